"""Checkpoint in, pruned decoder blocks out: read, calibrate, score, mask, refine, one block at a time."""
