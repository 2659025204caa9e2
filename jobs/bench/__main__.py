"""Measure what ray_ckpt does on this machine: a table, and with --json one last line of JSON.

python -m jobs.bench save         a training state is saved by some ranks: ours, DCP's, a raw write
python -m jobs.bench still        the same of a state most of which does not change: --still 0.9
python -m jobs.bench async        the same beside training: how long it stands still, until durable
python -m jobs.bench losing       the same beside training: how much later its steps are done
python -m jobs.bench load         and loaded again, from the page cache and from the disk
python -m jobs.bench restart      from the host's memory beside loads from the disk
python -m jobs.bench check        exit 1 if saves or loads have become slow beside DCP's own
python -m jobs.bench plan         plans the exports of two large models: names and shapes alone
python -m jobs.bench scale        plans and indexes saves of 8 to 1,024 ranks, which are simulated
python -m jobs.bench integrity    what digests, the look for NaN and verifying on load cost
python -m jobs.bench vote         what a save() that finds nothing due costs on two ranks
python -m jobs.bench manager      what a look at a root costs, by the number of its steps
python -m jobs.bench beside       what a training step takes while exports run beside it
python -m jobs.bench export       a step becomes a Hugging Face folder: ours, others, a bare copy
python -m jobs.bench crew         the same by one task of a cluster and by several together
python -m jobs.bench upload       a large file and small ones go to S3 and back: ours and others
python -m jobs.bench purge        a step is hidden, then removed; beside a plain removal
python -m jobs.bench last         a last save becomes one, written by the ranks that train

With --config FILE what is not typed comes from that TOML, under the same names: size-mb = 1500.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from jobs.bench.at import a_place
from jobs.bench.beside import measure_beside
from jobs.bench.check import Checked, check, too_slow
from jobs.bench.crew import measure_crews
from jobs.bench.export import measure_exports
from jobs.bench.hub import measure_hub
from jobs.bench.integrity import measure_integrity
from jobs.bench.last import measure_last_saves
from jobs.bench.losing import measure_losses
from jobs.bench.manager import measure_looks
from jobs.bench.models import KINDS
from jobs.bench.plan import measure_plans
from jobs.bench.purge import measure_purges
from jobs.bench.restart import measure_restarts
from jobs.bench.save import measure_async_saves, measure_loads, measure_saves
from jobs.bench.scale import measure_scale
from jobs.bench.still import measure_still_saves
from jobs.bench.upload import measure_uploads
from jobs.bench.vote import measure_votes
from jobs.command import run_job
from ray_ckpt.core.config import parse_toml
from ray_ckpt.storage.disk.config_file import config_text


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--config", type=Path, help="TOML of what follows, as in repeats = 9")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--layers", type=int, help="plan: fewer layers than the real models have")
    parser.add_argument("--nodes", type=int, default=8, help="plan: that make the export")
    parser.add_argument(
        "--size-mb", type=int, default=512, help="of weights, or of the state that is saved"
    )
    parser.add_argument(
        "--kind",
        choices=[*KINDS, "all"],
        default="plain",
        help="export: names stay (plain), q and k are permuted, LoRA is merged as well",
    )
    parser.add_argument(
        "--still", type=share, default=0.9, help="still: share of the state that does not change"
    )
    parser.add_argument("--repeats", type=int, default=5, help="how often all is measured in turn")
    parser.add_argument("--folder", type=Path, help="the disk to use, but for vote")
    parser.add_argument(
        "--tasks", type=numbers, default=[1, 2, 4], help="crew: that make an export, as in 1,2,4"
    )
    parser.add_argument(
        "--root",
        help="all of training states, upload, purge, manager: where to, a folder or s3://...",
    )
    parser.add_argument(
        "--steps", type=numbers, default=[10, 100, 1000], help="manager: as in 10,100,1000"
    )
    parser.add_argument(
        "--files", type=int, default=1000, help="upload: small ones; purge: of a step"
    )
    parser.add_argument(
        "--tensors", type=numbers, help="manager: listed in a manifest; scale: as in 100,873"
    )
    parser.add_argument("--ranks", type=numbers, default=[8, 64, 512], help="scale: as in 8,64")
    parser.add_argument("--peers", action="store_true", help="scale: DCP's planner as well")
    parser.add_argument("--actions", type=int, default=100, help="manager: done by one")
    parsed = parser.parse_args(arguments)
    if parsed.config is not None:
        typed = sys.argv[1:] if arguments is None else arguments
        parsed = parser.parse_args([*options_in(parsed.config), *typed])
    found = BENCHMARKS[parsed.what](parsed)
    rows = [asdict(row) for row in found]
    print_table(rows)
    if parsed.json:
        print(json.dumps({parsed.what: rows}))
    slow = too_slow([row for row in found if isinstance(row, Checked)])
    if slow:
        raise SystemExit("\n".join(["", *slow]))


def options_in(config: Path) -> list[str]:
    """What the file says, as it would be typed.

    Raises:
        ConfigError: it cannot be read, or is no TOML.
    """
    document = parse_toml(config_text(config), where=str(config))
    return [_option(name, value) for name, value in document.items() if value is not False]


def _option(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    return f"--{name}={','.join(map(str, value)) if isinstance(value, list) else value}"


def numbers(text: str) -> list[int]:
    """Each at least 1, from `1,2,4`."""
    found = [int(number) for number in text.split(",")]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: each must be at least 1")
    return found


def share(text: str) -> float:
    """At least 0 and less than 1."""
    found = float(text)
    if not 0 <= found < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at least 0 and less than 1")
    return found


def plan(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of the plans."""
    return measure_plans(parsed.layers, num_nodes=parsed.nodes)


