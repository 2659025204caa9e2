"""What a checkpoint or an export consists of, and its one canonical JSON form.

The manifest lists every file with its size and digest, and every tensor with its dtype and shape.
Where each piece of a tensor lies the index says, one of the files (`tensors.step_index`). It holds
no path of the machine that wrote it, no token and no secret. Serialising the same content always
gives the same bytes.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from ray_ckpt.core.errors import IntegrityError, UnknownSchemaError
from ray_ckpt.core.names import is_save_id

SCHEMA = "ray_ckpt.manifest/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file of the folder that holds the manifest."""

    path: str
    """Relative to the folder, separated by "/"."""
    size_bytes: int
    digest: str
    """`algorithm:hex`, for example `crc64nvme:7b2f...`; see `storage.digests`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor, whole."""

    name: str
    dtype: str
    """As torch prints it, without `torch.`: `float32`, `bfloat16`."""
    shape: tuple[int, ...]


class TensorBytes(NamedTuple):
    """How much of a file is for what, with what frames each tensor; the rest is for neither."""

    model: int
    optimizer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConverterEntry:
    """One converter that had changed the model, in order of conversion."""

    name: str
    """Name in `tensors.converters.CONVERTERS`, for example `lora`."""
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """JSON values from which an equal converter is made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntry:
    """What an export needs to know of the model, years later and without its code."""

    family: str | None
    """Name of the adapter that knows the model's names, for example `llama`; None if the run
    named none, and no export is possible."""
    keys: tuple[str, ...]
    """FQNs of the model's own tensors among all tensors of the checkpoint, sorted."""
    converters: tuple[ConverterEntry, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict[str, str])
    """FQN that is not saved to the one whose tensor it shares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NeededSource:
    """Where tensors lie that this checkpoint needs and does not hold: a LoRA run's base model."""

    name: str
    """Of its folder; where that lies is for the run to say."""
    format: str
    """`hf`, `dcp` or `peft`."""
    owners: tuple[str, ...]
    """Whose keys it supplies: `base`, or a converter's name."""
    digest: str
    """Of the names, sizes and digests of its tensor files: another model is refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSource:
    """A folder that a run's first weights came from, as far as it was known without reading it."""

    name: str
    """Of the folder; where it lay is nobody's business."""
    format: str
    """`hf`, `dcp` or `peft`."""
    owners: tuple[str, ...]
    """Whose keys it supplied: `base`, or names of converters."""
    digest: str
    """`content:` and the content id of a folder with a manifest; else `sizes:` and a SHA-256 of
    the names and sizes of its files with tensors."""
    run_id: str | None = None
    """Of the run that made it, if that is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lineage:
    """Where this came from."""

    run_id: str
    resumed_from: int | None = None
    """Step that the saving process had loaded; None for a run from scratch."""
    started_from: tuple[StartSource, ...] = ()
    """What the run, before its first step, took its weights from; nothing for one from scratch."""
    source_id: str | None = None
    """Content id of the checkpoint an export was made from."""
    recipe: Mapping[str, str] = field(default_factory=dict[str, str])
    """How an export was made: its name, dtype, adapter family and flavors."""
    adopted: bool = False
    """Whether somebody else wrote the bytes: no pickle among them is ever run."""


@dataclass(frozen=True, kw_only=True)  # no slots: the content id is kept once it is known
class Manifest:
    """All there is to know about one checkpoint or one export."""

    step: int
    save_id: str
    """Names one attempt to save; two saves of the same content differ in it."""
    created_at: str
    """UTC, ISO 8601 with seconds."""
    lineage: Lineage
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...] = ()
    tensor_bytes: Mapping[str, TensorBytes] = field(default_factory=dict[str, TensorBytes])
    """Of each file of a checkpoint with tensors in it."""
    model: ModelEntry | None = None
    world_size: int = 1
    is_last_step: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    holds: Literal["everything", "model"] = "everything"
    """`model`: weights alone; a run can start from them, and not go on."""
    needs: tuple[NeededSource, ...] = ()
    """What a load must take from elsewhere."""
    non_finite: tuple[str, ...] = ()
    """Tensors with NaN or Inf in them; such a step is unhealthy."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all files, the manifest itself left out."""
        return sum(entry.size_bytes for entry in self.files)

    @cached_property
    def content_id(self) -> str:
        """Hex SHA-256 over names, sizes and digests of all files: equal content, equal id."""
        lines = sorted(f"{e.path}\0{e.size_bytes}\0{e.digest}\n" for e in self.files)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def to_json(self) -> bytes:
        """Canonical UTF-8 JSON: keys sorted, files and tensors ordered by name.

        It carries a SHA-256 of itself, so that a damaged manifest is told from a sound one.
        """
        document = {"schema": SCHEMA, **asdict(replace(self, files=(), tensors=()))}
        document["files"] = [asdict(e) for e in sorted(self.files, key=lambda e: e.path)]
        document["tensors"] = [
            {"name": e.name, "dtype": e.dtype, "shape": e.shape}  # `asdict`: 5 us
            for e in sorted(self.tensors, key=lambda e: e.name)
        ]
        document[_CHECKSUM] = _checksum(document)
        return _canonical(document) + b"\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> "Manifest":
        """The manifest in `text`, read from `where`.

        Raises:
            IntegrityError: it is no JSON, of a schema this version does not know, damaged, lacks
                a field, or names a file outside its own folder.
        """
        try:
            document = json.loads(text)
            _refuse_unknown_schema(document, where)
            if document.pop(_CHECKSUM) != _checksum(document):
                raise ValueError("its own checksum does not match")
            return _from_document(document)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise IntegrityError(
                f"the manifest cannot be read: {error!r}", where, _UNTOUCHED, _LOOK
            ) from error

    @classmethod
    def without_tensors(cls, text: bytes, where: str) -> "Manifest":
        """The manifest without its tensors: most of it for a large model.

        As `to_json` wrote it, it is checked as a whole and they are never parsed.

        Raises:
            IntegrityError: as for `from_json`.
        """
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            document = _light_document(text)
            if document is not None:
                return _from_document(document)
        return replace(cls.from_json(text, where), tensors=())


