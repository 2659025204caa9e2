"""Real text that is on every machine: the Python standard library's own sources, byte by byte.

A token is a byte; its id is the byte's value; one more id ends a text. The tokenizer is a normal
Hugging Face one, so that an export is complete.
"""

import hashlib
import json
import sysconfig
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ray_ckpt.core.errors import StateDictError

END_OF_TEXT = "<|endoftext|>"
EOS_ID = 256
VOCAB_SIZE = 257


def standard_library_text(max_bytes: int) -> bytes:
    """The sources of the top-level modules in order of name, cut at `max_bytes`."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts: list[bytes] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        texts.append(path.read_bytes())
        size += len(texts[-1])
        if size >= max_bytes:
            break
    return b"\n".join(texts)[:max_bytes]


def tokenizer_files(max_seq_len: int) -> dict[str, bytes]:
    """`tokenizer.json` and `tokenizer_config.json`: byte-level, without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=_symbols(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": json.dumps(settings, indent=2).encode(),
    }


class Windows:
    """Random windows of a text, in an order fixed by the seed; knows how many were handed out.

    The position counts samples of all ranks together, so that a run goes on with the same samples
    on any number of ranks.
    """

    def __init__(self, text: bytes, *, seq_len: int, seed: int) -> None:
        self._tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._seq_len = seq_len
        self._seed = seed
        self._fingerprint = hashlib.sha256(text).hexdigest()
        self.num_samples = 0

    def next_batch(self, batch_size: int, *, rank: int, world_size: int) -> Tensor:
        """[batch_size / world_size, seq_len + 1] int64: this rank's share of the next batch."""
        own = range(self.num_samples + rank, self.num_samples + batch_size, world_size)
        self.num_samples += batch_size
        return torch.stack([self._window(index) for index in own])

    def _window(self, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        last = len(self._tokens) - self._seq_len - 1
        start = int(torch.randint(0, last, (), generator=generator))
        return self._tokens[start : start + self._seq_len + 1].long()

    def state_dict(self) -> dict[str, Any]:
        """How far, and in which text."""
        return {"num_samples": self.num_samples, "fingerprint": self._fingerprint}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on there.

        Raises:
            StateDictError: the text on this machine is another one.
        """
        if state_dict["fingerprint"] != self._fingerprint:
            raise StateDictError(
                "the run was trained on another text than this machine has",
                "dataloader",
                "nothing was changed",
                "resume with the Python version the run began with, or start a new root",
            )
        self.num_samples = int(state_dict["num_samples"])


def _symbols() -> dict[str, int]:
    """What byte-level tokenizers write for each byte, a printable sign, to the byte's value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + index): byte for index, byte in enumerate(others)},
    }
