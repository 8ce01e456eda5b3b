"""benchmarks/end_to_end.py without a GPU: two small models train side by side, and what their steps come to."""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import end_to_end  # noqa: E402
import timing  # noqa: E402

SIZES: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 2, "kv_heads": 1, "rope_base": 300.0}


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Tiny models on the CPU, and made-up GEMM times; results elsewhere. Says in which order attention was called."""
    monkeypatch.setattr(timing, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("FA3_DIST_STRICT", "0")
    monkeypatch.setattr(timing, "why_no_hopper", lambda: None)
    monkeypatch.setattr(timing, "why_no_library", lambda: None)
    monkeypatch.setattr(timing, "Flush", lambda: SimpleNamespace(overwrite=None))
    monkeypatch.setattr(timing, "gemm", lambda: None)
    monkeypatch.setattr(timing, "time_in_turn", lambda calls, flush, repeats: {"gemm": [timing.GEMM_FLOP / 790e9]})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(end_to_end, "DEVICE", "cpu")
    monkeypatch.setattr(end_to_end, "BACKEND", SDPBackend.MATH)
    monkeypatch.setattr(end_to_end.train, "MODELS", {"1b3": SIZES})
    called: list[str] = []
    attentions = end_to_end.attentions()

    def noted(name: str) -> Any:
        def attend(*args: Any, **kwargs: Any) -> Tensor:
            called.append(name)
            return attentions[name](*args, **kwargs)

        return attend

    monkeypatch.setattr(end_to_end, "attentions", lambda: {name: noted(name) for name in attentions})
    return called


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Flags for short sequences of a text of two kinds of lines, and blocks as they are."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} is a number\nand this is a line\n" * 9)
    return ["--data", str(folder), "--seqlen", "48", "--batch", "2", "--eager"]


def test_two_models_train_alike(
    tmp_path: Path, on_the_cpu: list[str], small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "end_to_end.json"
    assert end_to_end.main([*small, "--steps", "5", "--seeds", "2", "--lr", "3e-3", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert {"device", "torch", "cuda", "cudnn", "commit", "csrc_hash", "date", "text", "gemm"} <= set(result)
    assert (result["dim"], result["layers"], result["seqlen"], result["batch"]) == (32, 2, 48, 2) and result["valid"]
    assert [seed["seed"] for seed in result["seeds"]] == [0, 1]
    for seed in result["seeds"]:
        ours, cudnn = seed["losses"]["ours"], seed["losses"]["cudnn"]
        assert len(ours) == len(cudnn) == 5 and ours[4] < ours[0] - 0.1
        assert ours == pytest.approx(cudnn, abs=0.02) and seed["difference"] < 1e-3
    assert result["seeds"][0]["losses"]["ours"] != result["seeds"][1]["losses"]["ours"]
    turns = [*["ours", "cudnn", "cudnn", "ours"] * 2, "ours", "cudnn"]
    called = ["ours", "cudnn"] + [name for name in turns for _ in range(SIZES["layers"])]  # first a look at one layer
    assert on_the_cpu == called * 2
    times = [value for seed in result["seeds"] for value in seed["seconds"]["ours"][2:]]
    assert result["summary"]["step_time"]["seconds"]["ours"]["median"] == statistics.median(times)
    printed = capsys.readouterr().out
    assert f"step time, ours / cudnn: {result['summary']['step_time']['ratio']:.3f} (seeds: " in printed
    assert "at 95 % over 2 seeds" in printed and "steps of each seed: 5, 5" in printed


def test_models_that_differ_in_more_than_rounding_are_an_error(
    on_the_cpu: list[str], small: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sees_the_future(*args: Any, **options: Any) -> Tensor:
        return end_to_end.cudnn_attention(*args, **{**options, "causal": False})

    wrong = {"ours": end_to_end.cudnn_attention, "cudnn": sees_the_future}
    monkeypatch.setattr(end_to_end, "attentions", lambda: wrong)
    assert end_to_end.main([*small, "--steps", "3", "--seeds", "1"]) == 1
    printed = capsys.readouterr()
    assert "seed 0: attention of the first layer differs by" in printed.err
    assert "no interval from one seed" in printed.out and "written" not in printed.out


def test_every_block_is_compiled_unless_told_otherwise(
    on_the_cpu: list[str], small: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    flags = [*small, "--steps", "3", "--seeds", "1"]
    assert end_to_end.main(flags) == 0 and compiled == []
    assert end_to_end.main([flag for flag in flags if flag != "--eager"]) == 0
    assert compiled == ["TransformerBlock"] * (2 * SIZES["layers"])


def test_it_ends_when_the_time_is_up(
    on_the_cpu: list[str], small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count()  # one each time that the clock is read
    clock = SimpleNamespace(monotonic=lambda: next(seconds), perf_counter=time.perf_counter)
    monkeypatch.setattr(end_to_end, "time", clock)
    assert end_to_end.main([*small, "--steps", "100000", "--seeds", "2", "--seconds", "80"]) == 0
    assert "steps of each seed: " in capsys.readouterr().out
    assert end_to_end.main([*small, "--seeds", "2", "--seconds", "0"]) == 1
    printed = capsys.readouterr()
    assert "no seed came further than its 2 warm-up steps" in printed.err and "ours / cudnn" not in printed.out


def test_seeds_may_run_apart(
    tmp_path: Path, on_the_cpu: list[str], small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*small, "--steps", "4", "--lr", "3e-3"]
    files = [tmp_path / f"{name}.json" for name in ("all", "first", "last", "joined", "other")]
    whole, first, last, joined, other = map(str, files)
    assert end_to_end.main([*flags, "--seeds", "3", "--output", whole]) == 0
    assert end_to_end.main([*flags, "--seeds", "1", "--output", first]) == 0
    assert end_to_end.main([*flags, "--seeds", "1", "--first-seed", "2", "--output", last]) == 0
    del on_the_cpu[:]
    assert end_to_end.main([*flags, "--seeds", "3", "--continue", last, first, "--output", joined]) == 0
    assert len(on_the_cpu) == 2 * (1 + 4 * SIZES["layers"]), "one seed is left"
    expected, result = (json.loads(Path(file).read_text()) for file in (whole, joined))
    assert [seed["seed"] for seed in result["seeds"]] == [0, 1, 2]
    for a, b in zip(expected["seeds"], result["seeds"], strict=True):
        assert a["losses"] == b["losses"]
    assert result["summary"]["loss_difference"] == expected["summary"]["loss_difference"]
    assert end_to_end.main([*flags, "--steps", "5", "--continue", first, "--output", other]) == 2
    assert "first.json has steps 4: expected 5" in capsys.readouterr().err and not Path(other).exists()


def seed_of(losses: dict[str, list[float]], seconds: dict[str, list[float]]) -> dict[str, Any]:
    return {"seed": 0, "difference": 0.0, "losses": losses, "seconds": seconds}


def test_ratio_of_the_step_times() -> None:
    slow = seed_of({}, {"ours": [9.0, 9.0, 1.0, 2.0, 3.0], "cudnn": [1.0, 1.0, 4.0, 4.0, 5.0]})
    fast = seed_of({}, {"ours": [9.0, 9.0, 1.0], "cudnn": [1.0, 1.0, 2.0]})
    barely_begun = seed_of({}, {"ours": [9.0, 9.0], "cudnn": [1.0, 1.0]})
    times = end_to_end.step_times([slow, fast, barely_begun])
    assert times["seconds"]["ours"] == {"min": 1.0, "median": 1.5, "max": 3.0}
    assert times["ratio"] == 1.5 / 4.0 and times["ratio_of_seeds"] == [0.5, 0.5]
    assert end_to_end.step_times([barely_begun])["ratio"] is None


def test_difference_of_the_losses() -> None:
    seeds = [seed_of({"ours": [2.0 + d, 1.0 - d, 1.5 + mean * 3], "cudnn": [2.0, 1.0, 1.5]}, {})
             for d, mean in ((0.5, 0.01), (0.1, 0.03), (0.0, 0.02))]
    difference = end_to_end.loss_difference(seeds)
    assert difference["of_seeds"] == pytest.approx([0.01, 0.03, 0.02]) and difference["mean"] == pytest.approx(0.02)
    assert difference["half_width"] == pytest.approx(4.303 * 0.01 / 3**0.5)
    alone = end_to_end.loss_difference(seeds[:1])
    assert alone["mean"] == pytest.approx(0.01) and alone["half_width"] is None
    assert end_to_end.loss_difference([])["mean"] is None


def test_complaints() -> None:
    losses = {"ours": [2.0, 1.0, float("nan")], "cudnn": [2.0, 1.0, 1.0]}
    seeds = [seed_of(losses, {"ours": [1.0] * 3, "cudnn": [2.0] * 3})]
    result = {"seeds": seeds, "summary": end_to_end.summarise(seeds, 4e12), "valid": False,
              "gemm": {"tflops": {"median": 700.0}}}
    assert end_to_end.complain(result) == [
        "seed 0: a loss is not finite", "the run is invalid: its GEMM ran at 700 TFLOP/s, 760 is the least",
    ]
    assert result["summary"]["tflops"] == {"ours": 4.0, "cudnn": 2.0}


def test_attention_that_cudnn_does_not_have_is_refused() -> None:
    q = torch.ones(1, 2, 1, 8)
    for option in ({"window_size": (4, 0)}, {"softcap": 1.0}, {"sink": torch.zeros(1)}, {"deterministic": True}):
        with pytest.raises(ValueError, match="expected none of them"):
            end_to_end.cudnn_attention(q, q, q, **option)


@pytest.mark.parametrize(
    "arguments", [["--model", "9b"], ["--seeds", "11"], ["--steps", "0"], ["--seeds", "0"], ["--first-seed", "-1"]]
)
def test_wrong_command_lines(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        end_to_end.main(arguments)


def test_only_a_whole_run_writes_the_result_file() -> None:
    assert end_to_end.parse_arguments([]).is_whole and end_to_end.parse_arguments(["--output", "x"]).is_whole
    for flags in (["--seconds", "100"], ["--seeds", "2"], ["--eager"], ["--data", "x"], ["--seqlen", "4096"]):
        assert not end_to_end.parse_arguments(flags).is_whole
