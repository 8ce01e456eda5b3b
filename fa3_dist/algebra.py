"""The algebra of blockwise attention: which scores a mask leaves, and how results over parts of the keys merge."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of sums, lse and delta for inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Mask(NamedTuple):
    """Row i sees column j when i + offset - left <= j <= i + offset + right; None is no bound. Causal is right = 0."""

    offset: int
    left: int | None
    right: int | None

    def visible_keys(self, first_row: int, end_row: int, seqlen_k: int) -> tuple[int, int]:
        """[start, end) of the keys that at least one of the rows [first_row, end_row) sees (start >= end: none)."""
        start = 0 if self.left is None else max(0, first_row + self.offset - self.left)
        end = seqlen_k if self.right is None else min(seqlen_k, end_row + self.offset + self.right)
        return start, end

    def hidden(self, rows: slice, keys: slice, device: torch.device) -> Tensor | None:
        """Bool (rows, keys), True where a score is masked; None if the whole block is visible."""
        sees_all_left = self.left is None or keys.start >= rows.stop - 1 + self.offset - self.left
        sees_all_right = self.right is None or keys.stop - 1 <= rows.start + self.offset + self.right
        if sees_all_left and sees_all_right:
            return None
        i = torch.arange(rows.start, rows.stop, device=device).unsqueeze(1) + self.offset
        j = torch.arange(keys.start, keys.stop, device=device)
        hidden = torch.zeros(i.shape[0], j.shape[0], dtype=torch.bool, device=device)
        if self.left is not None:
            hidden |= j < i - self.left
        if self.right is not None:
            hidden |= j > i + self.right
        return hidden


class Rectangle(NamedTuple):
    rows: slice
    keys: slice
    causal: bool  # the diagonal ends in the bottom right corner


def rectangles(mask: Mask, seqlen_q: int, seqlen_k: int, square: bool) -> list[Rectangle] | None:
    """The visible part of a score matrix as disjoint rectangles; None if it has a left edge.

        keys ->
    q   . . . . . .     rows that see nothing: in no rectangle
        # . . . . .     CAUSAL rectangle, its diagonal ends in the bottom right corner
        # # . . . .
        # # # # # #     FULL rectangle: rows past the point where the keys run out

    `square`: every CAUSAL rectangle is square (what lies left of the square becomes a FULL one), since PyTorch's CPU
    kernel aligns the diagonal with the top left corner.
    """
    if mask.left is not None and mask.left < seqlen_q - 1 + mask.offset:
        return None
    if mask.right is None:
        first_row, first_full_row, diagonal = 0, 0, seqlen_k
    else:
        diagonal = mask.offset + mask.right  # row i sees the keys up to i + diagonal
        first_row = min(max(0, -diagonal), seqlen_q)
        first_full_row = min(max(seqlen_k - 1 - diagonal, first_row), seqlen_q)
    found = []
    if first_row < first_full_row:
        rows, end = slice(first_row, first_full_row), first_full_row + diagonal
        start = end - (first_full_row - first_row) if square else 0
        found += [Rectangle(rows, slice(0, start), causal=False), Rectangle(rows, slice(start, end), causal=True)]
    found.append(Rectangle(slice(first_full_row, seqlen_q), slice(0, seqlen_k), causal=False))
    return [r for r in found if r.rows.start < r.rows.stop and r.keys.start < r.keys.stop]


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys from the attention over each.

    out (..., S, H, Dv), lse (..., H, S). lse = log(exp(lse_a) + exp(lse_b)) and out is the mean of both, weighted by
    exp(lse_x - lse). A side with lse = -inf counts for nothing, also where both are.
    """
    largest = torch.maximum(lse_a, lse_b)
    largest = largest.masked_fill(largest == float("-inf"), 0.0)
    weight_a, weight_b = torch.exp(lse_a - largest), torch.exp(lse_b - largest)
    total = weight_a + weight_b
    lse = largest + total.log()
    total = total.masked_fill(total == 0, 1.0)
    weight_a, weight_b = ((w / total).transpose(-1, -2).unsqueeze(-1) for w in (weight_a, weight_b))
    return weight_a * out_a + weight_b * out_b, lse
