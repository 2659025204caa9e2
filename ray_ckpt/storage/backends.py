"""Which backend a location belongs to. To add one: its module, and a line in `_BACKENDS`."""

from collections.abc import Callable
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.errors import UsageError
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.commit import RenameCommit
from ray_ckpt.storage.disk.posix import translated
from ray_ckpt.storage.disk.store import LocalStore
from ray_ckpt.storage.fsspec_store import FsspecStore
from ray_ckpt.storage.hub.bucket import BucketStore
from ray_ckpt.storage.marker import MarkerCommit
from ray_ckpt.storage.s3.store import S3Store


def _open_local(uri: str) -> Catalog:
    store = LocalStore(uri.removeprefix("file://"))
    return Catalog(store, RenameCommit(store))


def _open_other(uri: str) -> Catalog:
    store = FsspecStore(uri)
    return Catalog(store, MarkerCommit(store))


def _open_s3(uri: str) -> Catalog:
    store = S3Store(uri)
    return Catalog(store, MarkerCommit(store))


def _open_bucket(uri: str) -> Catalog:
    if names.is_repository(uri):
        raise UsageError(
            "a repository on the Hub is no root and no folder",
            uri,
            do="name a path, s3://bucket/prefix or hf://buckets/ORG/NAME/PREFIX",
        )
    store = BucketStore(uri)
    return Catalog(store, MarkerCommit(store))


_BACKENDS: dict[str, Callable[[str], Catalog]] = {
    "": _open_local,
    "file": _open_local,
    "s3": _open_s3,
    "hf": _open_bucket,
}
_NO_ROOTS = ("http", "https", "github", "data")
"""fsspec knows them; they are read alone."""


def open_catalog(uri: str) -> Catalog:
    """The catalog of the root at `uri`: a path, `s3://bucket/prefix`, `hf://buckets/...`, fsspec's.

    Touches nothing yet: a root that is not there has no checkpoints.

    Raises:
        UsageError: no backend is known for the scheme.
    """
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if not uri or scheme in _NO_ROOTS or (scheme not in _BACKENDS and not _is_known(scheme)):
        raise UsageError(
            f"no backend for {uri!r}", do="use a path, s3://, or another that fsspec writes to"
        )
    return _BACKENDS.get(scheme, _open_other)(uri)


def open_root(root: str) -> Catalog:
    """The catalog of a root that is there.

    Raises:
        UsageError: a local root that does not exist, most likely a misspelt one, or is a file.
        AuthorizationError: this user may not look.
    """
    catalog = open_catalog(root)
    if "://" in catalog.uri:
        return catalog
    path = Path(catalog.uri)
    with translated(path):
        if not path.is_dir():
            raise UsageError(
                "a file is here, and no folder" if path.exists() else "no such folder",
                catalog.uri,
                "nothing was changed",
                "check the spelling; a root appears with the first save",
            )
    return catalog


def _is_known(scheme: str) -> bool:
    from fsspec.registry import known_implementations, registry  # pyright: ignore

    return scheme in known_implementations or scheme in registry


def open_folder(path: str) -> tuple[Catalog, str]:
    """The folder's parent as a root, and its own name in it."""
    parent, slash, folder = path.rstrip("/").rpartition("/")
    return open_catalog(parent or (slash or ".")), folder
