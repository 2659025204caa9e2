"""Ray: the manager actor, the tasks it drives, and what Ray Train's workers report to it."""
