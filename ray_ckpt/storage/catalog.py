"""The checkpoints and exports of one root: the only code that knows what "committed" means.

A step is committed if and only if the folder `step-<n>` holds a manifest. Everything else about it
is read from storage each time it is asked for; only an `Observer` remembers what it has read.
"""

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from ray_ckpt.core import names
from ray_ckpt.core.errors import (
    ConfigError,
    IntegrityError,
    ObjectExistsError,
    StepNotFoundError,
    UnknownSchemaError,
)
from ray_ckpt.core.lifecycle import CheckpointState
from ray_ckpt.core.manifest import Manifest
from ray_ckpt.core.observation import READABLE, CheckpointView, ExportView, Observation
from ray_ckpt.core.pins import Pin
from ray_ckpt.core.wanted import verify_action
from ray_ckpt.storage import step_errors
from ray_ckpt.storage.base import Store
from ray_ckpt.storage.commit import Commit
from ray_ckpt.storage.digests import find_damage, find_damage_before_reading
from ray_ckpt.storage.drafts import Drafts
from ray_ckpt.storage.listing import look_at_step, manifest_in, sizes_in
from ray_ckpt.storage.observer import Observer, with_verdict
from ray_ckpt.storage.parts import ExportParts
from ray_ckpt.storage.pins import read_pins, write_pin
from ray_ckpt.storage.progress import UNTOLD, Progress
from ray_ckpt.storage.records import Records
from ray_ckpt.storage.trash import Trash


