"""Peak memory on the CPU: 65 536 tokens fit, forward and backward, and memory grows with the tokens, not their square.

Every measurement runs in a process of its own, because a process's peak resident size never goes down.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

GIB = 2**30
BUDGET = 6 * GIB

PROGRAM = """
import json, resource, sys, time
import torch
from fa3_dist import flash_attn_func, ops

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(seqlen, heads, head_dim, dtype, options):
    q, k, v, dout = (torch.randn(1, seqlen, heads, head_dim, dtype=dtype) for _ in range(4))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = flash_attn_func(*leaves, **options)
    grads = torch.autograd.grad(out, leaves, dout)
    rows = [0, seqlen // 2, seqlen - 1]
    return bool(all(torch.isfinite(x).all() for x in (out, *grads))), float(out[0, rows].abs().sum())

case = json.loads(sys.argv[1])
torch.manual_seed(0)
dtype = getattr(torch, case["dtype"])
shape = (case["heads"], case["head_dim"], dtype, case["options"])
run(256, *shape)
report = {"base": peak()}
for seqlen in case["seqlens"]:
    started = time.perf_counter()
    finite, size = run(seqlen, *shape)
    report[str(seqlen)] = {"peak": peak(), "seconds": time.perf_counter() - started, "finite": finite, "size": size}
print(json.dumps(report))
"""


def measure(**case) -> dict:
    """Peaks in bytes after each sequence length of the case, ascending, and before the first (`base`)."""
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(case)],
        capture_output=True, text=True, timeout=400, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    report = json.loads(process.stdout.splitlines()[-1])
    for seqlen in case["seqlens"]:
        measured = report[str(seqlen)]
        print(f"{seqlen} tokens: peak {measured['peak'] / GIB:.2f} GiB, {measured['seconds']:.1f} s")
        assert measured["finite"] and measured["size"] > 0
    return report


def test_65536_tokens_causal_forward_and_backward_fit():
    """Two heads. A score matrix would be 32 GiB; an eighth of the tokens must need about an eighth of the memory."""
    report = measure(seqlens=[8192, 65536], heads=2, head_dim=32, dtype="float32", options={"causal": True})
    assert report["65536"]["peak"] < BUDGET
    grown, small = report["65536"]["peak"] - report["base"], report["8192"]["peak"] - report["base"]
    tensors = 8 * 65536 * 2 * 32 * 4  # q, k, v, dout, out, dq, dk, dv
    assert grown < max(8 * 3 * small, 6 * tensors), f"8192 tokens took {small} bytes, 65536 took {grown}"


@pytest.mark.parametrize(
    "case",
    [
        {"seqlens": [4096, 32768], "options": {"causal": True, "window_size": (256, 0), "softcap": 5.0}},
        {"seqlens": [1024, 8192], "options": {"softcap": 5.0}},
        {"seqlens": [768, 6144], "options": {"causal": True}, "dtype": "float64"},
        {"seqlens": [2048, 16384], "options": {"window_size": (256, 16)}, "dtype": "bfloat16"},
    ],
    ids=["window-softcap", "softcap-full", "fp64", "bf16-window"],
)
def test_memory_is_linear_in_tokens_on_every_path(case):
    """Eight times the tokens may take eight times the memory (twice that, for what allocators do), not 64 times."""
    case = {"heads": 2, "head_dim": 16, "dtype": "float32", **case}
    report = measure(**case)
    small, large = case["seqlens"]
    grown = report[str(large)]["peak"] - report["base"]
    tensors = 8 * large * 2 * 16 * 4
    score_matrix = 2 * large * large * 4
    assert grown < min(8 * tensors + 128 * 2**20, score_matrix / 2), f"{grown} bytes over a base of {report['base']}"
