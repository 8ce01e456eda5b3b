"""What runs an operator on a GPU: which calls the compiled library covers, how they reach it, and the direct way there.

Most of it is seen on the CPU: `Library` stands in for the compiled kernels. Like csrc/bindings.cpp it refuses what
does not fit, with errors of its own; what it accepts `reference` computes.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fa3_dist.__main__ as cli
from fa3_dist import _build, flash_attn_func, flash_attn_varlen_func, ops, reference, torch_kernels
from tests import test_bad_input, test_interface, test_ops
from tests.test_ops import RANGE_NAMES, index_tensors, random_qkv

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
VARIANTS = [
    "forward_bf16_64_64", "forward_bf16_192_128", "forward_fp32_64_64", "backward_bf16_64_64", "delta_bf16",
    "delta_fp32",
]  # fmt: skip
README = Path(__file__).resolve().parent.parent / "README.md"


class Library:
    """A compiled library for the CPU that holds VARIANTS."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple]] = []
        self.registration = torch.library.Library(ops.NAMESPACE, "IMPL")
        for op in ("forward", "forward_into"):
            self.registration.impl(f"{op}_sm90", lambda *args, op=op: self.run(op, args), "CPU")

    def run(self, op: str, args: tuple) -> object:
        self.calls.append((op, args))
        self.refuse(op, dict(zip(ops.SCHEMA_ARGS[op], args, strict=True)))
        with torch.no_grad(), ops._full_precision("cpu"):
            return getattr(reference, op)(*args)

    def direct_calls(self) -> list[Callable[..., object]]:
        """In the place of the library's functions: None for what they leave to the operator."""

        def direct(kernel: Callable[..., object], *args: object) -> object:
            try:
                return kernel(*args) or True  # through the dispatcher, which checks types as the library does
            except (IndexError, RuntimeError):
                return None

        def forward(*args: object) -> object:
            *args, wants_lse = args
            if args[ops._SCALE + 3] is None and isinstance(args[0], torch.Tensor) and args[0].dim():
                args[ops._SCALE + 3] = max(args[0].shape[-1], 1) ** -0.5
            result = direct(ops._forward_sm90, *args)
            return result if wants_lse or result is None else (result[0], None)

        return [forward, functools.partial(direct, ops._forward_into_sm90)]

    def refuse(self, op: str, call: dict) -> None:
        """Raises RuntimeError for what no kernel takes."""
        try:
            ops._CHECKS[op](**call)
        except (TypeError, ValueError) as error:
            raise RuntimeError("refused by the library") from error
        rows = [call[name] for name in "qkv"]
        columns = [x for name in (*RANGE_NAMES, "offsets", "flags") if (x := call.get(name)) is not None]
        state = [x for name in ("out_acc", "lse", "out") if (x := call.get(name)) is not None]
        if any(x.shape[-1] % 8 or x.stride(-1) != 1 for x in rows):
            raise RuntimeError("refused by the library: head dims")
        if not all(x.is_contiguous() for x in (*columns, *state)) or any(x.data_ptr() % 16 for x in state):
            raise RuntimeError("refused by the library: strides")
        if any(x.dtype not in (call["q"].dtype, FP32) for x in state):
            raise RuntimeError("refused by the library: dtype of out")

    def took(self, op: str, times: int = 1) -> bool:
        """Whether just so many calls came since the last question, all of this operator."""
        calls, self.calls = self.calls, []
        return [name for name, _ in calls] == [op] * times


@pytest.fixture
def library(monkeypatch):
    library = Library()
    monkeypatch.setattr(ops, "_has_compiled_kernel", lambda device, request: ops._covers(VARIANTS, request))
    yield library
    library.registration._destroy()


def go_directly(library, monkeypatch):
    """Every call that may goes to the library directly."""
    for name, call in zip(("_direct_forward", "_direct_forward_into"), library.direct_calls(), strict=True):
        monkeypatch.setattr(ops, name, call)


def do_not_go_directly(monkeypatch):
    for name in ("_direct_forward", "_direct_forward_into"):
        monkeypatch.setattr(ops, name, lambda *args: None)


@pytest.fixture
def direct(library, monkeypatch):
    go_directly(library, monkeypatch)
    return library


def visits(device, *, q_len, k_len, flags=ops.FIRST | ops.LAST, offset=0) -> dict:
    """One visit as `forward_into` takes it."""
    names = (*RANGE_NAMES, "offsets", "flags")
    return dict(zip(names, index_tensors(device, [0], [q_len], [0], [k_len], [offset], [flags]), strict=True))


# ---- what the library covers -----------------------------------------------------------------------------------------


def request(op, dtypes, head_dims=(), needs=()):
    return ops._Request(op, dtypes, head_dims, needs)


@pytest.mark.parametrize(
    ("wanted", "covered"),
    [
        (request("forward", (BF16,), (64, 64)), True),
        (request("forward", (BF16,), (40, 8)), True),
        (request("forward", (BF16,), (65, 65)), True),
        (request("forward", (BF16,), (192, 128)), True),
        (request("forward", (BF16,), (128, 192)), False),
        (request("forward", (BF16,), (200, 64)), False),
        (request("forward", (BF16,), (64, 0)), False),
        (request("forward", (FP16,), (64, 64)), False),
        (request("forward", (FP64,), (64, 64)), False),
        (request("forward_into", (BF16,), (192, 128)), True),
        (request("forward_into", (BF16,), (64, 64), ("something",)), False),
        (request("delta", (BF16, FP32)), True),
        (request("delta", (BF16, FP64)), False),
        (request("delta", (FP16, BF16)), False),
        (request("backward", (BF16,), (64, 64)), True),
        (request("backward", (BF16,), (128, 128)), False),
        (request("backward", (FP32,), (64, 64)), False),
        (request("backward", (BF16,), (64, 64), ("something",)), False),
    ],
    ids=str,
)
def test_coverage(wanted, covered):
    assert ops._covers(VARIANTS, wanted) is covered


