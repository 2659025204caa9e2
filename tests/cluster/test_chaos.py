"""Something dies every few seconds, and afterwards nothing is lost, done twice or forgotten.

`RAY_CKPT_CHAOS=200` lets so many things happen, in an order of their own each time, to a run on a
folder and then to one on S3; without it a short, fixed order runs on a folder.
"""

import os
import random
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.chaos.checks import Findings, examine
from tests.cluster.chaos.faults import FAULTS, happen
from tests.cluster.chaos.world import world
from tests.servers.seaweed import S3Endpoint

IS_LONG = "RAY_CKPT_CHAOS" in os.environ
NUM_FAULTS = int(os.environ.get("RAY_CKPT_CHAOS", len(FAULTS)))
SEED = random.randrange(10**6) if IS_LONG else 1
NOTHING = Findings(lost=(), duplicate=(), stuck=(), wrong=())

pytestmark = [
    pytest.mark.ray,
    pytest.mark.s3,
    pytest.mark.slow,
    pytest.mark.timeout(1200 + 60 * NUM_FAULTS),
]


@pytest.mark.parametrize("kept_on", ["folder", "s3"] if IS_LONG else ["folder"])
def test_whatever_dies_nothing_is_lost_done_twice_or_forgotten(
    kept_on: str,
    tmp_path: Path,
    s3_server: S3Endpoint,
    s3_root: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Invariants I1 to I9, by way of faults 1 to 3, 5 to 7, 26 to 29, 32, 33, 35, 36, 41 and 54."""
    began_at = time.monotonic()

    def tell(sentence: str) -> None:
        with capsys.disabled():  # for people, however the test ends
            sys.stdout.write(f"\n{time.monotonic() - began_at:6.1f} s  {sentence}")
            sys.stdout.flush()

    root = str(tmp_path / "run") if kept_on == "folder" else s3_root
    with world(root, tmp_path, s3_server, s3_copies=f"{s3_root}-copies", seed=SEED) as run:
        for sentence in happen(run, num_faults=NUM_FAULTS):
            tell(sentence)
        run.come_to_rest(timeout_s=600.0 + 20.0 * NUM_FAULTS)
        found = examine(run)
        tell(
            f"seed {SEED}: {NUM_FAULTS} faults survived, {len(set(run.told()))} steps committed, "
            f"steps lost {len(found.lost)}, duplicate effects {len(found.duplicate)}, "
            f"stuck actions {len(found.stuck)}, wrong {len(found.wrong)}\n"
        )
        assert found == NOTHING
