"""Others that delete step folders by rules of their own, which know neither pins nor copies.

    checkpoint_manager_snapshot.json    what Ray Train keeps, and with num_to_keep removes
    *.toml, *.json                      what TorchTitan is told, with checkpoint.keep_latest_k

Looked for in the root and in the folder around it; on an object store, Ray Train's list alone.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from ray_ckpt.core import names
from ray_ckpt.core.errors import RayCkptError
from ray_ckpt.core.findings import Finding, ok, problem
from ray_ckpt.storage.backends import open_folder
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.disk.store import LocalStore

_RAY_TRAIN = "checkpoint_manager_snapshot.json"
_TITAN_KEEPS = 10
"""What `keep_latest_k` is where a configuration does not say."""
_CONFIG_BYTES = 1 << 20


def look_for_second_deleters(store: Store) -> list[Finding]:
    """Each that would remove steps of this root."""
    found = [*_ray_train(store), *_torchtitan(store)]
    return found or [ok("nobody else is seen to delete steps here", store.uri)]


def _ray_train(store: Store) -> Iterator[Finding]:
    """Names that it lists are folders beside its list."""
    around, own_name = _around(store)
    for place, below in ((store, ""), (around, f"{own_name}/")):
        listed = _listed_by_ray(place) if place is not None else []
        ours = sorted(name for name in listed if _is_ours(f"{name}/", below))
        if ours:
            yield problem(
                f"Ray Train lists {len(ours)} folders of this run among its own checkpoints, "
                f"first: {ours[0]}. With num_to_keep it removes them; after a purge here "
                "its run cannot be resumed",
                f"{place.uri if place else store.uri}/{_RAY_TRAIN}",
                "report metrics to Ray Train and no Checkpoint; leave num_to_keep out",
            )


def _is_ours(folder: str, below: str) -> bool:
    """Whether a folder is a step of the root, or holds the root; `below` leads to the root."""
    if below and below.startswith(folder):
        return True
    return folder.startswith(below) and names.parse_step(folder[len(below) : -1]) is not None


def _around(store: Store) -> tuple[Store | None, str]:
    """The folder in which the root lies, and the root's name there."""
    if "/" not in store.uri.removeprefix("s3://"):
        return None, ""
    catalog, own_name = open_folder(store.uri)
    return catalog.store, own_name


def _listed_by_ray(place: Store) -> list[str]:
    try:
        document = json.loads(place.read(_RAY_TRAIN))
        results = [*document["checkpoint_results"], *document.get("pending_training_results", [])]
        return [str(result["checkpoint_dir_name"]) for result in results]
    except (RayCkptError, ValueError, KeyError, TypeError):
        return []  # not there, or of a version that says it otherwise


def _torchtitan(store: Store) -> Iterator[Finding]:
    if not isinstance(store, LocalStore):
        return
    root = Path(store.uri)
    for path in sorted((*_configurations(root), *_configurations(root.parent))):
        kept = _kept_by_titan(_section(path), root.name)
        if kept:
            yield problem(
                f"TorchTitan keeps the last {kept} steps and removes all others, pinned or not",
                str(path),
                "set checkpoint.keep_latest_k = 0 and leave purging to ray-ckpt",
            )


def _configurations(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        is_one = path.suffix in (".toml", ".json") and path.is_file()
        if is_one and path.stat().st_size <= _CONFIG_BYTES:
            yield path


def _section(path: Path) -> Mapping[str, Any]:
    """What the file says about checkpoints; nothing if it is no such file."""
    parse = tomllib.loads if path.suffix == ".toml" else json.loads
    try:
        section = parse(path.read_text(encoding="utf-8"))["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return cast(dict[str, Any], section) if isinstance(section, dict) else {}


def _kept_by_titan(section: Mapping[str, Any], folder: str) -> int:
    """So many; 0 for all, or where it saves elsewhere or not at all."""
    is_on = section.get("enable") or section.get("enable_checkpoint")
    is_here = Path(str(section.get("folder", "checkpoint"))).name == folder
    kept = section.get("keep_latest_k", _TITAN_KEEPS if is_on else 0)
    return kept if is_here and isinstance(kept, int) else 0