def test_sizes_of_operators_follow_from_the_variants():
    sizes = ops.compiled_sizes([*VARIANTS, "quantize_e4m3_rows"])
    assert sizes["forward"] == sizes["forward_into"] == {"bf16": [(64, 64), (192, 128)], "fp32": [(64, 64)]}
    assert sizes["delta"] == {"bf16": [()], "fp32": [()]}
    assert sizes["backward"] == sizes["round_dq"] == {"bf16": [(64, 64)]} and len(sizes) == 5


def test_doctor_describes_operators_from_the_variants():
    described = [line.split(None, 1) for line in cli._describe_operators(VARIANTS)]
    assert described == [
        ["forward", "bf16 64/64 192/128, fp32 64/64"],
        ["forward_into", "bf16 64/64 192/128, fp32 64/64"],
        ["delta", "bf16, fp32"],
        ["backward", "bf16 64/64"],
        ["round_dq", "bf16 64/64"],
    ]


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_readme_claims_what_the_variants_cover(op):
    """The rows of the README's table that name an sm_90a kernel for it, against csrc/instances.def."""
    kernels = [row for row in _build.instances() if row.family == op]
    largest = {row.traits[0]: max(map(int, row.traits[1:])) for row in kernels}
    (claim,) = re.findall(rf"^\| {op}, (.+) and (.+), head_dim up to (\d+): .*\*\*sm_90a", README.read_text(), re.M)
    assert set(claim[:2]) == set(largest)
    for dtype in claim[:2]:
        for most in (8, int(claim[2])):
            name = next(torch_dtype for torch_dtype, short in ops._VARIANT_DTYPES.items() if short == dtype)
            assert ops._covers([row.name for row in kernels], request(op, (name,), (most, most)))
        assert largest[dtype] == int(claim[2])


def test_requests_name_what_no_kernel_has():
    q, v = torch.empty(5, 2, 64, dtype=BF16), torch.empty(5, 2, 40, dtype=BF16)
    ranges = (None,) * 6
    assert str(ops._request("forward", (q, q, v))) == "fa3_dist::forward for torch.bfloat16, head_dim 64 and 40"
    assert str(ops._request("backward", (q, q, q, v))) == "fa3_dist::backward for torch.bfloat16, head_dim 64 and 40"
    assert str(ops._request("delta", (q, q.float()))) == "fa3_dist::delta for torch.bfloat16 and torch.float32"
    assert str(ops._request("delta", (q, q))) == "fa3_dist::delta for torch.bfloat16"
    for out in (None, v, v.float()):
        assert not ops._request("forward_into", (q, q, v, None, None, out, *ranges)).needs
    backward = {name: None for name in ops.SCHEMA_ARGS["backward"]} | {"q": q, "k": q, "v": q}
    assert not ops._request("backward", tuple(backward.values())).needs
    assert not ops._request("backward", tuple((backward | {"deterministic": True}).values())).needs
    wide = {name: torch.empty(5, 2, 200, dtype=BF16) for name in "qk"}
    assert not ops._request("backward", tuple((backward | wide | {"deterministic": True}).values())).needs
    odd = {name: torch.empty(5, 2, 33, dtype=BF16) for name in "qkv"}
    assert not ops._request("backward", tuple((backward | odd).values())).needs
    assert ops._request("backward", tuple((backward | odd | {"accumulate": True}).values())).needs
    assert "with an out of torch.float16" in str(ops._request("forward_into", (q, q, v, None, None, v.half(), *ranges)))
    narrow = v[..., :20]
    assert "with a state whose head dims are not multiples of 8" in str(
        ops._request("forward_into", (q, q, narrow, None, None, None, *ranges))
    )