def scale(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of saves by many ranks."""
    return measure_scale(parsed.ranks, parsed.tensors or [100, 873], with_peers=parsed.peers)


def save(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of saves that training waits for; what was written is removed."""
    return _at_a_place(measure_saves, parsed)


def still(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of saves of what stands still for the most part; what was written is removed."""
    return _in_a_folder(partial(measure_still_saves, still=parsed.still), parsed)


def save_async(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of saves beside training; what was written is removed."""
    return _at_a_place(measure_async_saves, parsed)


def losing(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of training with a save and without; what was written is removed."""
    return _at_a_place(measure_losses, parsed)


def load(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of loads; what was written is removed."""
    return _at_a_place(measure_loads, parsed)


def restart(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of loads by who starts again; what was written is removed."""
    return _at_a_place(measure_restarts, parsed)


def check_all(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of what must not become slow; what was written is removed."""
    return _at_a_place(check, parsed)


def integrity(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows about trust; what was written is removed."""
    return _in_a_folder(measure_integrity, parsed)


def beside(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of training with and without a neighbour; what was written is removed."""
    return _in_a_folder(measure_beside, parsed)


def export(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of exports; what was written is removed."""
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-", dir=parsed.folder) as folder:
        return measure_exports(
            Path(folder),
            list(KINDS) if parsed.kind == "all" else [parsed.kind],
            size_mb=parsed.size_mb,
            repeats=parsed.repeats,
        )


def crew(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of exports by several tasks; what was written is removed."""
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-", dir=parsed.folder) as folder:
        return measure_crews(
            Path(folder),
            parsed.tasks,
            size_mb=parsed.size_mb,
            repeats=parsed.repeats,
        )


def last(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of last saves; what was written is removed."""
    return _in_a_folder(measure_last_saves, parsed)


def _at_a_place(measure: Callable[..., Sequence[Any]], parsed: argparse.Namespace) -> Sequence[Any]:
    with a_place(parsed.root, parsed.folder) as at:
        return measure(at, size_mb=parsed.size_mb, repeats=parsed.repeats)


def _in_a_folder(
    measure: Callable[..., Sequence[Any]], parsed: argparse.Namespace
) -> Sequence[Any]:
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-", dir=parsed.folder) as folder:
        return measure(Path(folder), size_mb=parsed.size_mb, repeats=parsed.repeats)


def upload(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of what goes to the store or repository that `--root` names, and stays there."""
    measures = {"s3": measure_uploads, "hf": measure_hub}
    measure = measures.get((parsed.root or "").partition("://")[0])
    if measure is None:
        raise SystemExit("upload: say where to: --root s3://bucket/prefix, or hf://org/repo")
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-", dir=parsed.folder) as folder:
        return measure(
            Path(folder),
            parsed.root,
            size_mb=parsed.size_mb,
            num_small=parsed.files,
            repeats=parsed.repeats,
        )


def purge(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of steps taken away; nothing is left of them."""
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-", dir=parsed.folder) as folder:
        return measure_purges(
            parsed.root or folder,
            size_mb=parsed.size_mb,
            num_files=parsed.files,
            repeats=parsed.repeats,
        )


def vote(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows about a step without a save."""
    return measure_votes(parsed.repeats)


def manager(parsed: argparse.Namespace) -> Sequence[Any]:
    """Rows of the looks at roots of different sizes."""
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-bench-") as folder:
        return measure_looks(
            parsed.root or folder,
            parsed.steps,
            num_tensors=(parsed.tensors or [100])[0],
            num_actions=parsed.actions,
        )


BENCHMARKS: dict[str, Callable[[argparse.Namespace], Sequence[Any]]] = {
    "save": save,
    "still": still,
    "async": save_async,
    "losing": losing,
    "load": load,
    "restart": restart,
    "check": check_all,
    "plan": plan,
    "scale": scale,
    "integrity": integrity,
    "vote": vote,
    "manager": manager,
    "beside": beside,
    "export": export,
    "crew": crew,
    "last": last,
    "upload": upload,
    "purge": purge,
}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Columns are the rows' fields; units are in their names."""
    texts = [{key: _text(value) for key, value in row.items()} for row in rows]
    widths = {key: max(len(key), *(len(text[key]) for text in texts)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row, text in zip(rows, texts, strict=True):
        cells = (
            text[key].ljust(width) if isinstance(row[key], str) else text[key].rjust(width)
            for key, width in widths.items()
        )
        print("  ".join(cells).rstrip())


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    run_job(main)
