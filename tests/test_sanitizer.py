"""The compiled kernels under NVIDIA's compute-sanitizer: no access outside of memory, no race, no misused barrier."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
FORWARD = """
import torch
from fa3_dist import ops
from tests.test_forward_kernel import growing, pack, qkv, visit_columns

for dims in ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)):
    q, k, v = qkv(0, 300, 420, 4, 2, *dims, batch=1)
    ops.forward(q, k, v, window_left=150, window_right=0)
q, k, v = qkv(3, 400, 400, 3, 3, 128, batch=1)
ops.forward(q, k, v, window_left=128, window_right=0, sm_margin=131)  # by one block of threads, which walks
start, length, total = pack([300], gap=3)  # no list of tiles
q, k, v = (x[0] for x in qkv(4, total, total, 4, 2, 128, batch=1))
ops.forward(q, k, v, q_start=start, q_len=length, k_start=start, k_len=length, window_right=0)
start, length, total = pack([130, 0, 1, 200], gap=3)
q, k, v = (x[0] for x in qkv(1, total, total, 4, 2, 64, batch=1))
ops.forward(q, k, v, q_start=start, q_len=length, k_start=start, k_len=length, window_right=0, softcap=5.0)
out_acc, lse = torch.zeros(total, 4, 64, device="cuda"), torch.zeros(4, total, device="cuda")
out = torch.empty(total, 4, 64, device="cuda", dtype=q.dtype)
for flag in (1, 0, 2):
    ops.forward_into(q, k, v, out_acc, lse, out, **visit_columns((0, 100, 0, 333, 0, flag), (100, 170, 5, 70, 0, flag)))
ops.forward(*growing(2, [0.0, 0.0, 1000.0, 0.0, 0.0], torch.bfloat16), softmax_scale=1.0)
torch.cuda.synchronize()
print("all calls made")
"""

BACKWARD = """
import torch
from fa3_dist import ops
from tests.hopper import column, pack
from tests.test_backward_kernel import problem_tensors

def call(q, k, v, dout, accumulate=False, deterministic=False, **form):
    rows = torch.zeros(2, *q.shape[:-3], q.shape[-2], q.shape[-3], device="cuda")
    grads = [torch.zeros_like(x, dtype=torch.float32 if accumulate else None) for x in (q, k, v)]
    ops.backward(dout, q, k, v, *rows, *grads, accumulate=accumulate, deterministic=deterministic, **form)

def sum_up(q, k, v, dout, deterministic, **form):
    rows = torch.zeros(2, q.shape[1], q.shape[0], device="cuda")
    dq_sum = ops.new_dq_sum(q, v)
    dk, dv = (torch.empty_like(x, dtype=None if deterministic else torch.float32) for x in (k, v))
    ops.backward(
        dout, q, k, v, *rows, dq_sum, dk, dv, accumulate=True, accumulate_kv=False, deterministic=deterministic, **form
    )
    ops.round_dq(dq_sum, q, v)

for dims in ((64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)):
    dense = problem_tensors(0, 300, 420, 4, 2, *dims, batch=1)
    lengths = [130, 0, 1, 200]
    starts, total = pack(lengths, gap=3)
    ranges = dict(zip(ops.RANGES, map(column, (starts, lengths, starts, lengths))))
    one_range = dict(zip(ops.RANGES, map(column, ([3], [200], [5], [200]))))
    packed = [x[0] for x in problem_tensors(1, total, total, 4, 2, *dims, batch=1)]
    for deterministic in (False, True):
        call(*dense, window_left=150, window_right=0, deterministic=deterministic)
        call(*dense, accumulate=True, softcap=5.0, deterministic=deterministic)
        call(*packed, **ranges, window_right=0, deterministic=deterministic)
        call(*packed, **one_range, window_right=0, deterministic=deterministic)
        sum_up(*packed, **ranges, window_right=0, deterministic=deterministic)
        sum_up(*packed, **one_range, deterministic=deterministic)
long = problem_tensors(2, 1030, 300, 2, 1, 128, batch=1)  # in long blocks
for deterministic in (False, True):
    call(*long, deterministic=deterministic)
    sum_up(
        *(x[0] for x in long), **dict(zip(ops.RANGES, map(column, ([3], [1025], [2], [280])))),
        window_left=600, window_right=600, offsets=column([9]), deterministic=deterministic,
    )
for head_dim in (64, 128):  # by two blocks, which clear most of the sums beside the tiles
    call(*problem_tensors(3, 70, 100, 40, 40, head_dim, batch=1), sm_margin=130)
torch.cuda.synchronize()
print("all calls made")
"""


@pytest.mark.gpu
@pytest.mark.skipif(SANITIZER is None, reason="needs compute-sanitizer")
@pytest.mark.parametrize("calls", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(tool, calls):
    command = [str(SANITIZER), "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", calls]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and "all calls made" in result.stdout, (result.stdout + result.stderr)[-4000:]
