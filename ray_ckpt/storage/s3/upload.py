"""A local file becomes an object of an S3 store, in parts; a killed upload is gone on with.

    list_multipart_uploads    is one of this very key unfinished?
    list_parts                which of its parts are parts of this very file, by size and checksum?
    upload_part               the others, several at once
    complete                  the object is there, whole

An upload that fails is left as it is, for the next attempt. Where a store tells no checksum of a
part, and its ETags are no MD5 (some kinds of encryption), everything is sent anew.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from ray_ckpt.core.errors import AuthorizationError
from ray_ckpt.storage.disk.posix import translated
from ray_ckpt.storage.progress import Progress
from ray_ckpt.storage.s3.multipart import Multipart, S3Object
from ray_ckpt.storage.s3.unfinished import part_size, parts_of, uploads_of
from ray_ckpt.storage.s3.wire import checksum_of

PART_BYTES = 8 << 20
"""What a kill may cost, for each part that is under way."""
_PARTS_AT_ONCE = 4
"""Of one file."""
_IN_HAND = BoundedSemaphore(16)
"""Parts that this process holds in memory, of all files: 128 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Some bytes of the file; parts count from 1 on."""

    number: int
    begin: int
    size_bytes: int


def upload_in_parts(source: Path, target: S3Object, *, progress: Progress) -> None:
    """The object is there, with all that is in the file.

    A second run sends what is missing; one of an object that is there replaces it.

    Raises:
        TransientError: somebody else has ended the upload.
    """
    with translated(source), source.open("rb") as file:
        parts = list(_cut(os.fstat(file.fileno()).st_size))
        found = _found(target, parts, file.fileno())
        upload, etags = found or (Multipart.begun(target), {})
        for part in parts:
            if part.number in etags:
                progress.advance(part.size_bytes)
        missing = [part for part in parts if part.number not in etags]
        with ThreadPoolExecutor(_PARTS_AT_ONCE, "ray_ckpt upload") as threads:
            sent = [(part, threads.submit(_send, upload, part, file.fileno())) for part in missing]
            try:
                for part, future in sent:
                    etags[part.number] = future.result()
                    progress.advance(part.size_bytes)
            finally:
                threads.shutdown(cancel_futures=True)
        upload.complete(etags)


def _send(upload: Multipart, part: _Part, descriptor: int) -> str:
    with _IN_HAND:
        return upload.put(part.number, _bytes_of(part, descriptor))


def _found(
    target: S3Object, parts: Sequence[_Part], descriptor: int
) -> tuple[Multipart, dict[int, str]] | None:
    """The unfinished upload of this key that holds most of this file, and the ETags it holds."""
    at = {"Bucket": target.bucket, "Key": target.name}
    try:
        begun = list(uploads_of(target.call, bucket=target.bucket, prefix=target.name))
        own = [upload for upload in begun if upload["Key"] == target.name]
        ids = [str(upload["UploadId"]) for upload in own]
        held = [_held(parts_of(target.call, {**at, "UploadId": i}), parts, descriptor) for i in ids]
    except AuthorizationError:  # to list them is a right of its own
        return None
    if not any(held):
        return None
    most, upload = max(zip(held, own, strict=True), key=lambda pair: len(pair[0]))
    algorithm = upload.get("ChecksumAlgorithm")
    return Multipart(target, str(upload["UploadId"]), algorithm=algorithm), most


def _held(
    listed: Iterable[Mapping[str, Any]], parts: Sequence[_Part], descriptor: int
) -> dict[int, str]:
    """ETags of those that are parts of this very file."""
    expected = {part.number: part for part in parts}
    held: dict[int, str] = {}
    for found in listed:
        part = expected.get(int(found["PartNumber"]))
        if part is not None and _is_of(part, descriptor, found):
            held[part.number] = str(found["ETag"])
    return held


def _is_of(part: _Part, descriptor: int, found: Mapping[str, Any]) -> bool:
    """Whether what was found is this part of this file."""
    if part.size_bytes != int(found["Size"]):
        return False
    body = _bytes_of(part, descriptor)
    if "ChecksumCRC64NVME" in found:
        return str(found["ChecksumCRC64NVME"]) == checksum_of(body)
    own = hashlib.md5(body, usedforsecurity=False).hexdigest()
    return str(found["ETag"]).strip('"') == own


def _bytes_of(part: _Part, descriptor: int) -> bytes:
    return os.pread(descriptor, part.size_bytes, part.begin)


def _cut(size_bytes: int) -> Iterator[_Part]:
    part_bytes = part_size(size_bytes, at_least=PART_BYTES)
    for number, begin in enumerate(range(0, size_bytes, part_bytes), start=1):
        yield _Part(number=number, begin=begin, size_bytes=min(part_bytes, size_bytes - begin))
