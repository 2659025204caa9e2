"""A folder on a disk as a store, and files on this host."""
