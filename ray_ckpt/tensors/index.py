"""DCP's `.metadata`, and the only safe way to read one that is not ours."""

import io
import pickle
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from ray_ckpt.core.errors import IntegrityError

_ALLOWED: dict[str, frozenset[str]] = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
    "torch": frozenset({"Size"}),
    "torch.serialization": frozenset({"_get_layout"}),
    "collections": frozenset({"OrderedDict"}),
    "pathlib": frozenset({"PosixPath", "PurePosixPath", "Path"}),
}
_DTYPES = frozenset(
    {
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128", "bool"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu"),
        *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"),
    }
)
NOT_THE_MODEL = frozenset({"optimizer", "lr_scheduler", "dataloader", "train_state", "rng"})
"""First segments of keys that are no model's, as TorchTitan and we write them."""


def model_keys(metadata: Metadata, reserved: frozenset[str]) -> tuple[str, ...]:
    """Tensors whose first segment is not one of `reserved`: the model's own, sorted."""
    return tuple(
        name
        for name, entry in sorted(metadata.state_dict_metadata.items())
        if isinstance(entry, TensorStorageMetadata) and name.partition(".")[0] not in reserved
    )


def read_foreign_metadata(data: bytes, where: str) -> Metadata:
    """`.metadata` that somebody else wrote, read without running any code it may hold.

    Raises:
        IntegrityError: it is damaged, or names anything but torch's own metadata types.
    """
    try:
        metadata = _RestrictedUnpickler(io.BytesIO(data)).load()
    except IntegrityError as error:
        raise IntegrityError(error.what, where, error.safe, error.do) from error
    except Exception as error:
        raise IntegrityError(f".metadata cannot be read: {error!r}", where) from error
    if not isinstance(metadata, Metadata):
        raise IntegrityError(f".metadata holds a {type(metadata).__name__}, not an index", where)
    return metadata


class _RestrictedUnpickler(pickle.Unpickler):
    """Knows torch's checkpoint metadata types and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The type, if it is on the list; every callable a pickle runs comes through here."""
        allowed = name in _ALLOWED.get(module, frozenset()) or (
            module == "torch" and name in _DTYPES
        )
        if not allowed:
            raise IntegrityError(
                f".metadata asks for {module}.{name}, which no checkpoint index needs",
                safe="nothing of it was run",
                do="do not load this checkpoint with any tool; find out where it came from",
            )
        return super().find_class(module, name)
