"""A decoder with Llama's architecture under TorchTitan's names, and its Hugging Face config."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Sizes of a decoder."""

    dim: int = 256
    """Width of the residual stream."""
    num_layers: int = 4
    num_heads: int = 8
    """Query heads; `dim` is a multiple of it."""
    num_kv_heads: int = 4
    """Key and value heads; `num_heads` is a multiple of it."""
    ffn_dim: int = 688
    """Width of the feed-forward layers."""
    max_seq_len: int = 256
    """Longest sequence, in tokens."""
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class Attention(nn.Module):
    """Causal attention with grouped keys and rotary embedding on interleaved pairs."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.dim // config.num_heads
        self.wq = nn.Linear(config.dim, config.num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.num_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.num_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(config.num_heads * self.head_dim, config.dim, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """[batch, seq, dim] in and out; angles [seq, head_dim / 2] in radians."""
        batch, seq, _ = x.shape
        q = rotate_pairs(self.wq(x).view(batch, seq, -1, self.head_dim), angles).transpose(1, 2)
        k = rotate_pairs(self.wk(x).view(batch, seq, -1, self.head_dim), angles).transpose(1, 2)
        v = self.wv(x).view(batch, seq, -1, self.head_dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.wo(out.transpose(1, 2).reshape(batch, seq, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] in and out."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """[batch, seq, dim] in and out."""
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    """Token ids to logits."""

    def __init__(self, config: DecoderConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(n): Block(config) for n in range(config.num_layers)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.output = nn.Linear(config.dim, vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """[batch, seq] int64 to [batch, seq, vocab_size]."""
        x = self.tok_embeddings(ids)
        angles = rotary_angles(self.config, ids.shape[1], device=x.device)
        for block in self.layers.values():
            x = block(x, angles)
        return self.output(self.norm(x))


def init_weights(model: nn.Module) -> None:
    """Normal weights of 0.02, as Llama's; draws from torch's generator."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def rotary_angles(config: DecoderConfig, seq_len: int, *, device: torch.device) -> Tensor:
    """[seq_len, head_dim / 2], radians: position times theta^(-2i / head_dim)."""
    head_dim = config.dim // config.num_heads
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(seq_len, device=device, dtype=torch.float32)
    return torch.outer(positions, config.rope_theta**-exponents)


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """[batch, seq, heads, head_dim] with each pair (2i, 2i + 1) turned by its angle."""
    cos, sin = angles.cos()[:, None, :], angles.sin()[:, None, :]
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)


def hf_config(config: DecoderConfig, *, vocab_size: int, eos_token_id: int) -> dict[str, Any]:
    """`config.json` of the same model in transformers."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.dim // config.num_heads,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
    }