@pytest.mark.parametrize("built", [True, False], ids=["", "no library"])
@pytest.mark.parametrize("capability", [(9, 0), (8, 0)], ids=str)
def test_the_warning_says_what_was_asked_and_what_exists(built, capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(ops, "library_info", lambda: {"variants": VARIANTS} if built else None)
    decide = ops._has_compiled_kernel.__wrapped__
    covered, other = request("forward", (BF16,), (64, 64)), request("forward_into", (BF16,), (20, 20), ("a wish",))
    device = torch.device("cuda", 0)
    if built and capability == (9, 0):
        assert decide(device, covered) is True
    exists = "kernels forward_bf16_64_64, .*delta_fp32\\." if built else "`make kernels` builds it"
    asked = "forward_into for torch.bfloat16, head_dim 20 and 20, with a wish was called on Some GPU"
    with pytest.warns(UserWarning, match=f"{asked}.*{exists}.*FA3_DIST_STRICT=1"):
        assert decide(device, other) is False
    monkeypatch.setenv("FA3_DIST_STRICT", "1")
    with pytest.raises(RuntimeError, match="FA3_DIST_STRICT=1 makes this an error"):
        decide(device, other)


# ---- how calls reach it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("head_dims", [(20, 20), (64, 5), (3, 40), (1, 1)], ids=str)
@pytest.mark.parametrize("out_dtype", [None, FP32], ids=str)
def test_other_head_dims_are_padded_inside_the_operator(head_dims, packed, out_dtype, library):
    q, k, v, _ = random_qkv("cpu", BF16, batch=2, seqlen_q=9, seqlen_k=11, heads=4, head_dim=64)
    q, k, v = q[..., : head_dims[0]], k[..., : head_dims[0]], v[..., : head_dims[1]]
    ranges = [None] * 4
    if packed:
        q, k, v = q[0], k[0], v[0]
        ranges = index_tensors("cpu", [0, 5], [5, 4], [3, 0], [8, 3])
    call = (q, k, v, *ranges, None, None, 0.3, 4, 0, 2.0, out_dtype, False, 0)
    out, lse = ops._run_on_cuda("forward", *call)
    expected_out, expected_lse = reference.forward(*call)
    ((_, (q_seen, k_seen, v_seen, *_)),) = library.calls
    assert q_seen.shape[-1] == k_seen.shape[-1] == -(-head_dims[0] // 8) * 8
    assert v_seen.shape[-1] == -(-head_dims[1] // 8) * 8
    assert out.dtype == expected_out.dtype and out.is_contiguous()
    torch.testing.assert_close(out, expected_out, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("how", ["argument", "torch.use_deterministic_algorithms"])
def test_deterministic_gradients_come_from_the_library(how, deterministic, library, monkeypatch):
    """From an argument of the interface, or from torch's setting, down to the compiled kernel."""
    seen = []
    monkeypatch.setattr(ops, "_backward_sm90", lambda *args: seen.append(dict(zip(ops.SCHEMA_ARGS["backward"], args))))
    defaults = {"accumulate": False, "accumulate_kv": False, "offset": None, "most_queries": None, "mean_queries": None}
    monkeypatch.setattr(ops, "backward", lambda *args, **call: ops._run_on_cuda(
        "backward", *args, *((defaults | call)[name]
                             for name in ops.SCHEMA_ARGS["backward"][len(args):])))  # fmt: skip
    q, k, v, dout = random_qkv("cpu", BF16, head_dim=64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.use_deterministic_algorithms(deterministic and how != "argument")
    try:
        out = flash_attn_func(*leaves, deterministic=deterministic and how == "argument")
        torch.autograd.grad(out, leaves, dout)
    finally:
        torch.use_deterministic_algorithms(False)
    assert [call["deterministic"] for call in seen] == [deterministic]


def test_right_head_dims_are_not_copied(library):
    q, k, v, _ = random_qkv("cpu", BF16, head_dim=64)
    ops._run_on_cuda("forward", q, k, v, *[None] * 6, 0.3, None, None, 0.0, None, False, 0)
    ((_, seen),) = library.calls
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(seen, (q, k, v), strict=False))


def every_other_column(x):
    """x in the even columns of a tensor of sevens, and that tensor's odd columns."""
    memory = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 7.0, dtype=x.dtype)
    return memory[..., ::2].copy_(x), memory[..., 1::2]


def misaligned(x):
    """x, contiguous, right behind an element that is 7, and that element."""
    memory = torch.full((x.numel() + 1,), 7.0, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x), memory[:1]


@pytest.mark.parametrize("way", ["operator", "direct"])
@pytest.mark.parametrize("lay_out", [every_other_column, misaligned], ids=lambda function: function.__name__)
@pytest.mark.parametrize("odd", [(), ("out_acc",), ("lse",), ("out",), ("out_acc", "lse", "out")], ids=str)
def test_a_state_of_any_strides_is_updated_in_place(odd, lay_out, way, library, monkeypatch):
    """The kernel gets whole tensors; views of larger ones get back what it wrote, and nothing around them changes."""
    if way == "direct":
        go_directly(library, monkeypatch)
    q, k, v, state = (x[0] for x in random_qkv("cpu", BF16, seqlen_q=6, seqlen_k=8, head_dim=16))
    states = {"out_acc": state.float(), "lse": state.float().sum(-1).T.contiguous(), "out": state.clone()}
    around = {}
    for name in odd:
        states[name], around[name] = lay_out(states[name])
    expected = {name: x.clone() for name, x in states.items()}
    columns = visits("cpu", q_len=4, k_len=8, flags=ops.LAST)
    scores = (0.25, None, 0, 0.0, 0)
    reference.forward_into(q, k, v, *expected.values(), *columns.values(), *scores)
    if way == "direct":
        ops.forward_into(q, k, v, *states.values(), **columns, softmax_scale=0.25, window_right=0)
    else:
        ops._run_on_cuda("forward_into", q, k, v, *states.values(), *columns.values(), *scores)
    if way == "operator" or not odd:
        assert library.took("forward_into")
    for name, x in states.items():
        torch.testing.assert_close(x, expected[name], rtol=0, atol=0)
    assert all(bool((x == 7.0).all()) for x in around.values())


@pytest.mark.parametrize("way", ["operator", "direct"])
def test_ranges_may_be_columns_of_a_table(way, library, monkeypatch):
    if way == "direct":
        go_directly(library, monkeypatch)
    q, k, v, state = (x[0] for x in random_qkv("cpu", BF16, seqlen_q=6, seqlen_k=8, head_dim=16))
    columns = index_tensors("cpu", [0, 2], [2, 4], [0, 3], [3, 5], [1, -1], [3, 3])
    assert not any(x.is_contiguous() for x in columns)
    named = dict(zip((*RANGE_NAMES, "offsets", "flags"), columns, strict=True))
    out, flags = torch.empty_like(state), named.pop("flags")
    if way == "direct":
        result, lse = ops.forward(q, k, v, **named)
        ops.forward_into(q, k, v, state.float(), torch.zeros(2, 6), out, **named, flags=flags)
    else:
        result, lse = ops._run_on_cuda("forward", q, k, v, *columns[:5], None, 0.25, None, None, 0.0, None, False, 0)
        state = (state.float(), torch.zeros(2, 6), out)
        ops._run_on_cuda("forward_into", q, k, v, *state, *columns, 0.25, None, None, 0.0, 0)
    expected = reference.forward(q, k, v, *columns[:5], None, 0.25, None, None, 0.0, None, False, 0)
    for got, want in zip((result, lse, out), (*expected, expected[0]), strict=True):
        assert torch.equal(got, want)


def test_an_out_of_any_dtype_is_written(direct):
    """The library writes q's dtype and fp32; the operator does the rest."""
    q, k, v, state = (x[0] for x in random_qkv("cpu", BF16, seqlen_q=6, seqlen_k=8, head_dim=16))
    expected = reference.forward(q[None], k[None], v[None], *[None] * 6, 0.25, None, None, 0.0, FP32, False, 0)[0][0]
    for dtype in (BF16, FP32, FP16):
        out = torch.empty_like(state, dtype=dtype)
        columns = visits("cpu", q_len=6, k_len=8)
        ops.forward_into(q, k, v, torch.zeros(6, 2, 16), torch.zeros(2, 6), out, **columns)
        assert torch.equal(out, expected.to(dtype))


def test_no_out_is_needed_where_no_visit_is_the_last(direct):
    q, k, v, state = (x[0] for x in random_qkv("cpu", BF16, seqlen_q=6, seqlen_k=8, head_dim=16))
    out_acc, lse = state.float(), torch.zeros(2, 6)
    ops.forward_into(q, k, v, out_acc, lse, None, **visits("cpu", q_len=6, k_len=8, flags=ops.FIRST))
    assert direct.took("forward_into") and bool(lse.all())


@pytest.mark.parametrize(
    ("change", "plain"),
    [
        (lambda x: x, True),
        (lambda x: x.transpose(-3, -2), True),
        (lambda x: x[..., :40], True),  # rows 128 bytes apart
        (lambda x: x[..., 8:], True),
        (lambda x: x[..., 4:36], False),  # starts 8 bytes into a row
        (lambda x: x.flatten()[: 5 * 2 * 36].view(5, 2, 36), False),  # rows 72 bytes apart
        (lambda x: x[..., ::2], False),
        (lambda x: x.transpose(-1, -2), False),
        (lambda x: x[..., :1, :].expand_as(x), False),
        (lambda x: x[..., :1, :], True),  # one head: its stride is never used
        (lambda x: x.as_strided((*x.shape[:-3], 1, *x.shape[-2:]), (*x.stride()[:-3], 1, *x.stride()[-2:])), True),
    ],
    ids=["contiguous", "heads first", "sliced", "sliced aligned", "misaligned", "odd rows", "columns", "transposed",
         "expanded", "one head", "one token"],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_which_rows_the_copy_engine_can_address(change, plain, packed):
    """Meta tensors have strides and addresses (from 0 on) as CUDA tensors have."""
    x = torch.empty((5, 2, 64) if packed else (3, 5, 2, 64), dtype=BF16, device="meta")
    (view,) = (change(x),)
    (got,) = torch_kernels.with_plain_rows(view)
    assert (got is view) is plain
    assert got.shape == view.shape and (plain or got.is_contiguous())


@pytest.mark.parametrize("way", ["operator", "direct"])
def test_debug_mode_reads_what_the_kernels_take_on_trust(way, library, monkeypatch):
    if way == "direct":
        go_directly(library, monkeypatch)
    q, k, v, state = (x[0] for x in random_qkv("cpu", FP32, seqlen_q=6, seqlen_k=8, head_dim=16))
    lse = torch.zeros(2, 6)
    wrong = {"k_len": (visits("cpu", q_len=6, k_len=9), state), "LAST": (visits("cpu", q_len=6, k_len=8), None)}
    monkeypatch.setenv("FA3_DIST_DEBUG", "1")
    for said, (columns, out) in wrong.items():
        with pytest.raises(ValueError, match=said):
            if way == "direct":
                ops.forward_into(q, k, v, state, lse, out, **columns)
            else:
                ops._run_on_cuda("forward_into", q, k, v, state, lse, out, *columns.values(), 0.25, None, None, 0.0, 0)
        assert not library.calls


APART, TOGETHER = ([4, 0, 4], [3, 4, 0]), ([0, 3, 3], [4, 3, 0])  # starts and lengths


@pytest.mark.parametrize("shared", ["queries", "keys", "nothing"])
@pytest.mark.parametrize("op", ["forward", "backward", "backward that accumulates"])
def test_debug_mode_finds_ranges_that_share_rows(op, shared):
    """Queries may be shared in a backward that accumulates, and keys in a forward."""
    q, k, v, dout = (x[0] for x in random_qkv("cpu", FP32, seqlen_q=8, seqlen_k=8, head_dim=16))
    columns = [*(TOGETHER if shared == "queries" else APART), *(TOGETHER if shared == "keys" else APART)]
    ranges = (*(torch.tensor(column, dtype=torch.int32) for column in columns), None, None)
    mask = (0.25, None, None, 0.0)
    if op == "forward":
        call, wrong = ("forward", (q, k, v, *ranges, *mask, None, False, 0)), {"queries"}
    else:
        accumulate = op != "backward"
        rows = torch.zeros(2, 2, 8)
        call = ("backward", (dout, q, k, v, *rows, q, k, v, *ranges, *mask, accumulate, accumulate, False, 0))
        wrong = {"keys"} if accumulate else {"queries", "keys"}
    if shared not in wrong:
        ops._check_contents(*call)
        return
    with pytest.raises(ValueError, match=f"ranges 0 and 1 share {shared} from row 3 on"):
        ops._check_contents(*call)


# ---- direct calls ----------------------------------------------------------------------------------------------------


def test_a_call_that_the_library_leaves_runs_in_the_operator(direct):
    q, k, v, _ = random_qkv("cpu", BF16, head_dim=20)
    expected = reference.forward(q, k, v, *[None] * 6, 0.5, None, None, 0.0, None, False, 0)
    assert all(torch.equal(a, b) for a, b in zip(ops.forward(q, k, v, softmax_scale=0.5), expected, strict=True))


@pytest.mark.skipif(ops.library_info() is None, reason="needs the compiled library: make kernels")
def test_the_compiled_library_leaves_what_is_not_for_it():
    """Whatever Python objects it gets, and whatever kind of tensor, it says None and leaves no error behind."""
    q, k, v, _ = random_qkv("cpu", BF16, head_dim=16)
    rest = (*[None] * 6, 0.25, None, None, 0.0, None, False, 0, True)
    wrapped = []
    torch.func.vmap(lambda x: wrapped.append(x) or x)(q)
    odd = [None, 1, "q", object(), q.as_subclass(Subclass), q.to("meta"), q.to_sparse(), *wrapped]
    for x in (q, *odd):
        for call in ((x, k, v, *rest), (q, k, x, *rest), (q, k, v, x, *rest[1:])):
            assert ops._direct_forward(*call) is None
    for at in range(17):
        for x in (None, "text", 2**70, -1, 1.5, True, object(), FP64):
            call = [q, k, v, *rest]
            call[at] = x
            assert ops._direct_forward(*call) is None
    visit, states = visits("cpu", q_len=6, k_len=8).values(), (torch.zeros(6, 2, 16), torch.zeros(2, 6), None)
    for at in range(17):
        for x in (None, "text", 2**70, -1, 1.5, True, object(), FP64, q):
            call = [q[0], k[0], v[0], *states, *visit, 0.25, None, None, 0.0, 0]
            call[at] = x
            assert ops._direct_forward_into(*call) is None
    for call in (ops._direct_forward, ops._direct_forward_into):
        assert call() is None and call(q, k, v) is None


@pytest.mark.parametrize("op", ops.COMPILED)
def test_autograd_does_not_stand_before_the_library(op):
    """Else PyTorch's fallback, which only warns, takes as long as all of the rest."""
    assert torch._C._dispatch_kernel_for_dispatch_key_is_fallthrough(f"{ops.NAMESPACE}::{op}_sm90", "Autograd")


def test_direct_calls_of_the_interface(direct, monkeypatch):
    q, k, v, _ = random_qkv("cpu", BF16, seqlen_q=9, seqlen_k=9, head_dim=16)
    wanted = []
    call = ops._direct_forward
    monkeypatch.setattr(ops, "_direct_forward", lambda *args: wanted.append(args[-1]) or call(*args))
    for options in ({}, {"return_attn_probs": True}, {"sink": torch.zeros(2)}):
        out = flash_attn_func(q, k, v, causal=True, window_size=(4, 0), softcap=2.0, sm_margin=8, **options)
        assert direct.took("forward") and isinstance(out, tuple) is ("return_attn_probs" in options)
    assert flash_attn_func(q.requires_grad_(), k, v).requires_grad and direct.took("forward")
    q.requires_grad_(False)
    assert wanted == [False, True, True, True]  # lse
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    for options in ({}, {"return_attn_probs": True}):
        flash_attn_varlen_func(q[0], k[0], v[0], cu_seqlens, cu_seqlens, 5, 5, causal=True, **options)
        assert direct.took("forward")
    assert wanted[4:] == [False, True]


def outcome(wrong, device):
    """What a wrong call raises, as text; None if nothing."""
    try:
        wrong.call(device)
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def row(label, call, argument, came, expected):
    """A wrong call of a helper in test_bad_input, which is looked up late: tests on a GPU replace some."""
    return test_bad_input.Wrong(label, lambda device: call(test_bad_input, device), argument, came, expected)


def other(device):
    return "cpu" if device == "cuda" else "meta"


EVERY_WRONG_CALL = [
    *test_bad_input.OPERATORS,
    *test_bad_input.INTERFACE,
    row("q 0-d", lambda t, d: t.dense(d, q=t.empty(d)), r"\bq\b", r"\(\)", "head_dim"),
    row("no heads", lambda t, d: t.dense(d, q=t.empty(d, 2, 5, 0, 8)), "heads", r"\b0\b", "multiple"),
    row("softmax_scale text", lambda t, d: t.func(d, softmax_scale="1"), "softmax_scale", "str", "float"),
    row("sm_margin None", lambda t, d: t.packed(d, sm_margin=None), "sm_margin", "NoneType", "int"),
    row("k away", lambda t, d: t.dense(d, k=t.empty(other(d), 2, 6, 2, 8)), r"\bk\b", "cpu|meta", "where q"),
    row("k_len away", lambda t, d: t.packed(d, k_len=t.int32(other(d), 2, 4)), "k_len", "cpu|meta", "where q"),
    row("offsets away", lambda t, d: t.dense(d, offsets=t.int32(other(d), 0, 0)), "offsets", "cpu|meta", "where q"),
    row("flags away", lambda t, d: t.forward_into(d, flags=t.int32(other(d), 3, 3)), "flags", "cpu|meta", "where q"),
]


@pytest.mark.parametrize("wrong", EVERY_WRONG_CALL, ids=lambda wrong: wrong.label)
def test_direct_calls_raise_what_the_operator_raises(wrong, direct, monkeypatch):
    test_bad_input.check(wrong, "cpu")
    directly = outcome(wrong, "cpu")
    do_not_go_directly(monkeypatch)
    assert directly == outcome(wrong, "cpu")


@pytest.mark.parametrize("call", ["dense", "packed", "forward_into", "func", "varlen"])
def test_the_right_calls_beside_the_wrong_ones_go_directly(call, direct):
    """Without this the test above could pass because nothing goes directly."""
    getattr(test_bad_input, call)("cpu")
    assert direct.took("forward_into" if call == "forward_into" else "forward")


class SeesFunctions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_nothing_goes_past_those_who_listen_to_operators(direct):
    q, k, v, _ = random_qkv("cpu", BF16, head_dim=16)
    with SeesFunctions():
        ops.forward(q, k, v)
    seen = test_ops.recorded_calls(lambda: ops.forward(q, k, v))
    assert [str(function) for function, *_ in seen] == ["fa3_dist.forward.default"]
    ops.forward(q.as_subclass(Subclass), k, v)
    ops.forward(torch.nn.Parameter(q), k, v)
    with torch._subclasses.FakeTensorMode() as mode:
        assert torch._C._len_torch_dispatch_stack() == 1
        assert ops.forward(*(mode.from_tensor(x) for x in (q, k, v)))[0].shape == q.shape
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: ops.forward(x, k, v)[0].float().sum())(q)
    with torch.profiler.profile() as profile:
        ops.forward(q, k, v)
    assert "fa3_dist::forward" in {event.key for event in profile.key_averages()}
    traced = torch.jit.trace(lambda q, k, v: ops.forward(q, k, v)[0], (q, k, v), check_trace=False)
    assert "fa3_dist::forward(" in str(traced.graph)
    assert not direct.calls
    ops.forward(q, k, v)
    assert direct.took("forward")


def test_compiled_code_holds_the_operator(direct):
    torch.compiler.reset()
    compiled = torch.compile(test_ops.attention_and_loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for seqlen in (16, 29):
        got = test_ops.loss_and_grads(compiled, seqlen, "cpu")
        assert not direct.calls
        expected = test_ops.loss_and_grads(test_ops.attention_and_loss, seqlen, "cpu")
        assert direct.took("forward")
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_of_direct_calls_are_those_of_the_operator(direct, monkeypatch):
    """Bit for bit, and with hooks on what is saved, which must be nothing but inputs and results."""
    q, k, v, dout = random_qkv("cpu", BF16, batch=2, seqlen_q=20, seqlen_k=24, heads=4, head_dim=16)
    dlse = dout.float().sum(-1).transpose(1, 2)

    def run():
        saved = []
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(tuple(x.shape)) or x, lambda x: x):
            out, lse = ops.forward(*leaves, window_left=9, window_right=0, softcap=3.0)
        return (out, lse, *torch.autograd.grad((out, lse), leaves, (dout, dlse))), saved

    results, saved = run()
    assert direct.took("forward")
    do_not_go_directly(monkeypatch)
    expected, expected_saved = run()
    assert not direct.calls
    assert saved == expected_saved
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.fixture
def device(request):
    """For the tests below, which are those of other files again: on the CPU, and directly wherever that is possible."""
    request.getfixturevalue("direct")
    return "cpu"


test_upstream_gradients_of_every_size = test_ops.test_upstream_gradients_of_every_size
test_gradients_of_some_inputs_only = test_ops.test_gradients_of_some_inputs_only
test_no_graph_is_kept_without_gradients = test_ops.test_no_graph_is_kept_without_gradients
test_double_backward_raises_clearly = test_ops.test_double_backward_raises_clearly
test_two_deterministic_runs_are_bitwise_equal = test_ops.test_two_deterministic_runs_are_bitwise_equal
test_split_keys_equal_one_shot = test_ops.test_split_keys_equal_one_shot
test_vmap_raises_clearly = test_ops.test_vmap_raises_clearly
test_opcheck = test_ops.test_opcheck
test_every_argument_by_position = test_interface.test_every_argument_by_position
test_varlen_forward_and_backward = test_interface.test_varlen_forward_and_backward
test_inputs_whose_last_dimension_is_not_contiguous = test_interface.test_inputs_whose_last_dimension_is_not_contiguous
test_autocast_casts_fp32_inputs_like_sdpa = test_interface.test_autocast_casts_fp32_inputs_like_sdpa
test_gradients_accumulate_on_parameters = test_interface.test_gradients_accumulate_on_parameters
test_saved_inputs_may_not_be_changed = test_interface.test_saved_inputs_may_not_be_changed_before_the_backward
test_activation_checkpointing_gives_the_same_bits = test_interface.test_activation_checkpointing_gives_the_same_bits


# ---- the compiled library itself -------------------------------------------------------------------------------------


@pytest.fixture
def hopper():
    """A GPU with the compiled forward."""
    info = ops.library_info()
    variants = info["variants"] if info else []
    if torch.cuda.get_device_capability() != (9, 0) or not ops._covers(variants, request("forward", (BF16,), (64, 64))):
        pytest.skip("needs a Hopper GPU and a library with forward kernels: make kernels")
    return "cuda"


@pytest.fixture
def launches(hopper, monkeypatch):
    """How often `ops.forward` and `ops.forward_into` called the library directly, and it took the call."""
    count = {"forward": 0, "forward_into": 0}
    for op in count:
        kernel = getattr(ops, f"_direct_{op}")

        def counted(*args, op=op, kernel=kernel):
            result = kernel(*args)
            count[op] += result is not None
            return result

        monkeypatch.setattr(ops, f"_direct_{op}", counted)
    return count


def bf16_tables(monkeypatch):
    """Turns the calls of test_bad_input into bf16 ones, with an fp32 state where there is one."""
    empty, forward_into = test_bad_input.empty, test_bad_input.forward_into

    def forward_into_of_bf16(device, **changes):
        state = {"out_acc": empty(device, 5, 4, 8), "lse": empty(device, 4, 5)}
        return forward_into(device, **{**state, **changes})

    monkeypatch.setattr(test_bad_input, "empty", lambda *args, dtype=BF16: empty(*args, dtype=dtype))
    monkeypatch.setattr(test_bad_input, "forward_into", forward_into_of_bf16)


@pytest.mark.gpu
@pytest.mark.parametrize("call", ["dense", "packed", "forward_into", "func", "varlen"])
def test_the_library_is_called_directly(call, launches, monkeypatch):
    bf16_tables(monkeypatch)
    op = "forward_into" if call == "forward_into" else "forward"
    monkeypatch.setattr(ops, "_run_on_cuda", None)
    getattr(test_bad_input, call)("cuda")
    assert launches[op] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", EVERY_WRONG_CALL, ids=lambda wrong: wrong.label)
def test_the_library_refuses_what_the_operator_refuses(wrong, hopper, monkeypatch):
    """Were it to take one of these, a direct call would not raise."""
    bf16_tables(monkeypatch)
    for call in ("dense", "packed", "forward_into"):
        getattr(test_bad_input, call)("cuda")
    directly = outcome(wrong, "cuda")
    do_not_go_directly(monkeypatch)
    assert directly == outcome(wrong, "cuda")
    assert directly is not None or wrong.label == "v dtype"  # to bf16, which all are here


@pytest.mark.gpu
@pytest.mark.parametrize("layout", sorted(set(test_ops.GRADIENT_LAYOUTS)))
@pytest.mark.parametrize("which", range(3), ids="qkv")
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_direct_calls_with_any_strides(which, layout, packed, launches):
    device = "cuda"
    tensors = list(random_qkv(device, BF16, batch=2, seqlen_q=40, seqlen_k=70, heads=4, head_dim=64)[:3])
    ranges = {}
    if packed:
        tensors = [x[0] for x in tensors]
        ranges = dict(zip(RANGE_NAMES, index_tensors(device, [0, 25], [25, 15], [10, 0], [60, 70]), strict=True))
        ranges = {name: x.contiguous() for name, x in ranges.items()}
    tensors[which] = test_ops.lay_out(tensors[which], layout)
    plain = [x.contiguous() for x in tensors]
    expected = ops.forward(*plain, **ranges, window_right=0)
    assert launches["forward"] == 1
    for got, want in zip(ops.forward(*tensors, **ranges, window_right=0), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [None, BF16, FP32], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_direct_results_are_those_of_the_operator(dtype, out_dtype, launches, monkeypatch):
    if not ops._covers(ops.library_info()["variants"], request("forward", (dtype,), (64, 40))):
        pytest.skip(f"the library has no forward for {dtype}")
    q, k, v, _ = random_qkv("cuda", dtype, batch=2, seqlen_q=70, seqlen_k=90, heads=4, head_dim=64)
    call = {"softmax_scale": np.float64(0.2), "window_left": 30, "window_right": 4, "softcap": 5, "sm_margin": 3}
    call |= {"offsets": torch.tensor([3, -2], device="cuda", dtype=torch.int32), "out_dtype": out_dtype}

    def run():
        with torch.inference_mode():
            return ops.forward(q, k, v[..., :40], **call)

    if out_dtype in (None, dtype, FP32):
        directly = run()
        assert launches["forward"] == 1
        do_not_go_directly(monkeypatch)
        for got, want in zip(directly, run(), strict=True):
            assert torch.equal(got, want)
            assert (got.dtype, got.stride(), got.is_inference()) == (want.dtype, want.stride(), want.is_inference())
    else:
        with pytest.raises(TypeError, match="out_dtype"):
            run()


@pytest.mark.gpu
def test_direct_calls_in_a_graph(launches):
    q, k, v, _ = random_qkv("cuda", BF16, seqlen_q=200, seqlen_k=200, head_dim=64)
    expected = ops.forward(q, k, v, window_right=0)
    given = torch.zeros_like(q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ops.forward(given, k, v, window_right=0)
    assert launches["forward"] == 2
    given.copy_(q)
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_streams_that_come_and_go(launches):
    """The handle of a stream that was destroyed is given out again: its successor is another stream all the same."""
    runtime = torch.cuda.cudart()
    q, k, v, _ = random_qkv("cuda", BF16, batch=4, seqlen_q=2000, seqlen_k=2000, heads=4, head_dim=64)
    expected = ops.forward(q, k, v, window_right=0)
    torch.cuda.synchronize()
    results = []
    for _ in range(40):
        handle = ctypes.c_uint64()
        assert int(runtime.cudaStreamCreate(ctypes.addressof(handle))) == 0
        with torch.cuda.stream(torch.cuda.ExternalStream(handle.value)):
            results.append([ops.forward(q, k, v, window_right=0) for _ in range(3)])
        assert int(runtime.cudaStreamDestroy(handle.value)) == 0
    torch.cuda.synchronize()
    assert launches["forward"] == 121
    assert all(torch.equal(got, want) for each in results for result in each for got, want in zip(result, expected))


@pytest.mark.gpu
def test_direct_calls_on_another_device(launches):
    if torch.cuda.device_count() < 2 or torch.cuda.get_device_capability(1) != (9, 0):
        pytest.skip("needs two Hopper GPUs")
    tensors = random_qkv("cuda:0", BF16, seqlen_q=70, seqlen_k=90, head_dim=64)[:3]
    expected = ops.forward(*tensors)
    for device, current in ((1, 0), (0, 1), (1, 1)):
        with torch.cuda.device(current):
            results = ops.forward(*(x.to(f"cuda:{device}") for x in tensors))
            assert torch.cuda.current_device() == current
        for got, want in zip(results, expected, strict=True):
            assert got.device == torch.device("cuda", device) and torch.equal(got.cpu(), want.cpu())
    assert launches["forward"] == 4


@pytest.mark.gpu
@pytest.mark.parametrize("seqlen_q, seqlen_k, options", [
    (256, 256, {}), (1024, 512, {"causal": True}), (4096, 4096, {"causal": True, "window_size": (128, 0)}),
], ids=["full", "rows that see nothing", "walk"])  # fmt: skip
@pytest.mark.parametrize("head_dim", [64, 128])
def test_lse_that_nobody_wants_is_not_made(launches, head_dim, seqlen_q, seqlen_k, options):
    q, k, v, _ = random_qkv("cuda", BF16, seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim)
    expected, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    before = torch.cuda.memory_allocated()
    out = flash_attn_func(q, k, v, **options)
    assert torch.cuda.memory_allocated() - before == out.nbytes and launches["forward"] == 2
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_out_of_packed_documents_is_the_same_without_lse(launches):
    q, k, v, _ = random_qkv("cuda", BF16, seqlen_q=3000, seqlen_k=3000, head_dim=128)
    starts = torch.tensor([0, 17, 1700, 1700, 3000], dtype=torch.int32, device="cuda")
    used = torch.tensor([17, 1000, 0, 1300], dtype=torch.int32, device="cuda")
    packed = (q[0], k[0], v[0], starts, starts, None, None, used, used)
    expected, _ = flash_attn_varlen_func(*packed, causal=True, return_attn_probs=True)
    out = flash_attn_varlen_func(*packed, causal=True)
    assert launches["forward"] == 2 and torch.equal(out, expected)


@pytest.mark.gpu
def test_direct_calls_keep_the_allocators_rules(launches):
    """Results are the caching allocator's own: it counts them, and lets their streams be recorded."""
    q, k, v, _ = random_qkv("cuda", BF16, seqlen_q=256, seqlen_k=256, head_dim=64)
    ops.forward(q, k, v)
    before = torch.cuda.memory_allocated()
    out, lse = ops.forward(q, k, v)
    assert torch.cuda.memory_allocated() - before == out.nbytes + lse.nbytes
    address, side = out.data_ptr(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
    out.record_stream(side)
    del out
    assert ops.forward(q, k, v)[0].data_ptr() != address
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [None, BF16, FP32], ids=str)
def test_a_state_is_continued_directly_as_by_the_operator(out_dtype, launches, monkeypatch):
    q, k, v, state = (x[0] for x in random_qkv("cuda", BF16, seqlen_q=150, seqlen_k=90, heads=4, head_dim=64))
    columns = [x.contiguous() for x in index_tensors("cuda", [10, 80], [60, 70], [0, 40], [90, 50], [4, -3], [1, 3])]
    columns[5] = columns[5] if out_dtype else torch.ones_like(columns[5])
    names = (*RANGE_NAMES, "offsets", "flags")

    def run():
        states = state.float(), torch.linspace(-1, 1, 600, device="cuda").view(4, 150).contiguous()
        out = None if out_dtype is None else torch.zeros_like(state, dtype=out_dtype)
        ops.forward_into(q, k, v, *states, out, **dict(zip(names, columns, strict=True)), window_left=40)
        return [x for x in (*states, out) if x is not None]

    directly = run()
    assert launches["forward_into"] == 1
    do_not_go_directly(monkeypatch)
    for got, want in zip(directly, run(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*ComplexHalf:UserWarning")
def test_the_library_takes_no_tensor_that_is_yet_to_be_negated(launches):
    """Only complex numbers make them, and parts of those do not lie side by side."""
    if not ops._covers(ops.library_info()["variants"], request("forward", (FP16,), (64, 64))):
        pytest.skip("the library has no forward for float16")
    q, k, v, _ = random_qkv("cuda", FP16, head_dim=64)
    expected = ops.forward(-q, k, v)
    assert launches["forward"] == 1
    for at, x in enumerate((q, k, v)):
        negated = torch.complex(x, -x).conj().imag
        assert negated.is_neg() and torch.equal(negated, x)
        call = [q, k, v]
        call[at] = negated
        assert ops._direct_forward(*call, *[None] * 6, 0.125, None, None, 0.0, None, False, 0, True) is None
    assert torch.equal(ops.forward(torch.complex(q, q).conj().imag, k, v)[0], expected[0])


@pytest.mark.gpu
def test_a_thread_may_begin_with_a_call():
    """The driver describes tensors only where there is a context, and a new thread has none yet."""
    q, k, v, dout = torch.randn(4, 2, 256, 4, 64, device="cuda", dtype=torch.bfloat16)
    lse, delta = torch.zeros(2, 2, 4, 256, device="cuda")
    state = torch.zeros(256, 4, 64, device="cuda")
    start, length = (torch.tensor([i], dtype=torch.int32, device="cuda") for i in (0, 256))
    visit = dict(zip(ops.RANGES, [start, length] * 2), offsets=start, flags=start)
    calls = {
        "forward": lambda: ops.forward(q, k, v, window_right=0),
        "forward_into": lambda: ops.forward_into(q[0], k[0], v[0], state, lse[0], None, **visit),
        "backward": lambda: ops.backward(dout, q, k, v, lse, delta, *(torch.empty_like(q) for _ in range(3))),
        "delta": lambda: ops.delta(dout, q),
    }
    torch.cuda.synchronize()
    for name, call in calls.items():
        failed: list[BaseException] = []

        def run(call=call, failed=failed):
            try:
                call()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not failed, f"{name}: {failed[0]}"
    torch.cuda.synchronize()
