"""Jobs: one `ray job submit -- python -m jobs.<verb>` each. Straight lines on top of ray_ckpt."""
