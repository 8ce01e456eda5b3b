"""What attention is timed on: the cases of every suite and their tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

DOCUMENTS = Path(__file__).with_name("packed_documents.json")
LARGEST_SUMMED = 128  # the largest head dim whose dq is summed up in memory: separates_dq of csrc/backward/backward.h


@dataclass(frozen=True)
class Case:
    """One attention problem: each sequence attends to itself. Dense unless packed; dense sequences are equally long."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    causal: bool
    left: int | None = None  # a window: how many keys before its own a query sees
    packed: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def flop(self) -> int:
        """Operations of the forward that count."""
        return 2 * self.visible_pairs() * self.heads * (self.head_dim + self.head_dim_v)

    @property
    def backward_flop(self) -> int:
        """Operations of the backward that count: five matrix products to the forward's two."""
        return self.flop * 5 // 2

    def backward_memory(self) -> dict[str, int]:
        """Bytes that a backward of ours has reason to allocate beside its results: delta, and dq summed up in fp32."""
        rows = sum(self.lengths) * self.heads
        return {"dq_fp32": 4 * rows * self.head_dim if self.head_dim <= LARGEST_SUMMED else 0, "delta": 4 * rows}

    def visible_pairs(self) -> int:
        """(query, key) pairs that the mask leaves; of a dense causal batch half the square, as the field counts."""
        if not self.causal:
            return sum(n * n for n in self.lengths)
        if self.left is None and not self.packed:
            return sum(n * n for n in self.lengths) // 2
        return sum(_pairs_in_band(n, n if self.left is None else self.left) for n in self.lengths)

    def describe(self) -> dict[str, Any]:
        """The case as a result file has it."""
        shape: dict[str, Any] = {"batch": len(self.lengths), "seqlen": self.lengths[0]}
        if self.packed:
            shape = {"documents": len(self.lengths), "tokens": sum(self.lengths)}
        shape |= {"heads": self.heads, "kv_heads": self.kv_heads}
        shape |= {"head_dim": self.head_dim, "head_dim_v": self.head_dim_v}
        shape |= {"causal": self.causal, "window_left": self.left, "dtype": str(self.dtype).removeprefix("torch.")}
        return shape


def _pairs_in_band(seqlen: int, left: int) -> int:
    """Pairs with i - left <= j <= i: row i has min(i, left) + 1 of them."""
    left = min(left, seqlen - 1)
    return seqlen * (left + 1) - left * (left + 1) // 2


HEAD_DIMS = (64, 128, 256)
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
TOKENS, HIDDEN = 16384, 2048


def label(tokens: int) -> str:
    """512, 1k, 16k."""
    return str(tokens) if tokens < 1024 else f"{tokens // 1024}k"


def dense_name(head_dim: int, causal: bool, seqlen: int) -> str:
    """Name of a dense case."""
    return f"d{head_dim}_{'causal' if causal else 'full'}_{label(seqlen)}"


