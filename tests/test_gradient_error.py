"""benchmarks/gradient_error.py without a GPU: its attention in fp32, and faults that it has to find."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import end_to_end  # noqa: E402
import gradient_error  # noqa: E402
import timing  # noqa: E402

SIZES: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "rope_base": 300.0}


def test_attention_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_error, "QUERIES", 32)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 75, heads, 16, requires_grad=True) for heads in (6, 2, 2))
    dout = torch.randn_like(q)
    out = gradient_error.fp32_attention(q, k, v, causal=True)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, _ = oracle.attention(*inputs, window_right=0)
    for got, expected in zip((out, *grads), (want, *torch.autograd.grad(want, inputs, dout.double())), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for options in ({"causal": False}, {"causal": True, "softcap": 1.0}, {"causal": True, "window_size": (5, 0)}):
        with pytest.raises(ValueError, match="expected one causal sequence"):
            gradient_error.fp32_attention(q, k, v, **options)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], tuple[int, dict[str, Any]]]:
    """Runs it on the CPU with a small model and an attention as ours: exit status and result."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} is a number\nand this is a line\n" * 9)
    monkeypatch.setenv("FA3_DIST_STRICT", "0")
    monkeypatch.setattr(timing, "why_no_hopper", lambda: None)
    monkeypatch.setattr(timing, "why_no_library", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(end_to_end, "DEVICE", "cpu")
    monkeypatch.setattr(end_to_end, "BACKEND", SDPBackend.MATH)
    monkeypatch.setattr(end_to_end.train, "MODELS", {"1b3": SIZES})

    def call(ours: Any) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(end_to_end, "attentions", lambda: {"ours": ours, "cudnn": end_to_end.cudnn_attention})
        output = tmp_path / "result.json"
        flags = ["--data", str(folder), "--seqlen", "96", "--steps", "3", "--batches", "8", "--lr", "3e-3"]
        return gradient_error.main([*flags, "--output", str(output)]), json.loads(output.read_text())

    return call


def test_rounding_passes(run: Callable[[Any], tuple[int, dict[str, Any]]]) -> None:
    status, result = run(end_to_end.cudnn_attention)
    assert status == 0 and not result["summary"]["complaints"]
    ours, cudnn = result["summary"]["ours"], result["summary"]["cudnn"]
    assert ours == cudnn and 1e-4 < ours["error"] < 1e-2
    assert len(result["batches"]) == 8 and result["commit"] and result["csrc_hash"]


def test_bias_is_found(run: Callable[[Any], tuple[int, dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    def longer(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """The gradient of v 1 % too long."""
        return end_to_end.cudnn_attention(q, k, v + 0.01 * (v - v.detach()), **options)

    status, result = run(longer)
    assert status == 1
    assert {complaint.split()[0] for complaint in result["summary"]["complaints"]} == {"error", "along", "repeats"}
    assert "is the bar" in capsys.readouterr().err
