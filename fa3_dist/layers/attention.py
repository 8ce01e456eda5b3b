"""Multi-head attention as a layer: projections, QK-norm, rotary embedding, and an attention function from outside.

The layer never asks where its tokens come from. Whoever shards the sequence passes an attention callable and the
positions of the tokens; without them it is ordinary attention over the tokens it sees.

Shapes: x_BSE (batch, seqlen, dim), q_BSHD (batch, seqlen, heads, head_dim), k and v with kv_heads.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from fa3_dist.interface import Attention, flash_attn_func
from fa3_dist.layers.rotary import RotaryEmbedding

PRECISIONS = ("input",)
DEFAULT_ATTENTION = cast(Attention, flash_attn_func)  # returns out alone unless asked for more


class FA3Attention(nn.Module):
    """Self-attention (or attention to `kv`) with grouped key/value heads.

    state_dict: q_proj, k_proj, v_proj, o_proj (`.weight`, `.bias`), q_norm.weight and k_norm.weight (head_dim,) with
    `qk_norm`, sink (heads,) with `sink`. Row h * head_dim + d of q_proj.weight is feature d of head h.

    Args:
        dim: features of inputs and outputs.
        heads, kv_heads: heads a multiple of kv_heads; kv_heads defaults to heads.
        head_dim: default dim // heads.
        bias: of q_proj, k_proj and v_proj; out_bias of o_proj, default like bias.
        qk_norm: RMS norm over head_dim of q and k, before the rotation.
        causal, window_size, softcap, softmax_scale: as in `flash_attn_func`; window_size (left, right), -1 is no bound.
        sink: a learnable logit per head that takes part in the softmax without a value.
        rotary: applied to q and k.
        precision: "input" (the dtype of q, k and v).
        attention: attention callable used when `forward` is given none; default `flash_attn_func`.
        name: what error messages call this layer.

    There is no dropout: attention probabilities are never formed.

    Raises:
        ValueError: arguments out of range or not supported.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int | None = None, head_dim: int | None = None, *, bias: bool = False,
        qk_norm: bool = False, causal: bool = True, window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0,
        softmax_scale: float | None = None, sink: bool = False, rotary: RotaryEmbedding | None = None,
        out_bias: bool | None = None, precision: str = "input", attention: Attention | None = None,
        norm_eps: float = 1e-6, name: str = "FA3Attention", device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if min(dim, heads, kv_heads) < 1 or heads % kv_heads:
            raise ValueError(f"heads is {heads} and kv_heads {kv_heads}: expected heads to be a multiple of kv_heads")
        if head_dim is None and dim % heads:
            raise ValueError(f"dim is {dim} with {heads} heads: expected a multiple of heads, or head_dim given")
        if precision not in PRECISIONS:
            raise ValueError(f"precision is {precision!r}: expected 'input'; FP8 attention is not there yet")
        self.dim, self.heads, self.kv_heads, self.head_dim = dim, heads, kv_heads, head_dim or dim // heads
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise ValueError(f"rotary has head_dim {rotary.head_dim}: expected {self.head_dim}, the layer's head_dim")
        self.causal, self.softcap = causal, softcap
        self.window_size = (window_size[0], window_size[1])
        self.softmax_scale, self.precision, self.name = softmax_scale, precision, name
        self.attention, self.rotary = attention, rotary

        out_bias = bias if out_bias is None else out_bias
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(dim, kv_heads * self.head_dim, bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(dim, kv_heads * self.head_dim, bias, device=device, dtype=dtype)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, out_bias, device=device, dtype=dtype)
        self.q_norm = nn.RMSNorm(self.head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, norm_eps, device=device, dtype=dtype) if qk_norm else None
        self.sink = nn.Parameter(torch.empty(heads, device=device, dtype=dtype)) if sink else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises every parameter in place: projections as nn.Linear, norms 1, sinks 0."""
        for module in (self.q_proj, self.k_proj, self.v_proj, self.o_proj, self.q_norm, self.k_norm, self.rotary):
            if module is not None:
                module.reset_parameters()
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def forward(
        self, x_BSE: Tensor, *, positions: Tensor | None = None, attention: Attention | None = None,
        kv: Tensor | None = None,
    ) -> Tensor:
        """x (B, S, dim) -> (B, S, dim).

        Args:
            positions: int64 (B, S) or (1, S), what the rotary embedding turns by; None: 0 .. S - 1.
            attention: attention callable for this call.
            kv: (B, Skv, dim) to attend to instead of x, without rotary embedding; causal is then aligned to its end.

        Raises:
            ValueError: the attention callable works on a shard (`needs_positions`) and no positions came, or kv with a
                rotary embedding or a sharded attention.
        """
        attention = next(a for a in (attention, self.attention, DEFAULT_ATTENTION) if a is not None)
        self._check_call(attention, positions, kv)
        source = x_BSE if kv is None else kv
        q, k, v = (
            rearrange(proj(y), "b s (h d) -> b s h d", d=self.head_dim)
            for proj, y in ((self.q_proj, x_BSE), (self.k_proj, source), (self.v_proj, source))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = (norm(y.to(norm.weight.dtype)).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        if self.rotary is not None:
            if positions is None:
                positions = torch.arange(x_BSE.shape[1], device=x_BSE.device)[None]
            table = self.rotary.table(positions, torch.promote_types(q.dtype, torch.float32))
            q, k = self.rotary.rotate(q, table), self.rotary.rotate(k, table)
        out = attention(
            q, k, v, softmax_scale=self.softmax_scale, causal=self.causal, window_size=self.window_size,
            softcap=self.softcap, sink=self.sink,
        )
        return self.o_proj(rearrange(out, "b s h d -> b s (h d)"))

    def _check_call(self, attention: Attention, positions: Tensor | None, kv: Tensor | None) -> None:
        sharded = getattr(attention, "needs_positions", False)
        if self.rotary is not None and sharded and positions is None:
            raise ValueError(
                f"{self.name} has a rotary embedding and runs on a shard of the sequence, but positions is None: "
                "expected those of its tokens, batch.positions, because an index in the shard is not a position"
            )
        if kv is not None and (self.rotary is not None or sharded):
            raise ValueError(
                f"{self.name} was given kv with {'a sharded attention' if sharded else 'a rotary embedding'}: expected "
                "neither, the keys of another sequence have positions and a layout of their own"
            )

    @classmethod
    def from_torch(cls, mha: nn.MultiheadAttention, *, causal: bool = False, **options: object) -> FA3Attention:
        """A layer that computes what `mha(x, x, x, need_weights=False)` does, with its weights copied.

        The new layer takes and returns (batch, seqlen, dim) always; for a module with batch_first=False transpose the
        first two dimensions of its inputs and outputs. `causal=True` stands for an is_causal mask. Other options are
        the constructor's (window_size, attention, name, ...).

        Raises:
            ValueError: dropout > 0, kdim or vdim other than embed_dim, add_bias_kv or add_zero_attn.
        """
        if mha.dropout > 0:
            raise ValueError(f"mha has dropout {mha.dropout}: expected 0, attention probabilities are never formed")
        if not mha._qkv_same_embed_dim:
            raise ValueError(f"mha has kdim {mha.kdim} and vdim {mha.vdim}: expected embed_dim, {mha.embed_dim}")
        if mha.bias_k is not None or mha.add_zero_attn:
            raise ValueError("mha has add_bias_kv or add_zero_attn: expected neither, they add a key to every sequence")
        weight = mha.in_proj_weight
        layer = cls(
            mha.embed_dim, mha.num_heads, bias=mha.in_proj_bias is not None, out_bias=mha.out_proj.bias is not None,
            causal=causal, device=weight.device, dtype=weight.dtype, **options,  # type: ignore[arg-type]
        )
        with torch.no_grad():
            projections = (layer.q_proj, layer.k_proj, layer.v_proj)
            for proj, part in zip(projections, weight.chunk(3), strict=True):
                proj.weight.copy_(part)
            if mha.in_proj_bias is not None:
                for proj, part in zip(projections, mha.in_proj_bias.chunk(3), strict=True):
                    proj.bias.copy_(part)
            layer.o_proj.load_state_dict(mha.out_proj.state_dict())
        return layer.train(mha.training)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"causal={self.causal}, window_size={self.window_size}, softcap={self.softcap}, "
            f"sink={self.sink is not None}"
        )
