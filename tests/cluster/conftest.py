"""Fixtures of the tests that need Ray."""

from collections.abc import Callable, Iterator

import pytest
import ray

from ray_ckpt.cluster.connect import find_manager, start_manager


@pytest.fixture
def manage(ray_cluster: str) -> Iterator[Callable[[str], object]]:
    """Starts the manager of a root with quick rounds; all of them are gone after the test."""
    roots: list[str] = []

    def start(root: str) -> object:
        roots.append(root)
        return start_manager(root, interval_s=0.2)

    yield start
    for root in roots:
        handle = find_manager(root)
        if handle is not None:
            ray.kill(handle)
