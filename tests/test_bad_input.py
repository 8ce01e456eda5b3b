"""Wrong calls, as a table: each must raise, and say which argument, what came and what was expected.

Operator calls run on the CPU and on meta tensors, because a compiler sees only the latter. What can only be known from
the contents of a tensor is in a table of its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from fa3_dist import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func, ops
from fa3_dist.interface import apply_sink


class Wrong(NamedTuple):
    """A wrong call and three regular expressions that the message of its error must contain."""

    label: str
    call: Callable[[str], object]  # of a device
    argument: str
    came: str
    expected: str


def empty(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def int32(device: str, *values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def dense(device: str, **changes):
    """A correct dense `ops.forward` (q (2, 5, 4, 8), k and v (2, 6, 2, 8)) with some arguments changed."""
    arguments = {"q": empty(device, 2, 5, 4, 8), "k": empty(device, 2, 6, 2, 8), "v": empty(device, 2, 6, 2, 8)}
    return ops.forward(**{**arguments, **changes})


def packed_ranges(device: str) -> dict:
    starts_and_lengths = {"q_start": (0, 3), "q_len": (3, 2), "k_start": (0, 2), "k_len": (2, 4)}
    return {name: int32(device, *values) for name, values in starts_and_lengths.items()}


def packed(device: str, **changes):
    """A correct packed `ops.forward` (q (5, 4, 8), k and v (6, 2, 8), two ranges) with some arguments changed."""
    arguments = {"q": empty(device, 5, 4, 8), "k": empty(device, 6, 2, 8), "v": empty(device, 6, 2, 8)}
    return ops.forward(**{**arguments, **packed_ranges(device), **changes})


def forward_into(device: str, **changes):
    arguments = {
        "q": empty(device, 5, 4, 8), "k": empty(device, 6, 2, 8), "v": empty(device, 6, 2, 8),
        "out_acc": empty(device, 5, 4, 8), "lse": empty(device, 4, 5), "out": empty(device, 5, 4, 8),
        "offsets": int32(device, 0, 0), "flags": int32(device, 3, 3),
    }  # fmt: skip
    return ops.forward_into(**{**arguments, **packed_ranges(device), **changes})


def delta(device: str, **changes):
    arguments = {"dout": empty(device, 2, 5, 4, 8), "out": empty(device, 2, 5, 4, 8)}
    return ops.delta(**{**arguments, **changes})


def backward(device: str, **changes):
    arguments = {
        "dout": empty(device, 2, 5, 4, 8), "q": empty(device, 2, 5, 4, 8), "k": empty(device, 2, 6, 2, 8),
        "v": empty(device, 2, 6, 2, 8), "lse": empty(device, 2, 4, 5), "delta": empty(device, 2, 4, 5),
        "dq": empty(device, 2, 5, 4, 8), "dk": empty(device, 2, 6, 2, 8), "dv": empty(device, 2, 6, 2, 8),
    }  # fmt: skip
    return ops.backward(**{**arguments, **changes})


def func(device: str, **changes):
    arguments = {"q": empty(device, 2, 5, 4, 8), "k": empty(device, 2, 6, 2, 8), "v": empty(device, 2, 6, 2, 8)}
    return flash_attn_func(**{**arguments, **changes})


def varlen(device: str, **changes):
    arguments = {
        "q": empty(device, 5, 4, 8), "k": empty(device, 6, 2, 8), "v": empty(device, 6, 2, 8),
        "cu_seqlens_q": int32(device, 0, 3, 5), "cu_seqlens_k": int32(device, 0, 2, 6),
        "max_seqlen_q": 3, "max_seqlen_k": 4,
    }  # fmt: skip
    return flash_attn_varlen_func(**{**arguments, **changes})


HALF, BF16, INT = torch.float16, torch.bfloat16, torch.int64

OPERATORS = [
    # shapes of q, k, v
    Wrong("q 2-d", lambda d: dense(d, q=empty(d, 4, 8)), r"\bq\b", r"\(4, 8\)", "batch, seqlen, heads, head_dim"),
    Wrong("q 5-d", lambda d: dense(d, q=empty(d, 1, 2, 5, 4, 8)), r"\bq\b", r"\(1, 2, 5, 4, 8\)", "head_dim"),
    Wrong(
        "k packed, q dense", lambda d: dense(d, k=empty(d, 6, 2, 8)),
        r"\bk\b", r"\(6, 2, 8\)", r"4 dim|\(2, 5, 4, 8\)",
    ),
    Wrong(
        "v packed, q dense", lambda d: dense(d, v=empty(d, 6, 2, 8)),
        r"\bv\b", r"\(6, 2, 8\)", r"4 dim|\(2, 5, 4, 8\)",
    ),
    Wrong("k head_dim", lambda d: dense(d, k=empty(d, 2, 6, 2, 16)), r"\bk\b.*head_dim", r"\b16\b", r"expected.*\b8\b"),
    Wrong(
        "head_dim 0", lambda d: dense(d, q=empty(d, 2, 5, 4, 0), k=empty(d, 2, 6, 2, 0)),
        r"head_dim", r"\b0\b", "at least 1",
    ),
    Wrong("k batch", lambda d: dense(d, k=empty(d, 3, 6, 2, 8)), r"\bk\b.*batch", r"\b3\b", r"expected.*\b2\b"),
    Wrong("v seqlen", lambda d: dense(d, v=empty(d, 2, 7, 2, 8)), r"\bv\b", r"\(2, 7, 2, 8\)", r"expected \(2, 6, 2"),
    Wrong("v heads", lambda d: dense(d, v=empty(d, 2, 6, 4, 8)), r"\bv\b", r"\(2, 6, 4, 8\)", r"expected \(2, 6, 2"),
    Wrong("v batch", lambda d: dense(d, v=empty(d, 1, 6, 2, 8)), r"\bv\b", r"\(1, 6, 2, 8\)", r"expected \(2, 6, 2"),
    Wrong(
        "heads not a multiple", lambda d: dense(d, k=empty(d, 2, 6, 3, 8), v=empty(d, 2, 6, 3, 8)),
        r"\bk\b.*heads", r"\b3\b.*\b4\b", "multiple",
    ),
    Wrong(
        "more key heads than query heads", lambda d: dense(d, k=empty(d, 2, 6, 8, 8), v=empty(d, 2, 6, 8, 8)),
        r"\bk\b.*heads", r"\b8\b.*\b4\b", "multiple",
    ),
    Wrong(
        "no key heads", lambda d: dense(d, k=empty(d, 2, 6, 0, 8), v=empty(d, 2, 6, 0, 8)),
        r"\bk\b.*heads", r"\b0\b.*\b4\b", "multiple",
    ),
    # dtypes and devices
    Wrong("q int64", lambda d: dense(d, q=empty(d, 2, 5, 4, 8, dtype=INT)), r"\bq\b", "int64", "float32.*bfloat16"),
    Wrong(
        "q fp8", lambda d: dense(d, q=empty(d, 2, 5, 4, 8, dtype=torch.float8_e4m3fn)),
        r"\bq\b", "float8_e4m3fn", "float32.*bfloat16",
    ),
    Wrong("k dtype", lambda d: dense(d, k=empty(d, 2, 6, 2, 8, dtype=HALF)), r"\bk\b", "float16", "expected.*float32"),
    Wrong("v dtype", lambda d: dense(d, v=empty(d, 2, 6, 2, 8, dtype=BF16)), r"\bv\b", "bfloat16", "expected.*float32"),
    Wrong("out_dtype", lambda d: dense(d, out_dtype=HALF), "out_dtype", "float16", "expected.*float32"),
    Wrong("k None", lambda d: dense(d, k=None), r"\bk\b", "NoneType", "Tensor"),
    # scores and masks
    Wrong("softmax_scale 0", lambda d: dense(d, softmax_scale=0.0), "softmax_scale", r"0\.0", "above 0"),
    Wrong("softmax_scale negative", lambda d: dense(d, softmax_scale=-0.5), "softmax_scale", r"-0\.5", "above 0"),
    Wrong("softmax_scale nan", lambda d: dense(d, softmax_scale=float("nan")), "softmax_scale", "nan", "finite"),
    Wrong("softcap negative", lambda d: dense(d, softcap=-1.0), "softcap", r"-1\.0", "0"),
    Wrong("softcap infinite", lambda d: dense(d, softcap=float("inf")), "softcap", "inf", "finite"),
    Wrong("window_left negative", lambda d: dense(d, window_left=-1), "window_left", "-1", "0 or more, or None"),
    Wrong("window_right negative", lambda d: dense(d, window_right=-2), "window_right", "-2", "0 or more, or None"),
    Wrong("window_left float", lambda d: dense(d, window_left=2.5), "window_left", "float", r"[Ii]nt"),
    Wrong("sm_margin negative", lambda d: dense(d, sm_margin=-4), "sm_margin", "-4", "0 or more"),
    # ranges and offsets
    Wrong(
        "offset and offsets", lambda d: dense(d, offset=1, offsets=int32(d, 0, 0)),
        r"\boffset\b.*\boffsets\b", r"\b1\b.*both", "at most one",
    ),
    Wrong("offsets too many", lambda d: dense(d, offsets=int32(d, 0, 0, 0)), "offsets", r"\(3,\)", r"expected \(2,\)"),
    Wrong("offsets int64", lambda d: dense(d, offsets=int32(d, 0, 0).long()), "offsets", "int64", "int32"),
    Wrong("offsets float", lambda d: packed(d, offsets=int32(d, 0, 0).float()), "offsets", "float32", "int32"),
    Wrong("ranges of dense q", lambda d: dense(d, q_start=int32(d, 0)), "q_start", r"\(2, 5, 4, 8\)", "packed"),
    Wrong("k_len of dense q", lambda d: dense(d, k_len=int32(d, 0)), "k_len", r"\(2, 5, 4, 8\)", "packed"),
    Wrong("q_start missing", lambda d: packed(d, q_start=None), "q_start", "None", "int32"),
    Wrong("k_len missing", lambda d: packed(d, k_len=None), "k_len", "None", "int32"),
    Wrong("k_start int64", lambda d: packed(d, k_start=int32(d, 0, 2).long()), "k_start", "int64", "int32"),
    Wrong("q_len too long", lambda d: packed(d, q_len=int32(d, 1, 1, 1)), "q_len", r"\(3,\)", r"expected \(2,\)"),
    Wrong("q_start 2-d", lambda d: packed(d, q_start=int32(d, 0, 3)[None]), "q_start", r"\(1, 2\)", "one dimension"),
    Wrong("k_start 2-d", lambda d: packed(d, k_start=int32(d, 0, 2)[None]), "k_start", r"\(1, 2\)", r"expected \(2,\)"),
    # forward_into
    Wrong(
        "forward_into dense",
        lambda d: forward_into(d, q=empty(d, 1, 5, 4, 8), k=empty(d, 1, 6, 2, 8), v=empty(d, 1, 6, 2, 8)),
        r"\bq\b", r"\(1, 5, 4, 8\)", "packed",
    ),
    Wrong(
        "out_acc bf16", lambda d: forward_into(d, out_acc=empty(d, 5, 4, 8, dtype=BF16)),
        "out_acc", "bfloat16", "float32",
    ),
    Wrong(
        "out_acc shape", lambda d: forward_into(d, out_acc=empty(d, 5, 4, 16)),
        "out_acc", r"\(5, 4, 16\)", r"\(5, 4, 8\)",
    ),
    Wrong(
        "state lse shape", lambda d: forward_into(d, lse=empty(d, 5, 4)),
        r"\blse\b", r"\(5, 4\)", r"expected \(4, 5\)",
    ),
    Wrong(
        "state lse bf16", lambda d: forward_into(d, lse=empty(d, 4, 5, dtype=BF16)),
        r"\blse\b", "bfloat16", "float32",
    ),
    Wrong("out shape", lambda d: forward_into(d, out=empty(d, 6, 4, 8)), r"\bout\b", r"\(6, 4, 8\)", r"\(5, 4, 8\)"),
    Wrong("out int64", lambda d: forward_into(d, out=empty(d, 5, 4, 8, dtype=INT)), r"\bout\b", "int64", "float32"),
    Wrong("flags int64", lambda d: forward_into(d, flags=int32(d, 3, 3).long()), "flags", "int64", "int32"),
    Wrong("flags too few", lambda d: forward_into(d, flags=int32(d, 3)), "flags", r"\(1,\)", r"expected \(2,\)"),
    Wrong(
        "visit offsets too few", lambda d: forward_into(d, offsets=int32(d, 3)),
        "offsets", r"\(1,\)", r"expected \(2,\)",
    ),
    # delta and backward
    Wrong("delta of 2-d out", lambda d: delta(d, out=empty(d, 4, 8)), r"\bout\b", r"\(4, 8\)", "head_dim"),
    Wrong(
        "delta dout shape", lambda d: delta(d, dout=empty(d, 2, 5, 4, 4)),
        "dout", r"\(2, 5, 4, 4\)", r"\(2, 5, 4, 8\)",
    ),
    Wrong(
        "delta dlse shape", lambda d: delta(d, dlse=empty(d, 2, 5, 4)),
        "dlse", r"\(2, 5, 4\)", r"expected \(2, 4, 5\)",
    ),
    Wrong("delta out int64", lambda d: delta(d, out=empty(d, 2, 5, 4, 8, dtype=INT)), r"\bout\b", "int64", "float32"),
    Wrong(
        "backward dout shape", lambda d: backward(d, dout=empty(d, 2, 5, 2, 8)),
        "dout", r"\(2, 5, 2, 8\)", r"\(2, 5, 4, 8\)",
    ),
    Wrong(
        "backward lse shape", lambda d: backward(d, lse=empty(d, 2, 5, 4)),
        r"\blse\b", r"\(2, 5, 4\)", r"expected \(2, 4, 5\)",
    ),
    Wrong(
        "backward delta dtype", lambda d: backward(d, delta=empty(d, 2, 4, 5, dtype=BF16)),
        "delta", "bfloat16", "float32",
    ),
    Wrong(
        "backward mean above the most", lambda d: backward(d, most_queries=3, mean_queries=4),
        "most_queries", r"\b3\b.*\b4\b", "from 0 to the most",
    ),
    Wrong("backward mean alone", lambda d: backward(d, mean_queries=4), "most_queries", "None.*4", "both or neither"),
    Wrong("dq shape", lambda d: backward(d, dq=empty(d, 2, 6, 4, 8)), r"\bdq\b", r"\(2, 6, 4, 8\)", r"\(2, 5, 4, 8\)"),
    Wrong("dk shape", lambda d: backward(d, dk=empty(d, 2, 6, 4, 8)), r"\bdk\b", r"\(2, 6, 4, 8\)", r"\(2, 6, 2, 8\)"),
    Wrong("dv dtype", lambda d: backward(d, dv=empty(d, 2, 6, 2, 8, dtype=INT)), r"\bdv\b", "int64", "float32"),
    Wrong(
        "accumulate into bf16", lambda d: backward(d, dk=empty(d, 2, 6, 2, 8, dtype=BF16), accumulate=True),
        r"\bdk\b", "bfloat16", "expected torch.float32",
    ),
]  # fmt: skip

INTERFACE = [
    Wrong(
        "q 3-d", lambda d: func(d, q=empty(d, 5, 4, 8)),
        r"\bq\b", r"\(5, 4, 8\)", r"\(batch, seqlen, heads, head_dim\)",
    ),
    Wrong("q a list", lambda d: func(d, q=[1.0, 2.0]), r"\bq\b", "list", "tensor"),
    Wrong("q of varlen 4-d", lambda d: varlen(d, q=empty(d, 1, 5, 4, 8)), r"\bq\b", r"\(1, 5, 4, 8\)", "total_q"),
    Wrong("k a list", lambda d: func(d, k=[1.0]), r"\bk\b", r"list|List|float", "[Tt]ensor"),
    Wrong("qv", lambda d: func(d, qv=empty(d, 2, 5, 4, 8)), r"\bqv\b", "Tensor", "expected None"),
    Wrong("q_descale", lambda d: func(d, q_descale=empty(d, 2, 2)), "q_descale", "Tensor", "expected None"),
    Wrong("k_descale", lambda d: func(d, k_descale=empty(d, 2, 2)), "k_descale", "Tensor", "expected None"),
    Wrong("v_descale", lambda d: varlen(d, v_descale=empty(d, 2, 2)), "v_descale", "Tensor", "expected None"),
    Wrong("attention_chunk", lambda d: func(d, attention_chunk=64), "attention_chunk", "64", "expected 0"),
    Wrong("num_splits 4", lambda d: func(d, num_splits=4), "num_splits", r"\b4\b", "0 or 1"),
    Wrong("num_splits -1", lambda d: varlen(d, num_splits=-1), "num_splits", "-1", "0 or 1"),
    Wrong("pack_gqa", lambda d: func(d, pack_gqa="yes"), "pack_gqa", "yes", "True or False"),
    Wrong("window_size one number", lambda d: func(d, window_size=4), "window_size", r"\b4\b", r"\(left, right\)"),
    Wrong(
        "window_size three", lambda d: func(d, window_size=(1, 2, 3)),
        "window_size", r"\(1, 2, 3\)", r"\(left, right\)",
    ),
    Wrong("window_size float", lambda d: func(d, window_size=(2.5, 0)), "window", r"2\.5|float", r"[Ii]nt"),
    Wrong("softcap negative", lambda d: func(d, softcap=-3.0), "softcap", r"-3\.0", "0 for none"),
    Wrong("sink of key heads", lambda d: func(d, sink=empty(d, 2)), "sink", r"\(2,\)", r"\(4,\)"),
    Wrong("sink 2-d", lambda d: varlen(d, sink=empty(d, 1, 4)), "sink", r"\(1, 4\)", r"\(4,\)"),
    Wrong("sink a number", lambda d: func(d, sink=0.5), "sink", "float", "[Tt]ensor"),
    Wrong(
        "apply_sink", lambda d: apply_sink(empty(d, 5, 4, 8), empty(d, 4, 5), empty(d, 5)),
        "sink", r"\(5,\)", r"\(4,\)",
    ),
    Wrong("softmax_scale 0", lambda d: func(d, softmax_scale=0.0), "softmax_scale", r"0\.0", "above 0"),
    Wrong("offset float", lambda d: func(d, offset=1.5), "offset", r"float|1\.5", "[Ii]nt"),
    Wrong(
        "cu_seqlens int64", lambda d: varlen(d, cu_seqlens_q=int32(d, 0, 3, 5).long()),
        "cu_seqlens_q", "int64", "int32",
    ),
    Wrong("cu_seqlens a list", lambda d: varlen(d, cu_seqlens_k=[0, 2, 6]), "cu_seqlens_k", "list", "tensor"),
    Wrong(
        "cu_seqlens 2-d", lambda d: varlen(d, cu_seqlens_k=int32(d, 0, 2)[None]),
        "cu_seqlens_k", r"\(1, 2\)", "sequences",
    ),
    Wrong("cu_seqlens empty", lambda d: varlen(d, cu_seqlens_q=int32(d)), "cu_seqlens_q", r"\(0,\)", "sequences"),
    Wrong(
        "different numbers of sequences", lambda d: varlen(d, cu_seqlens_k=int32(d, 0, 2, 4, 6)),
        "cu_seqlens_k|k_start", r"\(4,\)|\(3,\)|3 sequences", r"\(3,\)|\(2,\)|2 sequences",
    ),
    Wrong(
        "seqused_k too long", lambda d: varlen(d, seqused_k=int32(d, 1, 1, 1)),
        "seqused_k|k_len", r"\(3,\)", r"\(2,\)",
    ),
    Wrong("seqused_q int64", lambda d: varlen(d, seqused_q=int32(d, 1, 1).long()), "seqused_q|q_len", "int64", "int32"),
    Wrong(
        "qkv of two", lambda d: flash_attn_qkvpacked_func(empty(d, 2, 5, 2, 4, 8)),
        "qkv", r"\(2, 5, 2, 4, 8\)", "seqlen, 3, heads",
    ),
    Wrong(
        "qkv 4-d, no num_heads_q", lambda d: flash_attn_qkvpacked_func(empty(d, 2, 5, 8, 8)),
        "qkv", r"\(2, 5, 8, 8\).*None", "num_heads_q given",
    ),
    Wrong(
        "num_heads_q leaves an odd rest", lambda d: flash_attn_qkvpacked_func(empty(d, 2, 5, 8, 8), num_heads_q=5),
        "num_heads_q", r"\b5\b", "2 \\* heads_kv",
    ),
    Wrong(
        "kv of three", lambda d: flash_attn_kvpacked_func(empty(d, 2, 5, 4, 8), empty(d, 2, 6, 3, 2, 8)),
        r"\bkv\b", r"\(2, 6, 3, 2, 8\)", "2, heads",
    ),
    Wrong(
        "kv 4-d", lambda d: flash_attn_kvpacked_func(empty(d, 2, 5, 4, 8), empty(d, 2, 6, 2, 8)),
        r"\bkv\b", r"\(2, 6, 2, 8\)", "2, heads",
    ),
]  # fmt: skip

BY_CONTENT = [
    Wrong("q range past the end", lambda d: packed(d, q_len=int32(d, 3, 3)), r"q_len\[1\]", r"= 3\b", r"<= 5"),
    Wrong("k range past the end", lambda d: packed(d, k_start=int32(d, 0, 4)), r"k_start\[1\]", r"= 4\b", r"<= 6"),
    Wrong("negative start", lambda d: packed(d, q_start=int32(d, -1, 3)), r"q_start\[0\]", r"-1\b", r"0 <= start"),
    Wrong("negative length", lambda d: packed(d, k_len=int32(d, -2, 4)), r"k_len\[0\]", r"-2\b", r"0 <= length"),
    Wrong("visit past the end", lambda d: forward_into(d, k_len=int32(d, 2, 5)), r"k_len\[1\]", r"= 5\b", r"<= 6"),
    Wrong("LAST without out", lambda d: forward_into(d, out=None), r"\bout\b", "None", "LAST"),
    Wrong(
        "cu_seqlens past the end", lambda d: varlen(d, cu_seqlens_k=int32(d, 0, 2, 9)),
        "k_start|cu_seqlens_k", r"\b[79]\b", "6",
    ),
    Wrong(
        "cu_seqlens decreasing", lambda d: varlen(d, cu_seqlens_q=int32(d, 0, 4, 3)),
        "q_len|cu_seqlens_q", "-1", "0 <= length",
    ),
    Wrong("k on another device", lambda d: dense(d, k=empty("meta", 2, 6, 2, 8)), r"\bk\b", "meta", "cpu"),
    Wrong("flags on another device", lambda d: forward_into(d, flags=int32("meta", 3, 3)), "flags", "meta", "cpu"),
]  # fmt: skip


def check(wrong: Wrong, device: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        wrong.call(device)
    message = str(caught.value)
    for what in ("argument", "came", "expected"):
        assert re.search(getattr(wrong, what), message), f"the message does not say {what!r}: {message}"


@pytest.mark.parametrize("device", ["cpu", "meta", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("wrong", OPERATORS + INTERFACE, ids=lambda wrong: wrong.label)
def test_wrong_call(wrong, device):
    check(wrong, device)


@pytest.mark.parametrize("wrong", BY_CONTENT, ids=lambda wrong: wrong.label)
def test_wrong_contents(wrong):
    check(wrong, "cpu")


@pytest.mark.parametrize(
    "wrong",
    [
        Wrong("max_seqlen_q", lambda d: varlen(d, max_seqlen_q=2), "max_seqlen_q", r"\b2\b", "at least 3"),
        Wrong("max_seqlen_k", lambda d: varlen(d, max_seqlen_k=3), "max_seqlen_k", r"\b3\b", "at least 4"),
        Wrong("seqused_k", lambda d: varlen(d, seqused_k=int32(d, 1, 5)), "seqused_k", r"\b5\b|longer", "at most"),
    ],
    ids=lambda wrong: wrong.label,
)
def test_what_only_debug_mode_checks(wrong, monkeypatch):
    """These cost a synchronisation on a GPU, so they are checked with FA3_DIST_DEBUG=1 and taken on trust without."""
    monkeypatch.setenv("FA3_DIST_DEBUG", "1")
    check(wrong, "cpu")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_calls_that_the_table_changes_are_right(device):
    """Each row above differs from a correct call in what its label says, and in nothing else."""
    for call in (dense, packed, forward_into, delta, backward, func, varlen):
        call(device)


def test_the_table_is_long_enough_and_its_labels_distinct():
    tables = (OPERATORS, INTERFACE, BY_CONTENT)
    assert sum(map(len, tables)) >= 40
    assert all(len({wrong.label for wrong in table}) == len(table) for table in tables)
