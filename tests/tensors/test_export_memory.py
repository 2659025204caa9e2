"""An export is made in little memory, however large the model: the kernel gives no more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench.models import STEP, commit_model
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.digests import find_damage
from tests.waiting import PATIENCE_S

MODEL_MB, LIMIT_MB = 560, 140
EXPORT = """
import resource, sys, threading
threading.stack_size(1 << 18)  # stacks count as well
import torch
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.export import export_step

torch.zeros(8).sum()
catalog = open_catalog(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name, dtype in (("full", "float32"), ("half", "bfloat16")):
    export_step(catalog, catalog.manifest(int(sys.argv[3])), ExportSpec(name=name, dtype=dtype))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_model_four_times_as_large_as_the_memory_is_exported(root: str) -> None:
    commit_model(root, MODEL_MB, kind="permute")
    catalog = open_catalog(root)
    command = [sys.executable, "-c", EXPORT, root, str(LIMIT_MB * 1_000_000), str(STEP)]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    for name in ("full", "half"):
        export = catalog.export(name, STEP)
        assert find_damage(catalog.store, f"exports/{name}/step-{STEP}", export.manifest) == []
    sizes = [path.stat().st_size for path in Path(root, "exports/full").rglob("*.safetensors")]
    assert sum(sizes) > 4 * LIMIT_MB * 1_000_000 * 0.95
