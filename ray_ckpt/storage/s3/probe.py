"""Finds out what an S3 store does, with requests to objects of its own; nothing of them is left.

    PUT, and once more        If-None-Match is known, and heeded
    8 at once, three times    of several exactly one succeeds: 24 requests, only if it is heeded
    PUT with a wrong CRC32    is refused
    COPY, LIST                the copy is there, the listing complete
    a multipart upload        is listed
    DELETE of all, LIST       in one request; the listing is empty

What this token may not do counts as done: that is for its first use to tell.
"""

import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from enum import Enum, auto
from typing import Any

from ray_ckpt.core.errors import AuthorizationError, ConflictError, StorageError, TransientError
from ray_ckpt.core.store_features import Creates, StoreFeatures
from ray_ckpt.storage.s3.unfinished import Call, uploads_of

_RACERS = 8
_ROUNDS = 3
_WRONG_CRC32 = "AAAAAA=="
_SWIFT = "x-openstack-request-id"
"""OpenStack Swift compares and writes in two steps; a few races may not show it."""


def probe(call: Call, *, bucket: str, folder: str) -> StoreFeatures:
    """What the store of this bucket does; `folder` is a prefix that is ours alone.

    `call` raises what the store refuses.

    Raises:
        AuthorizationError, ObjectNotFoundError: nothing can be written there.
        TransientError: try again later.
    """
    return _Probe(call, bucket, f"{folder}/{uuid.uuid4().hex}").run()


class _Put(Enum):
    """What became of a PUT with a condition."""

    STORED = auto()
    CONFLICT = auto()
    REFUSED = auto()


class _Probe:
    def __init__(self, call: Call, bucket: str, folder: str) -> None:
        self._call = call
        self._bucket = bucket
        self._folder = folder
        self._keys: set[str] = set()
        """Everything that may be there."""

    def run(self) -> StoreFeatures:
        try:
            creates = self._creates()
            checks_checksums = self._checks_checksums()
            copies = self._copies()
            lists_uploads = self._lists_uploads()
            listed = self._listed()
            shows = listed is None or self._key("first") in listed
            has_batches = self._deletes()
            hides = has_batches is None or not self._listed()
        except TransientError:
            raise  # must not wait for the store once more: gc finds what is left
        except BaseException:
            self._delete_one_by_one()
            raise
        return StoreFeatures(
            creates=creates,
            checks_checksums=checks_checksums,
            lists_at_once=shows and hides,
            lists_uploads=lists_uploads,
            deletes_in_batches=has_batches is not False,
            copies=copies,
        )

    def _key(self, name: str) -> str:
        return f"{self._folder}/{name}"

    def _at(self, name: str) -> dict[str, str]:
        self._keys.add(self._key(name))
        return {"Bucket": self._bucket, "Key": self._key(name)}

    def _creates(self) -> Creates:
        answer = self._call("put_object", **self._at("first"), Body=b"plain")
        if self._put("known", IfNoneMatch="*") is _Put.REFUSED:
            return Creates.REFUSED
        if self._put("first", IfNoneMatch="*") is _Put.STORED:
            return Creates.IGNORED
        if _SWIFT in _headers(answer) or any(self._winners(n) > 1 for n in range(_ROUNDS)):
            return Creates.RACY
        return Creates.EXCLUSIVE

    def _winners(self, number: int) -> int:
        with ThreadPoolExecutor(_RACERS, "ray_ckpt probe") as threads:
            racing = [threads.submit(self._race, f"race-{number}", str(n)) for n in range(_RACERS)]
            return sum(future.result() is _Put.STORED for future in racing)

    def _race(self, name: str, body: str) -> _Put:
        try:
            return self._put(name, body, IfNoneMatch="*")
        except TransientError:
            return _Put.CONFLICT

    def _checks_checksums(self) -> bool:
        try:
            return self._put("wrong", ChecksumCRC32=_WRONG_CRC32) is not _Put.STORED
        except TransientError:  # what a wrong checksum is taken for: a bad line
            return True

    def _put(self, name: str, body: str = "other", **options: str) -> _Put:
        try:
            self._call("put_object", **self._at(name), Body=body.encode(), **options)
        except ConflictError:
            return _Put.CONFLICT
        except (AuthorizationError, TransientError):
            raise
        except StorageError:
            return _Put.REFUSED
        return _Put.STORED

    def _copies(self) -> bool:
        source = {"Bucket": self._bucket, "Key": self._key("first")}
        try:
            self._call("copy_object", **self._at("copy"), CopySource=source)
        except (AuthorizationError, TransientError):
            return True
        except StorageError:
            return False
        return True

    def _lists_uploads(self) -> bool:
        at = {"Bucket": self._bucket, "Key": self._key("upload")}
        try:
            upload_id = self._call("create_multipart_upload", **at)["UploadId"]
        except (AuthorizationError, TransientError):
            return True
        except StorageError:
            return False
        try:
            found = uploads_of(self._call, bucket=self._bucket, prefix=self._folder)
            return any(upload["UploadId"] == upload_id for upload in found)
        except (AuthorizationError, TransientError):
            return True
        except StorageError:
            return False
        finally:
            with suppress(StorageError):
                self._call("abort_multipart_upload", **at, UploadId=upload_id)

    def _listed(self) -> set[str] | None:
        """None where this token may not look."""
        prefix = f"{self._folder}/"
        try:
            page = self._call("list_objects_v2", Bucket=self._bucket, Prefix=prefix)
        except AuthorizationError:
            return None
        return {entry["Key"] for entry in page.get("Contents", [])}

    def _deletes(self) -> bool | None:
        """Whether one request deletes all; None where some may be left, as nobody may delete."""
        doomed = {"Objects": [{"Key": key} for key in sorted(self._keys)], "Quiet": True}
        try:
            answer = self._call("delete_objects", Bucket=self._bucket, Delete=doomed)
        except (AuthorizationError, TransientError):
            return None
        except StorageError:
            self._delete_one_by_one()
            return False
        return None if answer.get("Errors") else True

    def _delete_one_by_one(self) -> None:
        """As many as can be; `gc` finds the rest."""
        for key in sorted(self._keys):
            try:
                self._call("delete_object", Bucket=self._bucket, Key=key)
            except StorageError:
                return


def _headers(answer: Mapping[str, Any]) -> Mapping[str, str]:
    return answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
