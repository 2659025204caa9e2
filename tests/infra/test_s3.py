"""The S3 server for development, started as a person does."""

import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.waiting import wait_for

SCRIPT = "infra/s3.sh"
LISTENERS = 8


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def free_ports() -> int:
    """The first of eight ports in a row that nobody listens on."""
    for first in range(21000, 30000, LISTENERS):
        probes = [socket.socket() for _ in range(LISTENERS)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for probe in probes:
                probe.close()
    raise AssertionError("no ports are free")


def variables(text: str) -> dict[str, str]:
    words = [w for line in text.splitlines() if line.startswith("export") for w in line.split()[1:]]
    return dict(word.split("=", 1) for word in words)


@pytest.mark.s3
@pytest.mark.slow
def test_what_the_script_prints_is_all_that_a_root_on_s3_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_ports()
    command = ["bash", SCRIPT, str(tmp_path), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
        try:
            assert script.stdout is not None
            said = "".join(script.stdout.readline() for _ in range(3))
            for name, value in variables(said).items():
                monkeypatch.setenv(name, value)
            (bucket,) = re.findall(r"s3://(\w+)/", said)
            from ray_ckpt.storage.backends import open_catalog

            store = open_catalog(f"s3://{bucket}/run").store
            store.create("a-key", b"text")
            assert store.read("a-key") == b"text"
        finally:
            script.terminate()
    assert set(variables(said)) == {
        "AWS_ENDPOINT_URL",
        "AWS_DEFAULT_REGION",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
    }
    wait_for(lambda: is_free(port))


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = ["bash", SCRIPT, str(tmp_path), str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "is taken; give another" in done.stderr
