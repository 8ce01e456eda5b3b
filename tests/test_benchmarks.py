"""The benchmarks without a GPU: cases and their FLOP, peers, checks, bars, result files, pictures, tile candidates."""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import attention  # noqa: E402
import attention_cases  # noqa: E402
import attention_peers  # noqa: E402
import attention_report  # noqa: E402
import check_results  # noqa: E402
import delta  # noqa: E402
import timing  # noqa: E402
import tune  # noqa: E402
from attention import Setup  # noqa: E402
from attention_cases import Case  # noqa: E402
from attention_peers import Peer  # noqa: E402

BACKWARD = timing.ROOT / "csrc" / "backward" / "backward.h"


def fake_time(calls: timing.Calls) -> dict[str, list[float]]:
    """Runs each call once; says that the first takes 1, 2 and 4 ms, the next twice that, and so on."""
    for call in calls.values():
        call()
    return {name: [n * 2.0**index for n in (2.0, 1.0, 4.0)] for index, name in enumerate(calls)}


def small(name: str = "small", lengths: tuple[int, ...] = (32, 32), **changes: Any) -> Case:
    """A case for a CPU."""
    fields = {"heads": 4, "kv_heads": 4, "head_dim": 16, "head_dim_v": 16, "causal": True, "dtype": torch.float32}
    return Case(name, lengths, **{**fields, **changes})


SMALL_CASES = [
    small("full", causal=False),
    small("causal"),
    small("gqa", kv_heads=2),
    small("wide", head_dim=24),
    small("window", (40,), left=7),
    small("wide_window", (40,), left=100),
    small("packed", (1, 17, 5, 30), packed=True),
    small("packed_window", (1, 17, 5, 30), packed=True, left=4),
]


def visible(case: Case) -> Tensor:
    """Bool (T, T) over all tokens of the case, by the definition of each mask."""
    seqlens = torch.tensor(case.lengths)
    document = torch.repeat_interleave(torch.arange(len(seqlens)), seqlens)
    i = torch.arange(len(document)).unsqueeze(1)
    j = torch.arange(len(document))
    seen = document.unsqueeze(1) == document
    if case.causal:
        seen &= j <= i
    if case.left is not None:
        seen &= j >= i - case.left
    return seen


