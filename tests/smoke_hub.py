"""The real Hub, once, by hand: everything that ray_ckpt does there, in a repository of its own.

    HF_TOKEN=hf_... python -m tests.smoke_hub ORG/NEW-REPOSITORY --bucket ORG/NEW-BUCKET --delete

Makes a private repository, which must not be there yet, and publishes two steps of a tiny model to
it: twice the first one, which sends nothing the second time. Fetches and compares, lets `latest`
lead to the newer one, removes the older one with its storage. With a bucket the same of a
checkpoint. Says each thing as it is found; ends with 1 at the first that is not as it should be.
With --delete what was made is deleted at the end, also after a failure. HF_HUB_DISABLE_XET=1 goes
another way.

The ordinary tests run it against the double, so that a failure here is about the Hub.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from huggingface_hub import HfApi

from ray_ckpt.core.actions import Action
from ray_ckpt.core.export_spec import ExportSpec
from ray_ckpt.core.lifecycle import ActionKind
from ray_ckpt.core.names import BUCKETS, export_dir
from ray_ckpt.core.observation import ExportView
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy, PublishPolicy
from ray_ckpt.storage.backends import open_catalog
from ray_ckpt.storage.copies.fetch import fetch
from ray_ckpt.storage.copies.promote import promote_copy
from ray_ckpt.storage.copies.publish import publish_checkpoint, publish_export
from ray_ckpt.tensors.export import export_step
from tests.roots import make_root, snapshot

OLD, NEW = 10, 20


def say(text: str) -> None:
    click.echo(f"{time.strftime('%H:%M:%S')} {text}")


def policy_of(place: str) -> LifecyclePolicy:
    """By which `latest` is a name of ours there."""
    publish = PublishPolicy(export="hf", to=place, promote="latest")
    return LifecyclePolicy(export=(ExportPolicy(name="hf"),), publish=(publish,))


def expect(is_so: bool, text: str) -> None:
    """Said if it is so, the end of the run if not."""
    if not is_so:
        raise click.ClickException(f"not so: {text}")
    say(f"ok: {text}")


@dataclass(frozen=True)
class Smoke:
    """One run: a root with two exported steps, and where they go."""

    root: str
    api: HfApi
    repository: str

    @property
    def place(self) -> str:
        return f"hf://{self.repository}"

    def export(self, step: int) -> ExportView:
        return open_catalog(self.root).export("hf", step)

    def publish(self, step: int) -> int:
        """Bytes that were sent."""
        return publish_export(open_catalog(self.root), self.export(step), self.place).bytes_sent

    def tags(self) -> dict[str, str]:
        found = self.api.list_repo_refs(self.repository).tags
        return {tag.name: tag.target_commit for tag in found}

    def large(self, step: int) -> set[str]:
        entries = self.export(step).manifest.files
        digests = (e.digest for e in entries if e.path.endswith(".safetensors"))
        return {digest.removeprefix("sha256:") for digest in digests}

    def try_publishing(self) -> None:
        sent = self.publish(OLD)
        expect(sent > 0, f"step-{OLD} is published: {sent} bytes in one commit")
        commits = self.api.list_repo_commits(self.repository)
        expect(self.publish(OLD) == 0, "published again: 0 bytes are sent")
        again = self.api.list_repo_commits(self.repository)
        expect(len(again) == len(commits), "published again: no second commit")
        expect(self.publish(NEW) > 0, f"step-{NEW} is published")
        expect(set(self.tags()) == {f"step-{OLD}", f"step-{NEW}"}, "each has its tag")
        private = self.api.repo_info(self.repository).private
        expect(bool(private), "the repository is private")

    def try_fetching(self, folder: Path) -> None:
        for reference, step in ((f"step-{OLD}", OLD), ("main", NEW)):
            fetch(f"{self.place}@{reference}", folder / reference)
            theirs = snapshot(str(folder / reference))
            theirs.pop(".gitattributes", None)
            made = snapshot(f"{self.root}/{export_dir('hf', step)}")
            expect(theirs == made, f"{reference} comes back as step-{step}, byte for byte")

    def try_promoting(self) -> None:
        export = self.export(NEW)
        action = Action(
            kind=ActionKind.PUBLISH,
            step=NEW,
            source_id=str(export.manifest.lineage.source_id),
            export=ExportSpec(name="hf"),
            destination=self.place,
        )
        content_id = export.manifest.content_id
        promote_copy(action, "latest", content_id=content_id, guard=lambda: None)
        expect(self.tags()["latest"] == self.tags()[f"step-{NEW}"], f"latest leads to step-{NEW}")

    def try_purging(self, folder: Path) -> None:
        command = [sys.executable, "-m", "ray_ckpt", "purge-hub", self.root, self.place]
        command += ["--keep-latest", "1", "--squash", "--apply"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        say(done.stdout + done.stderr)
        expect(done.returncode == 0, "the older step can be removed")
        expect(set(self.tags()) == {f"step-{NEW}", "latest"}, f"the tag step-{OLD} is gone")
        held = {file.file_oid for file in self.api.list_lfs_files(self.repository)}
        expect(not held & self.large(OLD), f"the storage of step-{OLD} is free")
        expect(self.large(NEW) <= held, f"the storage of step-{NEW} is not")
        fetch(f"{self.place}@step-{NEW}", folder / "purged")
        made = snapshot(f"{self.root}/{export_dir('hf', NEW)}").items()
        expect(made <= snapshot(str(folder / "purged")).items(), f"step-{NEW} comes back whole")

    def try_bucket(self, bucket: str, folder: Path) -> None:
        catalog, place = open_catalog(self.root), f"{BUCKETS}{bucket}/run"
        manifest = catalog.checkpoint(NEW).manifest
        assert manifest is not None
        sent = publish_checkpoint(catalog, manifest, place).bytes_sent
        expect(sent > 0, f"the checkpoint is in the bucket: {sent} bytes")
        sent = publish_checkpoint(catalog, manifest, place).bytes_sent
        expect(sent == 0, "copied again: 0 bytes are sent")
        expect(open_catalog(place).verify(NEW).step == NEW, "every byte there is as it was")
        fetch(f"{place}/step-{NEW}", folder / "checkpoint")
        made = snapshot(f"{self.root}/step-{NEW}")
        expect(snapshot(str(folder / "checkpoint")) == made, "it comes back, byte for byte")


@click.command()
@click.argument("repository")
@click.option("--bucket", help="Also try a bucket, ORG/NAME, which must not be there yet.")
@click.option("--delete", is_flag=True, help="Delete at the end what was made.")
def smoke(repository: str, bucket: str | None, delete: bool) -> None:
    """See the module."""
    with tempfile.TemporaryDirectory(prefix="ray_ckpt-smoke-") as name:
        folder, api = Path(name), HfApi()
        root = str(folder / "run")
        say(f"{api.endpoint}, Xet {'off' if os.environ.get('HF_HUB_DISABLE_XET') == '1' else 'on'}")
        made: list[Callable[[], None]] = []
        try:
            api.create_repo(repository, private=True)  # refuses one that is there
            made.append(lambda: api.delete_repo(repository))
            make_root(root, (OLD, NEW), policy_of(f"hf://{repository}"))
            catalog = open_catalog(root)
            for step in (OLD, NEW):
                export_step(catalog, catalog.manifest(step), ExportSpec(name="hf"))
            run = Smoke(root, api, repository)
            run.try_publishing()
            run.try_fetching(folder)
            run.try_promoting()
            run.try_purging(folder)
            if bucket is not None:
                api.create_bucket(bucket, private=True)
                made.append(lambda: api.delete_bucket(bucket))
                run.try_bucket(bucket, folder)
        finally:
            for remove in made if delete else []:
                remove()
    say("all is well" if delete else f"all is well; look at it: {api.endpoint}/{repository}")


if __name__ == "__main__":
    smoke()
