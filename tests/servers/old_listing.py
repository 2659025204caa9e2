"""What a bucket held at one moment, as S3 answers a LIST."""

from collections.abc import Iterable, Mapping
from datetime import UTC
from typing import Any
from urllib.parse import quote
from xml.sax.saxutils import escape

from tests.servers.seaweed import S3Endpoint, client_of


class OldListing:
    """The objects of `bucket` at the time of the call; all of them in one page."""

    def __init__(self, endpoint: S3Endpoint, bucket: str) -> None:
        self._objects: list[dict[str, Any]] = []
        client = client_of(endpoint)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            self._objects.extend(page.get("Contents", []))
        client.close()

    def answer(self, query: Mapping[str, str]) -> str:
        """The XML for a prefix, and a delimiter or none."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        found = [entry for entry in self._objects if entry["Key"].startswith(prefix)]
        folders = _folders((entry["Key"] for entry in found), prefix, delimiter)
        inside = [entry for entry in found if not entry["Key"].startswith(tuple(folders))]
        parts = [
            *(_entry(entry) for entry in inside),
            *(f"<CommonPrefixes><Prefix>{quote(f)}</Prefix></CommonPrefixes>" for f in folders),
        ]
        head = "<EncodingType>url</EncodingType><IsTruncated>false</IsTruncated>"
        return f"<ListBucketResult>{head}{''.join(parts)}</ListBucketResult>"


def _folders(keys: Iterable[str], prefix: str, delimiter: str) -> list[str]:
    if not delimiter:
        return []
    rest = ((key, key[len(prefix) :]) for key in keys)
    return sorted({prefix + r.split(delimiter)[0] + delimiter for _, r in rest if delimiter in r})


def _entry(entry: dict[str, Any]) -> str:
    moment = entry["LastModified"].astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    etag = escape(entry["ETag"])
    fields = f"<Key>{quote(entry['Key'])}</Key><LastModified>{moment}</LastModified>"
    return f"<Contents>{fields}<ETag>{etag}</ETag><Size>{entry['Size']}</Size></Contents>"
