"""The dashboard's queries and the alerts, on a real Prometheus that scrapes a real Ray."""

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.core.actions import Action
from ray_ckpt.core.lifecycle import ActionKind, ActionState
from ray_ckpt.core.metrics import METRICS
from ray_ckpt.core.names import run_name
from ray_ckpt.core.observation import Request
from ray_ckpt.storage.backends import open_catalog
from tests.servers.prometheus import Prometheus, needs_prometheus, prometheus
from tests.servers.s3_proxy import S3Proxy
from tests.servers.seaweed import S3Endpoint, make_bucket
from tests.waiting import wait_for

ALERTS = Path("infra/prometheus/alerts.yml")
ALERT_TESTS = Path("infra/prometheus/alerts.test.yml")
DASHBOARD = Path("infra/grafana/ray_ckpt.json")
SLOW_S = 4.0
"""Before each 64 KiB of an export that is read: 16 KB/s a connection, so that a copy takes time."""


def panels() -> list[dict[str, Any]]:
    return [p for p in json.loads(DASHBOARD.read_text())["panels"] if p["type"] != "row"]


def queries() -> dict[str, str]:
    """Every query of every panel under its title, with the variables filled in."""
    values = {"$run": ".*", "$__rate_interval": "1m", "$__range": "10m"}
    found: dict[str, str] = {}
    for panel in panels():
        for target in panel["targets"]:
            text = target["expr"]
            for variable, value in values.items():
                text = text.replace(variable, value)
            found[f"{panel['title']} {target['refId']}"] = text
    return found


def metrics_in(text: str) -> set[str]:
    return set(re.findall(r"ray_(ckpt_\w+)", text))


def test_every_metric_is_on_the_dashboard_and_no_other() -> None:
    drawn = set[str]().union(*map(metrics_in, queries().values()))
    assert drawn == {metric.name for metric in METRICS}


def test_every_alert_is_about_metrics_that_exist() -> None:
    assert metrics_in(ALERTS.read_text()) <= {metric.name for metric in METRICS}


def test_panels_lie_beside_each_other() -> None:
    document = json.loads(DASHBOARD.read_text())
    taken = [
        (x, y)
        for panel in document["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(taken)) == len(taken)
    ids = [panel["id"] for panel in document["panels"]]
    assert len(set(ids)) == len(ids)


@needs_prometheus
def test_each_alert_fires_for_a_bad_run_and_for_no_good_one() -> None:
    """`promtool` plays series to each rule; every rule has a moment with and one without alerts."""
    tests = ALERT_TESTS.read_text()
    for alert in re.findall(r"alert: (\w+)", ALERTS.read_text()):
        assert f"alertname: {alert}, " in tests, f"no moment without {alert}"
        assert f"- alertname: {alert}\n" in tests, f"no moment with {alert}"
    command = ["promtool", "test", "rules", str(ALERT_TESTS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def s3(s3_server: S3Endpoint) -> Iterator[S3Proxy]:
    with S3Proxy(s3_server) as proxy:
        yield proxy


@pytest.mark.ray
@pytest.mark.s3
@needs_prometheus
def test_a_real_prometheus_draws_every_panel_and_raises_an_alarm(
    tmp_path: Path, s3: S3Proxy, s3_server: S3Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = f"test-{uuid.uuid4().hex[:12]}"
    make_bucket(s3_server, bucket)
    local_root, s3_root = str(tmp_path / "run"), f"s3://{bucket}/run"
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    environment = {
        **os.environ,
        **s3.endpoint.environment(),
        "RAY_metrics_report_interval_ms": "3000",
        "RAY_AUTH_MODE": "disabled",
    }
    arguments = (local_root, s3_root, str(tmp_path / "copies"))
    with subprocess.Popen(
        [sys.executable, "-m", "tests.infra.small_run", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdin is not None and program.stdout is not None
        targets = Path(program.stdout.readline().strip())
        with prometheus(tmp_path, targets=targets, rules=ALERTS) as server:
            export = wait_for(lambda: exported(s3_root))
            s3.be_slow(SLOW_S, match="^GET .*/exports/")
            to = str(tmp_path / "slow")
            copy = Request(step=export.step, export=export.export, destination=to)
            open_catalog(s3_root).records.add_request(copy)
            draw_all(server)
            s3.recover()
            wait_for(lambda: ("RayCkptQuarantine", run_name(local_root)) in server.firing())
            wait_for(lambda: ("RayCkptDeadAction", run_name(local_root)) in server.firing())
            assert set(server.rules().values()) == {"ok"}
            fired = {run for alert, run in server.firing() if alert == "RayCkptQuarantine"}
            both = {run_name(local_root), run_name(s3_root)}
            wait_for(lambda: both == set(by_run(server, "Newest committed step A")))
            newest = by_run(server, "Newest committed step A")
            damaged = by_run(server, "Damaged A")
        program.stdin.close()
    assert fired == {run_name(local_root)}
    assert newest == {run_name(local_root): 6, run_name(s3_root): 1}
    assert damaged == {run_name(local_root): 1, run_name(s3_root): 0}


def exported(root: str) -> Action | None:
    """What has made the root's export."""
    for record in open_catalog(root).records.actions().values():
        if record.action.kind is ActionKind.EXPORT and record.state is ActionState.SUCCEEDED:
            return record.action
    return None


def by_run(server: Prometheus, title: str) -> dict[str, float]:
    found = server.query(queries()[title])
    return {series["metric"]["run"]: float(series["value"][1]) for series in found}


def draw_all(server: Prometheus) -> None:
    """Every query has had values at some moment."""
    left = queries()

    def look() -> bool:
        for title, expression in list(left.items()):
            if server.query(expression):
                del left[title]
        return not left

    try:
        wait_for(look, timeout_s=150.0)
    except AssertionError:
        raise AssertionError(f"nothing to draw for {sorted(left)}") from None
