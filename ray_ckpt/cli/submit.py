"""`ray-ckpt submit train.toml`: one of the jobs, on a cluster, through Ray's Jobs API."""

import contextlib
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ray_ckpt.cli.output import emit, json_option
from ray_ckpt.core.config import parse_toml
from ray_ckpt.core.errors import ConfigError, RayCkptError, UsageError
from ray_ckpt.core.names import run_name, step_dir
from ray_ckpt.storage.disk.config_file import config_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to run, and about which root."""

    module: str
    config: Path
    overrides: Sequence[str]
    root: str

    def entrypoint(self, config: Path) -> str:
        """The command, where the file lies at `config` in the job's folder."""
        return shlex.join(
            ["python", "-m", self.module, "--config", config.as_posix(), *self.overrides]
        )


@click.command()
@click.argument("config", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option(
    "--job", default="train", show_default=True, metavar="NAME",
    help="Which of jobs/: train, export, publish, purge, backfill, ...; or a module of yours: a.b.",
)  # fmt: skip
@click.option("--address", metavar="URL", help="The cluster's dashboard; without it RAY_ADDRESS.")
@click.option(
    "--working-dir", type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Sent along as the job's folder; without it the job runs what the cluster has installed.",
)  # fmt: skip
@click.option("--name", help="What the dashboard calls it; by default the job and the run.")
@click.option("--wait", is_flag=True, help="Follow its log to the end, and end as it does.")
@json_option
def submit(
    config: Path,
    overrides: tuple[str, ...],
    job: str,
    address: str | None,
    working_dir: Path | None,
    name: str | None,
    wait: bool,
    as_json: bool,
) -> None:
    """Submit a job with the file CONFIG and FIELD=VALUE on top; print how to see it.

    With --wait the exit code is the job's own.

    Example: ray-ckpt submit train.toml root=s3://bucket/run --wait
    """
    from ray_ckpt.cluster.jobs import follow, reach_jobs
    from ray_ckpt.cluster.submit import JobFacts, submit_job

    order = Order(
        module=_module(job, working_dir),
        config=config,
        overrides=overrides,
        root=_root(config, overrides),
    )
    title = name or f"{job.rpartition('.')[2]} {run_name(order.root)}"
    client = reach_jobs(address)
    about = JobFacts(name=title, root=order.root, newest=_newest(order.root))
    with _job_folder(order, working_dir) as (folder, file):
        environment = {"working_dir": str(folder)}
        number = submit_job(client, order.entrypoint(file), about=about, runtime_env=environment)
    document = {
        "job": number,
        "name": title,
        "root": order.root,
        "dashboard": f"{client.get_address()}/#/jobs/{number}",
        "watch": f"ray-ckpt watch {shlex.quote(order.root)}",
        "log": f"ray job logs --address {client.get_address()} --follow {number}",
    }
    emit(document, as_json=as_json, render=lambda: _print(document))
    if wait:
        with _told_how_to_go_on(document):
            sys.exit(follow(client, number, _write_to(sys.stderr if as_json else sys.stdout)))


def _print(document: dict[str, Any]) -> None:
    click.echo(f"submitted  {document['name']} as {document['job']}")
    for word in ("dashboard", "watch", "log"):
        click.echo(f"{word:<9}  {document[word]}")


def _write_to(stream: Any) -> Any:
    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    return write


@contextlib.contextmanager
def _told_how_to_go_on(document: dict[str, Any]) -> Generator[None]:
    """Whoever interrupts the waiting hears that the job goes on."""
    try:
        yield
    except KeyboardInterrupt:
        stop = f"ray job stop {document['job']}"
        click.echo(f"\nthe job goes on; its log: {document['log']}; its end: {stop}", err=True)
        raise


def _module(job: str, working_dir: Path | None) -> str:
    """What `python -m` runs."""
    if re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", job):
        return job
    folders = [working_dir / "jobs"] if working_dir is not None else []
    installed = find_spec("jobs")
    folders.extend(map(Path, installed.submodule_search_locations or ()) if installed else ())
    known = {path.stem: path for folder in folders for path in folder.glob("*.py")}
    if job not in known:
        runs = [n for n, path in known.items() if "run_job(main)" in path.read_text()]
        raise UsageError(
            f"there is no job {job!r}",
            "--job",
            "nothing was submitted",
            f"use one of: {', '.join(sorted(runs))}; or a module of yours, written package.module",
        )
    return f"jobs.{job}"


def _root(config: Path, overrides: Sequence[str]) -> str:
    """What the file and the words after it say; the last one counts. As its manager names it."""
    document = parse_toml(config_text(config), where=str(config))
    said = [word.removeprefix("root=") for word in overrides if word.startswith("root=")]
    root = said[-1].strip("'\"") if said else document.get("root")
    if not isinstance(root, str) or not root:
        raise ConfigError("'root' is missing", str(config), do="add root = ..., or write root=...")
    wrong = [word for word in overrides if "=" not in word]
    if wrong:
        raise ConfigError(f"{wrong[0]!r} is no override", do="write section.field=value")
    return root if "://" in root else str(Path(root).absolute())


def _newest(root: str) -> str | None:
    """Its newest checkpoint, where it can be seen from here."""
    from ray_ckpt.storage.backends import open_catalog
    from ray_ckpt.storage.listing import newest_step

    with contextlib.suppress(RayCkptError):
        step = newest_step(open_catalog(root).store)
        return None if step is None else step_dir(step)
    return None


@contextlib.contextmanager
def _job_folder(order: Order, working_dir: Path | None) -> Generator[tuple[Path, Path]]:
    """What is sent along, and where in it the config lies."""
    if working_dir is None:
        with tempfile.TemporaryDirectory(prefix="ray_ckpt-submit-") as folder:
            shutil.copy(order.config, folder)
            yield Path(folder), Path(order.config.name)
        return
    config, folder = order.config.resolve(), working_dir.resolve()
    if not config.is_relative_to(folder):
        raise UsageError(
            f"{order.config} is not in {working_dir}, so it would not be sent along",
            "--working-dir",
            "nothing was submitted",
            "put it there, or leave out --working-dir",
        )
    yield folder, config.relative_to(folder)
