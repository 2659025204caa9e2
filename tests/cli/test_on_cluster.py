from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from ray_ckpt.cluster.connect import find_manager
from ray_ckpt.storage.backends import open_catalog
from tests.cli.conftest import Answer
from tests.roots import flip_byte, make_root

pytestmark = pytest.mark.ray


def test_with_a_ray_address_the_manager_does_the_work(
    cli: Callable[..., Answer],
    root: str,
    tmp_path: Path,
    ray_cluster: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_root(root, (10, 20))
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    answer = cli("export", root, "--step", 20, "--to", tmp_path / "copies", "--json")
    assert answer.code == 0, answer.err
    assert "export step-20 hf-bf16: " in answer.err
    assert open_catalog(str(tmp_path / "copies")).export("hf-bf16", 20).step == 20
    manager = find_manager(root)
    assert manager is not None
    ray.kill(manager)


def test_with_a_ray_address_tasks_read_what_is_to_be_verified(
    cli: Callable[..., Answer], root: str, ray_cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_root(root, (10, 20))
    flip_byte(Path(root, "step-20", "__0_0.distcp"))
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster)
    answer = cli("verify", root, "--json")
    assert answer.code == 1, answer.err
    assert {row["what"]: row["result"] for row in answer.json} == {
        "step-10": "verified",
        "step-20": "corrupt",
    }
    assert "__0_0.distcp is crc64nvme:" in answer.json[1]["damage"][0]
    assert open_catalog(root).is_in_place(20)
