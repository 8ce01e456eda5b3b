"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) at positions that the caller states.

An angle only counts modulo one turn, so frequencies are kept as 64-bit fixed-point turns a position and multiplied by
the position in wrapping integer arithmetic: the product modulo 2**64 is the angle modulo a turn, exact to 1e-9 rad at
position 2**31, where an fp32 product would be off by hundreds of radians. Cosine and sine are then fp32.

Shapes: x_BSHD (batch, seqlen, heads, head_dim), positions_BS.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("none", "linear", "ntk", "yarn", "llama3")


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How frequencies are stretched for contexts longer than the trained one.

    Kinds:
        none: theta_i = base ** (-2 i / d), i = 0 .. d / 2 - 1.
        linear: theta_i / factor (position interpolation, Chen et al. 2023, arXiv:2306.15595).
        ntk: base * factor ** (d / (d - 2)), whatever the length: the highest frequency stays and the lowest is divided
            by factor.
        yarn: linear for slow frequencies, unscaled for fast ones, a ramp between, and cosine and sine multiplied by
            `attention_factor` (Peng et al. 2023, arXiv:2309.00071, sections 3.2 to 3.4).
        llama3: linear for wavelengths above original_max_positions / low_freq_factor, unscaled for those below
            original_max_positions / high_freq_factor, interpolated between (Llama 3.1).

    Args:
        factor: new context length over the trained one.
        original_max_positions: trained context length in tokens (yarn, llama3).
        beta_fast, beta_slow, truncate: yarn's ramp lies between the dimensions that turn this many times within
            original_max_positions; truncate rounds its ends outwards to whole dimensions.
        attention_factor: yarn; None: 0.1 * ln(factor) + 1, or with mscale and mscale_all_dim the ratio of
            0.1 * mscale * ln(factor) + 1 and 0.1 * mscale_all_dim * ln(factor) + 1.

    Raises:
        ValueError: an unknown kind, or a number that the kind needs is missing or out of range.
    """

    kind: str = "none"
    factor: float = 1.0
    original_max_positions: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}: expected one of {', '.join(KINDS)}")
        if not self.factor > 0:
            raise ValueError(f"factor is {self.factor}: expected a number above 0, new context length over trained one")
        if self.kind in ("yarn", "llama3") and not (self.original_max_positions and self.original_max_positions > 0):
            raise ValueError(
                f"original_max_positions is {self.original_max_positions}: kind {self.kind!r} expected the trained "
                "context length in tokens"
            )
        if self.kind == "llama3" and not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}: expected "
                "0 < low_freq_factor < high_freq_factor"
            )

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> RotaryScaling:
        """Reads the dict of a transformers configuration (`config.to_dict()`), or its rope_parameters / rope_scaling.

        Raises:
            ValueError: a type that is not a fixed function of the position: `dynamic` and `longrope` depend on the
                length of the running sequence, which a shard does not know; or parameters that differ by layer type.
        """
        rope = _hf_rope(config)
        hf_type = rope.get("rope_type", rope.get("type", "default"))
        kind = {"default": "none", "linear": "linear", "yarn": "yarn", "llama3": "llama3"}.get(hf_type)
        if kind is None:
            raise ValueError(
                f"rope_type is {hf_type!r}: expected default, linear, yarn or llama3; frequencies that change with the "
                "length of the sequence are not supported, the fixed form of NTK is RotaryScaling('ntk', factor)"
            )
        longest = config.get("max_position_embeddings")
        name = "original_max_position_embeddings"
        original = config.get(name) or rope.get(name) or longest
        factor = rope.get("factor")
        if factor is None:
            factor = longest / original if kind == "yarn" and longest and original else 1.0
        names = {field.name for field in dataclasses.fields(cls)} - {"kind", "factor", "original_max_positions"}
        given = {name: rope[name] for name in names if rope.get(name) is not None}
        return cls(kind, float(factor), original if kind in ("yarn", "llama3") else None, **given)

    def frequencies(self, dim: int, base: float) -> list[float]:
        """Radians a position of each of the dim / 2 pairs, in fp64."""
        if self.kind == "ntk":
            base *= self.factor ** (dim / (dim - 2)) if dim > 2 else 1.0
        plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
        shares = self._unscaled_shares(plain, dim, base)
        return [f * share + f / self.factor * (1 - share) for f, share in zip(plain, shares, strict=True)]

    def table_factor(self) -> float:
        """What cosine and sine are multiplied by; 1 except for yarn."""
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return float(self.attention_factor)
        log = max(math.log(self.factor), 0.0)
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * log + 1) / (0.1 * self.mscale_all_dim * log + 1)
        return 0.1 * log + 1

    def _unscaled_shares(self, plain: list[float], dim: int, base: float) -> list[float]:
        """How much of each frequency stays as it is; the rest is divided by factor."""
        if self.kind == "linear":
            return [0.0] * len(plain)
        if self.kind not in ("yarn", "llama3"):
            return [1.0] * len(plain)
        assert self.original_max_positions is not None
        if self.kind == "llama3":
            turns = [self.original_max_positions * f / (2 * math.pi) for f in plain]
            width = self.high_freq_factor - self.low_freq_factor
            return [min(max((t - self.low_freq_factor) / width, 0.0), 1.0) for t in turns]
        low, high = (self._dimension_turning(beta, dim, base) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = high - low if high != low else 0.001
        return [1.0 - min(max((i - low) / width, 0.0), 1.0) for i in range(len(plain))]

    def _dimension_turning(self, turns: float, dim: int, base: float) -> float:
        """The (fractional) pair that makes `turns` full turns within original_max_positions."""
        assert self.original_max_positions is not None
        return dim * math.log(self.original_max_positions / (2 * math.pi * turns)) / (2 * math.log(base))


class RotaryEmbedding(nn.Module):
    """Rotates pairs of features by angles proportional to the position.

    Holds no parameters and nothing in its state_dict; the frequencies follow the module from device to device and are
    rebuilt after `to_empty()`. Casting the module's dtype leaves them alone.

    Args:
        head_dim: last dimension of the inputs.
        base: the lowest frequency is about 1 / base.
        interleaved: pairs are (0, 1), (2, 3), ... (GPT-J, the first Llama weights); False: (i, i + rotary_dim / 2), as
            in GPT-NeoX and transformers.
        scaling: see `RotaryScaling`; None is no scaling.
        rotary_dim: only the first so many features are rotated, the rest pass unchanged; default head_dim.

    Raises:
        ValueError: rotary_dim is odd, below 2 or above head_dim, or base is not above 1.
    """

    def __init__(
        self, head_dim: int, base: float = 10000.0, interleaved: bool = False, scaling: RotaryScaling | None = None, *,
        rotary_dim: int | None = None, device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
            raise ValueError(f"rotary_dim is {rotary_dim}: expected an even number from 2 to head_dim = {head_dim}")
        if not base > 1:
            raise ValueError(f"base is {base}: expected a number above 1, such as 10000.0")
        self.head_dim, self.rotary_dim, self.base, self.interleaved = head_dim, rotary_dim, float(base), interleaved
        self.scaling = scaling or RotaryScaling()
        self.table_factor = self.scaling.table_factor()
        self.radians = 2 * math.pi / 2.0**64  # of the smallest angle; NOTE: a global float breaks dynamic compilation
        self._turns_per_position = [_fixed_point_turns(f) for f in self.scaling.frequencies(rotary_dim, self.base)]
        self.register_buffer("turns", torch.tensor(self._turns_per_position, device=device), persistent=False)
        self.turns: Tensor

    @classmethod
    def from_hf_config(cls, config: Mapping[str, Any]) -> RotaryEmbedding:
        """The embedding that a transformers configuration dict (`config.to_dict()`) describes, head_dim included."""
        rope = _hf_rope(config)
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        fraction = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        base = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
        scaling = RotaryScaling.from_hf_config(config)
        return cls(head_dim, base, scaling=scaling, rotary_dim=int(head_dim * fraction))

    def reset_parameters(self) -> None:
        """Rebuilds the frequencies where the module is."""
        self.turns = torch.tensor(self._turns_per_position, device=self.turns.device)

    def _apply(self, fn: Any, recurse: bool = True) -> RotaryEmbedding:
        super()._apply(fn, recurse)
        self.reset_parameters()  # to_empty() moves buffers without their values
        return self

    def table(self, positions_BS: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosine and sine at the given positions, times yarn's attention factor: each (B, S, 1, rotary_dim / 2).

        Raises:
            TypeError, ValueError: positions are not integers (B, S).
        """
        if positions_BS.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"positions have dtype {positions_BS.dtype}: expected torch.int64 token positions (B, S)")
        if positions_BS.dim() != 2:
            raise ValueError(f"positions have shape {tuple(positions_BS.shape)}: expected (B, S), or (1, S) for all")
        turns = positions_BS.to(torch.int64)[..., None, None] * self.turns  # wraps: the angle modulo one turn, signed
        angle = turns.to(dtype) * self.radians
        return angle.cos() * self.table_factor, angle.sin() * self.table_factor

    def rotate(self, x_BSHD: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
        """x rotated by a table of `table`, computed in the table's dtype and returned in x's.

        Raises:
            ValueError: x has another head_dim than the module, or the table is of other positions than x's tokens.
        """
        if x_BSHD.dim() != 4 or x_BSHD.shape[-1] != self.head_dim:
            raise ValueError(f"x has shape {tuple(x_BSHD.shape)}: expected (B, S, H, {self.head_dim}), head_dim last")
        cos, sin = table
        if cos.shape[1] != x_BSHD.shape[1] or cos.shape[0] not in (1, x_BSHD.shape[0]):
            raise ValueError(
                f"positions have shape {tuple(cos.shape[:2])}: expected {tuple(x_BSHD.shape[:2])} or "
                f"{(1, x_BSHD.shape[1])}, one position a token of x {tuple(x_BSHD.shape)}"
            )
        x, rest = x_BSHD.split([self.rotary_dim, self.head_dim - self.rotary_dim], dim=-1)
        x = x.to(cos.dtype)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else x.chunk(2, dim=-1)
        pair = (a * cos - b * sin, b * cos + a * sin)
        rotated = torch.stack(pair, dim=-1).flatten(-2) if self.interleaved else torch.cat(pair, dim=-1)
        rotated = rotated.to(x_BSHD.dtype)
        return rotated if self.rotary_dim == self.head_dim else torch.cat((rotated, rest), dim=-1)

    def forward(self, x_BSHD: Tensor, positions_BS: Tensor) -> Tensor:
        """x (B, S, H, head_dim), any float dtype; positions (B, S) or (1, S), int64, of any sign and order -> like x.

        Packed documents and shards of a sequence are positions like any others: 0, 1, 2, 0, 1, or 6, 7, 0, 1.

        Raises:
            ValueError, TypeError: shapes do not fit, positions are not integers.
        """
        return self.rotate(x_BSHD, self.table(positions_BS, torch.promote_types(x_BSHD.dtype, torch.float32)))

    def extra_repr(self) -> str:
        scaling = "" if self.scaling.kind == "none" else f", scaling={self.scaling}"
        rotary_dim = "" if self.rotary_dim == self.head_dim else f", rotary_dim={self.rotary_dim}"
        return f"{self.head_dim}, base={self.base:g}, interleaved={self.interleaved}{rotary_dim}{scaling}"


def _fixed_point_turns(radians: float) -> int:
    """Radians a position as 2**-64 turns a position, in the range of int64 (a turn more or less is no difference)."""
    turns = round(radians / (2 * math.pi) * 2.0**64) % 2**64
    return turns - 2**64 if turns >= 2**63 else turns


def _hf_rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if rope is None:
        return config if "rope_type" in config or "type" in config else {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"rope parameters differ by layer type ({', '.join(rope)}): expected those of one of them")
    return rope
