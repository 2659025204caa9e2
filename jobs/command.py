"""The edge that all jobs share: arguments in, configuration out, an exit code for scripts."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ray_ckpt.core.config import load_toml
from ray_ckpt.core.errors import ConfigError, RayCkptError

Config = TypeVar("Config")


def parse(config_type: type[Config], doc: str | None) -> Config:
    """The configuration that `--config FILE` and `field=value` words describe."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="on top of it")
    arguments = parser.parse_args()
    text, where = "", "command line"
    if arguments.config is not None:
        where = str(arguments.config)
        try:
            text = arguments.config.read_text()
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", where) from error
    return load_toml(config_type, text, where=where, overrides=arguments.overrides)


def run_job(main: Callable[[], None]) -> None:
    """Runs the job; one of our errors is told in full and becomes its exit code."""
    try:
        main()
    except RayCkptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
