"""What is known of the S3 store under a root: found out once, and remembered beside the root.

    in this process                       of each bucket at each address
    .ray_ckpt/store-<endpoint>.json       for the next process; `ray-ckpt doctor` writes it anew

It is kept by the address because a root can be copied to another store, its `.ray_ckpt/` included.
"""

import logging
from collections.abc import Callable
from contextlib import suppress

from ray_ckpt.core import names
from ray_ckpt.core.errors import ObjectNotFoundError, StorageError
from ray_ckpt.core.store_features import StoreFeatures, weaknesses
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.s3.probe import probe
from ray_ckpt.storage.s3.unfinished import Call

log = logging.getLogger("ray_ckpt")
_known: dict[tuple[str, str], StoreFeatures] = {}


class S3Features:
    """Of the store under one root.

    `endpoint` tells the address at which it answers; `call` raises what it refuses.
    """

    def __init__(self, store: Store, call: Call, endpoint: Callable[[], str]) -> None:
        self._store = store
        self._call = call
        self._endpoint = endpoint
        self._bucket, _, self._prefix = store.uri.removeprefix("s3://").partition("/")

    def get(self) -> StoreFeatures:
        """What the store does; asked of the store itself only where nobody has before.

        Raises:
            AuthorizationError, ObjectNotFoundError: nothing can be written there.
            TransientError: try again later.
        """
        at = (self._endpoint(), self._bucket)
        if at not in _known:
            _known[at] = self._remembered(at[0]) or self._found_out_and_told()
        return _known[at]

    def find_out(self) -> StoreFeatures:
        """What the store does now; remembered from then on."""
        folder = f"{self._prefix}/{names.PROBES}".lstrip("/")
        found = probe(self._call, bucket=self._bucket, folder=folder)
        endpoint = self._endpoint()
        with suppress(StorageError):  # the next process finds out for itself
            self._store.write(names.store_key(endpoint), found.to_json())
        _known[endpoint, self._bucket] = found
        return found

    def _found_out_and_told(self) -> StoreFeatures:
        """With a line in the log for everything that it lacks."""
        found = self.find_out()
        for finding in weaknesses(found, self._store.uri):
            log.warning("%s", finding)
        return found

    def _remembered(self, endpoint: str) -> StoreFeatures | None:
        try:
            return StoreFeatures.from_json(self._store.read(names.store_key(endpoint)))
        except ObjectNotFoundError:
            return None
