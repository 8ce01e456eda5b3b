"""The comparison of the training example on one GPU and on all: a small one on the CPU, its judgement, its limits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import train_scaling as benchmark  # noqa: E402

TINY = "--dim 32 --layers 1 --heads 2 --kv-heads 1 --seqlen 128 --precision fp32 --steps 3".split()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a run that takes seconds, with text of its own."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"the {i}th document of {i * i} words, " * 20)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return [*TINY, "--data", str(tmp_path / "text"), "--seconds", "100"]


def test_losses_of_one_rank_and_of_two_are_equal(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pair.json"
    status = benchmark.main([*tiny, "--output", str(output)])
    result = json.loads(output.read_text())
    assert status == 0 and result["summary"]["complaints"] == [] and result["steps"] == 3 and result["commit"]
    assert result["largest_difference"] < 1e-5 and all(loss > 1 for pair in result["losses"] for loss in pair)
    assert result["speed_over_one"] > 0 and "3 steps, losses" in capsys.readouterr().out


def test_a_pair_goes_on_where_it_was(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses in two calls, of which the first is over before its runs are, as in one; a third runs nothing."""

    def losses(*more: str) -> list[list[float]]:
        output = tmp_path / "pair.json"
        benchmark.main([*tiny, *more, "--output", str(output)])
        return json.loads(output.read_text())["losses"]

    kept = "--folder", str(tmp_path / "kept")
    ended: list[int] = []

    def end_after_a_step(process: subprocess.Popen[bytes], seconds: float) -> bool:
        ranks = 1 + len(ended)
        while not benchmark.steps_in(tmp_path / "kept" / str(ranks)) and process.poll() is None:
            time.sleep(0.01)
        benchmark.ask_to_end(process)
        process.wait(60)
        ended.append(ranks)
        return False

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "_wait", end_after_a_step)
        first = losses(*kept)
    whole = losses(*kept)
    assert ended == [1, 2] and 1 <= len(first) <= len(whole) == 3 and whole[: len(first)] == first
    assert whole == losses()
    monkeypatch.setattr(benchmark, "train", None)
    assert losses(*kept) == whole
    assert benchmark.main([*tiny, *kept, "--lr", "0.01"]) == 2, "a run of other flags would pass for this one's"


def test_a_run_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the run on 1 ranks failed:(.|\n)*--mode"):
        benchmark.train(1, ["--mode", "rings"], 60, tmp_path)


def test_a_run_that_takes_too_long_is_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    started = time.monotonic()
    assert benchmark._wait(process, 0.5) is False
    assert time.monotonic() - started < 30 and process.returncode is not None


RANK = """
import pathlib, signal, sys, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
pathlib.Path(sys.argv[1]).touch()
while not asked:
    time.sleep(0.01)
time.sleep(1)
pathlib.Path(sys.argv[2]).touch()
"""
LAUNCHER = """
import signal, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]])
signal.signal(signal.SIGTERM, lambda *_: rank.kill())
sys.exit(rank.wait())
"""


def test_ranks_have_time_to_save_that_their_launcher_would_not_give_them(tmp_path: Path) -> None:
    started, saved = tmp_path / "started", tmp_path / "saved"
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, RANK, str(started), str(saved)])
    while not started.exists() and process.poll() is None:
        time.sleep(0.01)
    assert benchmark._wait(process, 0.1) is False
    assert process.returncode == 0 and saved.exists()


def steps(*losses: float, speed: float = 100.0) -> list[dict[str, Any]]:
    return [{"loss": loss, "tokens_per_second": 1.0 if i == 0 else speed, "memory_gib": 2.0 + i}
            for i, loss in enumerate(losses)]  # fmt: skip


def test_judgement() -> None:
    good = benchmark.compare(steps(5.0, 4.0), steps(5.0, 4.0039, 3.0, speed=191.0), 2)
    assert good["steps"] == 2 and good["speed_over_one"] == pytest.approx(1.91) and good["memory_gib"] == [3.0, 4.0]
    assert benchmark.complain(good, 2, True) == []
    slow = benchmark.compare(steps(5.0, 4.0), steps(5.0, 4.0, speed=189.0), 2)
    assert benchmark.complain(slow, 2, True) == ["1.890 times one GPU's tokens per second, the bar is 1.90"]
    assert benchmark.complain(slow, 2, False) == [] and len(benchmark.complain(slow, 4, True)) == 1
    other = benchmark.compare(steps(5.0, 4.0), steps(5.0, 4.0041, speed=200.0), 2)
    assert benchmark.complain(other, 2, True) == ["losses differ by 1.0e-03, the bar is 1e-03"]
    nothing = benchmark.compare(steps(float("nan"), 4.0), steps(5.0, 4.0, speed=200.0), 2)
    assert len(benchmark.complain(nothing, 2, True)) == 1
    assert len(benchmark.complain(benchmark.compare([], steps(5.0), 2), 2, True)) == 2
    one = benchmark.complain(benchmark.compare(steps(5.0), steps(5.0), 2), 2, True)
    assert one == ["one of the runs did a single step: give them more --seconds"]
