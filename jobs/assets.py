"""What an export of the small decoder needs beside its weights."""

import json

from jobs.corpus import EOS_ID, VOCAB_SIZE, tokenizer_files
from jobs.decoder import DecoderConfig, hf_config
from ray_ckpt.tensors.run import HfAssets


def make_assets(model: DecoderConfig) -> HfAssets:
    """What an export of this model needs beside the weights."""
    config = hf_config(model, vocab_size=VOCAB_SIZE, eos_token_id=EOS_ID)
    generation = {"eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    return HfAssets(
        family="llama",
        files={
            "config.json": json.dumps(config, indent=2, sort_keys=True).encode(),
            "generation_config.json": json.dumps(generation, indent=2).encode(),
            **tokenizer_files(model.max_seq_len),
        },
    )
