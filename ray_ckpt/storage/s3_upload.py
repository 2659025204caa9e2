"""A local file becomes an object of an S3 store, in parts; a killed upload is gone on with.

    list_multipart_uploads    is one of this very key unfinished?
    list_parts                which of its parts are parts of this very file, by size and MD5?
    upload_part               the others, several at once
    complete                  the object is there, whole

An upload that fails is left as it is, for the next attempt. Where a store's ETags are no MD5 (some
kinds of encryption) nothing is recognised, and everything is sent anew.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from ray_ckpt.core.errors import AuthorizationError, TransientError
from ray_ckpt.storage.posix import translated
from ray_ckpt.storage.progress import Progress
from ray_ckpt.storage.s3_unfinished import Call, parts_of, uploads_of

PART_BYTES = 8 << 20
"""What a kill may cost, for each part that is under way."""
_MAX_PARTS = 9_000
"""S3 takes 10,000."""
_PARTS_AT_ONCE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some bytes of the file; parts count from 1 on."""

    number: int
    begin: int
    size_bytes: int


def upload_in_parts(
    call: Call, source: Path, *, bucket: str, name: str, progress: Progress
) -> None:
    """The object is there, with all that is in the file.

    A second run sends what is missing; one of an object that is there replaces it.

    Raises:
        TransientError: somebody else has ended the upload.
    """
    with translated(source), source.open("rb") as file:
        upload = _Upload(call, file.fileno(), {"Bucket": bucket, "Key": name})
        upload.run(progress)


class _Upload:
    def __init__(self, call: Call, descriptor: int, target: Mapping[str, str]) -> None:
        self._call = call
        self._descriptor = descriptor
        self._target = dict(target)
        self._parts = list(_cut(os.fstat(descriptor).st_size))

    def run(self, progress: Progress) -> None:
        upload_id, etags = self._find() or (self._begin(), {})
        at = {**self._target, "UploadId": upload_id}
        for part in self._parts:
            if part.number in etags:
                progress.advance(part.size_bytes)
        missing = [part for part in self._parts if part.number not in etags]
        with ThreadPoolExecutor(_PARTS_AT_ONCE, "ray_ckpt upload") as threads:
            sent = [(part, threads.submit(self._send, part, at)) for part in missing]
            try:
                for part, future in sent:
                    etags[part.number] = future.result()
                    progress.advance(part.size_bytes)
            finally:
                threads.shutdown(cancel_futures=True)
        listed = [{"PartNumber": number, "ETag": etags[number]} for number in sorted(etags)]
        done = self._call("complete_multipart_upload", **at, MultipartUpload={"Parts": listed})
        if "ETag" not in done:
            raise self._ended()

    def _begin(self) -> str:
        return str(self._call("create_multipart_upload", **self._target)["UploadId"])

    def _send(self, part: _Part, at: Mapping[str, str]) -> str:
        body = self._bytes(part)
        answer = self._call("upload_part", **at, PartNumber=part.number, Body=body)
        if "ETag" not in answer:
            raise self._ended()
        return str(answer["ETag"])

    def _find(self) -> tuple[str, dict[int, str]] | None:
        """The unfinished upload of this key that holds most of this file, and what it holds."""
        try:
            bucket, key = self._target["Bucket"], self._target["Key"]
            begun = uploads_of(self._call, bucket=bucket, prefix=key)
            held = {u["UploadId"]: self._held(u["UploadId"]) for u in begun if u["Key"] == key}
        except AuthorizationError:  # to list them is a right of its own
            return None
        if not any(held.values()):
            return None
        return max(held.items(), key=lambda item: len(item[1]))

    def _held(self, upload_id: str) -> dict[int, str]:
        at = {**self._target, "UploadId": upload_id}
        expected = {part.number: part for part in self._parts}
        held: dict[int, str] = {}
        for found in parts_of(self._call, at):
            part = expected.get(int(found["PartNumber"]))
            if part is not None and self._is(part, int(found["Size"]), str(found["ETag"])):
                held[part.number] = str(found["ETag"])
        return held

    def _is(self, part: _Part, size_bytes: int, etag: str) -> bool:
        if part.size_bytes != size_bytes:
            return False
        own = hashlib.md5(self._bytes(part), usedforsecurity=False).hexdigest()
        return etag.strip('"') == own

    def _bytes(self, part: _Part) -> bytes:
        return os.pread(self._descriptor, part.size_bytes, part.begin)

    def _ended(self) -> TransientError:
        where = f"s3://{self._target['Bucket']}/{self._target['Key']}"
        return TransientError("somebody has ended the upload", where)


def _cut(size_bytes: int) -> Iterator[_Part]:
    part_bytes = max(PART_BYTES, -(-size_bytes // _MAX_PARTS))
    for number, begin in enumerate(range(0, size_bytes, part_bytes), start=1):
        yield _Part(number=number, begin=begin, size_bytes=min(part_bytes, size_bytes - begin))
