"""What takes an export or a checkpoint to another place, and what looks at it there."""
