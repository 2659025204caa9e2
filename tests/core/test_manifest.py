"""One canonical form, read back as it was written, and refused as soon as anything is odd."""

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ckpt.core.errors import IntegrityError
from ray_ckpt.core.manifest import (
    SCHEMA,
    ConverterEntry,
    FileEntry,
    Lineage,
    Manifest,
    ModelEntry,
    StartSource,
    TensorBytes,
    TensorEntry,
)

FILES = (
    FileEntry(path=".metadata", size_bytes=3, digest="sha256:00"),
    FileEntry(path="__0_0.distcp", size_bytes=64, digest="crc64nvme:01"),
    FileEntry(path="hf_assets/config.json", size_bytes=0, digest="sha256:02"),
)
TENSORS = tuple(
    TensorEntry(name=name, dtype="bfloat16", shape=(4, 2))
    for name in ("a.weight", "b.weight", "scalar")
)
MANIFEST = Manifest(
    step=500,
    save_id="a1b2",
    created_at="2030-01-02T03:04:05+00:00",
    lineage=Lineage(
        run_id="run-1",
        resumed_from=400,
        started_from=(
            StartSource(name="Llama-3.1-8B", format="hf", owners=("base",), digest="sizes:00"),
        ),
        recipe={"name": "hf"},
    ),
    files=FILES,
    tensors=TENSORS,
    tensor_bytes={"__0_0.distcp": TensorBytes(model=40, optimizer=24)},
    model=ModelEntry(family="llama", keys=("a.weight", "b.weight")),
    world_size=8,
    is_last_step=True,
    metrics={"loss": 1.5},
    versions={"torch": "2.11.0"},
)


def document() -> dict[str, Any]:
    return json.loads(MANIFEST.to_json())


def read(changed: Any) -> Manifest:
    """The manifest of a document whose checksum is right, whatever else it holds."""
    changed.pop("self_sha256", None)
    text = json.dumps(changed, sort_keys=True, separators=(",", ":")).encode()
    changed["self_sha256"] = hashlib.sha256(text).hexdigest()
    return Manifest.from_json(json.dumps(changed).encode(), "s3://bucket/run/step-500")


@given(files=st.permutations(FILES), tensors=st.permutations(TENSORS))
@settings(max_examples=30, deadline=None)
def test_any_order_gives_the_same_bytes(files: list[FileEntry], tensors: list[TensorEntry]) -> None:
    shuffled = replace(MANIFEST, files=tuple(files), tensors=tuple(tensors))
    assert shuffled.to_json() == MANIFEST.to_json()
    assert shuffled.content_id == MANIFEST.content_id


def test_a_manifest_is_read_back_as_it_was_written() -> None:
    assert Manifest.from_json(MANIFEST.to_json(), "here") == MANIFEST


def test_a_manifest_with_nothing_optional_is_read_back_too() -> None:
    bare = Manifest(
        step=0, save_id="s", created_at="", lineage=Lineage(run_id="r"), files=(), tensors=()
    )
    assert Manifest.from_json(bare.to_json(), "here") == bare


def test_the_total_is_the_sum_of_all_files() -> None:
    assert MANIFEST.total_bytes == 67


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"7", b'"text"', b"\xff\xfe", b"{}", MANIFEST.to_json()[:-40]],
)
def test_what_is_no_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(IntegrityError, match="cannot be read") as caught:
        Manifest.from_json(text, "s3://bucket/run/step-500")
    assert caught.value.where == "s3://bucket/run/step-500"
    assert caught.value.safe
    assert caught.value.do


def test_an_unknown_schema_is_refused_by_name() -> None:
    """Scenario 25: a manifest of a newer version."""
    with pytest.raises(IntegrityError, match=r"schema 'ray_ckpt.manifest/9'.*manifest/1") as caught:
        read({**document(), "schema": "ray_ckpt.manifest/9"})
    assert "install" in caught.value.do


@pytest.mark.parametrize("field", sorted(set(document()) - {"schema", "self_sha256"}))
def test_a_lacking_field_is_refused(field: str) -> None:
    lacking = document()
    del lacking[field]
    with pytest.raises(IntegrityError, match=field):
        read(lacking)


