"""What only Xet brings: its own errors, chunks that are sent once, a kill in the middle of them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ckpt.core.errors import (
    AuthorizationError,
    ObjectNotFoundError,
    StorageError,
    StorageFullError,
    ThrottledError,
    TransientError,
)
from ray_ckpt.storage.backends import open_catalog
from tests.processes import run_python
from tests.servers.hub import HubDouble, Way
from tests.storage.copies.test_publish import PUBLISH, make_export, publish
from tests.waiting import wait_for

TO = "hf://ray/model"
TOKEN, XORBS, SHARDS = "GET .*/xet-write-token/", "POST /v1/xorbs/", "POST /v1/shards"
FILE_BYTES = 17_000_000
"""More than goes with a commit: a file of its own."""
NOWHERE = json.dumps({"casUrl": "http://127.0.0.1:9", "exp": 1 << 40, "accessToken": "x"}).encode()


@pytest.fixture
def way() -> Way:
    return "xet"


@pytest.fixture
def hub(hub: HubDouble) -> HubDouble:
    """With a repository."""
    hub.api().create_repo("ray/model")
    return hub


# ---- errors, as the real client words real answers ----


@pytest.mark.parametrize(
    ("match", "status", "kind"),
    [
        (TOKEN, 401, AuthorizationError),
        (TOKEN, 403, AuthorizationError),
        (TOKEN, 404, ObjectNotFoundError),
        (TOKEN, 429, ThrottledError),
        (TOKEN, 500, TransientError),
        (XORBS, 401, AuthorizationError),
        (XORBS, 403, AuthorizationError),
        (XORBS, 429, ThrottledError),
        (XORBS, 503, TransientError),
        (XORBS, 507, StorageFullError),
        (SHARDS, 400, StorageError),
        (SHARDS, 500, TransientError),
    ],
)
def test_what_the_xet_client_is_refused_with_has_its_class(
    root: str, hub: HubDouble, match: str, status: int, kind: type[StorageError]
) -> None:
    make_export(open_catalog(root))
    hub.fail(match=match, status=status, times=50)
    said = publish(root, hub, TO)
    assert said.startswith(f"failed {kind.__name__} the Hub cannot be used: ")
    assert "nothing became visible there" in said
    assert hub.api().list_repo_files("ray/model") == [".gitattributes"]
    hub.recover()
    assert publish(root, hub, TO).startswith("done")


def test_a_hub_without_xet_is_told_of_with_the_way_out(root: str, hub: HubDouble) -> None:
    make_export(open_catalog(root))
    hub.fail(match=TOKEN, status=404, times=50)
    assert "export HF_HUB_DISABLE_XET=1" in publish(root, hub, TO)
    said = publish(root, hub, TO, settings={"HF_HUB_DISABLE_XET": "1"})
    assert said.startswith("done")


def test_a_xet_server_that_is_away_is_worth_another_try(root: str, hub: HubDouble) -> None:
    make_export(open_catalog(root))
    hub.fail(match=TOKEN, status=200, body=NOWHERE)
    assert publish(root, hub, TO).startswith("failed TransientError")
    assert publish(root, hub, TO).startswith("done")


FETCH = """
import sys
from pathlib import Path
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.storage.copies.fetch import fetch
try:
    fetch(sys.argv[1], Path(sys.argv[2]))
    print("done")
except RayCkptError as error:
    print("failed", type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("match", "status", "kind"),
    [
        ("xet-read-token", 401, AuthorizationError),
        ("xet-read-token", 403, AuthorizationError),
        ("/v1/reconstructions/", 401, AuthorizationError),
        ("/v1/reconstructions/", 404, ObjectNotFoundError),
        ("/v1/reconstructions/", 500, TransientError),
        ("/xorb-bytes/", 403, AuthorizationError),
        ("/xorb-bytes/", 500, TransientError),
    ],
)
def test_what_cannot_be_fetched_from_xet_has_its_class(
    root: str, hub: HubDouble, tmp_path: Path, match: str, status: int, kind: type[StorageError]
) -> None:
    make_export(open_catalog(root))
    publish(root, hub, TO)

    def fetch() -> str:
        target = str(tmp_path / "mine")
        return run_python("-c", FETCH, TO, target, environment=hub.environment()).stdout

    hub.fail(match=match, status=status, times=50)
    assert fetch().startswith(f"failed {kind.__name__} ")
    assert not (tmp_path / "mine").exists()
    hub.recover()
    assert fetch() == "done\n"


# ---- chunks ----


def test_of_a_step_that_resembles_the_one_before_only_what_differs_is_sent(
    root: str, hub: HubDouble
) -> None:
    same, old, new = (os.urandom(size) for size in (4_000_000, 200_000, 200_000))
    make_export(open_catalog(root), 5, same + old)
    make_export(open_catalog(root), 7, same + new)
    publish(root, hub, TO)
    first_bytes = hub.xet.received_bytes
    assert first_bytes > 4_200_000
    assert publish(root, hub, TO, step=7).startswith("done")
    assert 200_000 < hub.xet.received_bytes - first_bytes < 600_000
    assert hub.xet.stored_bytes == hub.xet.received_bytes


def test_a_kill_in_the_middle_shows_nothing_and_no_chunk_is_sent_twice(
    root: str, hub: HubDouble, tmp_path: Path
) -> None:
    """Scenario 40: SIGKILL while large files are sent by Xet; the next attempt sends the rest."""
    files = [os.urandom(FILE_BYTES) for _ in range(3)]
    export = make_export(open_catalog(root), 5, *files)
    hub.meanwhile(match=SHARDS, do=lambda: hub.hang(match=XORBS))
    arguments = [sys.executable, "-c", PUBLISH, root, TO, "5"]
    process = subprocess.Popen(arguments, env={**os.environ, **hub.environment()})
    wait_for(lambda: hub.num_silent)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = hub.xet.stored_bytes
    assert FILE_BYTES <= before < 3 * FILE_BYTES
    assert hub.api().list_repo_files("ray/model") == [".gitattributes"]
    assert hub.api().list_repo_refs("ray/model").tags == []
    hub.recover()
    assert publish(root, hub, TO) == f"done hf://ray/model@step-5 {export.manifest.total_bytes}"
    assert hub.xet.received_bytes == hub.xet.stored_bytes < 1.01 * 3 * FILE_BYTES
    folder = Path(
        hub.api().snapshot_download("ray/model", revision="step-5", cache_dir=tmp_path / "cache")
    )
    for entry in export.manifest.files:
        made = Path(root, "exports/hf/step-5", entry.path)
        assert (folder / entry.path).read_bytes() == made.read_bytes()