def naive_attention(case: Case, x: attention_cases.Inputs) -> Tensor:
    """out in the layout of q, with all scores in memory."""
    q, k, v = (t.reshape(-1, *t.shape[-2:]).transpose(0, 1).double() for t in x[:3])
    k, v = (t.repeat_interleave(case.heads // case.kv_heads, dim=0) for t in (k, v))
    scores = (q @ k.transpose(1, 2)) * case.head_dim**-0.5
    out = scores.masked_fill(~visible(case), float("-inf")).softmax(-1) @ v
    return out.transpose(0, 1).reshape(*x.q.shape[:-1], case.head_dim_v)


# ---- cases -----------------------------------------------------------------------------------------------------------


def test_the_dense_grid_is_the_papers() -> None:
    cases = attention_cases.dense_cases()
    assert len(cases) == 36
    for case in cases:
        assert sum(case.lengths) == 16384 and case.heads * case.head_dim == 2048 and len(set(case.lengths)) == 1
    assert {(c.head_dim, c.causal, c.lengths[0]) for c in cases} == set(
        itertools.product((64, 128, 256), (False, True), (512, 1024, 2048, 4096, 8192, 16384))
    )


def test_forward_cases() -> None:
    cases = {case.name: case for case in attention_cases.forward_cases()}
    assert len(cases) == len(attention_cases.forward_cases()) == 47
    assert cases["d64_full_512"].describe() == {
        "batch": 32, "seqlen": 512, "heads": 32, "kv_heads": 32, "head_dim": 64, "head_dim_v": 64, "causal": False,
        "window_left": None, "dtype": "bfloat16",
    }
    assert cases["packed_web_64k"].describe()["documents"] == 871
    assert cases["fp16_d128_causal_8k"].dtype == torch.float16
    for name, tokens in (("web_16k", 16), ("web_64k", 64), ("code_64k", 64), ("long_128k", 128)):
        case = cases[f"packed_{name}"]
        assert sum(case.lengths) == tokens * 1024 and case.packed and case.causal and min(case.lengths) > 0


def test_backward_cases() -> None:
    cases = {case.name: case for case in attention_cases.backward_cases()}
    assert len(cases) == len(attention_cases.backward_cases()) == 36 + 1 + 4 + 2
    assert set(attention_cases.dense_cases()) <= set(cases.values())
    gqa, short, long = (cases[name] for name in ("gqa_32_8_16k", "window_1024_32k_mha", "window_4096_128k"))
    assert (gqa.heads, gqa.kv_heads, gqa.head_dim, gqa.lengths, gqa.causal) == (32, 8, 128, (16384,), True)
    assert (short.heads, short.kv_heads, short.left, short.lengths) == (16, 16, 1024, (32768,))
    assert (long.heads, long.kv_heads, long.left, long.lengths) == (16, 16, 4096, (131072,))
    for name in ("web_16k", "web_64k", "code_64k", "long_128k"):
        case = cases[f"packed_{name}"]
        assert (case.heads, case.kv_heads, case.head_dim, case.packed, case.causal) == (16, 16, 128, True, True)
    deterministic = attention_cases.deterministic_cases()
    assert {(c.head_dim, c.lengths, c.causal) for c in deterministic} == {(128, (8192,) * 2, c) for c in (True, False)}


def test_memory_of_a_backward() -> None:
    case = small("gqa", (3, 5), kv_heads=2, head_dim=24)
    assert case.backward_memory() == {"dq_fp32": 8 * 4 * 24 * 4, "delta": 8 * 4 * 4}
    assert small("wide", (3, 5), head_dim=256).backward_memory() == {"dq_fp32": 0, "delta": 8 * 4 * 4}
    (largest,) = re.findall(r"separates_dq\(.*\) \{ return head_dim > (\d+); \}", BACKWARD.read_text())
    assert attention_cases.LARGEST_SUMMED == int(largest)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_visible_pairs_against_counting(case: Case) -> None:
    counted = int(visible(case).sum())
    if case.causal and case.left is None and not case.packed:  # the field counts half of the square
        counted = sum(n * n for n in case.lengths) // 2
    assert case.visible_pairs() == counted
    assert case.flop == 2 * counted * case.heads * (case.head_dim + case.head_dim_v)
    assert case.backward_flop == 5 * counted * case.heads * (case.head_dim + case.head_dim_v)


def test_flop_of_the_dense_grid_is_the_fields() -> None:
    for case in attention_cases.dense_cases():
        batch, seqlen = len(case.lengths), case.lengths[0]
        assert case.flop == 4 * batch * case.heads * seqlen**2 * case.head_dim // (2 if case.causal else 1)


def test_inputs_are_laid_out_and_repeat() -> None:
    dense = attention_cases.make_inputs(small(kv_heads=2, head_dim_v=8), "cpu")
    assert [tuple(t.shape) for t in dense[:3]] == [(2, 32, 4, 16), (2, 32, 2, 16), (2, 32, 2, 8)]
    packed = attention_cases.make_inputs(small(lengths=(3, 5), packed=True), "cpu", requires_grad=True)
    assert packed.q.shape == (8, 4, 16) and packed.q.requires_grad and packed.dout.shape == (8, 4, 16)
    assert not packed.dout.requires_grad and dense.dout is None
    assert packed.cu_seqlens.tolist() == [0, 3, 8] and packed.cu_seqlens.dtype == torch.int32
    for requires_grad in (False, True):
        again = attention_cases.make_inputs(small(lengths=(3, 5), packed=True), "cpu", requires_grad)
        assert torch.equal(again.v, packed.v)


# ---- peers -----------------------------------------------------------------------------------------------------------


def naive_gradients(case: Case, x: attention_cases.Inputs) -> tuple[Tensor, ...]:
    """dq, dk, dv in the layouts of q, k and v, in fp64."""
    leaves = [t.detach().double().requires_grad_() for t in x[:3]]
    out = naive_attention(case, attention_cases.Inputs(*leaves, x.cu_seqlens))
    assert x.dout is not None
    return torch.autograd.grad(out, leaves, x.dout.double())


def check_gradients(build: Callable[[Case, attention_cases.Inputs], attention_peers.Call], case: Case) -> None:
    x = attention_cases.make_inputs(case, "cpu", requires_grad=True)
    work = attention_peers.backward_work(build, case, x)
    for _ in range(2):  # it runs as often as it is timed
        for actual, expected in zip(work(), naive_gradients(case, x), strict=True):
            assert attention.relative_l2(actual, expected) < 1e-5


def check_out(build: Callable[[Case, attention_cases.Inputs], attention_peers.Call], case: Case) -> None:
    x = attention_cases.make_inputs(case, "cpu")
    out = build(case, x)()
    assert out.shape == (*x.q.shape[:-1], case.head_dim_v)
    assert attention.relative_l2(out, naive_attention(case, x)) < 1e-5


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_ours_sees_what_is_counted(case: Case) -> None:
    ours = attention_peers.find_peers()["ours"]
    assert isinstance(ours, Peer)
    check_out(ours.build, case)
    check_gradients(ours.build, case)


@pytest.mark.parametrize("case", SMALL_CASES[:4], ids=lambda case: case.name)
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=str)
def test_sdpa_sees_what_is_counted(backend: SDPBackend, case: Case) -> None:
    if case.head_dim != case.head_dim_v and backend == SDPBackend.FLASH_ATTENTION:
        pytest.skip("FlashAttention-2 has one head_dim")
    check_out(functools.partial(attention_peers.sdpa, backend), case)
    check_gradients(functools.partial(attention_peers.sdpa, backend), case)


@pytest.mark.parametrize("case", SMALL_CASES[4:], ids=lambda case: case.name)
def test_sdpa_refuses_windows_and_packed_batches(case: Case) -> None:
    with pytest.raises(attention_peers.CannotRun, match="no packed sequences and no window"):
        attention_peers.sdpa(SDPBackend.MATH, case, attention_cases.make_inputs(case, "cpu"))


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_flex_sees_what_is_counted(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    check_out(attention_peers.flex_attention, case)


def with_window(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)): ...


def with_gqa(query, key, value, cu_q, cu_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False): ...


def with_causal(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None): ...


@pytest.mark.parametrize("signature", [with_window, with_gqa, with_causal])
@pytest.mark.parametrize("case", [*SMALL_CASES[4:], small("packed_gqa", (3, 9), packed=True, kv_heads=2)],
                         ids=lambda case: case.name)
def test_varlen_attn_of_every_torch(signature: Callable, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """varlen_attn changed its arguments from release to release."""
    from torch.nn.attention import varlen

    def called(*args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(signature).bind(*args, **kwargs)  # a wrong argument raises here
        bound.apply_defaults()
        got = bound.arguments
        if "is_causal" in got:
            assert got["is_causal"] is True and case.left is None
        else:
            assert got["window_size"] == (-1 if case.left is None else case.left, 0)
        assert got.get("enable_gqa", False) == (case.heads != case.kv_heads and signature is with_gqa)
        q = args[0]
        assert q.shape == (sum(case.lengths), 4, 16) and args[5:7] == (max(case.lengths),) * 2
        assert args[3] is args[4] and args[3].tolist()[-1] == len(q)
        return torch.ones(*q.shape[:-1], case.head_dim_v)

    called.__signature__ = inspect.signature(signature)  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", called)
    x = attention_cases.make_inputs(case, "cpu")
    if signature is with_causal and case.left is not None:
        with pytest.raises(attention_peers.CannotRun, match="no windows"):
            attention_peers.torch_flash(case, x)
    else:
        assert attention_peers.torch_flash(case, x)().shape == x.q.shape


def test_flash_attention_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def attend(q: Tensor, *_: Any, **options: Any) -> tuple[Tensor, None]:
        assert options == {"causal": True, "window_size": (7, 0)}
        return q, None

    module = SimpleNamespace(flash_attn_func=attend, flash_attn_varlen_func=None, __version__="x.y")
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    found = attention_peers.find_peers()
    fa3, case = found["fa3"], SMALL_CASES[4]
    assert isinstance(fa3, Peer) and fa3.about == "flash_attn_interface x.y"
    x = attention_cases.make_inputs(case, "cpu")
    assert fa3.build(case, x)() is x.q
    assert isinstance(found["flash_attn"], str) and found["flash_attn"].startswith("flash_attn does not import: ")
    assert list(attention_peers.choose_peers(found, [])) == ["ours", "cudnn", "fa2", "fa3"]
    assert list(attention_peers.choose_peers(found, ["flex", "cudnn"])) == ["ours", "cudnn", "flex"]
    with pytest.raises(ValueError, match="unknown peer 'fa4': the peers are ours, cudnn"):
        attention_peers.choose_peers(found, ["fa4"])
    with pytest.raises(ValueError, match="peer 'flash_attn' is not here: flash_attn does not import"):
        attention_peers.choose_peers(found, ["flash_attn"])


# ---- measuring -------------------------------------------------------------------------------------------------------


def peer_of(change: Callable[[Tensor], Tensor]) -> Peer:
    """A peer whose out is q, changed."""
    return Peer("test", lambda case, x: lambda: change(x.q))


def failing(message: str) -> Peer:
    def fail(q: Tensor) -> Tensor:
        raise RuntimeError(message)

    return peer_of(fail)


def test_a_case_with_agreeing_wrong_and_failing_peers() -> None:
    peers = {
        "ours": peer_of(lambda q: q),
        "near": peer_of(lambda q: 1.001 * q),
        "far": peer_of(lambda q: 1.01 * q),
        "nan": peer_of(lambda q: q * float("nan")),
        "flat": peer_of(lambda q: q.flatten()),
        "failing": failing("no kernel\n  for this"),
    }
    cell = attention.measure_case(small(), Setup(peers, fake_time, "cpu"))
    entries = cell["peers"]
    assert list(entries) == list(peers)
    assert entries["ours"]["ms"] == {"min": 1.0, "median": 2.0, "max": 4.0}
    assert entries["ours"]["tflops"]["median"] == pytest.approx(cell["flop"] / 2e-3 / 1e12)
    assert entries["ours"]["tflops"]["best"] == 4 * entries["ours"]["tflops"]["worst"]
    assert entries["near"]["ms"]["median"] == 4.0 and entries["near"]["difference"] == pytest.approx(1e-3, rel=0.01)
    assert entries["far"]["ms"] is None and entries["far"]["tflops"] is None
    assert entries["failing"]["reason"] == "no kernel for this"
    assert [error.split()[0] for error in cell["errors"]] == ["far", "nan", "flat"]
    json.dumps(cell, allow_nan=False)


def test_without_ours_the_peers_are_still_measured() -> None:
    peers = {"ours": failing("not built"), "a": peer_of(lambda q: q), "b": peer_of(lambda q: q)}
    cell = attention.measure_case(small(), Setup(peers, fake_time, "cpu"))
    assert cell["peers"]["ours"]["ms"] is None and cell["peers"]["b"]["difference"] == 0 and not cell["errors"]
    assert "ours: not built" in attention_report.cell_line(cell) and "unchecked" not in attention_report.cell_line(cell)


def test_an_output_that_nothing_checks_is_called_so() -> None:
    peers = {"ours": peer_of(lambda q: q), "fa2": failing("no windows")}
    cell = attention.measure_case(small(), Setup(peers, fake_time, "cpu"))
    assert "unchecked: no peer" in attention_report.cell_line(cell)


def test_a_lost_gpu_ends_the_run() -> None:
    peers = {"ours": failing("CUDA error: an illegal memory access was encountered")}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        attention.measure_case(small(), Setup(peers, fake_time, "cpu"))


# ---- backward --------------------------------------------------------------------------------------------------------


def wrong_in(gradient: int, by: float) -> Peer:
    """sdpa whose gradient of q, k or v is off by a share."""

    def build(case: Case, x: attention_cases.Inputs) -> attention_peers.Call:
        changed = list(x[:3])
        changed[gradient] = changed[gradient] * (1 + by) - by * changed[gradient].detach()  # equal values
        return attention_peers.sdpa(SDPBackend.MATH, case, attention_cases.Inputs(*changed, x.cu_seqlens))

    return Peer("test", build)


def test_a_backward_with_agreeing_wrong_and_failing_peers() -> None:
    found = attention_peers.find_peers()["ours"]
    assert isinstance(found, Peer)
    peers = {
        "ours": found, "near": wrong_in(0, 1e-3), "dq": wrong_in(0, 0.01), "dk": wrong_in(1, 0.01),
        "dv": wrong_in(2, 0.01), "nan": wrong_in(2, float("nan")), "failing": failing("no kernel"),
    }
    asked = []
    setup = Setup(peers, fake_time, "cpu", lambda call: asked.append(call()) or 1000 * len(asked))
    case = small(kv_heads=2)
    cell = attention.measure_backward(case, setup)
    entries = cell["peers"]
    assert list(entries) == list(peers) and cell["flop"] == case.backward_flop
    assert entries["ours"]["tflops"]["median"] == pytest.approx(2.5 * case.flop / 2e-3 / 1e12)
    assert entries["near"]["difference"] == pytest.approx(1e-3, rel=0.01) and entries["near"]["ms"]["median"] == 4.0
    assert [error.split(",")[0] for error in cell["errors"]] == [
        "dq differs by 1.0e-02 in dq", "dk differs by 1.0e-02 in dk", "dv differs by 1.0e-02 in dv",
        "nan differs by nan in dq",
    ]
    assert entries["dq"]["ms"] is None and entries["failing"]["reason"] == "no kernel"
    assert (entries["ours"]["extra_bytes"], entries["near"]["extra_bytes"]) == (1000, 2000) and len(asked) == 2
    assert [tuple(t.shape) for t in asked[0]] == [(2, 32, 4, 16), (2, 32, 2, 16), (2, 32, 2, 16)]
    assert cell["expected_bytes"] == case.backward_memory()
    json.dumps(cell, allow_nan=False)


def test_a_deterministic_backward_beside_an_ordinary_one() -> None:
    cell = attention.measure_deterministic(small(), Setup({}, fake_time, "cpu"))
    assert list(cell["peers"]) == ["ours", "deterministic"] and not cell["errors"]
    assert cell["peers"]["deterministic"]["difference"] == 0 and cell["peers"]["deterministic"]["ms"]["median"] == 4.0


class Jitter(torch.autograd.Function):
    """Identity whose gradient is never the same twice."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient + 1e-5 * torch.rand_like(gradient)


def test_gradients_that_change_from_run_to_run_are_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_peers.ours

    def unstable(case: Case, x: attention_cases.Inputs, deterministic: bool = False) -> attention_peers.Call:
        return real(case, x._replace(k=Jitter.apply(x.k)), deterministic)

    monkeypatch.setattr(attention, "ours", unstable)
    cell = attention.measure_deterministic(small(), Setup({}, fake_time, "cpu"))
    assert cell["errors"] == ["deterministic changes dk from run to run"]
    assert cell["peers"]["deterministic"]["ms"] is None and cell["peers"]["ours"]["ms"]


def test_without_a_deterministic_kernel_there_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    backward = attention.ops.backward

    def refuse(*args: Any, deterministic: bool, **kwargs: Any) -> None:
        if deterministic:
            raise RuntimeError("no deterministic gradients. FA3_DIST_STRICT=1 makes this an error")
        backward(*args, deterministic=deterministic, **kwargs)

    monkeypatch.setattr(attention.ops, "backward", refuse)
    case = attention_cases.deterministic_cases()[0]
    cell = attention.measure_deterministic(small(case.name), Setup({}, fake_time, "cpu"))
    reason = "no deterministic gradients. FA3_DIST_STRICT=1 makes this an error"
    assert cell["peers"]["deterministic"] == {"ms": None, "tflops": None, "reason": reason}
    assert f"    deterministic: {reason}" in attention_report.cell_line(cell) and not cell["errors"]
    line = summary_of({case.name: cell}, suite="backward")[f"time of {case.name} / ordinary"]
    assert line["value"] is None and line["passed"] is None and line["note"] == "not available: deterministic"


# ---- one step of a ring ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [4, 2])
def test_continuation_is_checked_against_merging(heads: int) -> None:
    case = small("continue", (48,), heads=4, kv_heads=heads, causal=False, packed=True)
    cell = attention.measure_continuation(case, Setup({}, fake_time, "cpu"))
    assert list(cell["peers"]) == ["plain", "continue", "merge"] and not cell["errors"]
    assert all(entry["ms"] for entry in cell["peers"].values())
    assert cell["peers"]["continue"]["difference"] < 1e-5


def test_a_continuation_that_forgets_its_state_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    forward_into = attention.ops.forward_into

    def forgetful(*args: Any, flags: Tensor, **kwargs: Any) -> None:
        forward_into(*args, flags=flags | attention.ops.FIRST, **kwargs)

    monkeypatch.setattr(attention.ops, "forward_into", forgetful)
    case = small("continue", (48,), causal=False, packed=True)
    cell = attention.measure_continuation(case, Setup({}, fake_time, "cpu"))
    assert cell["errors"] and cell["peers"]["continue"]["ms"] is None


@pytest.mark.parametrize("requires_grad", [False, True])
def test_host_suite(requires_grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(attention, "sdpa_kernel", lambda backend: contextlib.nullcontext())
    monkeypatch.setattr(attention, "HOST_BATCHES", 3)
    monkeypatch.setattr(attention, "HOST_CALLS", 2)
    cell = attention.measure_host(requires_grad, Setup({}, fake_time, "cpu"))
    assert cell["name"] == ("grad" if requires_grad else "no_grad")
    for name in ("ours", "cudnn"):
        us = cell["peers"][name]["us"]
        assert 0 < us["min"] <= us["median"] <= us["max"]
    assert "ours" in attention_report.cell_line(cell) and " us" in attention_report.cell_line(cell)


def test_calls_take_turns_behind_a_flush_and_a_spin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0

        def record(self) -> None:
            order.append("event")
            self.at = len(order)

        def query(self) -> bool:
            return order[self.at - 2] == "spin 0"

        def elapsed_time(self, end: Event) -> float:
            return float(end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(f"spin {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.time_in_turn(calls, lambda: order.append("flush"), repeats=2, warmups=1, spin_cycles=7)
    turn = [step for name in "ab" for step in ("flush", "spin 7", "event", name, "event")]
    assert order == turn * 3 + ["wait"]
    assert times == {"a": [2.0, 2.0], "b": [2.0, 2.0]}  # an event and the call lie between
    assert not capsys.readouterr().err
    timing.time_in_turn(calls, lambda: None, repeats=2, warmups=1, spin_cycles=0)
    assert "NOTE: the GPU waited for the host in 2 of 2 runs of a\n" in capsys.readouterr().err


def test_speed_and_spread() -> None:
    figures = timing.speed([2.0, 1.0, 4.0], 2e12)
    assert figures["ms"] == {"min": 1.0, "median": 2.0, "max": 4.0}
    assert figures["tflops"] == {"best": 2000.0, "median": 1000.0, "worst": 500.0}
    assert delta.terabytes_per_second(4_000_000, {"min": 1.0, "median": 2.0, "max": 4.0}) == {
        "best": 4.0, "median": 2.0, "worst": 1.0,
    }


# ---- bars ------------------------------------------------------------------------------------------------------------


def make_cells(
    ours: dict[str, float], cudnn: float = 500.0, cases: Callable[[], list[Case]] = attention_cases.forward_cases
) -> attention_report.Cells:
    """Every case of a suite, ours at 600 TFLOP/s unless said otherwise."""

    def entry(tflops: float) -> dict[str, Any]:
        return {"ms": {"median": 1 / tflops}, "tflops": {"best": tflops, "median": tflops, "worst": tflops}}

    cells = {}
    for case in cases():
        peers = {"ours": entry(ours.get(case.name, 600.0)), "cudnn": entry(cudnn)}
        peers["fa2"] = {"ms": None, "tflops": None, "reason": "test"}
        cells[case.name] = {"name": case.name, **case.describe(), "flop": case.flop, "peers": peers, "errors": []}
    return cells


def summary_of(
    cells: attention_report.Cells, gemm: float = 800.0, suite: str = "forward"
) -> dict[str, dict[str, Any]]:
    return {line["what"]: line for line in attention_report.summarise(suite, cells, gemm)}


def test_summary_of_the_forward_suite() -> None:
    summary = summary_of(make_cells({"d64_full_512": 450.0, "d128_causal_16k": 650.0, "packed_web_16k": 131.0}))
    mean = summary["geometric mean of ours / cudnn, dense"]
    assert mean["value"] == pytest.approx((1.2**34 * 0.9 * 1.3) ** (1 / 36)) and mean["passed"] is True
    smallest = summary["smallest ours / cudnn, dense"]
    assert (smallest["value"], smallest["note"], smallest["passed"]) == (pytest.approx(0.9), "d64_full_512", False)
    assert summary["ours / cudnn, d128_causal_16k"]["passed"] and not summary["ours / cudnn, d256_causal_16k"]["passed"]
    assert summary["packed_web_16k"]["passed"] and summary["packed_web_64k"]["passed"]
    assert not summary["window_4096_128k"]["passed"]
    assert len(summary) == 14


def test_summary_of_the_backward_suite() -> None:
    ours = {"d64_full_512": 495.0, "d256_full_1k": 570.0, "packed_web_64k": 299.0, "packed_web_16k": 111.0}
    cells = make_cells(ours, cases=attention_cases.backward_cases)
    cells |= make_cells({}, cases=attention_cases.deterministic_cases)
    for case, slower in zip(attention_cases.deterministic_cases(), (1.09, 1.11)):
        ordinary = cells[case.name]["peers"]["ours"]["ms"]["median"]
        cells[case.name]["peers"]["deterministic"] = {"ms": {"median": slower * ordinary}}
    bars = {
        "geometric mean of ours / cudnn, dense": (1.19, (1.2**34 * 0.99 * 1.14) ** (1 / 36), True),
        "smallest ours / cudnn, dense": (1.00, 0.99, False),
        "smallest ours / cudnn, head_dim 256": (1.15, 1.14, False),
        "ours / cudnn, gqa_32_8_16k": (1.18, 1.2, True),
        "packed_web_64k": (300, 299, False),
        "packed_web_16k": (110, 111, True),
        "packed_code_64k": (560, 600, True),
        "packed_long_128k": (600, 600, True),
        "window_1024_32k_mha": (450, 600, True),
        "window_4096_128k": (575, 600, True),
        "time of deterministic_d128_full_8k / ordinary": (1.10, 1.09, True),
        "time of deterministic_d128_causal_8k / ordinary": (1.10, 1.11, False),
    }
    summary = summary_of(cells, suite="backward")
    assert {what: (line["bar"], line["value"], line["passed"]) for what, line in summary.items()} == {
        what: (pytest.approx(bar), pytest.approx(value), passed) for what, (bar, value, passed) in bars.items()
    }
    assert summary["smallest ours / cudnn, head_dim 256"]["note"] == "d256_full_1k"
    del cells["d256_full_512"], cells["d256_full_1k"]["peers"]["cudnn"]
    assert summary_of(cells, suite="backward")["smallest ours / cudnn, head_dim 256"]["passed"] is None


def test_memory_beside_what_a_backward_needs() -> None:
    case = next(case for case in attention_cases.backward_cases() if case.name == "gqa_32_8_16k")
    cell = {"peers": {"ours": {"extra_bytes": 261 * 2**20}, "cudnn": {"extra_bytes": 2**20}}, "errors": [],
            "expected_bytes": case.backward_memory()}
    cells = {"d64_full_512": cell, case.name: cell, "deterministic": {"peers": {}}}
    table = attention_report.memory_table(cells)
    assert table[0] == "| MiB at the peak | ours | = dq in fp32 | + delta | + the rest | cudnn | fa2 |"
    assert table[2:] == ["| gqa_32_8_16k | 261.00 | 256.00 | 2.00 | 3.00 | 1.00 | - |"]
    assert attention_report.memory_table({case.name: {"peers": {}}}) == []


def test_bars_in_tflops_scale_with_the_gemm() -> None:
    cells = make_cells({"packed_web_64k": 401.0})
    assert summary_of(cells, 800.0)["packed_web_64k"]["passed"] is True
    scaled = summary_of(cells, 840.0)
    assert scaled["packed_web_64k"]["bar"] == pytest.approx(420) and scaled["packed_web_64k"]["passed"] is False
    assert scaled["ours / cudnn, gqa_64_8_32k"]["bar"] == 1.15


def test_what_was_not_measured_or_is_wrong_is_not_judged() -> None:
    cells = make_cells({})
    del cells["d64_full_512"], cells["packed_web_64k"]
    cells["window_128_32k"]["errors"].append("fa2 differs")
    cells["gqa_32_8_16k"]["peers"]["cudnn"] = {"ms": None, "tflops": None, "reason": "test"}
    summary = summary_of(cells)
    assert summary["geometric mean of ours / cudnn, dense"]["note"] == "35 of 36 cells"
    for what in (
        "geometric mean of ours / cudnn, dense", "smallest ours / cudnn, dense", "packed_web_64k", "window_128_32k",
        "ours / cudnn, gqa_32_8_16k",
    ):
        assert summary[what]["passed"] is None, what
    assert summary["window_128_32k"]["note"] == "results disagree"
    assert summary["ours / cudnn, gqa_32_8_16k"]["note"] == "not available: cudnn"
    assert all(line["passed"] is None for line in summary_of({}).values())


def test_bars_of_the_other_suites() -> None:
    cells = {"no_grad": {"peers": {"ours": {"us": {"median": 11.0}}}, "errors": []},
             "grad": {"peers": {"ours": {"us": {"median": 26.0}}}, "errors": []}}
    assert [line["passed"] for line in attention_report.summarise("host", cells, 800)] == [True, False]
    peers = {"plain": {"ms": {"median": 1.0}}, "continue": {"ms": {"median": 1.06}}}
    cells = {"continue_8k": {"peers": peers, "errors": []}}
    assert attention_report.summarise("continuation", cells, 800)[0]["passed"] is False
    peers["continue"]["ms"]["median"] = 1.04
    assert attention_report.summarise("continuation", cells, 800)[0]["passed"] is True


@pytest.mark.parametrize("suite", ["forward", "backward", "few_kv_heads"])
def test_every_bar_is_about_cells_of_its_suite(suite: str) -> None:
    peers = {name: {unit: {"median": 1.0} for unit in ("ms", "tflops")} for name in ("ours", "cudnn", "deterministic")}
    cells = {name: {"peers": peers, "errors": []} for name in attention.SUITES[suite]()}
    assert all(line["value"] == 1.0 for line in attention_report.summarise(suite, cells, 800))


# ---- command line and files ------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The command line on a machine without a GPU: made-up peers and times, nothing attended to, results elsewhere."""
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(tune, "ABLATION_FOLDER", tmp_path / "ablation")
    monkeypatch.setenv("FA3_DIST_STRICT", "0")
    monkeypatch.setattr(timing, "why_no_hopper", lambda: None)
    monkeypatch.setattr(timing, "why_no_library", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(timing, "Flush", lambda: SimpleNamespace(overwrite=None))
    monkeypatch.setattr(timing, "gemm", lambda: lambda: None)
    gemm_ms = timing.GEMM_FLOP / 790e9

    def time_in_turn(calls: timing.Calls, flush: Any, repeats: int, **_: Any) -> dict[str, list[float]]:
        return {name: [gemm_ms] * repeats if name == "gemm" else [1.0 + i] * repeats for i, name in enumerate(calls)}

    monkeypatch.setattr(timing, "time_in_turn", time_in_turn)
    def make_inputs(case: Case, device: str, requires_grad: bool = False) -> attention_cases.Inputs:
        return attention_cases.Inputs(*[torch.ones(2, requires_grad=requires_grad)] * 4, torch.ones(2))

    monkeypatch.setattr(attention, "make_inputs", make_inputs)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 * 2**20)
    peers = {"ours": peer_of(lambda q: q), "cudnn": peer_of(lambda q: q), "fa2": failing("not here"), "fa3": "missing"}
    monkeypatch.setattr(attention, "find_peers", lambda: peers)


@pytest.mark.usefixtures("no_gpu_needed")
def test_forward_suite_writes_figures_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "new" / "forward.json"
    status = attention.main(["--suite", "forward", "--output", str(output), "--repeats", "12"])
    result = json.loads(output.read_text())
    assert result["device"] == "NVIDIA H200" and result["valid"] and result["suite"] == "forward"
    assert result["peers"]["fa3"] == "missing" and result["csrc_hash"] == timing._build.csrc_hash()
    assert {"torch", "cuda", "cudnn", "commit", "date", "library"} <= set(result)
    assert [cell["name"] for cell in result["cells"]] == [case.name for case in attention_cases.forward_cases()]
    first = result["cells"][0]["peers"]
    assert first["cudnn"]["ms"]["median"] == 2.0 and first["fa2"] == {"ms": None, "tflops": None, "reason": "not here"}
    assert result["gemm"]["tflops"]["median"] == pytest.approx(790)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in output.parent.iterdir()) == ["forward.json", "forward.png"]
    printed = capsys.readouterr()
    for text in ("| 128 | causal |", "2.00 x cudnn", "stretch goal 1.17 too"):
        assert text in printed.out
    failed = [line["what"] for line in result["summary"] if line["passed"] is False]
    assert status == (1 if failed else 0) and all(what in printed.err for what in failed)
    drawn_before = output.with_suffix(".png").stat().st_mtime_ns
    assert attention.main(["--draw", str(output)]) == 0
    assert output.with_suffix(".png").stat().st_mtime_ns > drawn_before


@pytest.mark.usefixtures("no_gpu_needed")
def test_backward_suite_writes_figures_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def all_three(change: float) -> Peer:
        return Peer("test", lambda case, x: lambda: change * (x.q + x.k + x.v))

    peers = {"ours": all_three(1.0), "cudnn": all_three(1.001), "fa2": all_three(2.0)}
    monkeypatch.setattr(attention, "find_peers", lambda: peers)
    monkeypatch.setattr(attention, "ours", lambda case, x, deterministic=False: peers["ours"].build(case, x))
    output = tmp_path / "backward.json"
    assert attention.main(["--suite", "backward", "--output", str(output), "--repeats", "2"]) == 1
    result = json.loads(output.read_text())
    assert [cell["name"] for cell in result["cells"]] == [
        case.name for case in attention_cases.backward_cases() + attention_cases.deterministic_cases()
    ]
    first = result["cells"][0]
    assert first["flop"] == attention_cases.dense_cases()[0].backward_flop and first["expected_bytes"]
    assert first["errors"] and first["peers"]["fa2"]["ms"] is None and first["peers"]["cudnn"]["extra_bytes"] == 2**20
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "| MiB at the peak | ours | = dq in fp32 |" in printed and "WRONG: fa2 differs by 1.0e+00 in dq" in printed


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_run_that_is_cut_off_leaves_its_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = attention.make_inputs

    def lose_the_gpu(case: Case, *device: Any) -> attention_cases.Inputs:
        if case.name == "d64_full_2k":
            raise RuntimeError("CUDA error: unspecified launch failure")
        return inputs(case, *device)

    monkeypatch.setattr(attention, "make_inputs", lose_the_gpu)
    with pytest.raises(RuntimeError, match="CUDA error"):
        attention.main(["--suite", "forward", "--output", str(tmp_path / "r.json")])
    result = json.loads((tmp_path / "r.json").read_text())
    assert [cell["name"] for cell in result["cells"]] == ["d64_full_512", "d64_full_1k"] and result["summary"]


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_part_of_a_suite_overwrites_no_result(tmp_path: Path) -> None:
    assert attention.main(["--suite", "forward", "--cells", "d128_causal,gqa", "--peers", "cudnn"]) in (0, 1)
    assert not (tmp_path / "results").exists()
    attention.main(["--suite", "ablation"])
    assert json.loads((tmp_path / "results" / "attention_ablation_h200.json").read_text())["cells"][0]["paper"]


@pytest.mark.usefixtures("no_gpu_needed")
def test_a_slow_gpu_makes_the_run_invalid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (attention, attention_report):
        monkeypatch.setattr(module, "GEMM_LEAST", 791)
    assert attention.main(["--suite", "ablation", "--repeats", "1"]) == 1
    assert "invalid: its GEMM ran at 790 TFLOP/s, 791 is the least" in capsys.readouterr().err


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("suite", ["few_kv_heads", "host", "continuation", "ablation"])
def test_pictures_of_the_small_suites(suite: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    unit = "us" if suite == "host" else "tflops"
    peers = {"ours": {unit: {"median": 3.0}}, "cudnn": {unit: None, "ms": None, "reason": "test"}}
    cells = [{"name": name, "peers": peers, "errors": []} for name in attention.SUITES[suite]()]
    summary = attention_report.summarise(suite, {cell["name"]: cell for cell in cells}, 800)
    result = {"suite": suite, "device": "GPU", "cudnn": "x", "valid": False, "cells": cells, "summary": summary}
    assert attention_report.draw(result, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_default_output() -> None:
    path = timing.default_output("attention_host", "NVIDIA H100 80GB HBM3")
    assert path == ROOT / "benchmarks" / "results" / "attention_host_h100.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "forward", "--cells", "d127"], "no case of suite forward contains 'd127': they are d64_full_512,"),
        (["--suite", "forward", "--peers", "fa4"], "unknown peer 'fa4'"),
    ],
)
def test_useless_arguments_teach(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--suite", "sideways"], ["--suite", "host", "--repeats", "0"]])
def test_wrong_command_lines(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        attention.main(arguments)


@pytest.mark.parametrize("script", ["attention.py --suite forward", "tune.py run", "delta.py"])
def test_without_a_hopper_gpu_they_say_so(script: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    name, *arguments = script.split()
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    run = subprocess.run(command, env={"PYTHONPATH": str(ROOT), "PATH": ""}, capture_output=True, text=True)
    assert run.returncode == 2 and "needs a Hopper GPU" in run.stderr, run.stderr


# ---- committed results -----------------------------------------------------------------------------------------------


def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, dict[str, Any]]:
    """A result of the backward suite, as check_results.py finds it."""
    cells = make_cells({}, cases=attention_cases.backward_cases)
    gemm = {"tflops": {"median": 790.0}}
    result = {
        "benchmark": "attention", "suite": "backward", "cells": list(cells.values()), "gemm": gemm,
        "summary": attention_report.summarise("backward", cells, 790.0), "device": "NVIDIA H200", "torch": "2.11.0",
        "cuda": "13.0", "fa3_dist": "x.y", "commit": "abc", "csrc_hash": timing._build.csrc_hash(), **changes,
    }
    timing.write_result(tmp_path / "attention_backward_h200.json", result)
    monkeypatch.setattr(check_results, "RESULTS", tmp_path)
    return check_results.read_results()


def test_a_result_of_this_tree_is_neither_stale_nor_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = committed(tmp_path, monkeypatch)
    assert list(results) == ["benchmarks/results/attention_backward_h200.json"]
    assert not check_results.stale_results(results) and not check_results.results_without_origin(results)


def test_stale_results_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(tmp_path, monkeypatch, csrc_hash="other")
    monkeypatch.setattr(check_results, "missing_results", lambda readme: [])
    assert check_results.main() == 0
    assert "stale result: benchmarks/results/attention_backward_h200.json: measured on csrc other" in (
        capsys.readouterr().out
    )
    results = committed(tmp_path, monkeypatch)
    mean = results["benchmarks/results/attention_backward_h200.json"]["summary"][0]
    mean["value"] *= 1 + 2**-52  # another Python's sum
    assert not check_results.stale_results(results)
    mean["value"] *= 1 + 1e-9
    assert len(check_results.stale_results(results)) == 1
    results = committed(tmp_path, monkeypatch)
    bars = attention_report.BARS["backward"]
    monkeypatch.setitem(attention_report.BARS, "backward", [bars[0]._replace(bar=1.5), *bars[1:]])
    assert check_results.stale_results(results) == [
        "benchmarks/results/attention_backward_h200.json: judged by other bars than the tree's"
    ]


def test_results_that_hide_their_origin_or_are_missing_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    committed(tmp_path, monkeypatch, commit=None, device="")
    monkeypatch.setattr(check_results, "missing_results", lambda readme: [])
    assert check_results.main() == 1
    error = "benchmarks/results/attention_backward_h200.json does not say its device, commit\n"
    assert capsys.readouterr().err == error
    monkeypatch.undo()
    assert check_results.missing_results("| 1.2 | `benchmarks/results/made_up.json` | `benchmarks/delta.py` |") == [
        "README.md names benchmarks/results/made_up.json, which does not exist"
    ]


def test_the_committed_results_say_where_they_come_from() -> None:
    assert check_results.read_results() and not check_results.results_without_origin(check_results.read_results())


# ---- tune ------------------------------------------------------------------------------------------------------------


def test_candidates() -> None:
    found = tune.parse_candidates(128, "128x128, 192x112")
    assert [candidate.name for candidate in found] == ["d128_128x128", "d128_192x112"]
    for wrong in ("100x128", "128x8", "128", "128x264", ""):
        with pytest.raises(ValueError, match="candidate"):
            tune.parse_candidates(128, wrong)
    unit = found[1].unit()
    assert unit.startswith("#define fa3 fa3_d128_192x112\n#define FA3_FORWARD_TILE {192, 112}\n")


def test_the_wrapper_fits_the_kernels_parameters() -> None:
    try:
        tools = tune.builder.find_toolchain()
    except tune.builder.MissingTool as error:
        pytest.skip(str(error))
    # Host code only: the declarations of forward.h instead of the kernels.
    declared = "\n".join(line for line in tune.WRAPPER.splitlines() if not line.startswith("#"))
    source = tune.PREAMBLE.format(name="x", queries=128, keys=128, head_dim=128)
    source += f'#include "forward/forward.h"\n{declared}\n'
    command = [
        tools.gxx, "-std=c++17", "-Wall", "-Werror", "-fsyntax-only", f"-I{tune.builder.CSRC}", "-isystem",
        str(tools.cuda_include), "-x", "c++", "-",
    ]
    compiled = subprocess.run(command, input=source, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    parameters = tune.WRAPPER[tune.WRAPPER.index("fa3_tune_forward(") : tune.WRAPPER.index(") {")]
    assert parameters.count(",") + 1 == len(tune.ARGUMENTS)


def test_build_goes_on_past_a_failing_candidate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = SimpleNamespace(nvcc="nvcc", gxx="g++", cutlass="/cutlass", cuda_lib="/lib")
    monkeypatch.setattr(tune.builder, "find_toolchain", lambda: tools)
    monkeypatch.setattr(tune.builder, "job_count", lambda: 1)  # one after the other: the last command is the last link
    report = (
        "ptxas info    : Compiling entry function 'kernel' for 'sm_90a'\n"
        "    0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 168 registers, 1024 bytes smem\n"
    )
    commands = []

    def run(command: list[str], stdout: Any, stderr: Any) -> SimpleNamespace:
        commands.append(command)
        if command[0] == "nvcc":
            stdout.write(report)
        return SimpleNamespace(returncode=int(command[0] == "nvcc" and "192x128" in command[-1]))

    monkeypatch.setattr(subprocess, "run", run)
    folder = tmp_path / "tune"
    failed = tune.build(tune.parse_candidates(64, "192x128,128x128"), folder)
    assert [candidate.tile for candidate in failed] == ["192x128"]
    printed = capsys.readouterr().out
    assert "d64_192x128: does not compile" in printed and "d64_128x128: 168 registers, 12 bytes of spills" in printed
    assert [command[0] for command in commands].count("nvcc") == 2 and str(folder / "d64_128x128.so") in commands[-1]
    assert (folder / "d64_128x128.cu").read_text().endswith(tune.WRAPPER)
    assert tune.find_built(folder) == {tune.Candidate(64, 128, 128): folder / "d64_128x128.so"}
    facts = folder / "d64_128x128.json"
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "csrc_hash": "other"}))
    tune.find_built(folder)
    assert "NOTE: d64_128x128 was built from csrc other" in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu_needed")
def test_tune_names_the_winners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for candidate in tune.parse_candidates(128, "128x128,128x160"):
        facts = {**candidate._asdict(), "csrc_hash": timing._build.csrc_hash(), "kernels": []}
        (tmp_path / f"{candidate.name}.json").write_text(json.dumps(facts))
    monkeypatch.setattr(tune, "launch", lambda candidate, library, case, x: lambda: x.q)
    output = tmp_path / "out" / "tune.json"
    assert tune.main(["run", "--folder", str(tmp_path), "--cells", "full_512,causal_16k", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "d128_causal_16k" in printed and "best: 128x128" in printed and "GEMM of 8192^3: 790" in printed
    result = json.loads(output.read_text())
    assert [cell["name"] for cell in result["cells"]] == ["d128_full_512", "d128_causal_16k"]
    assert list(result["cells"][0]["peers"]) == ["cudnn", "128x128", "128x160"]
    table = tune.winners_table(result["cells"], 128)
    assert table[1].split() == ["full", "128x128", "-", "-", "-", "-", "-"]
    assert tune.main(["run", "--folder", str(tmp_path / "empty")]) == 2
    assert "`tune.py build` puts candidates there" in capsys.readouterr().err


def test_ablation_has_what_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = (tune.builder.CSRC / "forward" / "config.cuh").read_text()
    rows, keys = tune.ABLATION_TILE
    assert f"if (head_dim <= 128 || head_dim_v <= 128) return {{{rows}, {keys}}};" in config
    built: list[tune.Candidate] = []
    monkeypatch.setattr(tune, "build", lambda candidates, folder: built.extend(candidates) or [])
    assert tune.main(["build", "--ablation"]) == 0
    has = [
        {line.split()[1]: line.split()[2] for line in candidate.unit().splitlines() if "define FA3_FORWARD_" in line}
        for candidate in built
    ]
    turns, overlap = "FA3_FORWARD_TURNS", "FA3_FORWARD_OVERLAP"
    assert [(macros[turns], macros[overlap]) for macros in has] == [
        ("true", "true"), ("false", "true"), ("true", "false"), ("false", "false"),
    ]
    assert f"#ifdef {turns} " in config and f"return {turns};" in config and f"#ifndef {overlap}" in config
    assert "define FA3_FORWARD_TURNS" not in tune.Candidate(128, 128, 128).unit()
    assert len({candidate.name for candidate in built}) == 4
    for wrong in (["build"], ["build", "--ablation", "--head-dim", "128", "--candidates", "128x128"]):
        with pytest.raises(SystemExit):
            tune.main(wrong)


@pytest.mark.usefixtures("no_gpu_needed")
def test_ablation_times_variants_of_these_sources_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "launch", lambda candidate, library, case, x: lambda: x.q)
    folder = tmp_path / "ablation"
    folder.mkdir()
    both, overlap, *_ = tune.ablation_candidates()
    for candidate, of in ((both, timing._build.csrc_hash()), (overlap, "other")):
        (folder / f"{candidate.name}.json").write_text(json.dumps({**candidate._asdict(), "csrc_hash": of}))
    attention.main(["--suite", "ablation"])
    result = json.loads((tmp_path / "results" / "attention_ablation_h200.json").read_text())
    peers = result["cells"][0]["peers"]
    assert set(peers) == {"ours", "cudnn", *tune.ABLATION}
    assert peers["turns and overlap"]["tflops"] and peers["ours"]["tflops"]
    for name in ("overlap", "turns", "neither"):
        assert peers[name]["tflops"] is None and "tune.py build --ablation" in peers[name]["reason"]


def test_no_winner_where_nothing_ran() -> None:
    peers = {"cudnn": {"tflops": {"median": 1.0}}, "128x128": {"tflops": None}}
    assert tune.winner({"peers": peers}) is None
