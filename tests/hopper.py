"""What the tests of the compiled kernels on a Hopper GPU share."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

ONLY_THE_COMPILED_KERNEL = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
    pytest.mark.usefixtures("only_the_compiled_kernel"),
]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
MASKS = {
    "full": {},
    "causal": {"window_right": 0},
    "window": {"window_left": 200, "window_right": 0},
    "local": {"window_left": 70, "window_right": 33},
}


def poison_memory() -> None:
    """Leaves NaN in the memory that the next outputs, and kernels' scratch memory, are allocated from."""
    for size in (1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 25):
        torch.full((size,), torch.nan, device="cuda")


def pack(lengths: list[int], gap: int = 0) -> tuple[list[int], int]:
    """Starts `gap` rows apart, and how many rows that takes."""
    starts = list(itertools.accumulate([length + gap for length in lengths], initial=gap))
    return starts[:-1], starts[-1]


def column(values: list[int]) -> Tensor:
    """Starts, lengths or offsets as the operators take them."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")