@pytest.mark.parametrize(
    "path", ["../x", "a/../../x", "/etc/passwd", "..", "", ".", "a\\..\\x", "a/.."]
)
def test_a_file_outside_its_folder_is_refused(path: str) -> None:
    outside = document()
    outside["files"][0]["path"] = path
    with pytest.raises(IntegrityError, match="leaves the folder"):
        read(outside)


@pytest.mark.parametrize(("field", "value"), [("size_bytes", -1), ("digest", "00"), ("mode", 7)])
def test_a_nonsensical_file_is_refused(field: str, value: object) -> None:
    nonsense = document()
    nonsense["files"][0][field] = value
    with pytest.raises(IntegrityError):
        read(nonsense)


def test_the_schema_is_written() -> None:
    assert document()["schema"] == SCHEMA


@pytest.mark.parametrize(
    "changed",
    [
        {"created_at": "2031-01-01T00:00:00+00:00"},
        {"save_id": "other"},
        {"metrics": {"loss": 0.0}},
        {"world_size": 1},
    ],
)
def test_the_content_id_ignores_when_and_by_which_attempt(changed: dict[str, Any]) -> None:
    assert replace(MANIFEST, **changed).content_id == MANIFEST.content_id


@pytest.mark.parametrize("index", range(len(FILES)))
@pytest.mark.parametrize("changed", [{"digest": "sha256:ff"}, {"size_bytes": 9}, {"path": "other"}])
def test_the_content_id_changes_with_every_file(index: int, changed: dict[str, Any]) -> None:
    files = list(FILES)
    files[index] = replace(files[index], **changed)
    assert replace(MANIFEST, files=tuple(files)).content_id != MANIFEST.content_id


def test_a_changed_character_anywhere_is_found() -> None:
    text = MANIFEST.to_json()
    for index in range(0, len(text) - 1, 7):
        changed = bytes([*text[:index], text[index] ^ 1, *text[index + 1 :]])
        with pytest.raises(IntegrityError):
            Manifest.from_json(changed, "here")


HOSTILE = ',"tensors":[{"name":"x"}],"versions":{"self_sha256":"' + "0" * 64 + '",'


@pytest.mark.parametrize(
    "manifest",
    [
        MANIFEST,
        replace(MANIFEST, tensors=()),
        replace(MANIFEST, metrics={HOSTILE: 1.0}, versions={HOSTILE: HOSTILE}),
        replace(
            MANIFEST,
            model=ModelEntry(
                family=HOSTILE,
                keys=(HOSTILE,),
                converters=(
                    ConverterEntry(
                        name="x", options={"tensors": [1], "versions": {}, "self_sha256": "a"}
                    ),
                ),
            ),
        ),
        replace(
            MANIFEST,
            tensors=(TensorEntry(name=HOSTILE, dtype=HOSTILE, shape=()),),
            tensor_bytes={HOSTILE: TensorBytes(1, 2), "tensors": TensorBytes(0, 0)},
        ),
    ],
)
def test_a_manifest_is_read_without_its_tensors(manifest: Manifest) -> None:
    text = manifest.to_json()
    light = Manifest.without_tensors(text, "here")
    assert light == replace(Manifest.from_json(text, "here"), tensors=())
    # also as somebody's editor may have left it
    laid_out = json.dumps(json.loads(text), indent=2).encode()
    assert Manifest.without_tensors(laid_out, "here") == light


def test_a_changed_character_is_found_without_the_tensors_too() -> None:
    text = MANIFEST.to_json()
    for index in range(0, len(text) - 1, 7):
        changed = bytes([*text[:index], text[index] ^ 1, *text[index + 1 :]])
        with pytest.raises(IntegrityError):
            Manifest.without_tensors(changed, "here")


def test_what_a_whole_manifest_may_not_say_a_light_one_may_not_either() -> None:
    outside = replace(MANIFEST, files=(replace(FILES[0], path="../x"),), tensors=())
    with pytest.raises(IntegrityError, match="leaves the folder"):
        Manifest.without_tensors(outside.to_json(), "here")
