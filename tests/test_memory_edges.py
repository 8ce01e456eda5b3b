"""Kernels reach for nothing outside of their tensors, which here lie next to addresses that are not mapped.

A sanitizer does not see that: it follows neither the copy engine nor what that looks up besides what it copies.
"""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fa3_dist import ops
from tests.hopper import ONLY_THE_COMPILED_KERNEL, column, pack

pytestmark = ONLY_THE_COMPILED_KERNEL

LENGTHS = [17, 200, 1, 0, 64, 129, 70]
HEADS, KV_HEADS = 4, 2
OPERATORS = ("forward", "forward_into", "backward", "backward that accumulates")
EDGES = ("start", "end")
# The last four are so short that whole panels of columns of their kernels' tiles stay empty.
HEAD_DIMS = [(64, 64), (128, 128), (256, 256), (128, 8), (8, 128), (256, 40), (32, 32)]


class _Location(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class _AllocationProperties(ctypes.Structure):
    """CUmemAllocationProp."""

    _fields_ = (
        ("type", ctypes.c_int), ("handle_types", ctypes.c_int), ("location", _Location), ("metadata", ctypes.c_void_p),
        ("flags", ctypes.c_ubyte * 8),
    )  # fmt: skip


class _AccessDescription(ctypes.Structure):
    """CUmemAccessDesc."""

    _fields_ = (("location", _Location), ("flags", ctypes.c_int))


class _Bytes:
    """Device memory as Torch takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (address, False), "version": 3}


def island(size: int) -> Tensor:
    """Device memory of at least `size` bytes, before and after which addresses are reserved and nothing is mapped."""
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *args: object) -> None:
        error = getattr(driver, name)(*args)
        assert error == 0, f"{name} failed with {error}"

    device, pinned, read_write = 1, 1, 3  # CU_MEM_LOCATION_TYPE_, CU_MEM_ALLOCATION_TYPE_, CU_MEM_ACCESS_FLAGS_PROT_
    location = _Location(device, torch.cuda.current_device())
    properties = _AllocationProperties(type=pinned, location=location)
    granularity, base, handle = ctypes.c_size_t(), ctypes.c_uint64(), ctypes.c_uint64()
    call("cuMemGetAllocationGranularity", ctypes.byref(granularity), ctypes.byref(properties), 0)
    mapped = -(-size // granularity.value) * granularity.value
    around = 16 << 20
    call("cuMemAddressReserve", ctypes.byref(base), ctypes.c_size_t(2 * around + mapped), ctypes.c_size_t(0),
         ctypes.c_uint64(0), ctypes.c_uint64(0))  # fmt: skip
    call("cuMemCreate", ctypes.byref(handle), ctypes.c_size_t(mapped), ctypes.byref(properties), ctypes.c_uint64(0))
    start = base.value + around
    call("cuMemMap", ctypes.c_uint64(start), ctypes.c_size_t(mapped), ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
    access = _AccessDescription(location, read_write)
    call("cuMemSetAccess", ctypes.c_uint64(start), ctypes.c_size_t(mapped), ctypes.byref(access), ctypes.c_size_t(1))
    return torch.as_tensor(_Bytes(start, mapped), device="cuda")


def at_edge(x: Tensor, edge: str) -> Tensor:
    """A contiguous copy of x that begins, or ends, where device memory does."""
    size = x.numel() * x.element_size()
    memory = island(size)
    first = 0 if edge == "start" else memory.numel() - -(-size // 16) * 16
    return memory[first : first + size].view(x.dtype).view(x.shape).copy_(x)


def run(operator: str, edge: str | None, head_dims: tuple[int, int]) -> dict[str, Tensor]:
    """The results of an operator, whose tensors are all at an edge of memory, or none."""
    head_dim, head_dim_v = head_dims
    generator = torch.Generator("cuda").manual_seed(0)
    starts, total = pack(LENGTHS)
    ranges = dict(zip(ops.RANGES, map(column, (starts, LENGTHS, starts, LENGTHS)), strict=True))

    def normal(heads: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(total, heads, columns, generator=generator, device="cuda").to(dtype)

    q, k = normal(HEADS, head_dim), normal(KV_HEADS, head_dim)
    v, dout = normal(KV_HEADS, head_dim_v), normal(HEADS, head_dim_v)
    out, lse = ops.forward(q, k, v, **ranges, window_right=0)
    float32 = torch.float32
    tensors = {"q": q, "k": k, "v": v}
    if operator == "forward_into":
        tensors |= {"out_acc": normal(HEADS, head_dim_v, float32), "lse": lse.clone(), "out": torch.zeros_like(out)}
        ranges |= {"offsets": column([0] * len(LENGTHS)), "flags": column([ops.LAST] * len(LENGTHS))}
    elif operator.startswith("backward"):
        accumulates = "accumulates" in operator
        grads = [torch.zeros_like(x, dtype=float32 if accumulates else None) for x in (q, k, v)]
        tensors = {"dout": dout, **tensors, "lse": lse, "delta": ops.delta(dout, out)}
        tensors |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
        ranges["accumulate"] = accumulates
    if edge is not None:
        tensors = {name: at_edge(x, edge) for name, x in tensors.items()}
        ranges |= {name: at_edge(x, edge) for name, x in ranges.items() if isinstance(x, Tensor)}
    result = getattr(ops, operator.split()[0])(*tensors.values(), **ranges, window_right=0)
    torch.cuda.synchronize()
    if operator == "forward":
        return dict(zip(("out", "lse"), result, strict=True))
    return {name: x for name, x in tensors.items() if name in ("out_acc", "lse", "out", "dq", "dk", "dv")}


@pytest.mark.parametrize("operator", OPERATORS)
def test_nothing_is_touched_outside(operator):
    """In a process of its own, which an illegal access ends: what it last said is what it was about."""
    command = [sys.executable, "-m", "tests.test_memory_edges", operator]
    root = Path(__file__).resolve().parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, (result.stdout + result.stderr)[-3000:]


def main(operator: str) -> None:
    for head_dims, edge in itertools.product(HEAD_DIMS, EDGES):
        print(f"{operator}, head dims {head_dims}, tensors at the {edge} of memory", flush=True)
        expected = run(operator, None, head_dims)
        for name, x in run(operator, edge, head_dims).items():
            assert torch.allclose(x, expected[name], rtol=2e-2, atol=1e-3), f"{name} is not what it is elsewhere"


if __name__ == "__main__":
    main(*sys.argv[1:])
