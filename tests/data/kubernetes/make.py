"""Makes schemas.json: of each kind in infra/kuberay, the schema of the fields that are used there.

    python tests/data/kubernetes/make.py KUBERAY PROMETHEUS_OPERATOR

Both are checkouts of the projects of these names (Apache-2.0, as this one); their custom resource
definitions are the documented API. A field that a manifest uses and they do not know is left out,
so that the tests refuse it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
MANIFESTS = Path("infra/kuberay")
DEFINITIONS = {
    "RayCluster": (0, "ray-operator/config/crd/bases/ray.io_rayclusters.yaml"),
    "RayJob": (0, "ray-operator/config/crd/bases/ray.io_rayjobs.yaml"),
    "PodMonitor": (1, "example/prometheus-operator-crd/monitoring.coreos.com_podmonitors.yaml"),
}
_KEPT = ("type", "enum", "pattern", "minimum", "maximum", "anyOf", "format", "required")


def git(checkout: str, *arguments: str) -> str:
    return subprocess.check_output(["git", "-C", checkout, *arguments], text=True)


def pruned(schema: dict[str, Any], value: Any) -> dict[str, Any]:
    """What the schema says of the fields of `value`; no other field may be there."""
    kept = {word: schema[word] for word in _KEPT if word in schema}
    if schema.get("x-kubernetes-int-or-string"):
        kept = {"type": ["integer", "string"]}
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        kept["properties"] = {k: pruned(known[k], v) for k, v in value.items() if k in known}
        kept["additionalProperties"] = False
    elif isinstance(value, dict) and isinstance(schema.get("additionalProperties"), dict):
        each = [pruned(schema["additionalProperties"], v) for v in value.values()]
        kept["additionalProperties"] = merged(each)
    elif isinstance(value, list) and "items" in schema:
        kept["items"] = merged([pruned(schema["items"], v) for v in value])
    return kept


def merged(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema for all: the union of their fields."""
    union: dict[str, Any] = {}
    for schema in schemas:
        for word, own in schema.items():
            if word == "properties":
                known = union.setdefault(word, {})
                for name, each in own.items():
                    known[name] = merged([known[name], each]) if name in known else each
            elif word in ("items", "additionalProperties") and isinstance(own, dict):
                union[word] = merged([union[word], own]) if union.get(word) else own
            else:
                union[word] = own
    return union


def main() -> None:
    checkouts = sys.argv[1:]
    made: dict[str, Any] = {
        "$comment": [
            f"{git(path, 'log', '-1', '--format=%H').strip()} of {name}, Apache-2.0"
            for name, path in zip(("KubeRay", "prometheus-operator"), checkouts, strict=True)
        ]
    }
    for path in sorted(MANIFESTS.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            number, name = DEFINITIONS[document["kind"]]
            definition = yaml.safe_load(git(checkouts[number], "show", f"HEAD:{name}"))
            group, _, version = document["apiVersion"].partition("/")
            assert definition["spec"]["group"] == group
            (of_version,) = [v for v in definition["spec"]["versions"] if v["name"] == version]
            schema = of_version["schema"]["openAPIV3Schema"]
            schema["properties"]["metadata"] = {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string"},
                    "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                },
            }
            made[f"{document['apiVersion']} {document['kind']}"] = pruned(schema, document)
    (HERE / "schemas.json").write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
