"""What lies below a prefix of a bucket. Never cached: several processes write."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from ray_ckpt.storage.base import ObjectInfo, UnfinishedWrite
from ray_ckpt.storage.s3.connection import S3Connection
from ray_ckpt.storage.s3.unfinished import parts_of, uploads_of


def objects_at(at: S3Connection, start: str) -> Iterator[ObjectInfo]:
    """All objects whose key starts so."""
    for page in _pages(at, start):
        yield from (_listed(at, entry) for entry in page.get("Contents", []))


def folders_at(at: S3Connection, start: str) -> list[str]:
    """The names that stand between `start` and the next slash of a key."""
    pages = _pages(at, start, Delimiter="/")
    found = (entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", []))
    return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found)


def unfinished_at(at: S3Connection, start: str) -> list[UnfinishedWrite]:
    """Every upload in parts whose key starts so."""
    call = partial(at.call, key=start)
    begun = uploads_of(call, bucket=at.bucket, prefix=at.prefix(start))
    return [_unfinished(at, upload) for upload in begun]


def _pages(at: S3Connection, start: str, **options: str) -> Iterator[dict[str, Any]]:
    """The answers to as many LISTs as it takes.

    Not by s3fs's `find` and `ls`, which ask twice more where nothing is.
    """
    asked = {"Bucket": at.bucket, "Prefix": at.prefix(start), **options}
    while True:
        page = at.call("list_objects_v2", start, **asked)
        yield page  # empty where there is no such bucket
        if not page.get("IsTruncated"):
            return
        asked["ContinuationToken"] = page["NextContinuationToken"]


def _listed(at: S3Connection, entry: dict[str, Any]) -> ObjectInfo:
    """From an answer to LIST; a folder that some tool made an object of ends with a slash."""
    return ObjectInfo(
        key=at.key_of(f"{at.bucket}/{entry['Key']}"),
        size_bytes=int(entry["Size"]),
        modified_at=entry["LastModified"].timestamp(),
        version=entry["ETag"],
    )


def _unfinished(at: S3Connection, upload: dict[str, Any]) -> UnfinishedWrite:
    """One upload as LIST shows it, and how far it has come."""
    key, token = at.key_of(f"{at.bucket}/{upload['Key']}"), upload["UploadId"]
    place = {**at.object(key), "UploadId": token}
    parts = list(parts_of(partial(at.call, key=key), place))
    times = [upload["Initiated"], *(part["LastModified"] for part in parts)]
    return UnfinishedWrite(
        key=key,
        size_bytes=sum(int(part["Size"]) for part in parts),
        changed_at=max(time.timestamp() for time in times),
        token=token,
    )
