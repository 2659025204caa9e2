"""Tensors: what a checkpoint contains, how it is written and read, and what it becomes."""
