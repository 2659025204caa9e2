"""When a training loop saves, what the last save holds, and how a save is made."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from ray_ckpt.core.config import Dtype, a_word, at_least
from ray_ckpt.core.errors import ConfigError

Mode = Literal["sync", "async", "process"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Everything:
    """The last save is like the others: the run can go on from it."""

    kind: Literal["everything"] = "everything"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOnly:
    """The last save holds the weights alone, converters undone; a run can start from them."""

    kind: Literal["model"] = "model"
    dtype: Dtype | None = None
    """What floating-point tensors are cast to; None leaves them as they train."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HuggingFace:
    """The last save is an export that the ranks write themselves; the steps before it stay."""

    kind: Literal["hf"] = "hf"
    name: str = "hf"
    """Folder under `exports/`."""
    dtype: Dtype = "bfloat16"
    """What floating-point tensors are cast to."""

    def __post_init__(self) -> None:
        a_word("last.name", self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveConfig:
    """How a training loop saves."""

    every_steps: int | None = 500
    """Optimizer steps between two saves; None saves by time or on request only."""
    every_s: float | None = None
    """Seconds between two saves, by rank 0's clock; with `every_steps`, whichever comes first."""
    first_step: bool = False
    """Also save after the first step."""
    last: Everything | ModelOnly | HuggingFace = field(default_factory=Everything)
    """What the save of the last step holds."""
    sigterm_notice_s: float | None = None
    """Seconds between SIGTERM and the kill: a save that fits is made, then `stop_reason` is set."""
    listen: bool = True
    """Save when somebody asks to: `request_save()`, `ray-ckpt save-now`."""

    mode: Mode = "async"
    """`async` and `process`: training goes on as soon as the state is copied to host memory; a
    thread writes it, or a process of its own that does not share the trainer's interpreter lock."""
    when_busy: Literal["skip", "wait"] = "skip"
    """What becomes of a save that is due while the one before is still being written."""
    full_every_saves: int = 1
    """1: every save writes everything. N: tensors that have not changed may lie in one file of up
    to N steps in a row, written once: a hard link on a disk, a copy by the store on S3. Each step
    stays whole whatever becomes of the others; on a disk they share those bytes, and what befalls
    a sector befalls all N. For runs with a frozen base; not with `local_dir`."""
    keep_in_memory_s: float | None = None
    """The newest checkpoint's copy in host memory outlives a trainer that was killed, for so many
    seconds: a restart on the same nodes reads no shard from storage. It is there from a commit to
    the beginning of the next save. None: it goes with the trainer. Linux; not with mode `sync`."""
    on_failure: Literal["continue", "stop"] = "continue"
    """Whether a save that failed in the background stops training at the next step."""
    local_dir: str | None = None
    """Folder on each node's own disk that checkpoints are saved to first, the same path on every
    node: the root's manager brings them to the root and commits them there. None saves to the root
    itself. A last save in Hugging Face format always goes there."""
    timeout_s: float = 600.0
    """Seconds the ranks wait for each other during one save before it fails."""

    def __post_init__(self) -> None:
        at_least(1, every_steps=self.every_steps, full_every_saves=self.full_every_saves)
        if self.local_dir is not None and not PurePosixPath(self.local_dir).is_absolute():
            raise ConfigError(
                f"local_dir must be an absolute path, got {self.local_dir!r}", "local_dir"
            )
        if self.local_dir is not None and self.full_every_saves > 1:
            raise ConfigError(
                "full_every_saves must be 1 with local_dir: what lies on a node is all there is "
                "until it is brought, and no two saves may be lost with it",
                "full_every_saves",
            )
        if self.keep_in_memory_s is not None and self.mode == "sync":
            raise ConfigError(
                "mode 'sync' writes the model's own memory and makes no copy to keep: with "
                "keep_in_memory_s choose 'async' or 'process'",
                "keep_in_memory_s",
            )
        for name in ("every_s", "sigterm_notice_s", "keep_in_memory_s", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be more than 0 seconds, got {value}", name)
