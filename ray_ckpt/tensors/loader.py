"""One load from beginning to end: choose a step, hold it, open what it is made of, restore.

Knows the order. Which step is good, how a source is read and what a run does next are others'.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch.distributed.checkpoint.stateful import Stateful

from ray_ckpt.core.loading import LoadConfig
from ray_ckpt.core.manifest import NeededSource, StartSource
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.host_memory.nearby import Nearby
from ray_ckpt.storage.readers import reading
from ray_ckpt.storage.step_errors import found_corrupt
from ray_ckpt.tensors.choosing import Choice, choose, choose_newest, set_aside
from ray_ckpt.tensors.loading import LoadReport, restore
from ray_ckpt.tensors.model_wrapper import ModelWrapper
from ray_ckpt.tensors.proof import DamageFoundError
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.run import HfAssets
from ray_ckpt.tensors.sources import Naming
from ray_ckpt.tensors.starting import (
    base_of_saves,
    needs_of,
    open_sources,
    origins_of,
    pinned_start,
    refuse_unknown_parts,
)

NEWEST = -1


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What is in place now, and what the saves that follow are to know of it."""

    report: LoadReport
    choice: Choice
    origins: tuple[StartSource, ...]
    """Where the run took its weights from before its first step."""
    needs: tuple[NeededSource, ...]
    """Which bases the saves of an adapter alone belong to."""
    memories: tuple[Nearby, ...]
    """Copies in this host's memory that it may have come from."""


@dataclass(frozen=True, kw_only=True)
class Loader:
    """The state that loads fill, and the ranks that do it together."""

    catalog: Catalog
    ranks: Ranks
    model: ModelWrapper
    parts: Mapping[str, Stateful]
    assets: HfAssets | None

    def load(self, step: int, config: LoadConfig) -> Loaded:
        """The state of `step`, or of the newest good one, is in place; else what the config says.

        Collective. No purge takes what is read meanwhile.
        """
        named = [part for source in config.start.sources for part in source.parts]
        refuse_unknown_parts("load.start", named, self.parts)
        with contextlib.ExitStack() as held:
            return self._load(step, config, held)

    def _load(self, step: int, config: LoadConfig, held: contextlib.ExitStack) -> Loaded:
        damaged: dict[int, str] = {}
        while True:
            choice = self._choose(step, config, held, damaged)
            try:
                return self._restored(choice, config, held)
            except DamageFoundError as error:
                assert choice.step is not None, "other sources' damage is told as theirs"
                if step != NEWEST or config.on_damage == "raise":
                    raise found_corrupt(self.catalog.uri, choice.step, error.what) from error
                set_aside(self.catalog, self.ranks, choice.step, error.what)
                damaged[choice.step] = error.what

    def _restored(self, choice: Choice, config: LoadConfig, held: contextlib.ExitStack) -> Loaded:
        """What the choice says is in place.

        Raises:
            DamageFoundError: the chosen step is damaged, as its shards have shown.
        """
        start = self.ranks.on_coordinator(lambda: pinned_start(choice, config.start))
        config = replace(config, start=start)
        parts = {name: p for name, p in self.parts.items() if name not in config.exclude}
        naming = Naming.of(self.assets, self.model.converters)
        sources = self.ranks.together(
            lambda: open_sources(self.catalog, choice, config, naming, parts=tuple(self.parts))
        )
        if self.ranks.is_coordinator:
            for source in sources:
                held.enter_context(source.held())
        base = base_of_saves(sources, self.model)
        restored = restore(sources, self.ranks, model=self.model, parts=parts)
        memories = tuple(source.memory for source in sources if source.memory is not None)
        memory_bytes = self.ranks.gather(sum(memory.num_bytes for memory in memories))
        report = LoadReport(
            step=choice.step or 0,
            reason=choice.reason,
            skipped=choice.skipped,
            sources=restored.sources,
            memory_bytes=sum(memory_bytes),
            as_initialised=(*restored.as_initialised, *sorted(set(self.parts) - set(parts))),
        )
        return Loaded(
            report=report,
            choice=choice,
            origins=origins_of(choice, sources, self.ranks),
            needs=needs_of(base, self.ranks),
            memories=memories,
        )

    def _choose(
        self, step: int, config: LoadConfig, held: contextlib.ExitStack, damaged: dict[int, str]
    ) -> Choice:
        def hold(chosen: int) -> None:
            held.enter_context(reading(self.catalog.store, chosen, who="load"))

        if step == NEWEST:
            return choose_newest(self.catalog, self.ranks, config, hold=hold, damaged=damaged)
        return choose(self.catalog, self.ranks, step, hold=hold)
