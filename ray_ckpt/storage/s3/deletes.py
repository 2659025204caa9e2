"""Objects of a bucket are deleted: a thousand by one request, or one by one where that is unknown.

Not by s3fs's `rm`: it takes `*` for a pattern, and drops the refusals in S3's answer. One by one is
what some stores leave: they have no such request, or want a checksum with it that clients of today
do not send.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from ray_ckpt.core.errors import StorageError
from ray_ckpt.storage.s3.errors import is_unknown, raise_refusal

_BATCH_KEYS = 1000


class S3Deletes:
    """Remembers whether the store has refused a batch."""

    def __init__(self, call: Callable[..., dict[str, Any]], bucket: str) -> None:
        self._call = call
        self._bucket = bucket
        self._has_batches = True

    def delete(self, names: Sequence[str]) -> None:
        """The first object by itself, so that a marker is gone before the rest; then in batches."""
        rest = range(1, len(names), _BATCH_KEYS)
        for batch in (names[:1], *(names[start : start + _BATCH_KEYS] for start in rest)):
            if batch:
                self._batch(batch)

    def _batch(self, names: Sequence[str]) -> None:
        if self._has_batches:
            try:
                self._at_once(names)
                return
            except StorageError as error:
                if not is_unknown(error):
                    raise
                self._has_batches = False
        for name in names:
            self._call("delete_object", name, Bucket=self._bucket, Key=name)

    def _at_once(self, names: Sequence[str]) -> None:
        doomed = {"Objects": [{"Key": name} for name in names], "Quiet": True}
        answer = self._call("delete_objects", names[0], Bucket=self._bucket, Delete=doomed)
        for refusal in cast(list[dict[str, str]], answer.get("Errors", [])):
            code = refusal.get("Code", "")
            text = f"{refusal.get('Key')}: {code} {refusal.get('Message')}"
            raise_refusal(code, text, f"s3://{self._bucket}/{names[0]}")
