"""The model whose checkpoint several benchmarks work on."""

from jobs.assets import make_assets
from jobs.corpus import VOCAB_SIZE
from jobs.decoder import Decoder, DecoderConfig, init_weights
from ray_ckpt import CheckpointManager, ModelWrapper, SaveConfig, TrainingState

STEP = 1


def config_of(size_mb: int) -> DecoderConfig:
    """A model of about so many megabytes in float32."""
    return DecoderConfig(
        dim=1024, num_layers=max(1, size_mb // 50), num_heads=16, num_kv_heads=16, ffn_dim=2816
    )


def commit_model(root: str, size_mb: int) -> None:
    """Step 1 holds such a model, and no optimizer."""
    config = config_of(size_mb)
    model = Decoder(config, VOCAB_SIZE)
    init_weights(model)
    manager = CheckpointManager(
        root,
        TrainingState(model=ModelWrapper(model)),
        config=SaveConfig(mode="sync"),
        assets=make_assets(config),
    )
    manager.save(STEP, last_step=True)
    manager.close()
