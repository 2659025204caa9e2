"""A Hugging Face folder becomes step 0 of a root: a DCP checkpoint under native names.

    names, shapes       planned from the headers and the family's adapter; no tensor is read
    tensors             made one after the other, as the writer asks for them
    commit              like any save: manifest last, lease held

The way back of an export, bit for bit. No model is built, and none is held in memory.
"""

import json
from dataclasses import replace

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex

from ray_ckpt.core import names
from ray_ckpt.core.errors import ConfigError
from ray_ckpt.core.loading import Source
from ray_ckpt.core.manifest import Manifest, ModelEntry
from ray_ckpt.storage.catalog import Catalog
from ray_ckpt.storage.hub.download import pinned
from ray_ckpt.storage.listing import sizes_in
from ray_ckpt.tensors.adapters import make_adapter
from ray_ckpt.tensors.contents import Contents
from ray_ckpt.tensors.hf_reader import HfReader
from ray_ckpt.tensors.ranks import Ranks
from ray_ckpt.tensors.root_writer import RootWriter
from ray_ckpt.tensors.run import CONFIG, HfAssets, Run, is_asset
from ray_ckpt.tensors.save_protocol import SaveProtocol
from ray_ckpt.tensors.sources import Naming, open_source, split
from ray_ckpt.tensors.writer import CommittingWriter, SaveJob

STEP = 0
"""Seeds lie there: other runs start from it."""


def import_folder(catalog: Catalog, path: str, *, family: str | None = None) -> Manifest:
    """Step 0 holds the model of the folder at `path`; returns its manifest.

    Args:
        catalog: the root, which nobody trains in now.
        path: a Hugging Face folder on a disk, `s3://` or `hf://`; a quantized one is made plain.
        family: the adapter that knows its names; None for what `model_type` in its config says.

    Raises:
        ConfigError: no such family, or the folder lacks its `config.json`.
        StepExistsError: there is a step 0 already.
        StateDictError: a tensor that no rule speaks for, or one that is lacking.
        IntegrityError: a file is damaged.
    """
    catalog.refuse_existing(STEP)
    path = pinned(path) if names.is_repository(path) else path
    assets = _assets(path, family)
    naming = Naming.of(assets, converters=())
    source = open_source(Source(path=path, format="hf"), naming)
    assert isinstance(source.reader, HfReader), "it was opened as one"
    specs = source.reader.index.specs()
    make_adapter(assets.family, assets.config() or {}).expect_whole(specs)
    tensors = {name: spec.on_meta() for name, spec in specs.items()}
    writer = RootWriter(catalog, Run(), Ranks())
    try:
        writer.goes_on_from(None, started_from=(source.origin(),))
        model = ModelEntry(family=assets.family, keys=())
        contents = Contents(state_dict=tensors, model=model, holds="model")
        draft = writer.draft(STEP, contents, is_last_step=False, metrics={})
        job = SaveJob(
            catalog=catalog,
            draft=draft,
            assets=assets.files,
            reserved=frozenset(),
            check_lease=writer.check_lease,
        )
        SaveProtocol(None).save(tensors, _LazyPlanner(source.reader), CommittingWriter(job))
    finally:
        writer.close()
    return catalog.manifest(STEP)


class _LazyPlanner(DefaultSavePlanner):
    """Plans shapes alone, and makes each tensor when it is to be written."""

    def __init__(self, reader: HfReader) -> None:
        super().__init__()
        self._reader = reader

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The tensor, whole."""
        return self._reader.tensor(index.fqn)


def _assets(path: str, family: str | None) -> HfAssets:
    """What lies beside the weights, and the family: the one given, or its config's."""
    catalog, folder = split(path)
    store = catalog.store
    found = sorted(name for name in sizes_in(store, folder) if is_asset(name) and "/" not in name)
    files = {name: store.read(f"{folder}/{name}") for name in found}
    if CONFIG not in files:
        raise ConfigError(
            f"the folder holds no {CONFIG}, which says what model it is",
            path,
            "nothing was written",
            f"copy {CONFIG} of the same model there",
        )
    assets = HfAssets(family=family or "", files=files)
    config = json.loads(files[CONFIG])
    return assets if family else replace(assets, family=str(config.get("model_type")))
