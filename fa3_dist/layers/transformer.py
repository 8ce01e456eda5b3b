"""A small decoder-only language model in the manner of Llama, for the examples and as a pattern to copy.

Pre-norm blocks, RMS norm, SwiGLU, rotary embedding, grouped key/value heads; per-layer windows, softcap, sinks and
QK-norm as options. No dropout, no key/value cache: it is made for training.

Shapes: tokens and positions (batch, seqlen) int64, x_BSE (batch, seqlen, dim), logits (batch, seqlen, vocab_size).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fa3_dist.interface import Attention
from fa3_dist.layers.attention import FA3Attention
from fa3_dist.layers.rotary import RotaryEmbedding, RotaryScaling

Window = tuple[int, int]


@dataclass(frozen=True)
class TransformerConfig:
    """Everything that a `Transformer` is made from.

    Args:
        kv_heads: default heads. head_dim: default dim // heads. mlp_dim: default 8/3 dim, rounded up to 64.
        window_size: (left, right) for every layer, or a tuple of them that is repeated over the layers.
        tie_embeddings: the head uses the embedding's weight.
        checkpoint_activations: recompute each block in the backward instead of storing its activations.
        embed_std: standard deviation of the embedding's first values. A block's norm divides by what it gets, so with a
            small embedding the first gradients are large, and what blocks write outweighs it. A larger one makes
            training steadier (Takase et al. 2023, arXiv:2312.16903), and the first logits of a tied head larger.
        others: as in `FA3Attention` and `RotaryEmbedding`.

    Raises:
        ValueError: a size below 1, an embed_std that is not above 0, or windows of another form.
    """

    vocab_size: int
    dim: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    mlp_dim: int | None = None
    rope_base: float = 10000.0
    rope_scaling: RotaryScaling | None = None
    qk_norm: bool = False
    window_size: Window | tuple[Window, ...] = (-1, -1)
    softcap: float = 0.0
    sink: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-5
    checkpoint_activations: bool = False
    embed_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1")
        if not self.embed_std > 0:
            raise ValueError(f"embed_std is {self.embed_std}: expected a standard deviation above 0")
        if any(len(window) != 2 for window in self.windows()):
            raise ValueError(f"window_size is {self.window_size}: expected (left, right) or a tuple of such pairs")

    def windows(self) -> tuple[Window, ...]:
        """The window of each layer."""
        pattern = self.window_size if isinstance(self.window_size[0], (tuple, list)) else (self.window_size,)
        return tuple(tuple(pattern[i % len(pattern)]) for i in range(self.layers))  # type: ignore[misc]


class SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), without biases (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    state_dict: attention_norm, attention (`FA3Attention`), mlp_norm, mlp.gate_proj, mlp.up_proj, mlp.down_proj.
    """

    def __init__(self, config: TransformerConfig, layer: int = 0) -> None:
        super().__init__()
        head_dim = config.head_dim or config.dim // config.heads
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attention = FA3Attention(
            config.dim, config.heads, config.kv_heads, config.head_dim, qk_norm=config.qk_norm,
            window_size=config.windows()[layer], softcap=config.softcap, sink=config.sink, norm_eps=config.norm_eps,
            rotary=RotaryEmbedding(head_dim, config.rope_base, scaling=config.rope_scaling),
            name=f"blocks.{layer}.attention",
        )
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config.dim, config.mlp_dim or 64 * math.ceil(8 * config.dim / 3 / 64))

    def forward(self, x_BSE: Tensor, positions: Tensor | None = None, attention: Attention | None = None) -> Tensor:
        """x (B, S, dim) -> (B, S, dim); positions and attention as in `FA3Attention.forward`."""
        x_BSE = x_BSE + self.attention(self.attention_norm(x_BSE), positions=positions, attention=attention)
        return x_BSE + self.mlp(self.mlp_norm(x_BSE))


class Transformer(nn.Module):
    """Token ids to next-token logits.

    state_dict: embed.weight, blocks.{i} (`TransformerBlock`), norm.weight, and, without tie_embeddings, head.weight.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises every parameter in place: matrices N(0, 0.02), those that write to the residual stream smaller by
        sqrt(2 layers) (as in GPT-2), the embedding N(0, embed_std), norms 1, sinks 0. After a start on the meta device:
        `to_empty(device=...)`, this.
        """
        for module in self.modules():
            if isinstance(module, (nn.RMSNorm, FA3Attention, RotaryEmbedding)):
                module.reset_parameters()
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.embed_std)
            elif isinstance(module, nn.Linear):
                residual = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * self.config.layers) if residual else 0.02)

    def forward(
        self, tokens_BS: Tensor, positions: Tensor | None = None, attention: Attention | None = None
    ) -> Tensor:
        """tokens (B, S) int64 -> logits (B, S, vocab_size).

        Args:
            positions: (B, S) int64 positions in the documents; None: 0 .. S - 1.
            attention: attention callable of every layer; None: `flash_attn_func`. A context-parallel batch brings both.
        """
        x = self.embed(tokens_BS)
        recompute = self.config.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            if recompute:
                x = checkpoint(block, x, positions, attention, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, positions, attention)
        return F.linear(self.norm(x), self.embed.weight if self.head is None else self.head.weight)

    def number_of_parameters(self) -> int:
        """Parameters, a tied weight counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, seqlen: int) -> float:
        """Floating-point operations a token, forward and backward without recomputation, documents of `seqlen` tokens.

        6 N + sum over layers of 12 H D K. N: weights in matrix products (the head's, not the embedding's look-up); H D:
        features of the queries; K: mean number of keys that a query sees, (seqlen + 1) / 2 without a window. A weight
        is one multiply-add forward and two backward; Q K^T and P V are two weights a feature and key in this sense.
        """
        weights = sum(module.weight.numel() for module in self.modules() if isinstance(module, nn.Linear))
        weights += self.embed.weight.numel() if self.head is None else 0
        heads, head_dim = self.config.heads, self.config.head_dim or self.config.dim // self.config.heads
        keys = sum(_mean_visible(seqlen, left) for left, _ in self.config.windows())
        return 6 * weights + 12 * heads * head_dim * keys


def _mean_visible(seqlen: int, left: int) -> float:
    """Mean over queries of the keys that causal attention sees, with at most `left` keys before the query (-1: all)."""
    widest = seqlen if left < 0 else min(left + 1, seqlen)
    return (widest * (widest + 1) / 2 + (seqlen - widest) * widest) / seqlen
