"""Uploads in parts: how large the parts are, and what a store says of those not ended."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Call = Callable[..., dict[str, Any]]
"""The name of a request of S3 and its parameters, to its answer; empty for what is not there."""
_MAX_PARTS = 9_000
"""S3 takes 10,000."""


def part_size(size_bytes: int, *, at_least: int) -> int:
    """Bytes of each part of an object but the last one."""
    return max(at_least, -(-size_bytes // _MAX_PARTS))


def uploads_of(call: Call, *, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """`Key`, `UploadId` and `Initiated` of each upload of a key with this prefix."""
    following = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
    asked = {"Bucket": bucket, "Prefix": prefix}
    for page in _pages(call, "list_multipart_uploads", asked, following):
        yield from page.get("Uploads", [])


def parts_of(call: Call, upload: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """`PartNumber`, `Size`, `ETag` and `LastModified` of each part that has arrived.

    `upload` names its `Bucket`, `Key` and `UploadId`.
    """
    following = {"PartNumberMarker": "NextPartNumberMarker"}
    for page in _pages(call, "list_parts", upload, following):
        yield from page.get("Parts", [])


def _pages(
    call: Call, verb: str, options: Mapping[str, str], following: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Every page of a listing; `following` names what a page tells and the next request takes."""
    asked = dict(options)
    while True:
        page = call(verb, **asked)
        yield page
        if not page.get("IsTruncated"):
            return
        asked |= {taken: page[told] for taken, told in following.items()}
