"""A state dict filled from one folder, by all ranks together or by one process alone.

plan       each rank its own, since no plan depends on another's     all know that all could
read       tensors into place, values as they lie
compare    what was read with what was committed                    from memory? else storage
give       what one of several ranks has read for the others
put        values in their places: what is pickled is run now, not before
"""

import contextlib
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from ray_ckpt.core.errors import IntegrityError, RayCkptError, StateDictError
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.tensors.load_plan import LoadPlan, plan_load
from ray_ckpt.tensors.proof import DamageFoundError, Proof
from ray_ckpt.tensors.ranks import Ranks, ours, sentence
from ray_ckpt.tensors.reader import step_reader
from ray_ckpt.tensors.replicas import Replicas
from ray_ckpt.tensors.step_index import StepIndex
from ray_ckpt.tensors.values import Values

T = TypeVar("T")
log = logging.getLogger("ray_ckpt")


class Reader(Protocol):
    """What a folder can be loaded by."""

    uri: str
    runs_pickles: bool
    """Whether its values are ours, and may be any object."""

    @property
    def proof(self) -> Proof | None:
        """What compares its bytes while they are read, if anything does."""
        ...

    @property
    def index(self) -> StepIndex:
        """What it holds."""
        ...

    @property
    def is_far(self) -> bool:
        """Whether a read is a request to somewhere else."""
        ...

    def read(
        self, plan: LoadPlan, state_dict: Mapping[str, Any], values: Values, progress: Progress
    ) -> None:
        """Fills the targets of the plan, which was made for that flat state dict."""
        ...


def load_into(
    state_dict: dict[str, Any],
    reader: Reader,
    *,
    ranks: Ranks | None = None,
    progress: Progress = UNTOLD,
) -> None:
    """Every tensor of `state_dict` filled in place, every other entry replaced.

    Collective, unless this process loads alone.

    Raises:
        StateDictError: a tensor has another shape on storage; no tensor was read.
        DamageFoundError: what was read is not what was committed; no pickle of it was run.
        IntegrityError: it cannot be read.
    """
    flat, paths = flatten_state_dict(state_dict)
    values = Values(reader.uri, runs_pickles=reader.runs_pickles)
    replicas = Replicas(flat, is_far=reader.is_far)
    plan = _agreed(lambda: plan_load(reader.index, flat, replicas.reads), ranks, reader.uri)
    _read_proven(
        lambda: _agreed(lambda: reader.read(plan, flat, values, progress), ranks, reader.uri),
        reader.proof,
        ranks,
    )
    _agreed(replicas.give, ranks, reader.uri)
    _agreed(lambda: values.put(state_dict, paths), ranks, reader.uri)


def read_tensors(
    catalog: Catalog, manifest: Manifest, keys: Sequence[str], *, progress: Progress = UNTOLD
) -> dict[str, Tensor]:
    """These tensors, whole and on the CPU, in this process alone."""
    entries = {entry.name: entry for entry in manifest.tensors}
    state_dict = {
        key: torch.empty(entries[key].shape, dtype=getattr(torch, entries[key].dtype))
        for key in keys
    }
    load_into(state_dict, step_reader(catalog, manifest), progress=progress)
    return state_dict


def _read_proven(read: Callable[[], None], proof: Proof | None, ranks: Ranks | None) -> None:
    """What was read is as it was committed; if it is not so in memory, storage is read."""
    try:
        with _damage_comes_first(proof, ranks):
            read()
    except DamageFoundError as error:
        assert proof is not None and ranks is not None, "damage is found by who looks for it"
        if not ranks.any(proof.memory.num_bytes > 0):
            raise
        log.warning("a copy in memory is not as committed, all is read again: %s", error.what)
        proof.begin_without_memory()
        with _damage_comes_first(proof, ranks):
            read()


@contextlib.contextmanager
def _damage_comes_first(proof: Proof | None, ranks: Ranks | None) -> Generator[None]:
    """What the block has read is as it was committed; if it is not, no other error matters."""
    if proof is None:
        yield
        return
    assert ranks is not None, "who loads alone has nobody to share the proof with"
    try:
        yield
    except RayCkptError:  # every rank has the same one
        proof.refuse_damage(ranks)
        raise
    proof.refuse_damage(ranks)


def _agreed(act: Callable[[], T], ranks: Ranks | None, step: str) -> T:
    """What it returned here, if it raised nowhere."""
    results: list[T] = []
    own: Exception | None = None
    try:
        results.append(act())
    except Exception as error:  # noqa: BLE001  every rank must hear of it, then it is raised
        own = error
    everywhere = [own] if ranks is None else ranks.gather(own)
    raised = {rank: error for rank, error in enumerate(everywhere) if error is not None}
    if raised:
        raise _meant(raised, step) from (own or next(iter(raised.values())))
    return results[0]


def _meant(raised: Mapping[int, Exception], step: str) -> RayCkptError:
    meant = ours(raised)
    if meant is not None:
        return meant
    text = sentence(raised)
    if all(isinstance(cause, ValueError) for cause in raised.values()):
        return StateDictError(
            f"{step} does not fit the model: {text}",
            safe="no tensor was read, the model is as it was",
            do="load it with the model and optimizer it was saved from",
        )
    return IntegrityError(
        f"{step} cannot be read: {text}",
        step,
        "storage was not changed; what it was read into may hold some of its values",
        "do not train on: start again from another step or source, or once it can be read",
    )
