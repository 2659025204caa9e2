"""An upload in parts to an S3 store: begun, or found and gone on with, and ended.

Every part goes with the checksum that was agreed on when the upload began, by whichever way it
goes. A store that does not know CRC64NVME is asked for an upload without.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from ray_ckpt.core.errors import AuthorizationError, StorageError, ThrottledError, TransientError
from ray_ckpt.storage.s3.unfinished import Call
from ray_ckpt.storage.s3.wire import S3Wire, checksum_of

_ALGORITHM = "CRC64NVME"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Object:
    """Where an object is or will be, and the two ways there."""

    bucket: str
    name: str
    call: Call
    wire: Callable[[], S3Wire | None]
    """As it is now; None if all must go by `call`."""


class Multipart:
    """The parts of one object; its completion makes it visible, and replaces what is there."""

    def __init__(self, target: S3Object, upload_id: str, *, algorithm: str | None) -> None:
        """The upload that was begun so, with these checksums."""
        self._target = target
        self._at = {"Bucket": target.bucket, "Key": target.name, "UploadId": upload_id}
        self._has_checksums = algorithm == _ALGORITHM

    @classmethod
    def begun(cls, target: S3Object) -> "Multipart":
        """A new one; one POST."""
        begin = partial(
            target.call, "create_multipart_upload", Bucket=target.bucket, Key=target.name
        )
        wire = target.wire()
        if wire is not None and wire.sends_checksums:
            try:
                upload_id = begin(ChecksumAlgorithm=_ALGORITHM, ChecksumType="FULL_OBJECT")[
                    "UploadId"
                ]
                return cls(target, upload_id, algorithm=_ALGORITHM)
            except (AuthorizationError, ThrottledError, TransientError):
                raise
            except StorageError:
                pass  # it may be the checksum that it does not know: asked once more, without
        return cls(target, begin()["UploadId"], algorithm=None)

    def put(self, number: int, body: bytes | memoryview) -> str:
        """The ETag of the part that now holds `body`; parts count from 1 on.

        Raises:
            TransientError: somebody else has ended the upload.
        """
        wire, has_checksum = self._target.wire(), self._has_checksums
        part = {"partNumber": str(number), "uploadId": self._at["UploadId"]}
        sent = wire and wire.put(self._target.name, body, has_checksum=has_checksum, **part)
        if sent:
            return sent
        asked: dict[str, Any] = {**self._at, "PartNumber": number, "Body": bytes(body)}
        if has_checksum:
            asked["ChecksumCRC64NVME"] = checksum_of(body)
        answer = self._target.call("upload_part", **asked)
        if "ETag" not in answer:
            raise self._ended()
        return str(answer["ETag"])

    def complete(self, etags: Mapping[int, str]) -> None:
        """The object is there, whole; one POST.

        Raises:
            TransientError: somebody else has ended the upload.
        """
        parts: list[dict[str, Any]] = [
            {"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)
        ]
        done = self._target.call(
            "complete_multipart_upload", **self._at, MultipartUpload={"Parts": parts}
        )
        if "ETag" not in done:
            raise self._ended()

    def abandon(self) -> None:
        """One ABORT."""
        self._target.call("abort_multipart_upload", **self._at)

    def _ended(self) -> TransientError:
        where = f"s3://{self._target.bucket}/{self._target.name}"
        return TransientError("somebody has ended the upload", where)
