"""How a training loop begins: it resumes where there is a checkpoint, else it starts as told.

Each way to start is a type that holds what it needs. Every key of a model has one owner (the base
or one converter), and a source supplies exactly the keys of the owners it is named for.
"""

from dataclasses import dataclass, field
from typing import Literal

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConfigError

Format = Literal["dcp", "hf", "peft"]
BASE = "base"
"""Owner of every key that no converter claims."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A folder that tensors are taken from."""

    path: str
    """`/runs/a/step-500`, `s3://bucket/run/step-500` or a Hugging Face or PEFT folder, which may
    also be `hf://org/repo[@revision]`."""
    format: Format = "dcp"
    """`dcp`: native names. `hf`: the model family's names, also quantized. `peft`: an adapter."""
    owners: tuple[str, ...] = (BASE,)
    """Whose keys it supplies: `base`, or names of converters."""
    parts: tuple[str, ...] = ()
    """What is taken beside the model: `optimizer`, `lr_scheduler`, ...; `dcp` only."""

    @property
    def name(self) -> str:
        """What manifests call it: the folder's own name, or `org/repo`."""
        if names.is_repository(self.path):
            return self.path.removeprefix("hf://").partition("@")[0]
        return self.path.rstrip("/").rpartition("/")[2]

    def __post_init__(self) -> None:
        if names.is_repository(self.path) and self.format == "dcp":
            raise ConfigError(
                f"{self.path} is a Hugging Face repository, and format dcp a checkpoint's",
                "source.format",
                do="set format = 'hf' or 'peft'; a checkpoint's folder: ray-ckpt fetch it first",
            )
        if not self.owners:
            raise ConfigError("a source must supply somebody's keys", "source.owners")
        if self.parts and self.format != "dcp":
            raise ConfigError(
                f"a {self.format} folder holds no {', '.join(self.parts)}",
                "source.parts",
                do="take these from a source of format 'dcp'",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class FromScratch:
    """The model trains from the weights it was initialised with."""

    kind: Literal["scratch"] = "scratch"

    @property
    def sources(self) -> tuple[Source, ...]:
        """None."""
        return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FromWeights:
    """The base's weights come from one folder; converters' own keys are as initialised."""

    path: str
    format: Format = "dcp"
    parts: tuple[str, ...] = ()
    """What is taken beside the model: `optimizer`, `lr_scheduler`, ...; `dcp` only."""
    kind: Literal["weights"] = "weights"

    @property
    def sources(self) -> tuple[Source, ...]:
        """The one source."""
        return (Source(path=self.path, format=self.format, parts=self.parts),)

    def __post_init__(self) -> None:
        _ = self.sources  # a Source refuses what cannot be


@dataclass(frozen=True, slots=True, kw_only=True)
class FromSources:
    """Weights from several folders: a base model and an adapter, an average, ..."""

    sources: tuple[Source, ...]
    kind: Literal["sources"] = "sources"

    def __post_init__(self) -> None:
        owners = [owner for source in self.sources for owner in source.owners]
        twice = sorted({owner for owner in owners if owners.count(owner) > 1})
        parts = [part for source in self.sources for part in source.parts]
        twice += sorted({part for part in parts if parts.count(part) > 1})
        if twice:
            raise ConfigError(
                f"more than one source supplies {', '.join(twice)}",
                "start.sources",
                "nothing was loaded",
                "name each owner and each part in one source only",
            )


Start = FromScratch | FromWeights | FromSources


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """How a training loop loads."""

    start: Start = field(default_factory=FromScratch)
    """What a run without a checkpoint of its own starts from; a restarted one resumes instead."""
    exclude: tuple[str, ...] = ()
    """Parts that keep the values they have: `dataloader`, `optimizer`, ...; never the model."""
    on_damage: Literal["fall back", "raise"] = "fall back"
    """A damaged newest step is set aside and the one before it is loaded, or it is an error."""

    def __post_init__(self) -> None:
        if "model" in self.exclude:
            raise ConfigError(
                "the model cannot be excluded from loading", "exclude", do="use load.start instead"
            )
        parts = {part for source in self.start.sources for part in source.parts}
        if "lr_scheduler" in parts and "optimizer" not in parts:
            raise ConfigError(
                "lr_scheduler cannot be taken without optimizer, into which it writes",
                "start.parts",
                do="take both, or neither",
            )
        if "optimizer" in self.exclude and "lr_scheduler" not in self.exclude:
            raise ConfigError(
                "lr_scheduler must be excluded when optimizer is: it writes into it", "exclude"
            )
