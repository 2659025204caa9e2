"""`ray-ckpt doctor` finds what will hurt a run before it does."""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.findings import Finding, Level
from ray_ckpt.core.garbage import ABANDONED_AFTER_S
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.lease import MANAGER, Lease
from ray_ckpt.storage.s3.checkup import look_at_bucket
from ray_ckpt.storage.s3.store import S3Store
from tests.cli.conftest import Answer
from tests.disks import fill, small_file_system
from tests.processes import run_python
from tests.servers.hub import HubDouble
from tests.servers.lesser_s3 import Lack, LesserS3
from tests.servers.seaweed import S3Endpoint, client_of
from tests.storage.copies.test_publish import make_export
from tests.storage.steps import save_step

Cli = Callable[..., Answer]
Row = Mapping[str, str]
ABORTS = {"AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 7}}


def look(cli: Cli, *arguments: object, code: int = 0) -> list[Row]:
    answer = cli("doctor", *arguments, "--json")
    assert answer.code == code, answer.out + answer.err
    return answer.json


def not_ok(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["level"] != "ok"]


def only(rows: list[Row], level: str) -> Row:
    """The one finding that is not well; it says what to do."""
    (row,) = not_ok(rows)
    assert row["level"] == level
    assert row["do"]
    return row


@pytest.fixture
def step(root: str) -> str:
    """A root with a committed and verified step."""
    save_step(open_catalog(root), 5)
    return root


# ---- on a disk ----


def test_a_healthy_root_has_nothing_but_good_news(cli: Cli, root: str, tmp_path: Path) -> None:
    Path(root).mkdir()
    assert not_ok(look(cli, root, "--to", tmp_path)) == []
    assert list(Path(root).iterdir()) == []


def test_a_person_gets_lines_and_a_sum(cli: Cli, root: str) -> None:
    Path(root).mkdir()
    answer = cli("doctor", root)
    first = answer.out.splitlines()[0].split("\t")
    assert first == ["ok", root, "can be read, written and deleted from", "-"]
    assert answer.err == "0 problems, 0 warnings\n"


def test_a_root_that_is_not_there_is_made_by_the_first_save(cli: Cli, root: str) -> None:
    assert not_ok(look(cli, root)) == []
    assert not Path(root).exists()


def test_a_root_that_cannot_be_made_is_a_problem(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    rows = look(cli, tmp_path / "file" / "run", code=1)
    assert "may not make it" in rows[0]["what"]


def test_a_place_without_room_for_two_copies_is_a_problem(
    cli: Cli, root: str, tmp_path: Path
) -> None:
    make_export(open_catalog(root))
    with small_file_system(tmp_path / "disk", size="1m") as disk:
        assert not_ok(look(cli, root, "--to", disk)) == []
        fill(disk, but_bytes=300_000)
        rows = look(cli, root, "--to", disk, code=1)
    assert only(rows, "problem")["what"].startswith("no room for two copies")


def test_requests_that_nobody_takes_care_of_are_a_problem(cli: Cli, step: str) -> None:
    row = only(look(cli, step, code=1), "problem")
    assert row["what"] == "1 actions wait, first: verify step-5, and no manager is alive"
    assert row["do"].endswith(f"ray-ckpt drain {step}")


def test_a_living_manager_is_told_of(cli: Cli, step: str) -> None:
    lease = Lease(open_catalog(step).store, MANAGER, owner="test")
    lease.acquire()
    rows = look(cli, step)
    lease.release()
    assert not_ok(rows) == []
    assert "was heard of 0 s ago" in rows[-1]["what"]


def test_a_manager_on_another_host_that_has_gone_silent_is_a_problem(cli: Cli, step: str) -> None:

    lease = Lease(open_catalog(step).store, MANAGER, owner="test")
    lease.acquire()
    lease.release()
    path = Path(step, names.lease_key(MANAGER, 1))
    holder = {**json.loads(path.read_text()), "host": "gone", "is_released": False}
    path.write_text(json.dumps(holder))
    os.utime(path, (time.time() - 7200, time.time() - 7200))
    row = only(look(cli, step, code=1), "problem")
    assert "on gone, was last heard of 2.0 h ago" in row["what"]


@pytest.mark.parametrize("place", [".", ".."])
def test_torchtitan_that_purges_here_is_a_problem(cli: Cli, root: str, place: str) -> None:
    Path(root).mkdir()
    config = Path(root, place, "llama3.toml")
    config.write_text('[checkpoint]\nenable = true\nfolder = "run"\nkeep_latest_k = 5\n')
    row = only(look(cli, root, code=1), "problem")
    assert row["what"].startswith("TorchTitan keeps the last 5 steps")
    assert Path(row["where"]).resolve() == config.resolve()
    for harmless in (
        '[checkpoint]\nenable = true\nfolder = "run"\nkeep_latest_k = 0\n',
        '[checkpoint]\nenable = true\nfolder = "elsewhere"\nkeep_latest_k = 5\n',
        "[checkpoint]\nenable = false\n",
        "[model]\n",
        "no toml",
    ):
        config.write_text(harmless)
        assert not_ok(look(cli, root)) == []


@pytest.mark.parametrize(
    ("place", "listed"), [(".", "step-5"), ("..", "run/step-5"), ("..", "run")]
)
def test_ray_train_that_counts_our_steps_is_a_problem(
    cli: Cli, root: str, place: str, listed: str
) -> None:
    Path(root).mkdir()
    write_ray_trains_list(Path(root, place), listed, "checkpoint_2026-11-27_09-00-00.000000")
    row = only(look(cli, root, code=1), "problem")
    assert (
        f"Ray Train lists 1 folders of this run among its own checkpoints, first: {listed}"
        in (row["what"])
    )


def test_ray_train_that_keeps_to_its_own_folders_is_none(cli: Cli, root: str) -> None:
    Path(root).mkdir()
    write_ray_trains_list(Path(root), "checkpoint_2026-11-27_09-00-00.000000")
    assert not_ok(look(cli, root)) == []


def write_ray_trains_list(folder: Path, *listed: str) -> None:
    """As Ray Train itself writes it."""
    from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    results = [_TrainingResultState(checkpoint_dir_name=name, metrics={}) for name in listed]
    state = _CheckpointManagerState(
        checkpoint_results=results,
        checkpoint_report_indices=list(range(len(listed))),
        latest_checkpoint_result=results[-1],
        pending_training_results=[],
        pending_validation_specs=[],
        current_report_index=len(listed),
        validated_checkpoint_dir_names=[],
        timed_out_validation_checkpoint_dir_names=[],
        failed_validation_checkpoint_dir_names=[],
    )
    (folder / CHECKPOINT_MANAGER_SNAPSHOT_FILENAME).write_text(state.model_dump_json())


# ---- on S3 ----


@pytest.fixture
def s3(s3_server: S3Endpoint) -> Iterator[Any]:
    client = client_of(s3_server)
    yield client
    client.close()


def put_rules(s3: Any, root: str, *rules: dict[str, Any]) -> None:
    bucket = S3Store(root).bucket
    s3.put_bucket_lifecycle_configuration(
        Bucket=bucket,
        LifecycleConfiguration={
            "Rules": [
                {"ID": f"rule-{n}", "Status": "Enabled", "Filter": {"Prefix": ""}, **rule}
                for n, rule in enumerate(rules)
            ]
        },
    )


@pytest.mark.s3
def test_a_healthy_bucket_has_nothing_but_good_news(cli: Cli, s3_root: str, s3: Any) -> None:
    put_rules(s3, s3_root, ABORTS)
    rows = look(cli, s3_root)
    assert not_ok(rows) == []
    assert any(row["what"] == "the store does all that is relied on" for row in rows)
    left = {info.key for info in S3Store(s3_root).list_objects("")}
    assert {key.rpartition("-")[0] for key in left} == {f"{names.PRIVATE}/store"}


@pytest.mark.s3
def test_a_bucket_without_a_rule_for_unfinished_uploads_is_a_warning(
    cli: Cli, s3_root: str
) -> None:
    assert "AbortIncompleteMultipartUpload" in only(look(cli, s3_root), "warning")["do"]


@pytest.mark.s3
def test_a_rule_that_deletes_what_is_ours_is_a_problem(cli: Cli, s3_root: str, s3: Any) -> None:
    mine = {"Filter": {"Prefix": "run/step-"}, "Expiration": {"Days": 30}}
    others = {"Filter": {"Prefix": "tmp/"}, "Expiration": {"Days": 1}}
    put_rules(s3, s3_root, ABORTS, mine, others)
    row = only(look(cli, s3_root, code=1), "problem")
    assert row["what"].startswith("the bucket's rule rule-1 deletes what is 30 days old")


@pytest.mark.s3
def test_a_bucket_that_keeps_every_version_is_a_warning(cli: Cli, s3_root: str, s3: Any) -> None:
    put_rules(s3, s3_root, ABORTS)
    enabled = {"Status": "Enabled"}
    s3.put_bucket_versioning(Bucket=S3Store(s3_root).bucket, VersioningConfiguration=enabled)
    row = only(look(cli, s3_root), "warning")
    assert "a purge frees nothing" in row["what"]


@pytest.mark.s3
def test_uploads_that_nobody_goes_on_with_are_a_warning(s3_root: str, s3: Any) -> None:
    put_rules(s3, s3_root, ABORTS)
    store = S3Store(s3_root)
    store.begin("step-5/a", 20 << 20).put(0, memoryview(bytes(6 << 20)), 6 << 20)
    assert of_level(look_at_bucket(store, now=time.time()), Level.WARNING) == []
    late = look_at_bucket(store, now=time.time() + 2 * ABANDONED_AFTER_S)
    (found,) = of_level(late, Level.WARNING)
    assert found.what.startswith(f"1 uploads were begun and never ended, {6 << 20} bytes")


def of_level(found: Iterator[Finding], level: Level) -> list[Finding]:
    return [finding for finding in found if finding.level is level]


@pytest.mark.s3
def test_keys_that_may_only_read_are_a_problem(
    cli: Cli, s3_root: str, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.read_only().environment().items():
        monkeypatch.setenv(name, value)
    row = only(look(cli, s3_root, code=1), "problem")
    assert row["what"].startswith("the store says no")
    assert "AWS_ACCESS_KEY_ID" in row["do"]


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_a_problem(cli: Cli, root: str, s3_root: str) -> None:
    Path(root).mkdir()
    row = only(look(cli, root, "--to", "s3://no-such-bucket/models", code=1), "problem")
    assert row["where"].startswith("s3://no-such-bucket/models")


@pytest.fixture
def lesser(
    s3_root: str, s3_server: S3Endpoint, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[LesserS3]:
    put_rules(s3, s3_root, ABORTS)
    with LesserS3(s3_server) as lesser:
        monkeypatch.setenv("AWS_ENDPOINT_URL", lesser.endpoint.url)
        yield lesser


@pytest.mark.s3
@pytest.mark.parametrize(("ahead_s", "level"), [(120, "warning"), (-3600, "problem")])
def test_clocks_that_differ_are_told_of(
    cli: Cli, s3_root: str, lesser: LesserS3, ahead_s: float, level: str
) -> None:
    lesser.clock_ahead_s = ahead_s
    row = only(look(cli, s3_root, code=int(level == "problem")), level)
    told = int(row["what"].removeprefix("its clock is ").split(" ")[0])
    assert abs(ahead_s) - 5 < told <= abs(ahead_s)
    assert ("ahead of" if ahead_s > 0 else "behind") in row["what"]


@pytest.mark.s3
def test_what_a_store_lacks_is_told_of_and_a_better_one_is_known_again(
    cli: Cli, s3_root: str, lesser: LesserS3
) -> None:
    lesser.lacks.add(Lack.CREATES)
    assert "If-None-Match is ignored" in only(look(cli, s3_root), "warning")["what"]
    lesser.lacks.clear()
    assert not_ok(look(cli, s3_root)) == []


@pytest.mark.s3
def test_rules_that_nobody_may_see_are_told_of(cli: Cli, s3_root: str, lesser: LesserS3) -> None:
    lesser.fail(match=r"GET .*\?lifecycle", status=403, code="AccessDenied")
    assert "s3:GetLifecycleConfiguration" in only(look(cli, s3_root), "warning")["do"]


# ---- on the Hub ----


def look_at_hub(root: str, hub: HubDouble, to: str = "hf://ray/model", **other: str) -> list[Row]:
    """As a process of its own: the Hub's client reads its environment once."""
    Path(root).mkdir(exist_ok=True)
    done = run_python(
        *("-m", "ray_ckpt", "doctor", root, "--to", to, "--json"),
        environment={**hub.environment(), **other},
        check=False,
    )
    rows = json.loads(done.stdout)
    assert done.returncode == int(any(row["level"] == "problem" for row in rows)), done.stderr
    return rows


@pytest.fixture
def repository(hub: HubDouble) -> HubDouble:
    hub.api().create_repo("ray/model")
    return hub


def test_a_token_that_may_write_is_good_news(root: str, repository: HubDouble) -> None:
    rows = look_at_hub(root, repository)
    assert not_ok(rows) == []
    assert rows[-1]["what"] == "this token may write there"


@pytest.mark.parametrize(
    ("to", "token", "told"),
    [
        ("hf://ray/model", "", "no token"),
        ("hf://ray/model", "hf_readonly", "the Hub answered 403"),
        ("hf://ray/none", "hf_test", "the Hub answered 404"),
        ("hf://ray/model@best", "hf_test", "there is no branch best"),
    ],
)
def test_what_would_stop_a_copy_to_the_hub_is_a_problem(
    root: str, repository: HubDouble, to: str, token: str, told: str
) -> None:
    row = only(look_at_hub(root, repository, to, HF_TOKEN=token), "problem")
    assert row["what"].startswith(told)
    assert row["where"] == to


@pytest.mark.parametrize(("days", "level"), [(2, "warning"), (90, "ok")])
def test_a_token_that_ends_soon_is_a_warning(
    root: str, repository: HubDouble, days: int, level: str
) -> None:
    ends_at = (datetime.now(UTC) + timedelta(days=days)).isoformat().replace("+00:00", "Z")
    answer = {"name": "ray", "auth": {"accessToken": {"role": "write", "expiresAt": ends_at}}}
    repository.fail(match="GET /api/whoami", status=200, body=json.dumps(answer).encode())
    last = look_at_hub(root, repository)[-1]
    assert last["level"] == level
    assert last["what"].startswith(f"the token ends on {ends_at[:10]}")


def test_the_places_of_a_policy_are_looked_at(cli: Cli, root: str, tmp_path: Path) -> None:
    Path(root).mkdir()
    policy = tmp_path / "policy.toml"
    place = tmp_path / "copies"
    policy.write_text(f'[[export]]\nname = "hf"\n[[publish]]\nexport = "hf"\nto = "{place}"\n')
    rows = look(cli, root, "--policy", policy)
    assert [row["what"] for row in rows if row["where"] == str(place)] == [
        "not there yet; the first to write makes it"
    ]
