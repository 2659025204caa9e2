"""Scenario 42: the manager looks at copies again by itself; what it finds is shown and acted on."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.core.actions import ActionRecord
from ray_ckpt.core.copy_policy import CopiedSteps, PublishPolicy
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.catalog import Catalog
from tests.roots import make_root

Cli = Callable[..., Any]
SHARD = "step-10/.metadata"
HOUR_S = 3600.0


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, cli: Cli, root: str, tmp_path: Path) -> Store:
    """Where a copy of step 10 was made long ago, at which the policy looks every hour."""
    is_s3 = request.param == "s3"
    to = request.getfixturevalue("s3_root") if is_s3 else str(tmp_path / "copies")
    copy = PublishPolicy(checkpoint=CopiedSteps(every_steps=10), to=to, look_every_s=HOUR_S)
    make_root(root, (10,), LifecyclePolicy(publish=(copy,)))
    assert cli("drain", root).code == 0
    let_time_pass(open_catalog(root))
    return open_catalog(to).store


def only(catalog: Catalog, kind: ActionKind) -> ActionRecord:
    (record,) = [r for r in catalog.records.actions().values() if r.action.kind is kind]
    return record


def let_time_pass(catalog: Catalog) -> None:
    """The copy was made, and looked at, two hours before."""
    for record in catalog.records.actions().values():
        result = dict(record.result)
        for moment in ("looked_at", "copied_at"):
            if moment in result:
                result[moment] -= 2 * HOUR_S
        past = replace(record, changed_at=record.changed_at - 2 * HOUR_S, result=result)
        catalog.records.write_action(past)


def events(cli: Cli, root: str) -> list[str]:
    told = [json.loads(line)["what"] for line in cli("events", root, "--json").out.splitlines()]
    return [what for what in told if what.startswith("copy.")]


def test_a_copy_that_nobody_touched_is_present_and_not_read(
    cli: Cli, root: str, place: Store
) -> None:
    assert cli("drain", root).code == 0
    look = only(open_catalog(root), ActionKind.LOOK)
    assert (look.result["state"], look.result["read_at"]) == ("present", None)
    assert cli("ls", root, "--json").json[0]["lost_copies"] == []
    assert events(cli, root) == []


def test_a_copy_that_was_written_anew_with_the_same_bytes_is_read_once(
    cli: Cli, root: str, place: Store
) -> None:
    place.write(SHARD, place.read(SHARD))
    catalog = open_catalog(root)
    cli("drain", root)
    first = only(catalog, ActionKind.LOOK).result
    assert first["state"] == "present"
    # S3 gives the same bytes the same ETag
    assert (first["read_at"] is None) is place.uri.startswith("s3://")
    let_time_pass(catalog)
    cli("drain", root)
    assert only(catalog, ActionKind.LOOK).result["read_at"] == first["read_at"]


def test_a_copy_that_is_gone_is_told_of_and_made_again(cli: Cli, root: str, place: Store) -> None:
    whole = place.read(SHARD)
    place.delete([info.key for info in place.list_objects("step-10")])
    assert cli("drain", root).code == 0
    assert place.read(SHARD) == whole
    assert open_catalog(place.uri).verify(10).step == 10
    assert events(cli, root) == ["copy.gone", "copy.whole"]
    row = cli("ls", root, "--json").json[0]
    assert (row["copies"], row["lost_copies"]) == ([f"{place.uri}/step-10"], [])


def test_a_copy_that_was_altered_is_shown_everywhere_and_never_written_over(
    cli: Cli, root: str, place: Store
) -> None:
    altered = bytes(len(place.read(SHARD)))
    place.write(SHARD, altered)
    cli("drain", root)
    assert place.read(SHARD) == altered
    location = f"{place.uri}/step-10"
    row = cli("ls", root, "--json").json[0]
    assert row["copies"] == []
    (lost,) = row["lost_copies"]
    assert (lost["location"], lost["state"]) == (location, "stale")
    assert lost["why"].startswith(".metadata is sha256:")
    assert f"{location} (stale)" in cli("ls", root).out
    shown = cli("show", root, 10).out
    assert f"{location}\tstale: .metadata is sha256:" in shown
    assert f"ray-ckpt copies {root}" in shown
    assert events(cli, root) == ["copy.stale"]
    planned = cli("plan", root, "--json").json["actions"]
    (publish,) = [a for a in planned if a["kind"] == "publish"]
    assert "look at it and remove it there, the next look finds it gone" in publish["not_now"]
    (copy,) = cli("copies", root, "--json").json
    assert copy["state"] == "stale"

    place.delete([info.key for info in place.list_objects("step-10")])
    let_time_pass(open_catalog(root))
    assert cli("drain", root).code == 0
    assert open_catalog(place.uri).verify(10).step == 10
    assert events(cli, root) == ["copy.stale", "copy.gone", "copy.whole"]


@pytest.mark.s3
@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_place_that_cannot_be_asked_leaves_what_was_known(
    cli: Cli, root: str, place: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.delete([SHARD])
    cli("drain", root)
    let_time_pass(open_catalog(root))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    cli("drain", root)
    look = only(open_catalog(root), ActionKind.LOOK)
    assert look.state == "retry_wait"
    assert cli("ls", root, "--json").json[0]["lost_copies"][0]["state"] == "stale"
