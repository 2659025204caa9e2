"""What a run tells its CheckpointManager about itself, beside the state."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_ckpt.core.draft import Node
from ray_ckpt.core.events import SaveEvent
from ray_ckpt.core.policy import LifecyclePolicy
from ray_ckpt.tensors.logits import Reference

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
"""Of a base model: an export is cut into files as that is."""
CARD = "README.md"
"""Of a base model: its front matter names the license; an export has a card of its own."""
LICENSE = "LICENSE"
REFERENCE = "reference.safetensors"
"""What the trained model makes of a prompt; stays with the step."""
_TEXTS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
"""How a tokenizer's and a model's own files end; code from the Hub is not taken along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfAssets:
    """What an export needs beside the weights; saved with every step, so that it is never lost."""

    family: str
    """The adapter that knows the model's names, for example `llama`."""
    files: Mapping[str, bytes]
    """`config.json`, `generation_config.json`, the tokenizer's files, by name. What `README.md`
    says of the license is said by every export."""

    @classmethod
    def of_folder(cls, family: str, folder: str | Path) -> "HfAssets":
        """What a local Hugging Face folder holds beside its weights."""
        paths = [path for path in sorted(Path(folder).iterdir()) if is_asset(path.name)]
        return cls(family=family, files={path.name: path.read_bytes() for path in paths})

    def config(self) -> dict[str, Any] | None:
        """What `config.json` says; None if it is not among the files."""
        return json.loads(self.files[CONFIG]) if CONFIG in self.files else None


def is_asset(name: str) -> bool:
    """Whether a file of a Hugging Face folder is taken along with its weights."""
    if name in (INDEX, CARD, LICENSE):
        return True
    return name.endswith(_TEXTS) and not name.endswith(".index.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The run this process belongs to."""

    owner: str | None = None
    """Equal for all restarts of one training job, which may take its own lease over at once."""
    policy: LifecyclePolicy | None = None
    """What is to happen after a save; None leaves the root's policy as it is."""
    on_event: Callable[[SaveEvent], None] | None = None
    """Called on rank 0 for every save that ended or was skipped; must not block."""
    reference: Callable[[], Reference] | None = None
    """Called on every rank whenever a step is saved: what the model makes of a short prompt. It is
    saved with the step; `logits_within` compares an export with it."""
    node: Node | None = None
    """Where this process runs, if it saves to its node's own disk; None for the host's name. On Ray
    `cluster.train.this_node()`, so that a task can be sent there."""
