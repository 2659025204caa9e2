"""A step with NaN or Inf in its weights is kept, named, and never gone on from by itself."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ray_ckpt.core.errors import IntegrityError, UsageError
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.policy import KeepConfig, LifecyclePolicy
from ray_ckpt.core.reconcile import decide_all
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.tensors.export_plan import plan_export
from ray_ckpt.tensors.finite import is_finite
from ray_ckpt.tensors.manager import CheckpointManager
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.states import TrainingState
from tests.tensors.plain import EVERY_STEP_SYNC, Layer, loaded, plain_manager, save_steps
from tests.tensors.ranks import run
from tests.tensors.tiny import error_of

# ---- what a save finds ----


def _save_broken(root: str) -> list[float]:
    """Step 1: NaN in rank 1's rows alone. Step 2: Inf in what all ranks have. Step 3: none."""
    model = Layer()
    manager = plain_manager(root, model, EVERY_STEP_SYNC)
    for step in (1, 2, 3):
        model.fill(step)
        if step == 1 and dist.get_rank() == 1:
            model.local_weight[-1, -1] = math.nan
        if step == 2:
            model.bias.detach()[0] = -math.inf
        manager.save(step)
    manager.close()
    return sorted(model.values())


def test_the_manifest_names_the_tensors_that_any_rank_found_broken(tmp_path: Path) -> None:
    run(_save_broken, str(tmp_path))
    catalog = open_catalog(str(tmp_path))
    found = [catalog.manifest(step).non_finite for step in (1, 2, 3)]
    assert found == [("weight",), ("bias",), ()]


