"""Decisions: data in, data out. Touches no file, clock, environment, tensor or cluster."""
