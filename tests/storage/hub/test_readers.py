"""Whoever reads a branch or a tag while steps are published sees one whole step, at any moment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_ckpt.core.observation import ExportView
from ray_ckpt.storage.backends import open_catalog
from tests.processes import run_python
from tests.servers.hub import HubDouble, Way
from tests.storage.copies.test_promote import PROMOTE
from tests.storage.copies.test_publish import make_export, publish
from tests.waiting import PATIENCE_S, wait_for

TO = "hf://ray/model"
READER = """
import hashlib, json, sys, time
from pathlib import Path
from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError
reference, stop, begun = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
api, seen, wrong = HfApi(), {}, []

def look():
    '''The step that is there, or what is not as it should be; proven as a stranger would.'''
    info = api.repo_info("ray/model", revision=reference, files_metadata=True)
    files = {f.rfilename: f for f in info.siblings if f.rfilename != ".gitattributes"}
    if not files:
        return "nothing"
    if "ray_ckpt.manifest.json" not in files:
        return f"wrong: no manifest beside {sorted(files)}"
    cached = api.hf_hub_download("ray/model", "ray_ckpt.manifest.json", revision=info.sha)
    manifest = json.loads(Path(cached).read_text())
    listed = {entry["path"]: entry for entry in manifest["files"]}
    if set(listed) | {"ray_ckpt.manifest.json"} != set(files):
        return f"wrong: {sorted(files)} where {sorted(listed)} are listed"
    for path, entry in listed.items():
        if files[path].lfs is None:
            content = Path(api.hf_hub_download("ray/model", path, revision=info.sha)).read_bytes()
            found = hashlib.sha256(content).hexdigest()
        else:
            found = files[path].lfs.sha256
        if "sha256:" + found != entry["digest"]:
            return f"wrong: {path} is of another step"
    return f"step-{manifest['step']}"

while not stop.exists():
    try:
        told = look()
    except RevisionNotFoundError:
        told = "no such tag"
    seen[told] = seen.get(told, 0) + 1
    begun.touch()
    time.sleep(0.01)
print(json.dumps(seen))
"""


@pytest.fixture(params=["lfs", "xet"])
def way(request: pytest.FixtureRequest) -> Way:
    return request.param


@pytest.fixture
def exports(root: str) -> list[ExportView]:
    """Each with another number of files, so that files of one are none of the next."""
    catalog = open_catalog(root)
    contents = [[os.urandom(30_000) for _ in range(number)] for number in (3, 1, 2, 3)]
    return [make_export(catalog, step, *c) for step, c in zip((5, 6, 7, 8), contents, strict=True)]


class Reader:
    """A process that looks at one reference every 10 ms."""

    def __init__(self, hub: HubDouble, reference: str, folder: Path) -> None:
        self._stop, begun = folder / f"stop-{reference}", folder / f"begun-{reference}"
        own = {"HF_HOME": str(folder / f"home-{reference}"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER, reference, str(self._stop), str(begun)],
            env={**os.environ, **hub.environment(), **own},
            stdout=subprocess.PIPE,
            text=True,
        )
        wait_for(begun.exists)

    def end(self) -> dict[str, int]:
        """What it saw, and how often."""
        self._stop.touch()
        said, _ = self._process.communicate(timeout=PATIENCE_S)
        return json.loads(said)


def test_a_reader_sees_one_whole_step_or_the_one_before(
    root: str, hub: HubDouble, exports: list[ExportView], tmp_path: Path
) -> None:
    hub.api().create_repo("ray/model")
    readers = {name: Reader(hub, name, tmp_path) for name in ("main", "latest")}
    for export in exports:
        assert publish(root, hub, TO, step=export.step).startswith("done")
        content_id = export.manifest.content_id
        arguments = ("-c", PROMOTE, TO, str(export.step), content_id, "latest")
        said = run_python(*arguments, environment=hub.environment()).stdout
        assert said == f"done {TO}@latest\n"
    seen = {name: reader.end() for name, reader in readers.items()}
    steps = {"step-5", "step-6", "step-7", "step-8"}
    assert set(seen["main"]) == {"nothing", *steps}
    assert set(seen["latest"]) == {"no such tag", *steps}
    assert sum(seen["main"].values()) > 50
