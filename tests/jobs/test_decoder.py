"""The decoder is causal, knows positions, and its config describes it."""

import torch

from jobs.decoder import (
    Decoder,
    DecoderConfig,
    hf_config,
    init_weights,
    rotary_angles,
    rotate_pairs,
)

SIZES = DecoderConfig(dim=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=24, max_seq_len=32)


def _decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(SIZES, 31)


def test_a_position_sees_nothing_that_comes_after_it() -> None:
    model = _decoder()
    ids = torch.randint(0, 31, (2, 10))
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 1) % 31
    with torch.no_grad():
        left, right = model(ids), model(other)
    assert left.shape == (2, 10, 31)
    torch.testing.assert_close(left[:, :6], right[:, :6])
    assert not torch.allclose(left[:, 6:], right[:, 6:])


def test_the_order_of_tokens_matters() -> None:
    with torch.no_grad():
        logits = _decoder()(torch.tensor([[1, 2, 3], [2, 1, 3]]))
    assert not torch.allclose(logits[0, -1], logits[1, -1])


def test_rotation_keeps_lengths_and_depends_on_distance_alone() -> None:
    angles = rotary_angles(SIZES, 8, device=torch.device("cpu"))
    x = torch.randn(1, 1, 1, 4).expand(1, 8, 1, 4)
    turned = rotate_pairs(x, angles)[0, :, 0]
    torch.testing.assert_close(turned.norm(dim=-1), x[0, :, 0].norm(dim=-1))
    torch.testing.assert_close(turned[0], x[0, 0, 0])
    torch.testing.assert_close(turned[1] @ turned[3], turned[4] @ turned[6])


def test_weights_are_drawn_from_torchs_generator() -> None:
    first, second = _decoder(), _decoder()
    torch.manual_seed(5)
    init_weights(first)
    torch.manual_seed(5)
    init_weights(second)
    assert torch.equal(first.output.weight, second.output.weight)
    assert 0.01 < first.output.weight.std() < 0.03
    assert torch.equal(first.norm.weight, torch.ones(16))


def test_the_config_has_the_sizes_of_the_model() -> None:
    model = _decoder()
    config = hf_config(SIZES, vocab_size=31, eos_token_id=30)
    block = model.layers["0"]
    assert (config["vocab_size"], config["hidden_size"]) == model.tok_embeddings.weight.shape
    assert (
        config["intermediate_size"],
        config["hidden_size"],
    ) == block.feed_forward.w1.weight.shape
    assert config["num_hidden_layers"] == len(model.layers)
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    widths = block.attention.wq.out_features, block.attention.wk.out_features
    assert tuple(n * config["head_dim"] for n in heads) == widths
    assert config["eos_token_id"] == 30
