"""Implementations of the same three functions: `reference` (plain torch, the oracle) and `native` (C++)."""
