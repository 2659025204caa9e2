"""What a store lacks is told with what it means and what to do."""

import pytest

from ray_ckpt.core.findings import has_problem
from ray_ckpt.core.store_features import Creates, StoreFeatures, weaknesses


@pytest.mark.parametrize("text", [b"{", b"[]", b"{}", b'{"creates": "exclusive", "newer": 1}'])
def test_what_another_version_remembers_says_nothing(text: bytes) -> None:
    assert StoreFeatures.from_json(text) is None


def test_what_is_remembered_is_read_again() -> None:
    features = StoreFeatures(creates=Creates.RACY, checks_checksums=False)
    assert StoreFeatures.from_json(features.to_json()) == features


def test_a_store_that_does_everything_has_nothing_to_tell() -> None:
    assert weaknesses(StoreFeatures(), "s3://bucket/run") == ()


_OTHER_CREATES = (Creates.RACY, Creates.IGNORED, Creates.REFUSED)


@pytest.mark.parametrize(
    "features",
    [
        *(StoreFeatures(creates=creates) for creates in _OTHER_CREATES),
        *(StoreFeatures(creates=creates, lists_at_once=False) for creates in _OTHER_CREATES),
        StoreFeatures(checks_checksums=False),
        StoreFeatures(lists_at_once=False),
        StoreFeatures(lists_uploads=False),
        StoreFeatures(deletes_in_batches=False),
        StoreFeatures(copies=False),
    ],
)
def test_every_lack_says_what_it_means_and_what_to_do(features: StoreFeatures) -> None:
    found = weaknesses(features, "s3://bucket/run")
    assert found
    assert all(f.what and f.do and f.where == "s3://bucket/run" for f in found)
    is_unsafe = features.creates is not Creates.EXCLUSIVE and not features.lists_at_once
    assert has_problem(found) is (is_unsafe or not features.copies)
