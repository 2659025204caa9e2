"""The edge that all jobs share: arguments in, configuration out, an exit code for scripts."""

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from ray_ckpt.core.config import load_toml
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.storage.disk.config_file import config_text

Config = TypeVar("Config")


def parse(config_type: type[Config], doc: str | None) -> Config:
    """The configuration that `--config FILE` and `field=value` words describe."""
    parser = argparse.ArgumentParser(
        description=doc,
        epilog=_fields_of(config_type),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, help="TOML file")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="on top of it")
    arguments = parser.parse_args()
    text, where = "", "command line"
    if arguments.config is not None:
        where = str(arguments.config)
        text = config_text(arguments.config)
    return load_toml(config_type, text, where=where, overrides=arguments.overrides)


def _fields_of(config_type: type[Any]) -> str:
    """A line for each field: name, default, and what its docstring says."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config_type))).body
    assert isinstance(definition, ast.ClassDef)
    lines = ["fields:"]
    for field, then in pairwise([*definition.body, ast.Pass()]):
        if not isinstance(field, ast.AnnAssign):
            continue
        default = f" = {ast.unparse(field.value)}" if field.value else ""
        lines.append(f"  {ast.unparse(field.target)}: {ast.unparse(field.annotation)}{default}")
        if isinstance(then, ast.Expr) and isinstance(then.value, ast.Constant):
            lines.append(textwrap.indent(inspect.cleandoc(str(then.value.value)), " " * 6))
    return "\n".join(lines)


def run_job(main: Callable[[], None]) -> None:
    """Runs the job; one of our errors is told in full and becomes its exit code."""
    try:
        main()
    except RayCkptError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
