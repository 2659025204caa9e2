"""Files of a repository on the Hub, on this host, each proven by what the Hub says of its content.

    large    SHA-256, under which the Hub keeps them
    small    git's name for them

The library downloads, goes on with what was cut off, and keeps one copy a host, whoever asks.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.at_once import at_once
from ray_ckpt.storage.digests import algorithm_of, describe_file
from ray_ckpt.storage.hub.client import hub_api, parse_hub
from ray_ckpt.storage.hub.errors import translated
from ray_ckpt.storage.room import expect_room

_WEIGHTS = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.tiktoken",
    "README.md",
    "LICENSE",
)
_FILES_AT_ONCE = 4
_BLOCK_BYTES = 8 << 20


def pinned(source: str) -> str:
    """`hf://org/repo@<commit>`: where the branch or tag of `source` leads now."""
    repository, revision = parse_hub(source)
    with translated(source):
        return f"hf://{repository}@{hub_api().repo_info(repository, revision=revision).sha}"


def in_cache(source: str) -> Path:
    """The folder of huggingface_hub's cache with the repository's safetensors and what they need.

    Several processes of a host may ask at once: one of them downloads.

    Raises:
        IntegrityError: a file is not what the Hub says; it was removed.
        AuthorizationError, ObjectNotFoundError, TransientError
    """
    repository, revision = parse_hub(source)
    with translated(source):
        api = hub_api()
        folder = api.snapshot_download(
            repository, revision=revision, allow_patterns=_WEIGHTS, ignore_patterns="*/*"
        )
        _prove(Path(folder), _contents(api, repository, revision), source)
    return Path(folder)


def download(source: str, folder: Path) -> None:
    """Every file of the repository is in the folder; what is there and whole is not sent again.

    Raises:
        IntegrityError: a file is not what the Hub says; it was removed.
        AuthorizationError, ObjectNotFoundError, TransientError
    """
    repository, revision = parse_hub(source)
    with translated(source):
        api = hub_api()
        api.snapshot_download(repository, revision=revision, local_dir=folder)
        _prove(folder, _contents(api, repository, revision), source)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the library's notes


def downloaded_damage(api: Any, repository: str, revision: str, manifest: Manifest) -> list[str]:
    """Sentences about the files that do not come from the Hub as the manifest says.

    One after the other, past the library's cache; none of them stays on this host.
    """
    damage: list[str] = []
    for entry in manifest.files:
        with tempfile.TemporaryDirectory(prefix="ray_ckpt-") as folder:
            expect_room(Path(folder), entry.size_bytes, what=f"{entry.path} on its way back")
            path = api.hf_hub_download(
                repository, entry.path, revision=revision, local_dir=folder, force_download=True
            )
            found = describe_file(Path(path), entry.path, algorithm_of(entry))
        if found != entry:
            damage.append(f"{entry.path} is {found.digest}, the manifest says {entry.digest}")
    return damage


def _contents(api: Any, repository: str, revision: str) -> list[tuple[str, str]]:
    """Path and name of the content of every file: 64 hex digits if it is large, else 40."""
    tree = api.list_repo_tree(repository, recursive=True, revision=revision)
    files = (entry for entry in tree if hasattr(entry, "blob_id"))
    return [(f.path, f.lfs.sha256 if f.lfs else f.blob_id) for f in files]


def _prove(folder: Path, contents: Iterable[tuple[str, str]], source: str) -> None:
    present = [(folder / path, name) for path, name in contents if (folder / path).exists()]
    found = at_once(lambda one: _name_of(*one), present, num_threads=_FILES_AT_ONCE)
    broken = [path for (path, name), actual in zip(present, found, strict=True) if name != actual]
    for path in broken:
        path.resolve().unlink()  # the cache links to where it keeps contents
        path.unlink(missing_ok=True)
    if broken:
        names = ", ".join(sorted(path.relative_to(folder).as_posix() for path in broken))
        raise IntegrityError(
            f"what arrived is not what the Hub says: {names}",
            source,
            "these files were removed from this host; the repository is untouched",
            "run the same command again: they are sent anew",
        )


def _name_of(path: Path, expected: str) -> str:
    """What the Hub would call the content of a local file, in the way it calls the expected one."""
    if len(expected) == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
