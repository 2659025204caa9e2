"""`ray-ckpt diff`: two checkpoints or exports, tensor by tensor."""

import math
from collections import Counter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import click

from ray_ckpt.cli.bar import byte_bar
from ray_ckpt.cli.output import Number, complete_folder, emit, json_option, print_table

if TYPE_CHECKING:
    from ray_ckpt.tensors.comparing import Compared, Comparison
    from ray_ckpt.tensors.recording import TensorSpec

_COLUMNS = ("tensor", "differs in", "largest", "at", "elements", "holds")


@click.command()
@click.argument("a", shell_complete=complete_folder)
@click.argument("b", shell_complete=complete_folder)
@click.option(
    "--only", multiple=True, metavar="PATTERN",
    help="Only names like this, as in 'layers.0.*'. Repeatable.",
)  # fmt: skip
@click.option(
    "--tolerance", type=Number(min=0), metavar="DIFFERENCE",
    help="Values so far apart count as equal, and so do other types.",
)  # fmt: skip
@json_option
def diff(a: str, b: str, only: tuple[str, ...], tolerance: float | None, as_json: bool) -> None:
    """Compare checkpoints or exports A and B tensor by tensor, the worst first.

    Each is a folder: ROOT/step-500, ROOT/exports/NAME/step-500, s3://..., hf://org/repo, also one
    that ray_ckpt did not write; no pickle of it is run. A step meets an export as an export of it
    would be. What two manifests say is the same is not read: ray-ckpt verify finds damage.

    Exit 1 if anything differs.

    Example: ray-ckpt diff /runs/a/step-500 /runs/a/exports/hf-bf16/step-500
    """
    from ray_ckpt.tensors.comparable import open_folder_to_compare
    from ray_ckpt.tensors.comparing import compare

    with byte_bar() as progress:
        compared = compare(
            open_folder_to_compare(a),
            open_folder_to_compare(b),
            tolerance=tolerance,
            chosen=lambda name: not only or any(fnmatchcase(name, pattern) for pattern in only),
            progress=progress,
        )
    emit(_document(compared), as_json=as_json, render=lambda: _print(compared))
    if not compared.are_equal:
        raise click.exceptions.Exit(1)


def _document(compared: "Comparison") -> dict[str, Any]:
    return {
        "a": compared.a,
        "b": compared.b,
        "equal": compared.are_equal,
        "note": compared.note,
        "totals": dict(Counter(str(result.verdict) for result in compared.results)),
        "tensors": [
            {
                "name": result.name,
                "verdict": str(result.verdict),
                "a": _spec(result.a),
                "b": _spec(result.b),
                "max_difference": _number(result),
                "at": result.at,
                "num_differing": result.num_differing,
                "was_read": result.was_read,
            }
            for result in compared.results
        ],
    }


def _spec(spec: "TensorSpec | None") -> dict[str, Any] | None:
    return None if spec is None else {"dtype": _dtype(spec), "shape": spec.shape}


def _number(result: "Compared") -> float | str:
    """JSON has no infinity; Python's and JavaScript's numbers are made of this word."""
    return "Infinity" if math.isinf(result.max_difference) else result.max_difference


def _print(compared: "Comparison") -> None:
    if compared.note:
        click.echo(compared.note, err=True)
    differing = [result for result in compared.results if result.verdict != "equal"]
    if differing:
        print_table(_COLUMNS, [_row(result) for result in differing])
    counts = Counter(str(result.verdict) for result in compared.results)
    unread = sum(not r.was_read and r.verdict == "equal" for r in compared.results)
    told = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    known = f"; of the equal ones {unread} are known by their manifests" if unread else ""
    click.echo(f"{len(compared.results)} compared: {told}{known}")


def _row(result: "Compared") -> tuple[str, ...]:
    largest = f"{result.max_difference:.3g}" if result.at is not None else "-"
    at = "-" if result.at is None else str(list(result.at))
    size = math.prod(result.a.shape) if result.a else 0
    share = f"{result.num_differing} of {size}" if result.num_differing else "-"
    verdict = str(result.verdict)
    return (result.name, verdict, largest, at, share, _held(result))


def _held(result: "Compared") -> str:
    """Type and shape: of both if they are the same, else a's and b's."""
    told = [f"{_dtype(spec)} {list(spec.shape)}" for spec in (result.a, result.b) if spec]
    return " | ".join(dict.fromkeys(told)) or "-"


def _dtype(spec: "TensorSpec") -> str:
    return str(spec.dtype).removeprefix("torch.")