def test_an_optimizer_may_hold_what_it_likes(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.state[model.weight]["momentum_buffer"].fill_(math.inf)
    manager = CheckpointManager(
        str(tmp_path),
        TrainingState(model=ModelWrapper(model), optimizer=optimizer),
        config=EVERY_STEP_SYNC,
    )
    manager.save(1)
    assert manager.load().step == 1
    manager.close()
    assert open_catalog(str(tmp_path)).manifest(1).non_finite == ()
    assert optimizer.state[model.weight]["momentum_buffer"].isinf().all()


class _Mixed(nn.Module):
    """Buffers of every kind; those called `bad` hold one number that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        for name, tensor in _MIXED.items():
            self.register_buffer(name, tensor)


def _with(value: float, dtype: torch.dtype) -> Tensor:
    tensor = torch.ones(8)
    tensor[3] = value
    return tensor.to(dtype)


_MIXED = {
    "good_int64": torch.full((8,), 2**62),
    "good_bool": torch.ones(8, dtype=torch.bool),
    "good_bfloat16": _with(3e38, torch.bfloat16),
    "good_float8": _with(448.0, torch.float8_e4m3fn),
    "good_float4": torch.ones(8, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
    "good_empty": torch.empty(0),
    "bad_bfloat16": _with(math.nan, torch.bfloat16),
    "bad_float16": _with(1e9, torch.float16),
    "bad_float8": _with(math.nan, torch.float8_e4m3fn),
    "bad_float8_e5m2": _with(math.inf, torch.float8_e5m2),
    "bad_float64": _with(-math.inf, torch.float64),
    "bad_complex": _with(math.nan, torch.complex64),
}


def test_every_kind_of_number_is_looked_at_as_what_it_is() -> None:
    found = {name: is_finite(tensor) for name, tensor in _MIXED.items()}
    assert found == {name: name.startswith("good") for name in _MIXED}


def test_a_model_of_every_kind_of_number_is_saved(tmp_path: Path) -> None:
    model = _Mixed()
    manager = plain_manager(tmp_path, model, EVERY_STEP_SYNC)
    manager.save(1)
    manager.close()
    broken = {name for name in _MIXED if name.startswith("bad")}
    assert set(open_catalog(str(tmp_path)).manifest(1).non_finite) == broken


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
        *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    ],
    ids=str,
)
def test_every_byte_of_a_float8_is_what_torch_says_it_is(dtype: torch.dtype) -> None:
    bytes_ = torch.arange(256).to(torch.uint8)
    found = [is_finite(byte.reshape(1).view(dtype)) for byte in bytes_]
    assert found == bytes_.view(dtype).float().isfinite().tolist()
    assert is_finite(torch.empty(0, dtype=dtype))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.full((1000,), 3e38),
        torch.full((1000,), -6e4, dtype=torch.float16),
        torch.full((1000,), 3e38, dtype=torch.bfloat16),
        torch.full((1000,), 1.7e308, dtype=torch.float64),
        torch.full((1000,), 5e4, dtype=torch.float8_e5m2),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_numbers_whose_sum_overflows_are_finite(tensor: Tensor) -> None:
    assert is_finite(tensor)


def test_infinities_that_cancel_out_are_found() -> None:
    assert not is_finite(torch.tensor([math.inf, -math.inf, 1.0]))
    assert is_finite("no tensor at all")


# ---- what becomes of such a step ----


@pytest.fixture
def sick_root(tmp_path: Path) -> Path:
    """Steps 1, 2 and 3, the last of which holds NaN."""
    save_steps(tmp_path / "run", 1, 2)
    model = Layer(value=3.0)
    model.local_weight[0, 0] = math.nan
    manager = plain_manager(tmp_path / "run", model, EVERY_STEP_SYNC)
    manager.save(3)
    manager.close()
    return tmp_path / "run"


def test_a_run_resumes_from_the_healthy_step_before_and_says_why(sick_root: Path) -> None:
    """Scenario 22: NaN or Inf in the weights."""
    model = Layer(value=-1.0)
    manager = plain_manager(sick_root, model)
    report = manager.load()
    manager.close()
    assert (report.step, model.values()) == (2, {2.0})
    assert report.skipped == ((3, "committed: NaN or Inf in 1 tensors, first weight"),)
    assert open_catalog(str(sick_root)).checkpoint(3).state is CheckpointState.COMMITTED


def test_whoever_asks_for_the_step_by_number_gets_it(sick_root: Path) -> None:
    model = Layer(value=-1.0)
    manager = plain_manager(sick_root, model)
    assert manager.load(step=3).step == 3
    manager.close()
    assert model.local_weight.isnan().sum() == 1


def test_the_run_that_goes_on_sets_it_aside_and_saves_the_step_anew(sick_root: Path) -> None:
    model = Layer()
    manager = plain_manager(sick_root, model, EVERY_STEP_SYNC)
    manager.load()
    model.fill(33.0)
    manager.save(3)
    manager.close()
    assert loaded(sick_root) == (3, {33.0})
    views = open_catalog(str(sick_root)).observe().checkpoints
    aside = [v for v in views if v.state is CheckpointState.TRASHED]
    assert [(v.step, v.manifest and v.manifest.non_finite) for v in aside] == [(3, ("weight",))]


def test_a_run_whose_every_step_is_sick_does_not_start_from_scratch(tmp_path: Path) -> None:
    model = Layer(value=math.nan)
    manager = plain_manager(tmp_path, model, EVERY_STEP_SYNC)
    manager.save(1)
    with pytest.raises(IntegrityError, match="NaN or Inf in 2 tensors"):
        manager.load()
    manager.close()


def test_retention_counts_healthy_steps_alone(sick_root: Path) -> None:
    save_steps(sick_root, 4)
    observed = open_catalog(str(sick_root)).observe()
    verified = tuple(replace(v, state=CheckpointState.VERIFIED) for v in observed.checkpoints)
    policy = LifecyclePolicy(keep=KeepConfig(latest=2))
    verdicts = decide_all(replace(observed, checkpoints=verified, policy=policy), holds={}, now=0.0)
    kept: dict[int, Any] = {verdict.step: verdict.reasons for verdict in verdicts if verdict.keep}
    assert {2, 4} <= set(kept), "the newest two that a run can go on from"
    assert not kept.keys() & {1}
    assert "newest two verified" not in kept.get(3, ())


def test_an_export_of_it_is_refused_unless_it_is_allowed(sick_root: Path) -> None:
    """Scenario 22: it is exported only if somebody insists."""
    catalog = open_catalog(str(sick_root))
    with pytest.raises(IntegrityError, match="1 tensors of step-3 hold NaN or Inf: weight"):
        plan_export(catalog, catalog.manifest(3), ExportSpec(name="hf"))
    allowed = ExportSpec(name="hf", allow_non_finite=True)
    error = error_of(lambda: plan_export(catalog, catalog.manifest(3), allowed))
    assert isinstance(error, UsageError), "another thing: this step knows of no model family"
