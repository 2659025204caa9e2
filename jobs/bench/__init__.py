"""Measurements of ray_ckpt on the machine they run on: `python -m jobs.bench --help`."""
