"""All that a run depends on, each part of which may die: its trainer, its cluster, its stores.

trainer      two ranks; whoever submitted them starts both again when one is gone
hosts        a head and two nodes with Ray; a new cluster is started when the head is gone
hub, s3      where exports are copied to, and a folder
rival        a second manager, as a person starts one: `ray-ckpt drain`
"""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi

from ray_ckpt.core.policy import (
    ExportPolicy,
    KeepConfig,
    LifecyclePolicy,
    PublishPolicy,
    VerifyPolicy,
)
from ray_ckpt.storage.backends import open_catalog
from tests.cluster.chaos.training import train
from tests.cluster.hosts import Hosts, hosts
from tests.servers.hub import HubDouble
from tests.servers.seaweed import S3Endpoint
from tests.tensors.ranks import RankGroup
from tests.waiting import wait_for

NUM_NODES = 2
EXPORT_EVERY = 5
KEEP_EVERY = 10
REPOSITORY = "ray/chaos"


@dataclass(kw_only=True)
class World:
    """What is running, and what people were told or have asked for."""

    root: str
    folder: Path
    hosts: Hosts
    hub: HubDouble
    s3: S3Endpoint
    s3_copies: str
    random: random.Random
    environment: dict[str, str]
    pinned: set[int] = field(default_factory=set)
    asked: dict[int, str] = field(default_factory=dict)
    """Step to the name of an export that a person asked for."""
    removed: set[int] = field(default_factory=set)
    """Steps of which a person removed the export `hf`."""
    trainer: RankGroup | None = None
    rivals: "list[subprocess.Popen[bytes]]" = field(default_factory=list)
    paused: list[threading.Timer] = field(default_factory=list)
    """Each lets a process go on that stands still; who waits for that process need not care."""

    @property
    def copies(self) -> str:
        """The folder that exports are copied to."""
        return str(self.folder / "copies")

    @property
    def destinations(self) -> tuple[str, ...]:
        """Everywhere an export is copied to."""
        return self.copies, self.s3_copies, f"hf://{REPOSITORY}"

    def policy(self) -> LifecyclePolicy:
        """Something of everything."""
        return LifecyclePolicy(
            export=(ExportPolicy(name="hf", dtype="float32", every_steps=EXPORT_EVERY),),
            publish=tuple(PublishPolicy(export="hf", to=to) for to in self.destinations),
            keep=KeepConfig(latest=3, every_steps=KEEP_EVERY, trash_grace_s=2.0),
            verify=VerifyPolicy(scrub_every_s=20.0),
        )

    def told(self) -> list[int]:
        """Steps that the trainer was told are committed, in the order of telling."""
        journal = self.folder / "journal"
        lines = journal.read_text().splitlines() if journal.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    def tend(self, seconds: float) -> None:
        """Time goes by; whatever somebody would start again is started again."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._tend_trainer()
            time.sleep(0.1)

    def start_trainer(self) -> None:
        """Two new ranks go on from the newest committed step; nothing is left of the old ones."""
        if self.trainer is not None:
            self.trainer.kill()
        paths = (self.root, str(self.folder / "journal"), str(self.folder / "end"))
        self.trainer = RankGroup(train, *paths, num_ranks=2)

    def start_cluster(self) -> None:
        """A new cluster, and the root's manager on it."""
        self.hosts.start(num_nodes=NUM_NODES)
        self.hosts.start_manager(self.root)

    def start_rival(self, *, timeout_s: float) -> "subprocess.Popen[bytes]":
        """A person's own manager, which waits for the other or takes over from it."""
        command = [sys.executable, "-m", "ray_ckpt", "drain", self.root]
        with self._log(len(self.rivals)).open("wb") as log:
            rival = subprocess.Popen(
                [*command, "--timeout", str(timeout_s)],
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=log,
            )
        self.rivals.append(rival)
        return rival

    def _log(self, number: int) -> Path:
        """What a rival said."""
        return self.folder / f"rival-{number}.log"

    def come_to_rest(self, *, timeout_s: float) -> None:
        """Training has ended with a last step, and nothing is left to do."""
        for timer in self.paused:
            timer.join()
        (self.folder / "end").touch()
        wait_for(self._tend_trainer, timeout_s=timeout_s)
        last = self.start_rival(timeout_s=timeout_s)
        code = last.wait(timeout=timeout_s + 30)
        assert code == 0, self._log(len(self.rivals) - 1).read_text()

    def close(self) -> None:
        """Nothing of it runs any more."""
        for timer in self.paused:
            timer.join()
        if self.trainer is not None:
            self.trainer.kill()
        for rival in self.rivals:
            rival.kill()
            rival.wait()

    def _tend_trainer(self) -> bool:
        """Whether training has ended well; where a rank has died both are started again."""
        codes = self.trainer.exit_codes if self.trainer is not None else [-1]
        if set(codes) == {0}:
            return True
        if set(codes) - {None, 0}:
            self.start_trainer()
        return False


@contextmanager
def world(root: str, folder: Path, s3: S3Endpoint, *, s3_copies: str, seed: int) -> Iterator[World]:
    """Everything runs inside the block."""
    with ExitStack() as stack:
        hub = stack.enter_context(HubDouble(folder / "hub"))
        environment = {
            **s3.environment(),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
        }
        HfApi(endpoint=hub.url, token=hub.token).create_repo(REPOSITORY)
        made = World(
            root=root,
            folder=folder,
            hosts=stack.enter_context(hosts(environment, num_nodes=NUM_NODES)),
            hub=hub,
            s3=s3,
            s3_copies=s3_copies,
            random=random.Random(seed),
            environment=environment,
        )
        stack.callback(made.close)
        open_catalog(root).records.begin_run("chaos", made.policy())
        made.start_trainer()
        made.hosts.start_manager(root)
        yield made
