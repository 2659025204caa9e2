"""`python -m ray_ckpt` is `ray-ckpt`."""

from ray_ckpt.cli.main import main

if __name__ == "__main__":
    main()
