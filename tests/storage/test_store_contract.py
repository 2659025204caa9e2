"""What every backend must do; a new one is a line in `store`."""

import os
import pickle
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from aiobotocore.client import AioBaseClient
from botocore.exceptions import HTTPClientError

from ray_ckpt.core.errors import (
    AuthorizationError,
    IntegrityError,
    ObjectExistsError,
    ObjectNotFoundError,
    StorageError,
    TransientError,
    UsageError,
)
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.digests import describe_object
from ray_ckpt.storage.disk.ordered_write import OrderedWrite
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.fsspec_store import FsspecStore
from ray_ckpt.storage.s3.store import S3Store
from tests.servers.seaweed import S3Endpoint

LARGE_BYTES = 12 << 20


@pytest.fixture
def memory_root() -> str:
    """A place that shows objects once they are whole."""
    return f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def file_system_root(tmp_path: Path) -> str:
    """A place that fsspec reaches and that shows what is half written."""
    return f"local://{tmp_path}/run"


@pytest.fixture(
    params=[
        "root",
        "memory_root",
        "file_system_root",
        "bucket_root",
        *(pytest.param(name, marks=pytest.mark.s3) for name in ("s3_root", "lesser_root")),
    ]
)
def store(request: pytest.FixtureRequest) -> Store:
    return open_catalog(request.getfixturevalue(request.param)).store


@pytest.fixture(params=["root", pytest.param("s3_root", marks=pytest.mark.s3)])
def root_store(request: pytest.FixtureRequest) -> Store:
    """One that may be a run's root."""
    return open_catalog(request.getfixturevalue(request.param)).store


def keys_below(store: Store, folder: str) -> set[str]:
    return {info.key for info in store.list_objects(folder)}


def test_the_uri_has_no_slash_at_the_end(store: Store) -> None:
    assert open_catalog(f"{store.uri}/").store.uri == store.uri
    assert not store.uri.endswith("/")


def test_another_process_may_be_given_the_store(store: Store) -> None:
    store.write("a", b"x")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"x"


def test_what_was_written_is_read(store: Store) -> None:
    store.write("a/b", b"old")
    store.write("a/b", b"new and longer")
    assert store.read("a/b") == b"new and longer"


def test_any_range_is_read_into_place(store: Store) -> None:
    data = os.urandom(100_000)
    store.write("a/b", data)
    for offset, size in ((0, 100_000), (0, 1), (99_999, 1), (50_000, 12_345), (70_000, 0)):
        buffer = bytearray(size)
        store.read_into("a/b", offset, memoryview(buffer))
        assert buffer == data[offset : offset + size]
    assert store.reads_at_once >= 1


@pytest.mark.parametrize(("offset", "size"), [(0, 11), (5, 6), (10, 1), (20, 1)])
def test_a_range_beyond_the_end_is_damage(store: Store, offset: int, size: int) -> None:
    store.write("a/b", b"0123456789")
    with pytest.raises(IntegrityError):
        store.read_into("a/b", offset, memoryview(bytearray(size)))


def test_no_range_can_be_read_of_what_is_not_there(store: Store) -> None:
    with pytest.raises(ObjectNotFoundError):
        store.read_into("a/b", 0, memoryview(bytearray(1)))


