"""What the Ray dashboard shows: names, logs and metadata that say which run and step."""

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from ray_ckpt.cluster.attempts import Attempt
from ray_ckpt.cluster.connect import start_manager_job
from ray_ckpt.cluster.task_log import TaskLog, how_far
from ray_ckpt.core.beats import Beat, Watch
from ray_ckpt.core.names import run_name
from ray_ckpt.core.policy import ExportPolicy, LifecyclePolicy
from ray_ckpt.core.wanted import verify_action
from ray_ckpt.storage.backends import open_catalog
from tests.core.worlds import view
from tests.roots import make_root
from tests.waiting import wait_for

ATTEMPT = Attempt(action=verify_action(view(30)), number=2, started_at=1.0, epoch=1, beat_s=1.0)
FIRST = Beat(attempt_started_at=1.0, host="a", node=None, pid=1, process_born="1")
READS = replace(FIRST, count=1, doing="reads step-30", total_bytes=1_000_000_000)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_a_task_says_now_and_then_how_far_it_is(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, logger="ray_ckpt")
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr("ray_ckpt.cluster.task_log.time", clock)
    told = TaskLog("/runs/a", ATTEMPT)
    title = f"{run_name('/runs/a')}: verify step-30, attempt 2"
    with told.lines():
        told.heard(FIRST)
        for count, now[0] in enumerate((1.0, 6.0, 11.0, 12.0, 21.0, 31.0), start=1):
            done_bytes = min(500_000_000, int(now[0] - 1) * 50_000_000)
            told.heard(replace(READS, count=count, done_bytes=done_bytes))
    assert said(caplog) == [
        f"{title} begins",
        f"{title}: reads step-30 50 %, 50 MB/s, 10 s left",
        f"{title} is done",
    ]


def test_a_task_says_why_it_failed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="ray_ckpt")
    with pytest.raises(ValueError), TaskLog("/runs/a", ATTEMPT).lines():
        raise ValueError("no room")
    assert said(caplog)[-1].endswith("verify step-30, attempt 2 failed: no room")


def test_what_cannot_be_counted_is_told_without_a_share() -> None:
    assert how_far(Watch(begun_at=0.0)) == "waits"
    sends = replace(FIRST, doing="sends hf to hf://org/repo", total_bytes=None)
    assert how_far(Watch(begun_at=0.0).after(sends, 1.0)) == "sends hf to hf://org/repo"


@pytest.mark.ray
def test_the_log_of_a_task_and_the_page_of_the_managers_job_name_run_and_step(
    root: str, ray_cluster: str
) -> None:
    from ray.job_submission import JobSubmissionClient
    from ray.util.state import get_log, list_tasks

    make_root(root, (10, 20), LifecyclePolicy(export=(ExportPolicy(name="hf"),)))
    uri = open_catalog(root).uri
    manager = start_manager_job(root)
    try:
        wait_for(lambda: open_catalog(root).observe().exports)
        wait_for(lambda: ray.get(manager.status.remote())["is_idle"])
        named = [t.task_id for t in list_tasks(limit=10_000) if t.name == "export step-20 hf"]
        lines = wait_for(lambda: finished_log(get_log, named, run_name(uri)))
        assert re.findall(r"(?<= )run-\w+: .*", lines) == [
            f"{run_name(uri)}: export step-20 hf begins",
            f"{run_name(uri)}: export step-20 hf is done",
        ]
        jobs = JobSubmissionClient(ray.get_runtime_context().gcs_address).list_jobs()
        pages = [job.metadata for job in jobs if job.metadata and job.metadata.get("root") == uri]
        assert pages == [
            {"job_name": f"manager of {run_name(uri)}", "run": run_name(uri), "root": uri}
        ]
    finally:
        ray.kill(manager)


def finished_log(get_log: Callable[..., Any], named: list[str], run: str) -> str | None:
    """The run's own one of the logs of these tasks, once it holds its last line."""
    for task_id in named:
        with suppress(Exception):  # other tests' tasks, whose logs may be gone
            text = "".join(get_log(task_id=task_id, suffix="err", tail=1000))
            if f"{run}: export step-20 hf is done" in text:
                return text
    return None


SPEAK = """
import logging
from ray_ckpt.cluster.task_log import speak
speak("run-a: ")
logging.getLogger("ray_ckpt").info("step-10 is verified")
logging.getLogger("httpx").info("HTTP Request: PUT https://cdn/x?X-Amz-Signature=abc")
"""


def test_the_log_of_a_task_holds_nothing_that_other_libraries_say() -> None:
    done = subprocess.run([sys.executable, "-c", SPEAK], capture_output=True, text=True, check=True)
    (line,) = done.stderr.splitlines()
    assert line.endswith(" run-a: step-10 is verified")