_CHECKSUM = "self_sha256"


def _light_document(text: bytes) -> dict[str, Any] | None:
    """What `to_json` wrote, without tensors; None if it is not that very text, whole.

    Keys are sorted, and nothing that comes after one of these has keys of somebody else's choice
    with such a value: the last match is the manifest's own.
    """
    head, found, rest = text.rpartition(b',"self_sha256":"')
    checksum, rest = rest[:64], rest[65:]
    digest = hashlib.sha256(head)
    digest.update(rest.removesuffix(b"\n"))
    if not found or digest.hexdigest().encode() != checksum:
        return None
    middle, has_tensors, tail = rest.rpartition(b',"tensors":[')
    _, has_versions, end = tail.rpartition(b'],"versions":{')
    light = head + middle + has_tensors + has_versions + end
    document = json.loads(light) if has_tensors and has_versions else None
    return document if document and document["schema"] == SCHEMA else None


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _checksum(document: Mapping[str, Any]) -> str:
    """SHA-256 over everything but the checksum itself."""
    return hashlib.sha256(_canonical(document)).hexdigest()


_UNTOUCHED = "nothing was changed; the other steps do not depend on this one"
_LOOK = "restore the manifest from a copy, or set the folder aside and resume from an older step"


def _refuse_unknown_schema(document: Mapping[str, Any], where: str) -> None:
    if document["schema"] != SCHEMA:
        raise UnknownSchemaError(
            f"the manifest has schema {document['schema']!r}, this version reads {SCHEMA!r}",
            where,
            _UNTOUCHED,
            "install the version of ray_ckpt that wrote it, or a newer one",
        )


def _from_document(document: Mapping[str, Any]) -> Manifest:
    model = document["model"]
    return Manifest(
        step=int(document["step"]),
        save_id=_save_id(document["save_id"]),
        created_at=str(document["created_at"]),
        lineage=_lineage(document["lineage"]),
        files=tuple(_file_entry(entry) for entry in document["files"]),
        tensors=tuple(
            TensorEntry(name=e["name"], dtype=e["dtype"], shape=tuple(e["shape"]))
            for e in document["tensors"]
        ),
        tensor_bytes={path: TensorBytes(*b) for path, b in document["tensor_bytes"].items()},
        model=_model_entry(model) if model else None,
        world_size=int(document["world_size"]),
        is_last_step=bool(document["is_last_step"]),
        metrics=dict(document["metrics"]),
        versions=dict(document["versions"]),
        holds=_holds(document["holds"]),
        needs=tuple(
            NeededSource(
                name=entry["name"],
                format=entry["format"],
                owners=tuple(entry["owners"]),
                digest=entry["digest"],
            )
            for entry in document["needs"]
        ),
        non_finite=tuple(document["non_finite"]),
    )


def _save_id(value: object) -> str:
    """Part of a folder's name in the trash, so it must be one."""
    if not isinstance(value, str) or not is_save_id(value):
        raise ValueError(f"save_id is {value!r}, expected letters and digits")
    return value


def _lineage(document: Mapping[str, Any]) -> Lineage:
    started_from = tuple(
        StartSource(
            name=entry["name"],
            format=entry["format"],
            owners=tuple(entry["owners"]),
            digest=entry["digest"],
            run_id=entry["run_id"],
        )
        for entry in document["started_from"]
    )
    rest = {name: value for name, value in document.items() if name != "started_from"}
    return Lineage(**rest, started_from=started_from)


def _holds(value: str) -> Literal["everything", "model"]:
    if value == "everything":
        return "everything"
    if value == "model":
        return "model"
    raise ValueError(f"holds is {value!r}, expected 'everything' or 'model'")


def _model_entry(document: Mapping[str, Any]) -> ModelEntry:
    return ModelEntry(
        family=document["family"],
        keys=tuple(document["keys"]),
        converters=tuple(ConverterEntry(**entry) for entry in document["converters"]),
        tied=dict(document["tied"]),
    )


def _file_entry(entry: Mapping[str, Any]) -> FileEntry:
    parsed = FileEntry(**entry)
    parts = PurePosixPath(parsed.path).parts
    if not parts or parts[0] == "/" or ".." in parts or "\\" in parsed.path:
        raise ValueError(f"file name {parsed.path!r} leaves the folder")
    if parsed.size_bytes < 0 or ":" not in parsed.digest:
        raise ValueError(f"size or digest of {parsed.path!r} is none")
    return parsed