def dense_cases() -> list[Case]:
    """The grid of the FlashAttention papers: 16 k tokens and a hidden size of 2048, whatever head_dim and seqlen."""
    return [
        Case(
            dense_name(head_dim, causal, seqlen), (seqlen,) * (TOKENS // seqlen), HIDDEN // head_dim,
            HIDDEN // head_dim, head_dim, head_dim, causal,
        )
        for head_dim in HEAD_DIMS
        for causal in (False, True)
        for seqlen in SEQLENS
    ]


def packed_cases() -> list[Case]:
    """Batches of documents packed one after the other, causal inside each."""
    batches = json.loads(DOCUMENTS.read_text())["batches"]
    return [
        Case(f"packed_{name}", tuple(lengths), 16, 16, 128, 128, causal=True, packed=True)
        for name, lengths in batches.items()
    ]


def grouped_case(heads: int, kv_heads: int, seqlen: int) -> Case:
    """One causal sequence whose query heads share keys."""
    return Case(f"gqa_{heads}_{kv_heads}_{label(seqlen)}", (seqlen,), heads, kv_heads, 128, 128, causal=True)


k = 1024
GQA_16K = grouped_case(32, 8, 16 * k)
WINDOW_4096 = Case("window_4096_128k", (128 * k,), 16, 16, 128, 128, causal=True, left=4096)


def forward_cases() -> list[Case]:
    """All cases of the suite `forward`."""
    return [
        *dense_cases(),
        GQA_16K,
        grouped_case(64, 8, 32 * k),
        Case("d192_128_causal_8k", (8 * k,) * 2, 16, 16, 192, 128, causal=True),
        Case("fp16_d128_causal_8k", (8 * k,) * 2, 16, 16, 128, 128, causal=True, dtype=torch.float16),
        *packed_cases(),
        Case("window_1024_32k", (32 * k,), 64, 8, 128, 128, causal=True, left=1024),
        Case("window_128_32k", (32 * k,), 16, 16, 128, 128, causal=True, left=128),
        WINDOW_4096,
    ]


def backward_cases() -> list[Case]:
    """All cases of the suite `backward` in which peers meet."""
    window_1024 = Case("window_1024_32k_mha", (32 * k,), 16, 16, 128, 128, causal=True, left=1024)
    return [*dense_cases(), GQA_16K, *packed_cases(), window_1024, WINDOW_4096]


def few_kv_heads_cases() -> list[Case]:
    """All cases of the suite `few_kv_heads`: single sequences with few blocks of keys, as under tensor parallelism."""
    shapes = [
        (8, 1, 4 * k), (8, 1, 8 * k), (8, 1, 16 * k), (8, 1, 32 * k), (8, 2, 4 * k), (8, 2, 8 * k), (32, 1, 8 * k),
        (32, 4, 4 * k), (32, 8, k), (32, 8, 2 * k), (64, 8, 2 * k), (64, 8, 4 * k),
    ]  # fmt: skip
    base = grouped_case(8, 1, 8 * k)
    return [
        *(grouped_case(*shape) for shape in shapes),
        replace(base, name=f"{base.name}_full", causal=False),
        *(replace(base, name=f"{base.name}_d{d}", head_dim=d, head_dim_v=d) for d in (64, 256)),
    ]


def deterministic_cases() -> list[Case]:
    """Where the suite `backward` holds a deterministic backward against an ordinary one."""
    wanted = [dense_name(128, causal, 8 * k) for causal in (True, False)]
    return [replace(case, name=f"deterministic_{case.name}") for case in dense_cases() if case.name in wanted]


HOST_CASE = Case("host", (128,), 2, 2, 128, 128, causal=True)  # over on the GPU before the host has the next one ready
CONTINUATION_CASE = Case("continue_8k", (8192,), 16, 16, 128, 128, causal=False, packed=True)
ABLATION_CASE = Case("ablation", (8448,) * 4, 16, 16, 128, 128, causal=False)


class Inputs(NamedTuple):
    """q (B, S, H, D), k (B, S, Hkv, D), v (B, S, Hkv, Dv); packed (T, H, D) and so on. cu_seqlens (n + 1,), int32.

    dout, the gradient of out, is there where gradients are asked for.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    dout: Tensor | None = None


def make_inputs(case: Case, device: str, requires_grad: bool = False) -> Inputs:
    """N(0, 1) in the case's dtype, the same for every run."""
    rows = (sum(case.lengths),) if case.packed else (len(case.lengths), case.lengths[0])
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, dim: int) -> Tensor:
        return torch.randn(*rows, heads, dim, dtype=case.dtype, device=device, generator=generator)

    shapes = (case.heads, case.head_dim), (case.kv_heads, case.head_dim), (case.kv_heads, case.head_dim_v)
    q, k, v = (normal(*shape).requires_grad_(requires_grad) for shape in shapes)
    ends = torch.tensor((0, *case.lengths)).cumsum(0).to(device, torch.int32)
    return Inputs(q, k, v, ends, normal(case.heads, case.head_dim_v) if requires_grad else None)
