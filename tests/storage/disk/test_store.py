"""What a disk does that no other store does."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ray_ckpt.storage.disk.store import LocalStore


@pytest.mark.parametrize("how", ["write", "create"])
def test_a_folder_that_others_leave_empty_is_written_to_all_the_same(
    tmp_path: Path, how: str
) -> None:
    """Who deletes its last object removes the folder; who writes there makes it anew."""
    is_over = threading.Event()

    def write_and_delete() -> None:
        store = LocalStore(str(tmp_path))
        while not is_over.is_set():
            store.write("a/b/theirs", b"1")
            store.delete(["a/b/theirs"])

    store = LocalStore(str(tmp_path))
    with ThreadPoolExecutor() as threads:
        other = threads.submit(write_and_delete)
        try:
            for number in range(300):
                getattr(store, how)(f"a/b/{number}", b"2")
                store.delete([f"a/b/{number}"])
        finally:
            is_over.set()
        other.result()
