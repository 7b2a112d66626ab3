"""Packing and products of 2:4 weights, by device and instruction set."""
