"""What infra/README.md says is so."""

import re
from pathlib import Path

from ray_ckpt.core.metrics import METRICS

README = Path("infra/README.md").read_text()


def test_the_table_of_metrics_is_the_one_in_the_code() -> None:
    rows = [
        f"| `ray_{metric.name}` | {', '.join(metric.labels) or '-'} | {metric.says} |"
        for metric in METRICS
    ]
    assert [line for line in README.splitlines() if line.startswith("| `ray_ckpt_")] == rows


def test_every_alert_is_in_the_readme_and_no_other() -> None:
    rules = re.findall(r"alert: (\w+)", Path("infra/prometheus/alerts.yml").read_text())
    assert re.findall(r"^\| (RayCkpt\w+) \|", README, flags=re.MULTILINE) == rules


def test_every_file_that_is_named_is_there() -> None:
    named = re.findall(r"infra/[\w./-]+\w", README)
    assert named
    assert [name for name in named if not Path(name).exists()] == []
