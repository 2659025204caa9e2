"""An object is created on an S3 store, by whatever that store can do about two who create it."""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from ray_ckpt.core.errors import IntegrityError, ObjectNotFoundError
from ray_ckpt.core.store_features import Creates, StoreFeatures
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.election import create_by_election


def create_object(
    store: Store,
    key: str,
    data: bytes,
    *,
    features: StoreFeatures,
    put_new: Callable[[str, bytes], None],
) -> None:
    """The object is there, put by this call; the very same bytes count as put by it.

    `put_new` is one PUT with If-None-Match. In an election it goes along where the store knows it:
    it may have learnt more since somebody found out.

    Raises:
        ObjectExistsError: something is there.
        IntegrityError: what arrived is not what was sent, and the store has not noticed.
    """
    if features.creates is Creates.EXCLUSIVE:
        put_new(key, data)
    else:
        put = store.write if features.creates is Creates.REFUSED else put_new
        create_by_election(store, key, data, partial(put, key, data))
    if not features.checks_checksums:
        _prove(store, key, data)


def _prove(store: Store, key: str, data: bytes) -> None:
    """What is there is what was sent, unless somebody has removed it meanwhile."""
    with suppress(ObjectNotFoundError):
        if store.read(key) != data:
            where = f"{store.uri}/{key}"
            raise IntegrityError(
                "what is there differs from what was sent",
                where,
                "whatever was sent before is untouched",
                f"remove it and try again: aws s3 rm {where}",
            )
