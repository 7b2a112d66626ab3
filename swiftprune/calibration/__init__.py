"""Text, and what the model makes of it, block by block."""
