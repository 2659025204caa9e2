"""Bytes: where they lie, in which order they become visible, whether they are still the same."""
