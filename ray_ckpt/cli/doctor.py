"""The verb that finds what will hurt before it does."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click

from ray_ckpt.cli.output import emit, json_option, print_table, root_argument, say
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.findings import Finding, Level, has_problem
from ray_ckpt.core.observation import Observation
from ray_ckpt.core.policy import LifecyclePolicy, policy_of_toml
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.checkup import look_at_destination, look_at_root
from ray_ckpt.storage.disk.config_file import config_text

_COLUMNS = ("level", "where", "what", "do")


@click.command()
@root_argument
@click.option(
    "--to", "destinations", multiple=True,
    help="Look at this place for copies as well: /path, s3://bucket/prefix, hf://org/repo.",
)  # fmt: skip
@click.option(
    "--policy", "policy_file", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Look at the places this TOML publishes to instead of those of the run's policy.",
)  # fmt: skip
@json_option
def doctor(
    root: str, destinations: tuple[str, ...], policy_file: Path | None, as_json: bool
) -> None:
    """Look for what will hurt a run on ROOT: rights, room, clocks, tokens, rules of buckets.

    Looks at the root and at every place that copies go to, as this host and these keys see them; a
    few small objects are written below .ray_ckpt/ and removed. Exit 1 if something is a problem.

    Example: ray-ckpt doctor s3://bucket/run --to hf://org/model
    """
    catalog = open_catalog(root)
    observed = _observed(catalog)
    policy = observed.policy if observed else LifecyclePolicy()
    if policy_file is not None:
        policy = policy_of_toml(config_text(policy_file), where=str(policy_file))
    found = look_at_root(catalog)
    for place in dict.fromkeys([*destinations, *(publish.to for publish in policy.publish)]):
        found += look_at_destination(place, copy_bytes=_largest_copy(observed))
    document = [{**asdict(finding), "level": str(finding.level)} for finding in found]
    emit(document, as_json=as_json, render=lambda: _print(found))
    if has_problem(found):
        raise click.exceptions.Exit(1)


def _observed(catalog: Catalog) -> Observation | None:
    """What is there; None where nobody can look, which is a finding of its own."""
    try:
        return catalog.observe()
    except RayCkptError:
        return None


def _largest_copy(observed: Observation | None) -> int:
    sizes = [export.manifest.total_bytes for export in observed.exports] if observed else []
    return max(sizes, default=0)


def _print(found: Sequence[Finding]) -> None:
    print_table(_COLUMNS, [(str(f.level), f.where, f.what, f.do or "-") for f in found])
    problems = sum(finding.level is Level.PROBLEM for finding in found)
    warnings = sum(finding.level is Level.WARNING for finding in found)
    say(f"{problems} problems, {warnings} warnings")
