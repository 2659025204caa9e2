"""What is copied to another place, and what became of it there."""

from dataclasses import dataclass

from ray_ckpt.core import names
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import ExportView


@dataclass(frozen=True, slots=True, kw_only=True)
class Cargo:
    """One folder with a manifest, which lies under the same key at its root and at every copy."""

    folder: str
    title: str
    """`export hf-bf16 of step-500`."""
    manifest: Manifest
    cure: str
    """What to type where the folder itself is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Where a copy is now."""

    location: str
    """As a person opens it: a folder, a prefix, or a repository at a revision."""
    bytes_sent: int
    """By this host; 0 if the very same was there already, or the store has copied it by itself."""
    bytes_copied: int = 0
    """By the store itself."""
    fingerprint: str = ""
    """What `storage.versions` says of a copy that was made or read just now; else empty."""


def cargo_of_checkpoint(manifest: Manifest, root: str) -> Cargo:
    """A checkpoint of that root, as it is copied: optimizer and all."""
    folder = names.step_dir(manifest.step)
    return Cargo(
        folder=folder,
        title=f"checkpoint {folder}",
        manifest=manifest,
        cure=f"ray-ckpt verify {root} --step {manifest.step}    (says whether it lasts)",
    )


def cargo_of(export: ExportView) -> Cargo:
    """An export as it is copied."""
    return Cargo(
        folder=names.export_dir(export.name, export.step),
        title=f"export {export.name} of step-{export.step}",
        manifest=export.manifest,
        cure="remove the export's folder and export the step again",
    )
