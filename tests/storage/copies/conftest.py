"""A root, and each kind of place that copies of it go to."""

from pathlib import Path

import pytest

from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.catalog import Catalog


@pytest.fixture
def catalog(root: str) -> Catalog:
    return open_catalog(root)


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3), "bucket"])
def destination(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param != "folder":
        return str(request.getfixturevalue(f"{request.param}_root"))
    return str(tmp_path / "copies")
