"""One way to a prefix of a bucket: s3fs for requests, sockets of our own for bulk bytes.

Credentials, endpoint and profile come from where everybody's do: `AWS_*`, fsspec's configuration,
IAM. Keys that are refused are looked up once more: who rotates them need not tell us.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from ray_ckpt.core.errors import AuthorizationError, StorageError, TransientError
from ray_ckpt.storage.s3.client import make_file_system
from ray_ckpt.storage.s3.errors import (
    has_broken_off,
    is_gone,
    is_unknown,
    may_have_newer_keys,
    translated,
)
from ray_ckpt.storage.s3.wire import S3Wire, open_wire

T = TypeVar("T")
_REPEATS = 2


class S3Connection:
    """To `s3://bucket/prefix`. A `key` is below it; a `name` is how the bucket calls an object."""

    def __init__(self, uri: str) -> None:
        self._base = uri.removeprefix("s3://").rstrip("/")
        self.uri = f"s3://{self._base}"
        self.bucket = self._base.partition("/")[0]
        self._file_system = self._made()
        self._wired: tuple[Any, S3Wire | None] = (None, None)

    def _made(self) -> Any:
        with translated(self.uri):
            return make_file_system()

    def endpoint(self) -> str:
        """Where its requests go."""
        return self.ask("", lambda files: str(files.s3.meta.endpoint_url))

    def path(self, key: str) -> str:
        """`bucket/prefix/key`, as s3fs takes it."""
        return f"{self._base}/{key}".rstrip("/")

    def name(self, key: str) -> str:
        """As it is called in the bucket."""
        return self.path(key).partition("/")[2]

    def prefix(self, start: str) -> str:
        """What names in the bucket start with, of objects whose key starts so."""
        return f"{self._base}/{start}".partition("/")[2]

    def object(self, key: str) -> dict[str, str]:
        """As S3's own requests name it."""
        return {"Bucket": self.bucket, "Key": self.name(key)}

    def where(self, key: str) -> str:
        """As messages say it."""
        return f"{self.uri}/{key}"

    def key_of(self, path: str) -> str:
        """The key of what s3fs calls `path`."""
        return path.removeprefix(f"{self._base}/")

    def ask(self, key: str, use: Callable[[Any], T]) -> T:
        """What `use` makes of the s3fs file system.

        Again, if its answer has broken off, or if newer keys may be there meanwhile; whatever else
        is worth another try botocore has tried again itself.
        """
        for _ in range(_REPEATS):
            try:
                with translated(self.where(key)):
                    return use(self._file_system)
            except AuthorizationError as error:
                if not may_have_newer_keys(error):
                    raise
                self._file_system = self._made()
            except TransientError as error:
                if not has_broken_off(error):
                    raise
        with translated(self.where(key)):
            return use(self._file_system)

    def wire(self, key: str) -> S3Wire | None:
        """The way for bulk bytes, with the keys that s3fs has now."""
        of, wire = self._wired
        if of is not self._file_system:
            of = self._file_system
            wire = self.ask(key, lambda files: open_wire(files, self.bucket))
            self._wired = (of, wire)
        return wire

    def get(self, key: str, **options: str) -> bytes:
        """The answer to a GET through s3fs, whole."""
        return self.ask(key, lambda files: _body_of(files, self.object(key), **options))

    def call(self, verb: str, key: str, **options: Any) -> dict[str, Any]:
        """S3's own answer; empty where what is asked about is not there, or nobody can say."""
        try:
            return self.request(key, verb, **options)
        except StorageError as error:
            is_untold = verb == "list_multipart_uploads" and is_unknown(error)
            if not is_untold and not is_gone(error):
                raise
            return {}

    def call_at_name(self, verb: str, name: str, **options: Any) -> dict[str, Any]:
        """As `call`, about an object under its name in the bucket."""
        return self.call(verb, self.key_of(f"{self.bucket}/{name}"), **options)

    def request(self, key: str, verb: str, **options: Any) -> dict[str, Any]:
        """S3's own answer to one of its own requests; errors are said to be about `key`."""
        return self.ask(key, lambda files: files.call_s3(verb, **options))


def _body_of(file_system: Any, place: dict[str, str], **options: str) -> bytes:
    """Not by s3fs's `cat_file`: it repeats what has failed within repetitions of its own."""
    from aiohttp import ClientPayloadError
    from fsspec import asyn  # pyright: ignore[reportMissingTypeStubs]
    from s3fs.core import S3_RETRYABLE_ERRORS  # pyright: ignore[reportMissingTypeStubs]

    sync: Callable[..., bytes] = cast(Any, asyn).sync
    broken = cast(tuple[type[Exception], ...], S3_RETRYABLE_ERRORS)
    answer = file_system.call_s3("get_object", **place, **options)
    try:
        return sync(file_system.loop, answer["Body"].read)
    except broken as error:
        raise ClientPayloadError(f"the object broke off: {error}") from error
    finally:
        answer["Body"].close()
