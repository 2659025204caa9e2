"""Copies of files in the memory of this host, for whoever starts again after a crash."""