class Catalog:
    """Lists, commits, verifies, pins, trashes and erases."""

    def __init__(self, store: Store, commit: Commit) -> None:
        self.store = store
        self.commit = commit
        self.records = Records(store)
        self.drafts = Drafts(store, commit)

    @property
    def uri(self) -> str:
        """The root as a person types it."""
        return self.store.uri

    # ---- what is there ----

    def observer(self) -> Observer:
        """For who looks again and again: it remembers what it has read."""
        return Observer(self.store, self.records, self.drafts)

    def observe(self) -> Observation:
        """All that storage shows of the run, manifests without the index of their tensors."""
        return self.observer().observe(now=0.0)

    def checkpoint(self, step: int) -> CheckpointView:
        """A committed checkpoint as it is now, its state and pins included; a few reads.

        Raises:
            StepNotFoundError: there is none; the message lists the ones there are.
            ForeignFolderError: a folder is there, without a manifest.
        """
        view = look_at_step(self.store, step)
        if view is None or view.state not in READABLE:
            raise step_errors.not_readable(self.uri, step, self.observe())
        return with_verdict(view, self.records.action(verify_action(view)))

    def export(self, name: str, step: int) -> ExportView:
        """A finished export.

        Raises:
            StepNotFoundError: there is none.
        """
        manifest = manifest_in(self.store, names.export_dir(name, step))
        if manifest is None:
            raise StepNotFoundError(
                f"step-{step} has no export called {name!r}",
                self.uri,
                step_errors.UNCHANGED,
                f"ray-ckpt export {self.uri} --step {step} --name {name}",
            )
        return ExportView(name=name, step=step, manifest=manifest)

    def manifest(
        self, step: int, *, read: Callable[[bytes, str], Manifest] = Manifest.from_json
    ) -> Manifest:
        """The manifest of a committed step; one read. `read` makes it of its text and place.

        Raises:
            StepNotFoundError: the step is not committed.
            IntegrityError: its manifest cannot be read.
        """
        manifest = manifest_in(self.store, names.step_dir(step), read=read)
        if manifest is None:
            raise step_errors.not_readable(self.uri, step, self.observe())
        return manifest

    # ---- how it gets there ----

    def refuse_existing(self, step: int) -> None:
        """Nothing, if `step` may be saved.

        Raises:
            StepExistsError: it is committed.
            ForeignFolderError: a folder that ray_ckpt did not write is in its place.
        """
        folder = names.step_dir(step)
        if self.store.stat(names.manifest_key(folder)) is not None:
            raise step_errors.exists(self.uri, step)
        view = look_at_step(self.store, step)
        if view is not None and view.state is CheckpointState.FOREIGN:
            raise step_errors.foreign(self.uri, step)

    def commit_step(self, staging: Path, manifest: Manifest) -> None:
        """The step is committed: visible, whole and durable.

        Raises:
            StepExistsError: it was committed before; that one is untouched.
        """
        try:
            self.commit.publish(staging, names.step_dir(manifest.step), manifest.to_json())
        except ObjectExistsError as error:
            raise step_errors.exists(self.uri, manifest.step) from error

    def commit_waiting(self, manifest: Manifest) -> None:
        """The step is committed, made of what was brought from its nodes.

        Raises:
            StepExistsError: it was committed before; that one is untouched.
        """
        try:
            self.commit.publish_waiting(names.step_dir(manifest.step), manifest)
        except ObjectExistsError as error:
            raise step_errors.exists(self.uri, manifest.step) from error

    def export_parts(self, export_id: str, name: str, step: int) -> ExportParts:
        """The finished files of an export that is still being made."""
        folder = names.export_dir(name, step)
        return ExportParts(self.store, self.commit, export_id=export_id, folder=folder)

    def commit_export(self, staging: Path, name: str, manifest: Manifest) -> Manifest:
        """The export is there, whole; returns its manifest: of equal ones the first counts."""
        return self.commit_folder(staging, names.export_dir(name, manifest.step), manifest)

    def commit_folder(self, staging: Path, folder: str, manifest: Manifest) -> Manifest:
        """As for an export, under any name."""
        try:
            self.commit.publish(staging, folder, manifest.to_json())
        except ObjectExistsError:
            self.commit.discard(staging)
            present = manifest_in(self.store, folder)
            if present is None or present.content_id != manifest.content_id:
                raise
            return present
        return manifest

    def adopt(self, manifest: Manifest) -> None:
        """A foreign folder whose files `manifest` describes is committed from now on."""
        self.store.create(names.manifest_key(names.step_dir(manifest.step)), manifest.to_json())

    # ---- whether it is still the same ----

    def damage(
        self, step: int, *, part: slice = slice(None), progress: Progress = UNTOLD
    ) -> list[str]:
        """Sentences about every file of a committed step that differs; reads every byte."""
        folder, manifest = names.step_dir(step), self.manifest(step)
        return find_damage(self.store, folder, manifest, part=part, progress=progress)

    def damage_before_reading(self, manifest: Manifest, *, part: slice) -> list[str]:
        """The same of sizes, and of all files but the shards: a load digests what it reads."""
        folder = names.step_dir(manifest.step)
        return find_damage_before_reading(self.store, folder, manifest, part=part)

    def verify(self, step: int, *, progress: Progress = UNTOLD) -> Manifest:
        """The manifest of a step whose every byte was read and is as the manifest says.

        Raises:
            IntegrityError: names each damaged file; storage is not touched.
        """
        damage = self.damage(step, progress=progress)
        if damage:
            raise step_errors.corrupt(self.uri, step, damage)
        return self.manifest(step)

    # ---- pins ----

    def pin(self, step: int, *, name: str, reason: str, until: str | None = None) -> Pin:
        """The step survives every purge until it is unpinned, or until then (UTC, ISO 8601)."""
        if not names.is_word(name):
            raise ConfigError(
                f"{name!r} cannot name a pin", do="use letters, digits, '.', '_' and '-'"
            )
        self.manifest(step)
        pinned_at = datetime.now(UTC).isoformat(timespec="seconds")
        pin = Pin(name=name, reason=reason, pinned_at=pinned_at, until=until)
        write_pin(self.store, step, pin)
        return pin

    def pins(self, step: int) -> tuple[Pin, ...]:
        """The pins that lie in the step's folder at this moment, expired ones too."""
        folder = names.step_dir(step)
        return read_pins(self.store, folder, sizes_in(self.store, folder))

    def unpin(self, step: int, *, name: str | None = None) -> list[str]:
        """Names of the pins that are gone now: the one called `name`, or all of them.

        Raises:
            StepNotFoundError: no such step is here, nor pins of one that was.
        """
        files = sizes_in(self.store, names.step_dir(step))
        if not files:
            raise step_errors.not_readable(self.uri, step, self.observe())
        pins = sorted(pin for file in files if (pin := names.parse_pin(file)))
        present = [pin for pin in pins if name in (None, pin)]
        self.store.delete([names.pin_key(step, pin) for pin in present])
        return present

    # ---- how it goes ----

    def trash(self, step: int) -> None:
        """No reader sees the step any more; `restore` brings it back."""
        manifest = self.manifest(step)
        aside = names.set_aside_dir(names.TRASH, step, manifest.save_id)
        self.commit.set_aside(names.step_dir(step), aside)

    def quarantine(self, step: int) -> None:
        """A damaged step is out of every reader's way, and kept for a person to look at."""
        try:
            save_id = self.manifest(step).save_id
        except IntegrityError:  # the manifest itself is damaged
            save_id = f"unreadable{uuid.uuid4().hex[:8]}"
        aside = names.set_aside_dir(names.QUARANTINE, step, save_id)
        self.commit.set_aside(names.step_dir(step), aside)

    def is_in_place(self, step: int) -> bool:
        """Whether a manifest lies in the step's own folder, readable or not."""
        return self.store.stat(names.manifest_key(names.step_dir(step))) is not None

    def is_of_another_version(self, step: int) -> bool:
        """Whether the step's manifest is one that this version of ray_ckpt cannot read."""
        try:
            manifest_in(self.store, names.step_dir(step))
        except UnknownSchemaError:
            return True
        except IntegrityError:
            return False
        return False

    def roll_back(self, step: int, *, now: float) -> list[int]:
        """Committed steps newer than `step` are in the trash, until somebody erases them by hand.

        The newest goes first: whenever this dies, what is left is one unbroken branch.

        Raises:
            UsageError: one of them is pinned at `now`, in seconds since the epoch.
        """
        newer = [view for view in self.observe().at(now).readable() if view.step > step]
        pinned = [view.step for view in newer if view.pins]
        if pinned:
            steps = [view.step for view in newer]
            raise step_errors.cannot_roll_back(self.uri, step, steps, pinned[0])
        for view in reversed(newer):
            self.trash(view.step)
        return [view.step for view in newer]

    def restore(self, step: int) -> None:
        """The newest trashed save of the step is committed again.

        Raises:
            StepNotFoundError: the trash holds none.
            StepExistsError: the step was saved anew meanwhile.
            UsageError: a trainer is saving the step anew at this moment.
        """
        Trash(self.store, self.commit, self.records).restore(step)
