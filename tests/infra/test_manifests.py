"""What is in infra/ is what Kubernetes, KubeRay and Ray take, as far as that shows without them."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from jobs.train import TrainConfig
from ray_ckpt.cluster.nodes import IO_RESOURCE
from ray_ckpt.core.config import load_toml

KUBERAY = Path("infra/kuberay")
# made by tests/data/kubernetes/make.py, which names its sources
SCHEMAS = json.loads(Path("tests/data/kubernetes/schemas.json").read_text())
MANIFESTS = sorted(path.name for path in KUBERAY.glob("*.yaml"))


def manifest(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((KUBERAY / name).read_text())
    return document


def check(document: dict[str, Any]) -> None:
    schema = SCHEMAS[f"{document['apiVersion']} {document['kind']}"]
    jsonschema.validate(document, schema)


@pytest.mark.parametrize("name", MANIFESTS)
def test_every_field_of_a_manifest_is_one_that_its_kind_has(name: str) -> None:
    check(manifest(name))


@pytest.mark.parametrize(
    ("name", "path", "value"),
    [
        ("raycluster.yaml", ("spec", "workerGroupSpecs", 0, "minReplica"), 1),
        ("raycluster.yaml", ("spec", "workerGroupSpecs", 0, "maxReplicas"), "8"),
        ("raycluster.yaml", ("spec", "autoscalerOptions", "version"), "v3"),
        ("raycluster.yaml", ("spec", "gcsFaultToleranceOptions", "redis"), "redis:6379"),
        ("rayjob.yaml", ("spec", "clusterSelector", "ray.io/cluster"), 1),
        ("rayjob.yaml", ("spec", "entryPoint"), "true"),
        ("podmonitor.yaml", ("spec", "podMetricsEndpoints", 0, "interval"), "often"),
    ],
)
def test_a_slip_in_a_manifest_is_found(name: str, path: tuple[str | int, ...], value: Any) -> None:
    document = copy.deepcopy(manifest(name))
    *parents, last = path
    inner: Any = document
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    with pytest.raises(jsonschema.ValidationError):
        check(document)


def groups() -> dict[str, dict[str, Any]]:
    found = manifest("raycluster.yaml")["spec"]["workerGroupSpecs"]
    return {group["groupName"]: group for group in found}


def test_one_group_has_slots_for_what_follows_a_save_and_the_others_none() -> None:
    """Ray gets the resources as a JSON text that a shell has unquoted."""
    texts = {name: g["rayStartParams"].get("resources", "'{}'") for name, g in groups().items()}
    slots = {name: json.loads(text[1:-1].replace('\\"', '"')) for name, text in texts.items()}
    assert slots == {"gpu": {}, "io": {IO_RESOURCE: 4}}
    assert groups()["io"]["minReplicas"] == 1


def test_credentials_come_from_secrets_everywhere_and_none_is_written_down() -> None:
    spec = manifest("raycluster.yaml")["spec"]
    templates = [spec["headGroupSpec"]["template"], *(g["template"] for g in groups().values())]
    for template in templates:
        (container,) = template["spec"]["containers"]
        assert {"secretRef": {"name": "ray-ckpt-s3"}} in container["envFrom"]
        assert "env" not in container
    assert spec["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"]
    readme = Path("infra/README.md").read_text()
    assert all(
        f"create secret generic {name}" in readme for name in ("ray-ckpt-s3", "ray-ckpt-hub")
    )


def test_the_job_and_the_monitor_name_the_cluster_that_is_there() -> None:
    name = manifest("raycluster.yaml")["metadata"]["name"]
    assert manifest("rayjob.yaml")["spec"]["clusterSelector"] == {"ray.io/cluster": name}
    selector = manifest("podmonitor.yaml")["spec"]["selector"]
    assert selector["matchLabels"] == {"ray.io/cluster": name}


def test_the_job_trains_with_fields_that_exist() -> None:
    words = manifest("rayjob.yaml")["spec"]["entrypoint"].split()
    assert words[:3] == ["python", "-m", "jobs.train"]
    config = load_toml(TrainConfig, "", where="rayjob", overrides=words[3:])
    assert config.root == manifest("rayjob.yaml")["spec"]["metadata"]["root"]


def test_the_monitor_scrapes_ports_that_the_head_has() -> None:
    head = manifest("raycluster.yaml")["spec"]["headGroupSpec"]["template"]["spec"]
    ports = {port["name"] for port in head["containers"][0]["ports"]}
    scraped = manifest("podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert {endpoint["port"] for endpoint in scraped} <= ports


def test_ray_up_takes_the_cluster_file_and_would_refuse_a_slip() -> None:
    config = yaml.safe_load(Path("infra/cluster.yaml").read_text())
    validate_config(prepare_config(copy.deepcopy(config)))
    nodes = config["available_node_types"]
    assert nodes["io"]["resources"][IO_RESOURCE] == 4
    assert nodes[config["head_node_type"]]["resources"]["CPU"] == 0
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config({**config, "max_worker": 3}))


def test_the_image_copies_what_is_there_and_has_the_rays_version_of_the_cluster() -> None:
    text = Path("infra/docker/Dockerfile").read_text()
    copied = [line.split()[2:-1] for line in text.splitlines() if line.startswith("COPY")]
    assert all(Path(name).exists() for names in copied for name in names)
    version = manifest("raycluster.yaml")["spec"]["rayVersion"]
    assert re.findall(r"^ARG BASE=rayproject/ray:([\d.]+)-py311$", text, flags=re.M) == [version]
    setup = yaml.safe_load(Path("infra/cluster.yaml").read_text())["setup_commands"]
    assert f"=={version}'" in setup[0]
