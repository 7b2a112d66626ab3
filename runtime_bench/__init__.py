"""Measurements: what pruning costs, what it does to quality, and the demo model they run on."""
