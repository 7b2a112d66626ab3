"""Engines that load packed checkpoints."""