@pytest.mark.parametrize("size_bytes", [1, 5_000, 16 << 20, (40 << 20) + 7])
def test_an_object_may_be_written_block_by_block(root_store: Store, size_bytes: int) -> None:
    data = os.urandom(1 << 20) * (size_bytes // (1 << 20) + 1)
    write = OrderedWrite(root_store.begin("a/b", size_bytes), name="b", algorithm="sha256")
    write.write(memoryview(data)[:size_bytes])
    assert root_store.stat("a/b") is None
    entry = write.close()
    assert root_store.read("a/b") == data[:size_bytes]
    assert entry == describe_object(root_store, "a/b", name="b", algorithm="sha256")
    assert root_store.list_unfinished("a") == []


def test_of_an_object_that_is_given_up_nothing_is_left(root_store: Store) -> None:
    write = OrderedWrite(root_store.begin("a/b", 40 << 20), name="b", algorithm="sha256")
    write.write(memoryview(bytes(40 << 20)))
    is_sent_at_the_end = isinstance(root_store, FsspecStore)  # until then it is on this host alone
    assert len(root_store.list_unfinished("a")) == (0 if is_sent_at_the_end else 1)
    write.discard()
    write.discard()
    assert root_store.stat("a/b") is None
    assert root_store.list_unfinished("a") == []


def test_an_empty_object_is_an_object(store: Store) -> None:
    store.write("empty", b"")
    assert store.read("empty") == b""
    info = store.stat("empty")
    assert info is not None
    assert info.size_bytes == 0


def test_stat_tells_size_and_time(store: Store) -> None:
    store.write("a/b", b"12345")
    info = store.stat("a/b")
    assert info is not None
    assert (info.key, info.size_bytes) == ("a/b", 5)
    assert info.modified_at > 1.7e9


def test_stat_of_nothing_and_of_a_folder_is_none(store: Store) -> None:
    store.write("a/b", b"12345")
    assert store.stat("a/c") is None
    assert store.stat("a") is None


def test_an_object_that_was_replaced_has_another_version(store: Store) -> None:
    store.write("a/b", b"first")
    [before] = store.list_objects("a")
    store.write("a/b", b"again")
    [after] = store.list_objects("a")
    assert before.size_bytes == after.size_bytes
    assert before.version != after.version
    assert list(store.list_objects("a")) == [after]


def test_a_listing_can_be_of_names_that_start_alike(store: Store) -> None:
    for key in ("step-1/a", "step-1/b/c", "step-20", "steps/a", "other/step-1/a"):
        store.write(key, b"")
    found = {info.key for info in store.list_objects("", prefix="step-")}
    assert found == {"step-1/a", "step-1/b/c", "step-20"}
    assert [i.key for i in store.list_objects("other", prefix="step-")] == ["other/step-1/a"]
    assert list(store.list_objects("other", prefix="steps")) == []


def test_a_mark_changes_with_an_object_and_with_a_folders_entries(root: str) -> None:
    store = LocalStore(root)
    assert store.mark("a") == store.mark("a/b") == ""
    store.write("a/b", b"first")
    marks = [store.mark("a"), store.mark("a/b")]
    assert marks == [store.mark("a"), store.mark("a/b")]
    store.write("a/b", b"again")
    assert store.mark("a/b") != marks[1]
    before = store.mark("a")
    store.write("a/c", b"")
    assert store.mark("a") != before


def test_an_object_store_has_no_marks() -> None:
    assert S3Store("s3://bucket/run").mark("step-5") is None


def test_a_name_leads_to_what_lies_beside_it_and_can_be_let_lead_elsewhere(store: Store) -> None:
    store.write("a/one/file", b"1")
    store.write("a/two/file", b"2")
    assert store.pointed("a/latest") is None
    for name in ("one", "two", "two", "one"):
        store.point("a/latest", name)
        assert store.pointed("a/latest") == name
    assert store.list_folders("a") == ["one", "two"]
    assert keys_below(store, "a") - {"a/latest"} == {"a/one/file", "a/two/file"}


@pytest.mark.parametrize("there", [b"two words", b"", b"x" * 1000])
def test_what_leads_nowhere_is_not_replaced(store: Store, there: bytes) -> None:
    store.write("a/latest", there)
    with pytest.raises(ObjectExistsError):
        store.point("a/latest", "one")
    assert store.read("a/latest") == there


def test_a_name_on_a_disk_is_a_link_that_every_program_follows(root: str) -> None:
    store = LocalStore(root)
    store.write("a/one/file", b"1")
    store.point("a/latest", "one")
    assert Path(root, "a/latest/file").read_bytes() == b"1"
    assert Path(root, "a/latest").readlink() == Path("one")
    Path(root, "a/folder").mkdir()
    with pytest.raises(ObjectExistsError):
        store.point("a/folder", "one")


def test_create_is_refused_the_second_time(store: Store) -> None:
    store.create("claim", b"first")
    with pytest.raises(ObjectExistsError) as caught:
        store.create("claim", b"second")
    assert store.read("claim") == b"first"
    assert caught.value.where == f"{store.uri}/claim"


def test_of_several_creates_at_once_exactly_one_succeeds(root_store: Store) -> None:
    root_store.write("other", b"")
    barrier, winners, losers = threading.Barrier(4), list[bytes](), list[bytes]()

    def claim(mine: bytes) -> None:
        barrier.wait()
        try:
            root_store.create("claim", mine)
            winners.append(mine)
        except ObjectExistsError:
            losers.append(mine)

    threads = [threading.Thread(target=claim, args=(bytes([n]) * 9,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(winners), len(losers)) == (1, 3)
    assert root_store.read("claim") == winners[0]


def test_a_stream_can_seek(store: Store) -> None:
    store.write("a", bytes(range(200)))
    with store.open_read("a") as stream:
        stream.seek(100)
        assert stream.read(3) == bytes([100, 101, 102])
        stream.seek(0)
        assert stream.read(2) == bytes([0, 1])
        stream.seek(-1, os.SEEK_END)
        assert stream.read() == bytes([199])


@pytest.mark.parametrize("verb", ["read", "open_read"])
def test_a_missing_object_is_not_found(store: Store, verb: str) -> None:
    with pytest.raises(ObjectNotFoundError) as caught:
        getattr(store, verb)("a/missing")
    assert caught.value.where == f"{store.uri}/a/missing"


def test_a_missing_object_cannot_be_downloaded(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ObjectNotFoundError):
        store.download("a/missing", tmp_path / "target")


def test_a_large_file_goes_up_and_comes_down(store: Store, tmp_path: Path) -> None:
    data = os.urandom(1 << 20) * (LARGE_BYTES >> 20)
    (tmp_path / "source").write_bytes(data)
    (tmp_path / "target").write_bytes(b"to be replaced")
    store.upload(tmp_path / "source", "deep/er/shard")
    info = store.stat("deep/er/shard")
    assert info is not None
    assert info.size_bytes == LARGE_BYTES
    store.download("deep/er/shard", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == data
    with store.open_read("deep/er/shard") as stream:
        stream.seek(LARGE_BYTES - 5)
        assert stream.read() == data[-5:]


def test_an_upload_replaces_what_was_there(store: Store, tmp_path: Path) -> None:
    store.write("a", b"old and longer")
    (tmp_path / "source").write_bytes(b"new")
    store.upload(tmp_path / "source", "a")
    assert store.read("a") == b"new"


def test_a_listing_has_every_object_at_any_depth(store: Store) -> None:
    for key in ("a/1", "a/b/2", "a/b/c/3", "ab/4", "5"):
        store.write(key, key.encode())
    assert keys_below(store, "a") == {"a/1", "a/b/2", "a/b/c/3"}
    assert keys_below(store, "a/b") == {"a/b/2", "a/b/c/3"}
    assert keys_below(store, "") == {"a/1", "a/b/2", "a/b/c/3", "ab/4", "5"}
    assert {i.key: i.size_bytes for i in store.list_objects("a/b")} == {"a/b/2": 5, "a/b/c/3": 7}


def test_folders_are_listed_by_name_and_objects_are_not(store: Store) -> None:
    for key in ("b/1", "a/deep/2", "file", ".hidden/3", "a-b/4"):
        store.write(key, b"x")
    assert store.list_folders("") == [".hidden", "a", "a-b", "b"]
    assert store.list_folders("a") == ["deep"]
    assert store.list_folders("b") == []


def test_what_is_not_there_lists_as_nothing(store: Store) -> None:
    assert list(store.list_objects("absent")) == []
    assert list(store.list_objects("")) == []
    assert store.list_folders("") == []
    store.write("a/1", b"")
    assert store.list_folders("absent/deeper") == []


def test_a_listing_is_never_stale(store: Store) -> None:
    store.write("a/1", b"")
    assert keys_below(store, "a") == {"a/1"}
    open_catalog(store.uri).store.write("a/2", b"")
    assert keys_below(store, "a") == {"a/1", "a/2"}
    assert store.list_folders("") == ["a"]


def test_what_was_deleted_is_gone_and_absent_keys_are_no_error(store: Store) -> None:
    for key in ("a/1", "a/2", "a/3", "b/4"):
        store.write(key, b"x")
    store.delete(["a/absent", "a/1", "a/3", "b/4", "never/there"])
    assert keys_below(store, "") == {"a/2"}
    assert "a" in store.list_folders("")
    store.delete(["a/1"])
    store.delete([])
    assert keys_below(store, "") == {"a/2"}


def test_a_thousand_objects_and_more_are_deleted(store: Store, tmp_path: Path) -> None:
    store.write("a/keep", b"x")
    store.write("a/1001", b"x")
    store.delete([f"a/{n}" for n in range(1100)])
    assert keys_below(store, "a") == {"a/keep"}


def test_a_name_with_a_star_or_brackets_means_itself(store: Store) -> None:
    for key in ("a/x1", "a/[x]1", "a/*", "a/x?"):
        store.write(key, key.encode())
    assert store.read("a/[x]1") == b"a/[x]1"
    store.delete(["a/[x]1", "a/*", "a/x?"])
    assert keys_below(store, "a") == {"a/x1"}


def test_the_unfinished_file_of_a_dead_process_is_not_listed(root: str) -> None:
    store = LocalStore(root)
    store.write("a/1", b"x")
    (Path(root) / "a" / ".tmp-dead").write_bytes(b"half")
    assert keys_below(store, "a") == {"a/1"}


def test_deleting_the_last_file_removes_its_empty_folders_but_not_the_root(root: str) -> None:
    store = LocalStore(root)
    store.write("a/b/c/1", b"x")
    store.write("a/2", b"x")
    store.delete(["a/b/c/1"])
    assert [path.name for path in Path(root).rglob("*")] == ["a", "2"]
    store.delete(["a/2"])
    assert list(Path(root).iterdir()) == []


def test_a_local_delete_keeps_the_order_given(root: str) -> None:
    store = LocalStore(root)
    for key in ("last", "first"):
        store.write(key, b"x")
    Path(root, "wall").mkdir()
    with pytest.raises(UsageError):
        store.delete(["first", "wall", "last"])
    assert keys_below(store, "") == {"last"}


@pytest.fixture
def below_a_file(tmp_path: Path) -> LocalStore:
    (tmp_path / "file").write_bytes(b"not a folder")
    return LocalStore(str(tmp_path / "file" / "run"))


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.write("a", b""),
        lambda store: store.create("a", b""),
        lambda store: store.read("a"),
        lambda store: store.stat("a"),
        lambda store: list(store.list_objects("a")),
        lambda store: store.list_folders(""),
        lambda store: store.delete(["a"]),
        lambda store: store.upload(Path(__file__), "a"),
    ],
    ids=["write", "create", "read", "stat", "list_objects", "list_folders", "delete", "upload"],
)
def test_a_root_below_a_file_is_the_users_mistake(below_a_file: LocalStore, use) -> None:
    with pytest.raises(UsageError, match="not usable as a place for checkpoints") as caught:
        use(below_a_file)
    assert caught.value.do


@pytest.mark.s3
def test_an_s3_delete_removes_the_first_key_before_the_rest(s3_root: str) -> None:
    store = S3Store(s3_root)
    for key in ("a/1", "a/2"):
        store.write(key, b"x")
    store.delete(["a/2", "a/1"])
    assert keys_below(store, "") == set()


@pytest.fixture
def lost_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer to the next PUT of `claim` never comes, although the server has done it."""
    make, is_lost = AioBaseClient._make_request, False

    async def lose(self: AioBaseClient, model: Any, request: dict[str, Any], *args: Any) -> Any:
        nonlocal is_lost
        answer = await make(self, model, request, *args)
        is_it = model.name == "PutObject" and request["url_path"].endswith("/claim")
        if is_it and not is_lost:
            is_lost = True
            raise HTTPClientError(error="the connection was reset")
        return answer

    monkeypatch.setattr(AioBaseClient, "_make_request", lose)


@pytest.mark.s3
@pytest.mark.usefixtures("lost_answer")
def test_a_create_whose_answer_was_lost_has_succeeded(s3_root: str) -> None:
    store = S3Store(s3_root)
    store.create("claim", b"mine")
    with pytest.raises(ObjectExistsError):
        store.create("claim", b"another's")
    assert store.read("claim") == b"mine"


@pytest.fixture
def read_only(s3_root: str, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch) -> Store:
    S3Store(s3_root).write("a", b"there")
    S3Store(s3_root).write("b", b"there")
    for name, value in s3_server.read_only().environment().items():
        monkeypatch.setenv(name, value)
    return S3Store(s3_root)


@pytest.mark.s3
@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.write("a", b""),
        lambda store: store.create("c", b""),
        lambda store: store.upload(Path(__file__), "a"),
        lambda store: store.delete(["a"]),
        lambda store: store.delete(["absent", "a", "b"]),
    ],
    ids=["write", "create", "upload", "delete", "delete several"],
)
def test_a_reader_may_not_change_anything(read_only: Store, use) -> None:
    with pytest.raises(AuthorizationError) as caught:
        use(read_only)
    assert "AWS_ACCESS_KEY_ID" in caught.value.do
    assert read_only.read("a") == read_only.read("b") == b"there"


@pytest.mark.s3
def test_wrong_keys_are_an_authorization_error(
    s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(AuthorizationError):
        S3Store(s3_root).write("a", b"")


@pytest.mark.s3
def test_a_bucket_that_is_not_there_is_not_found(s3_root: str) -> None:
    store = S3Store("s3://no-such-bucket/run")
    for use in (lambda: store.read("a"), lambda: store.write("a", b"")):
        with pytest.raises(ObjectNotFoundError, match="not there"):
            use()


def test_a_server_that_does_not_answer_is_worth_another_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(TransientError) as caught:
        S3Store("s3://bucket/run").read("a")
    assert caught.value.do


def test_a_location_without_a_bucket_or_a_backend_is_refused() -> None:
    for uri in ("s3://", "gs://bucket/run", ""):
        with pytest.raises(UsageError):
            open_catalog(uri)


def _described(store: Store, key: str) -> FileEntry:
    return describe_object(store, key, name=key, algorithm="crc64nvme")


def test_what_is_taken_over_outlives_its_source_or_is_refused(store: Store) -> None:
    store.write("a/shard", os.urandom(LARGE_BYTES))
    entry = _described(store, "a/shard")
    try:
        store.take_over("a/shard", "b/shard", entry, mark=store.mark("a/shard"))
    except StorageError as error:
        assert "checksum" in error.what
        assert keys_below(store, "b") == set()
        return
    store.delete(["a/shard"])
    assert _described(store, "b/shard").digest == entry.digest


def test_another_object_than_the_one_that_is_meant_is_not_taken_over(root_store: Store) -> None:
    root_store.write("a/shard", b"as it was")
    entry, mark = _described(root_store, "a/shard"), root_store.mark("a/shard")
    root_store.write("a/shard", b"otherwise")
    with pytest.raises(ObjectNotFoundError):
        root_store.take_over("a/shard", "b/shard", entry, mark=mark)
    root_store.delete(["a/shard"])
    with pytest.raises((ObjectNotFoundError, TransientError)):
        root_store.take_over("a/shard", "b/shard", entry, mark=mark)
    assert keys_below(root_store, "b") == set()
