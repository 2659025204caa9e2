"""Samples in one fixed order, however many ranks share them and however often they are stopped."""

import json

import pytest
import torch
from tokenizers import Tokenizer

from jobs.corpus import (
    END_OF_TEXT,
    EOS_ID,
    VOCAB_SIZE,
    Windows,
    standard_library_text,
    tokenizer_files,
)
from ray_ckpt.core.errors import StateDictError

TEXT = bytes(range(256)) * 8


def _windows(text: bytes = TEXT, seed: int = 0) -> Windows:
    return Windows(text, seq_len=6, seed=seed)


def test_ranks_share_the_batch_that_one_rank_would_have() -> None:
    alone = _windows()
    for world_size in (2, 4):
        together = [_windows() for _ in range(world_size)]
        alone.num_samples = 0
        for _ in range(3):
            batch = alone.next_batch(8, rank=0, world_size=1)
            shares = [
                windows.next_batch(8, rank=rank, world_size=world_size)
                for rank, windows in enumerate(together)
            ]
            assert torch.equal(torch.stack(shares, dim=1).flatten(0, 1), batch)
        assert {windows.num_samples for windows in together} == {24}


def test_a_resumed_run_goes_on_with_the_next_sample_on_any_number_of_ranks() -> None:
    straight, stopped = _windows(), _windows()
    straight.next_batch(4, rank=0, world_size=1)
    expected = straight.next_batch(4, rank=0, world_size=1)
    for rank in range(2):
        stopped = _windows()
        stopped.next_batch(4, rank=rank, world_size=2)
    resumed = _windows()
    resumed.load_state_dict(stopped.state_dict())
    assert torch.equal(resumed.next_batch(4, rank=0, world_size=1), expected)


def test_samples_do_not_repeat_and_depend_on_the_seed() -> None:
    text = standard_library_text(100_000)
    batches = Windows(text, seq_len=32, seed=0).next_batch(64, rank=0, world_size=1)
    assert len({tuple(row.tolist()) for row in batches}) == 64
    others = Windows(text, seq_len=32, seed=1).next_batch(64, rank=0, world_size=1)
    assert not torch.equal(batches, others)


def test_a_window_is_a_piece_of_the_text_with_one_token_to_predict() -> None:
    for row in _windows().next_batch(16, rank=0, world_size=1):
        assert (row.shape, row.dtype) == ((7,), torch.int64)
        assert bytes(row.tolist()) in TEXT


def test_a_run_that_learnt_another_text_is_refused_and_nothing_changes() -> None:
    state = _windows(TEXT[::-1]).state_dict() | {"num_samples": 99}
    windows = _windows()
    with pytest.raises(StateDictError, match="another text"):
        windows.load_state_dict(state)
    assert windows.num_samples == 0


def test_the_text_is_real_and_cut_where_it_was_asked_for() -> None:
    text = standard_library_text(50_000)
    assert len(text) == 50_000
    assert b"import" in text
    assert standard_library_text(10_000) == text[:10_000]


def test_the_id_of_a_token_is_the_value_of_its_byte() -> None:
    files = tokenizer_files(max_seq_len=64)
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    text = "".join(map(chr, range(0x250))) + " 世界 🙂"
    encoded = tokenizer.encode(text)
    assert encoded.ids == list(text.encode())
    assert tokenizer.decode(encoded.ids) == text
    assert tokenizer.token_to_id(END_OF_TEXT) == EOS_ID
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 64
