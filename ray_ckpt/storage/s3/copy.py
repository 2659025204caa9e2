"""An object of an S3 service becomes another one there: none of its bytes passes through this host.

    create_multipart_upload    with the checksum that the service is to compute of what it copies
    upload_part_copy           several at once
    complete                   the object is there, whole

Whether it is what its manifest says, only a checksum of its whole content can tell, by the
algorithm of the manifest, and computed by the service:

    crc64nvme    of any number of parts
    sha256       of one part, which has `WHOLE_BYTES` at most

Of a larger one, and of an old server that computes none, nobody knows before it is read. An ETag
would say that it is like its source, not that its source is like the manifest.
"""

import base64
import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray_ckpt.core.errors import RayCkptError, TransientError
from ray_ckpt.core.manifest import FileEntry
from ray_ckpt.storage.digests import algorithm_of
from ray_ckpt.storage.s3.unfinished import Call, part_size

WHOLE_BYTES = 5 << 30
"""S3 copies so many bytes at once at most."""
PART_BYTES = 512 << 20
"""Copied within seconds: silence is not waited for much longer."""
_PARTS_AT_ONCE = 4
_ALGORITHMS = {"crc64nvme": "CRC64NVME", "sha256": "SHA256"}


def copy_object(
    call: Call, source: Mapping[str, str], target: Mapping[str, str], entry: FileEntry
) -> None:
    """What is at `source` is at `target` as well, replacing what was there; it is as large as that.

    Both name their `Bucket` and `Key`. One that fails leaves nothing; one that is killed leaves an
    unfinished upload.
    """
    if not entry.size_bytes:
        call("put_object", **target, Body=b"")
        return
    algorithm = _ALGORITHMS.get(algorithm_of(entry))
    checksum = {"ChecksumAlgorithm": algorithm} if algorithm else {}
    if algorithm == "CRC64NVME":
        checksum["ChecksumType"] = "FULL_OBJECT"
    begun = call("create_multipart_upload", **target, **checksum)
    at = {**target, "UploadId": begun["UploadId"]}
    try:
        parts = _copy_parts(call, source, at, list(_ranges(entry.size_bytes, algorithm)))
        if "ETag" not in call("complete_multipart_upload", **at, MultipartUpload={"Parts": parts}):
            raise _ended(target)
    except BaseException:
        with contextlib.suppress(RayCkptError):  # what went wrong first is what matters
            call("abort_multipart_upload", **at)
        raise


def is_equal(call: Call, target: Mapping[str, str], entry: FileEntry) -> bool | None:
    """Whether the object is the one that the entry describes; None if only its bytes could tell."""
    head = call("head_object", **target, ChecksumMode="ENABLED")
    if head.get("ContentLength") != entry.size_bytes:
        return False
    algorithm, _, digest = entry.digest.partition(":")
    told = str(head.get(f"Checksum{_ALGORITHMS.get(algorithm)}", ""))
    value, _, num_parts = told.partition("-")
    if not value or num_parts not in ("", "1"):
        return None
    expected = bytes.fromhex(digest)
    if num_parts:  # then it is the digest of the one part's digest
        expected = hashlib.new(algorithm, expected).digest()
    return base64.b64decode(value) == expected


def _copy_parts(
    call: Call, source: Mapping[str, str], at: Mapping[str, str], ranges: list[str]
) -> list[dict[str, Any]]:
    """What completes the upload `at`: each part's number, ETag and checksum."""

    def copy(number: int) -> dict[str, Any]:
        part = {"PartNumber": number}
        # a range of an object of one part is refused, should that be a small one
        cut = {"CopySourceRange": ranges[number - 1]} if len(ranges) > 1 else {}
        answer = call("upload_part_copy", **at, **part, **cut, CopySource=dict(source))
        told = answer.get("CopyPartResult", {})
        if "ETag" not in told:
            raise _ended(at)
        sums = {name: value for name, value in told.items() if name.startswith("Checksum")}
        return {**part, "ETag": told["ETag"], **sums}

    with ThreadPoolExecutor(_PARTS_AT_ONCE, "ray_ckpt copy") as threads:
        return list(threads.map(copy, range(1, len(ranges) + 1)))


def _ranges(size_bytes: int, algorithm: str | None) -> Iterator[str]:
    """In one part where no other number of them could be told from another content."""
    is_whole = algorithm != "CRC64NVME" and size_bytes <= WHOLE_BYTES
    part_bytes = size_bytes if is_whole else part_size(size_bytes, at_least=PART_BYTES)
    for begin in range(0, size_bytes, part_bytes):
        yield f"bytes={begin}-{min(begin + part_bytes, size_bytes) - 1}"


def _ended(target: Mapping[str, str]) -> TransientError:
    where = f"s3://{target['Bucket']}/{target['Key']}"
    return TransientError("somebody has ended the copy, or removed its source", where)
