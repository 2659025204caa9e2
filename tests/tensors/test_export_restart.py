"""A killed export goes on from its finished shards; two at once end as one; forms do not meet."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConflictError, TransientError, UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.garbage import ABANDONED_AFTER_S
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.digests import describe_object
from ray_ckpt.storage.garbage import find_garbage, remove_garbage
from ray_ckpt.storage.progress import Progress
from ray_ckpt.tensors.export import alone, export_step
from ray_ckpt.tensors.exporting import Export, begin_export
from ray_ckpt.tensors.output_shards import OutputShard
from tests.roots import make_root

STEP = 10
HF = ExportSpec(name="hf", dtype="bfloat16", max_shard_bytes=16_000)


@pytest.fixture(params=["root", "s3_root"])
def catalog(request: pytest.FixtureRequest) -> Catalog:
    """A root in a folder or in a bucket, with one step."""
    where = request.getfixturevalue(request.param)
    make_root(where, [STEP])
    return open_catalog(where)


class Dying(Progress):
    """Ends its process by SIGKILL once so many bytes were written, wherever that is."""

    def __init__(self, after_bytes: int) -> None:
        super().__init__()
        self._left = after_bytes

    def advance(self, num_bytes: int) -> None:
        self._left -= num_bytes
        if self._left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Counting(Progress):
    """Remembers what was announced, by what it was for."""

    def __init__(self) -> None:
        super().__init__()
        self.announced: dict[str, int | None] = {}

    def begin(self, doing: str, total_bytes: int | None = None) -> None:
        self.announced[doing] = total_bytes


def _export(catalog: Catalog, spec: ExportSpec = HF, progress: Progress | None = None) -> Manifest:
    return export_step(catalog, catalog.manifest(STEP), spec, progress=progress or Progress())


def _plan(catalog: Catalog) -> Export:
    return begin_export(catalog, catalog.manifest(STEP), HF)


def _export_and_die(uri: str, after_bytes: int) -> None:
    _export(open_catalog(uri), progress=Dying(after_bytes))


def _kill_after(catalog: Catalog, num_bytes: int) -> None:
    spawn = multiprocessing.get_context("fork")
    process = spawn.Process(target=_export_and_die, args=(catalog.uri, num_bytes))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def _digests(manifest: Manifest) -> dict[str, str]:
    return {entry.path: entry.digest for entry in manifest.files}


def _leftovers(store: Store) -> list[str]:
    private = [names.PARTS, names.STAGING]
    return [info.key for folder in private for info in store.list_objects(folder)]


def _expect_whole(catalog: Catalog, export: Manifest) -> None:
    """What the manifest says is what lies there, and nothing else does."""
    folder = names.export_dir(export.lineage.recipe["name"], STEP)
    keys = {info.key.removeprefix(f"{folder}/") for info in catalog.store.list_objects(folder)}
    assert keys == {*_digests(export), names.MANIFEST}
    for entry in export.files:
        found = describe_object(
            catalog.store, f"{folder}/{entry.path}", name=entry.path, algorithm="sha256"
        )
        assert found == entry
    assert _leftovers(catalog.store) == []


def _shards(catalog: Catalog) -> tuple[OutputShard, ...]:
    shards = _plan(catalog).plan.shards
    assert len(shards) >= 4
    return shards


@pytest.mark.parametrize("finished", [0, 1, 3])
def test_a_killed_export_goes_on_from_its_finished_shards(catalog: Catalog, finished: int) -> None:
    """Scenario 45."""
    shards = _shards(catalog)
    _kill_after(catalog, sum(shard.size_bytes for shard in shards[:finished]) + 1)
    assert catalog.observe().exports == ()
    counting = Counting()
    export = _export(catalog, progress=counting)
    left = sum(shard.size_bytes for shard in shards[finished:])
    assert counting.announced["exports hf"] == left
    _expect_whole(catalog, export)
    undisturbed = _export(catalog, replace(HF, name="undisturbed"))
    assert _digests(export).items() >= {
        (path, digest)
        for path, digest in _digests(undisturbed).items()
        if path.endswith(".safetensors")
    }


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(bytes(data))
    os.utime(path, ns=times)  # as a disk does that loses a bit


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("harm", [_flip, _truncate, Path.unlink], ids=["flip", "cut", "remove"])
def test_a_finished_shard_that_changed_is_made_again(
    root: str, harm: Callable[[Path], None]
) -> None:
    make_root(root, [STEP])
    catalog = open_catalog(root)
    shards = _shards(catalog)
    _kill_after(catalog, sum(shard.size_bytes for shard in shards[:2]) + 1)
    (second,) = Path(root, names.STAGING).rglob(f"*-{shards[1].file}")
    harm(second)
    counting = Counting()
    export = _export(catalog, progress=counting)
    left = sum(shard.size_bytes for shard in shards if shard.file != shards[0].file)
    assert counting.announced["exports hf"] == left
    _expect_whole(catalog, export)


def test_two_at_once_end_as_one_export(catalog: Catalog) -> None:
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(_export, open_catalog(catalog.uri)) for _ in range(2)]
        first, second = (run.result() for run in runs)
    assert first == second
    _expect_whole(catalog, first)


def test_forms_of_one_step_that_are_made_at_once_do_not_meet(catalog: Catalog) -> None:
    """Scenario 48, while both are under way."""
    full = replace(HF, name="hf-fp32", dtype="float32")
    both = begin_export(catalog, catalog.manifest(STEP), full), _plan(catalog)
    for export in both:
        alone(export, export.plan.shards, Progress())
    for export in both:
        made = export.finish()
        assert made.lineage.recipe["dtype"] == export.spec.dtype
        folder = names.export_dir(export.spec.name, STEP)
        for entry in made.files:
            key = f"{folder}/{entry.path}"
            assert describe_object(catalog.store, key, name=entry.path, algorithm="sha256") == entry
    assert _leftovers(catalog.store) == []


def test_an_export_without_one_of_its_shards_is_never_seen(catalog: Catalog) -> None:
    export = _plan(catalog)
    alone(export, export.plan.shards[1:], Progress())
    with pytest.raises(ConflictError, match="model-00001"):
        export.finish()
    assert catalog.observe().exports == ()


def test_a_fault_that_may_pass_keeps_what_is_finished_another_drops_it(catalog: Catalog) -> None:
    source = catalog.manifest(STEP)

    def fail(error: Exception) -> Callable[..., None]:
        def crew(export: Export, shards: object, progress: Progress) -> None:
            alone(export, export.plan.shards[:1], progress)
            raise error

        return crew

    with pytest.raises(TransientError):
        export_step(catalog, source, HF, crew=fail(TransientError("the mount was gone", "here")))
    assert list(_plan(catalog).parts.finished()) == [_shards(catalog)[0].file]
    with pytest.raises(UsageError):
        export_step(catalog, source, HF, crew=fail(UsageError("nobody can do that", "here")))
    assert _plan(catalog).parts.finished() == {}


def test_gc_removes_what_nobody_went_on_with(catalog: Catalog) -> None:
    _kill_after(catalog, _shards(catalog)[0].size_bytes + 1)
    assert _leftovers(catalog.store)
    soon = find_garbage(catalog, catalog.observe(), now=time.time() + 60)
    assert not [found for found in soon if "export" in found.what]
    late = find_garbage(catalog, catalog.observe(), now=time.time() + 2 * ABANDONED_AFTER_S)
    assert remove_garbage(late, guard=lambda: None) == []
    assert _leftovers(catalog.store) == []
    _expect_whole(catalog, _export(catalog))
