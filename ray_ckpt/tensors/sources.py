"""Where a load takes tensors from: one folder, its keys, and the owners it answers for.

    step of this run      everything it holds
    DCP folder            native names; ours, or anybody's (read without running its pickles)
    Hugging Face folder   the family's names; quantized ones are made plain
    PEFT folder           a converter's names

All are opened and their keys compared with the model's before a tensor is read.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConfigError, ObjectNotFoundError, RayCkptError
from ray_ckpt.core.loading import Source
from ray_ckpt.core.manifest import Manifest, NeededSource, StartSource
from ray_ckpt.storage.backends import open_folder
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.host_memory.nearby import Nearby
from ray_ckpt.storage.hub.download import in_cache
from ray_ckpt.storage.listing import manifest_in
from ray_ckpt.storage.readers import reading
from ray_ckpt.tensors.adapters import StateDictAdapter, make_adapter
from ray_ckpt.tensors.converters import ModelConverter, entries_of, make_converters
from ray_ckpt.tensors.hf_reader import HfFolder, HfReader
from ray_ckpt.tensors.index import NOT_THE_MODEL
from ray_ckpt.tensors.load_into import Reader
from ray_ckpt.tensors.quantized import dequantize
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.reader import DcpReader, proving_reader
from ray_ckpt.tensors.run import CONFIG, HfAssets
from ray_ckpt.tensors.source_files import SourceFiles
from ray_ckpt.tensors.step_index import StepIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSource:
    """A source that was found and whose index was read; no tensor was."""

    uri: str
    reader: Reader
    owners: tuple[str, ...]
    parts: tuple[str, ...]
    """Names of what it supplies beside the model."""
    left: tuple[str, ...] = ()
    """What else a step holds, which the run neither has nor excludes."""
    shapes: Mapping[str, tuple[int, ...] | None]
    """Everything it holds by flat name; None for what is no tensor."""
    model_keys: frozenset[str]
    named: Source | None = None
    """What named it; None for a step of the run itself."""
    files: SourceFiles | None = None
    """What it consists of; None for a step of the run, which was looked at when it was chosen."""
    expected: NeededSource | None = None
    """What it must be, where a step that was trained on it says so."""
    started_from: tuple[StartSource, ...] = ()
    """What the run that made a step had started from."""

    @property
    def memory(self) -> Nearby | None:
        """Copies of its files in this host's memory; None where nobody looks for any."""
        return None if self.reader.proof is None else self.reader.proof.memory

    def held(self) -> contextlib.AbstractContextManager[None]:
        """While it is entered, no purge takes it, if it is a step of another run."""
        step = names.parse_step(self.files.folder) if self.files is not None else None
        if self.files is None or self.files.manifest is None or step is None:
            return contextlib.nullcontext()
        return reading(self.files.store, step, who="load into another run")

    def identified(self, ranks: Ranks) -> NeededSource:
        """How the manifest of a step that is trained on it names it. Collective."""
        assert self.named is not None and self.files is not None, "a step names others, not itself"
        return NeededSource(
            name=self.named.name,
            format=self.named.format,
            owners=self.owners,
            digest=self.files.identity(ranks),
        )

    def origin(self) -> StartSource:
        """How the manifests of a run that starts from it name it; reads no tensor."""
        assert self.named is not None and self.files is not None, "a step goes on, nothing starts"
        digest, run_id = self.files.origin()
        return StartSource(
            name=self.named.name,
            format=self.named.format,
            owners=self.owners,
            digest=digest,
            run_id=run_id,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """What is needed to give a Hugging Face folder native names."""

    family: str | None
    config: Mapping[str, object] | None
    """`config.json` of the model that trains; a PEFT folder has none of its own."""
    converters: Sequence[ModelConverter]

    @classmethod
    def of(cls, assets: HfAssets | None, converters: Sequence[ModelConverter]) -> "Naming":
        """As far as the run's assets tell."""
        if assets is None:
            return cls(family=None, config=None, converters=converters)
        return cls(family=assets.family, config=assets.config(), converters=converters)


def open_step(
    catalog: Catalog, manifest: Manifest, *, owners: tuple[str, ...], parts: tuple[str, ...]
) -> OpenSource:
    """A committed step of the run itself."""
    reader = proving_reader(catalog.store, names.step_dir(manifest.step), manifest)
    own = manifest.model.keys if manifest.model is not None else _tensors_of(reader.index)
    return OpenSource(
        uri=reader.uri,
        reader=reader,
        owners=owners,
        parts=parts,
        shapes=_shapes(reader.index),
        model_keys=frozenset(own),
        started_from=manifest.lineage.started_from,
    )


def open_source(source: Source, naming: Naming) -> OpenSource:
    """The folder that `source` names.

    Raises:
        ConfigError: it is not there, or its names cannot be made native here.
        IntegrityError: it is damaged.
    """
    return _OPENERS[source.format](source, naming)


def _open_dcp(source: Source, naming: Naming) -> OpenSource:
    catalog, folder = split(source.path)
    manifest = manifest_in(catalog.store, folder)
    reader = (
        DcpReader(catalog.store, folder, digests=None)
        if manifest is None
        else proving_reader(catalog.store, folder, manifest)
    )
    try:
        ends = reader.index.ends()
    except ObjectNotFoundError as error:
        raise _no_dcp(source) from error
    known = manifest.model.keys if manifest and manifest.model else _tensors_of(reader.index)
    return OpenSource(
        uri=reader.uri,
        reader=reader,
        owners=source.owners,
        parts=source.parts,
        shapes=_shapes(reader.index),
        model_keys=frozenset(known),
        named=source,
        files=SourceFiles(
            store=catalog.store,
            folder=folder,
            files=(names.METADATA, *sorted(ends)),
            manifest=manifest,
            ends=ends,
        ),
    )


def _open_hf(source: Source, naming: Naming) -> OpenSource:
    folder = _hf_folder(source)
    config = folder.config(CONFIG, otherwise=naming.config)  # TorchTitan writes none
    adapter = _adapter(source, naming, config)

    def to_native(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return adapter.from_hf(dequantize(state_dict, config))

    return _from_hf_folder(source, folder, to_native)


def _open_peft(source: Source, naming: Naming) -> OpenSource:
    if len(source.owners) != 1:
        raise ConfigError(
            f"a PEFT folder belongs to one converter, not to {', '.join(source.owners)}",
            "source.owners",
        )
    converter = next((c for c in naming.converters if c.name == source.owners[0]), None)
    base = _adapter(source, naming, naming.config or {})
    adapter = _peft_names(converter, base) if converter is not None else None
    if adapter is None:
        raise ConfigError(
            f"no converter called {source.owners[0]} reads PEFT's names",
            source.path,
            "nothing was loaded",
            "give the source owners=('lora',), and the model wrapper converters=[LoRA(...)]",
        )
    folder = _hf_folder(source, stem="adapter_model")
    _refuse_other_scaling(folder, converter)
    return _from_hf_folder(source, folder, adapter.from_hf)


def _peft_names(converter: ModelConverter, base: StateDictAdapter) -> StateDictAdapter | None:
    """How PEFT calls its keys, whatever flavor its exports have."""
    if "peft" in getattr(converter, "flavors", ()):
        [converter] = make_converters(entries_of([converter]), {converter.name: "peft"})
    return converter.state_dict_adapter(base)


def _refuse_other_scaling(folder: HfFolder, converter: ModelConverter | None) -> None:
    """The factor of the low-rank sum is in no tensor: an adapter under another one is another."""
    config = folder.config("adapter_config.json")
    rank, alpha = config.get("r") or 1, config.get("lora_alpha") or 1
    theirs = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    own = getattr(converter, "scaling", theirs)
    strange = [key for key in ("use_dora", "alpha_pattern", "rank_pattern") if config.get(key)]
    if strange or not math.isclose(own, theirs):
        raise ConfigError(
            f"the adapter's scaling is {theirs:g} (r={rank}, lora_alpha={alpha}), the model's "
            f"is {own:g}"
            if not strange
            else f"the adapter was trained with {', '.join(strange)}, which is not known here",
            folder.uri,
            "nothing was loaded",
            f"convert the model with LoRA(rank={rank}, alpha={theirs * rank:g}, ...)"
            if not strange
            else "merge the adapter into its base with PEFT, and start from the merged model",
        )


_OPENERS: dict[str, Callable[[Source, Naming], OpenSource]] = {
    "dcp": _open_dcp,
    "hf": _open_hf,
    "peft": _open_peft,
}


def _from_hf_folder(
    source: Source,
    folder: HfFolder,
    to_native: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
) -> OpenSource:
    try:
        reader = HfReader(folder, to_native)
    except RayCkptError as error:
        where = error.where or folder.uri  # adapters know names, not where these come from
        raise type(error)(error.what, where, "nothing was loaded", error.do) from error
    shapes = _shapes(reader.index)
    return OpenSource(
        uri=folder.uri,
        reader=reader,
        owners=source.owners,
        parts=(),
        shapes=shapes,
        model_keys=frozenset(shapes),
        named=source,
        files=folder.source_files,
    )


def _adapter(source: Source, naming: Naming, config: Mapping[str, object]) -> StateDictAdapter:
    if naming.family is None:
        raise ConfigError(
            "the run names no model family, which knows a Hugging Face folder's names",
            source.path,
            "nothing was loaded",
            "give CheckpointManager(..., assets=HfAssets(family=..., files=...))",
        )
    try:
        return make_adapter(naming.family, config)
    except ConfigError as error:
        raise ConfigError(error.what, source.path, "nothing was loaded", error.do) from error


def _no_dcp(source: Source) -> ConfigError:
    return ConfigError(
        f"the folder is not there, or is no finished DCP checkpoint: it holds no {names.METADATA}",
        source.path,
        "nothing was loaded",
        "check the path in load.start; for a Hugging Face folder give format='hf'",
    )


def _hf_folder(source: Source, *, stem: str = "model") -> HfFolder:
    catalog, folder = split(source.path)
    return HfFolder(catalog.store, folder, stem=stem)


def split(path: str) -> tuple[Catalog, str]:
    """The folder's parent as a root, and its own name; of the Hub's its copy on this host."""
    return open_folder(str(in_cache(path)) if names.is_repository(path) else path)


def _shapes(index: StepIndex) -> dict[str, tuple[int, ...] | None]:
    """None for what is no tensor."""
    known = zip(index.names, index.shapes, index.dtypes, strict=True)
    return {name: shape if dtype is not None else None for name, shape, dtype in known}


def _tensors_of(index: StepIndex) -> list[str]:
    """Tensors that by their names are no optimizer's, dataloader's, ...: the model's, one hopes."""
    return [name for name in index.specs() if name.partition(".")[0] not in NOT_THE_MODEL]
