"""What the file systems of fsspec raise, as ours: by errno, else by the status of an answer."""

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

from ray_ckpt.core.errors import (
    AuthorizationError,
    ObjectNotFoundError,
    RayCkptError,
    StorageError,
    StorageFullError,
    ThrottledError,
    TransientError,
    UsageError,
)
from ray_ckpt.storage.disk.posix import kind_of
from ray_ckpt.storage.secrets import without_secrets

_BY_STATUS: Mapping[int, type[StorageError]] = {
    **dict.fromkeys((401, 403), AuthorizationError),
    404: ObjectNotFoundError,
    **dict.fromkeys((429, 503), ThrottledError),
    507: StorageFullError,
}
_DO = "look at the place and at what its package needs, then run the same command again"


@contextlib.contextmanager
def translated(where: str) -> Generator[None]:
    """Turns what comes from a file system into ours, once."""
    try:
        yield
    except (RayCkptError, ImportError):
        raise
    except FileNotFoundError as error:
        raise ObjectNotFoundError("not there", where, do="check the location") from error
    except (NotADirectoryError, IsADirectoryError) as error:
        raise UsageError(
            "not usable as a place for checkpoints",
            where,
            "nothing was changed",
            "name a folder, or one that can be made",
        ) from error
    except NotImplementedError as error:
        raise StorageError(f"it cannot do this: {error}", where, do="use another place") from error
    except Exception as error:
        raise _kind(error)(without_secrets(str(error) or repr(error)), where, do=_DO) from error


def _kind(error: Exception) -> type[StorageError]:
    """By what packages for stores behind HTTP call the status; else it may pass."""
    for name in ("status", "status_code", "code"):
        status: Any = getattr(error, name, None)
        if isinstance(status, str | int) and str(status).isdecimal():
            return _BY_STATUS.get(int(status), TransientError)
    return kind_of(error) if isinstance(error, OSError) else TransientError
