"""An object of an S3 store that is uploaded in parts, as its bytes come."""

from collections.abc import Callable
from typing import Any

from ray_ckpt.core.errors import TransientError

_PART_BYTES = 16 << 20
_MAX_PARTS = 9_000
"""S3 takes 10,000."""


class S3Blocks:
    """A multipart upload; its completion makes the object visible, and replaces what is there.

    `call` is asked with the name of a request of S3 and its parameters.
    """

    puts_at_once = 4

    def __init__(
        self, call: Callable[..., dict[str, Any]], *, bucket: str, name: str, size_bytes: int
    ) -> None:
        self.block_bytes = max(_PART_BYTES, -(-size_bytes // _MAX_PARTS))
        self._call = call
        self._where = f"s3://{bucket}/{name}"
        self._at = {"Bucket": bucket, "Key": name}
        self._at["UploadId"] = call("create_multipart_upload", **self._at)["UploadId"]
        self._etags: dict[int, str] = {}

    def put(self, number: int, block: memoryview, num_bytes: int) -> None:
        """One PUT; parts count from 1 on."""
        body = bytes(block[:num_bytes])  # botocore takes no view
        answer = self._call("upload_part", **self._at, PartNumber=number + 1, Body=body)
        if "ETag" not in answer:
            raise TransientError("somebody has ended the upload", self._where)
        self._etags[number + 1] = answer["ETag"]

    def finish(self, size_bytes: int) -> None:
        """One POST."""
        parts = [{"PartNumber": n, "ETag": self._etags[n]} for n in sorted(self._etags)]
        done = self._call("complete_multipart_upload", **self._at, MultipartUpload={"Parts": parts})
        if "ETag" not in done:
            raise TransientError("somebody has ended the upload", self._where)

    def abandon(self) -> None:
        """One ABORT."""
        self._call("abort_multipart_upload", **self._at)
