"""A real Prometheus for tests, of Debian's package: scrapes, evaluates rules, answers queries."""

import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.servers.ports import free_ports
from tests.waiting import wait_for

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus: apt-get install prometheus",
)
_CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: ray
    file_sd_configs: [{{files: [{targets}], refresh_interval: 1s}}]
"""


class Prometheus:
    """Answers at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series with a value now; AssertionError with Prometheus's own words if it is wrong."""
        return self._get("query", query=expression)["result"]

    def firing(self) -> set[tuple[str, str]]:
        """Names of the alerts that fire, each with its run."""
        alerts = self._get("alerts")["alerts"]
        return {
            (alert["labels"]["alertname"], alert["labels"]["run"])
            for alert in alerts
            if alert["state"] == "firing"
        }

    def rules(self) -> dict[str, str]:
        """Health of each rule by its name."""
        groups = self._get("rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    def _get(self, what: str, **parameters: str) -> dict[str, Any]:
        asked = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None


@contextmanager
def prometheus(folder: Path, *, targets: Path, rules: Path) -> Iterator[Prometheus]:
    """A server that scrapes every second what the file `targets` names, as Ray writes it."""
    port = free_ports(1)[0]
    config = folder / "prometheus.yml"
    config.write_text(_CONFIG.format(rules=rules.resolve(), targets=targets))
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        server = Prometheus(f"http://127.0.0.1:{port}")
        wait_for(lambda: _is_ready(server))
        yield server
    finally:
        process.kill()
        process.wait()


def _is_ready(server: Prometheus) -> bool:
    try:
        with urllib.request.urlopen(f"{server.url}/-/ready", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False
