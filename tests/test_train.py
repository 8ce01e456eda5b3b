"""The training example, started as a user starts it: torchrun, small models, short sequences."""

from __future__ import annotations

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import checkpoints  # noqa: E402
import data  # noqa: E402
import plots  # noqa: E402
import train  # noqa: E402
from muon import newton_schulz  # noqa: E402

STEPS = 24
SMALL = (
    "--dim 32 --layers 2 --heads 2 --kv-heads 1 --seqlen 192 --batch 4 --eval-sequences 8 --sample 4 --precision fp32"
).split()
VARYING = ("tokens_per_second", "memory_gib")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 60 documents of invented words, 1 to 900 bytes."""
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshr", k=rng.randint(1, 7))) for _ in range(40)]
    for i in range(60):
        document = " ".join(rng.choices(words, k=300))[: rng.randint(1, 900)]
        (folder / f"{i:02d}.txt").write_text(document)
    return folder


class Run:
    """`torchrun examples/train.py` in the background."""

    def __init__(self, out: Path, text: Path, ranks: int, *flags: str, steps: int = STEPS) -> None:
        self.out = out
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        flags = ("--data", str(text), "--out", str(out), "--steps", str(steps), *SMALL, *flags)
        self.log = out.parent / f"{out.name}.log"
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*launcher, str(ROOT / "examples/train.py"), *flags], env=environment, stdout=log, stderr=log
            )

    def finish(self, code: int | None = 0) -> Run:
        """Waits for the end; `code` None stands for any failure."""
        came = self.process.wait(timeout=120)
        assert (came != 0) if code is None else (came == code), self.log.read_text()
        return self

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 120
        while not any(line["step"] >= step for line in self.metrics()):
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)

    def workers(self) -> list[int]:
        pid = self.process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def metrics(self) -> list[dict[str, float]]:
        return plots.read_metrics(self.out / "metrics.jsonl")

    def exact(self) -> list[dict[str, float]]:
        """Everything that must not differ between equal runs."""
        return [{name: value for name, value in line.items() if name not in VARYING} for line in self.metrics()]

    def losses(self) -> np.ndarray:
        return np.array([line[name] for name in ("loss", "held_out_loss") for line in self.metrics() if name in line])


def run(out: Path, text: Path, ranks: int, *flags: str) -> Run:
    return Run(out, text, ranks, *flags).finish()


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_losses_do_not_depend_on_how_ranks_share_the_work(tmp_path: Path, text: Path) -> None:
    alone = run(tmp_path / "cp1", text, 1)
    losses = alone.losses()
    assert len(losses) == STEPS + 3, "a held-out loss every third of the steps"
    assert losses[0] == pytest.approx(math.log(256), rel=0.02) and losses[STEPS - 1] < 0.8 * losses[0]
    assert "exposed communication: none" in alone.log.read_text()
    all_to_all, auto = ["--dp", "2", "--mode", "all_to_all"], ["--mode", "auto"]
    for ranks, flags in (
        (2, ["--cp", "2"]), (4, ["--cp", "4"]), (4, ["--dp", "2", "--cp", "2"]), (4, all_to_all), (2, auto),
    ):
        shared = run(tmp_path / "-".join(flags), text, ranks, *flags)
        check_exposure(shared, flags[-1] if "--mode" in flags else "ring")
        said = shared.log.read_text(errors="replace")
        assert len(re.findall(r"(?m)^  \* (ring|all_to_all) +[\d.]+ ms: [\d.]+ attention", said)) == (flags == auto)
        np.testing.assert_allclose(shared.losses(), losses, rtol=1e-5, err_msg=f"{ranks} ranks, {flags}")


def test_packed_documents_interruptions_and_results(tmp_path: Path, text: Path) -> None:
    packed = ["--packing", "--save-every", "5"]
    whole = run(tmp_path / "whole", text, 2, *packed, "--ablation")
    check_results(whole)
    np.testing.assert_allclose(run(tmp_path / "cp1", text, 1, *packed).losses(), whole.losses(), rtol=1e-5)

    killed = Run(tmp_path / "broken", text, 2, *packed)
    killed.wait_for_step(7)
    os.kill(killed.workers()[1], signal.SIGKILL)
    killed.finish(None)
    assert whole.exact()[:7] == killed.exact()[:7], "two runs with equal flags"

    stopped = Run(tmp_path / "broken", text, 2, *packed, "--resume")
    stopped.wait_for_step(13)
    stopped.process.send_signal(signal.SIGTERM)
    stopped.finish(None)
    said = stopped.log.read_text()
    assert "resumed from" in said and "SIGTERM: stopped after step" in said
    at = checkpoints.newest(stopped.out / "checkpoints")
    assert at is not None and 13 <= json.loads((at / "run.json").read_text())["step"] < STEPS

    resumed = run(tmp_path / "broken", text, 2, *packed, "--resume")
    assert f"resumed from {at}" in resumed.log.read_text()
    assert resumed.exact() == whole.exact(), "every loss, learning rate and gradient norm, bit for bit"


def check_exposure(finished: Run, mode: str) -> None:
    """Messages were timed: some time is theirs, and not more than there is."""
    said = re.search(r"exposed communication: (.+) ms a step of (.+) ms, .*\(--mode (\w+), the last 5 steps",
                     finished.log.read_text(errors="replace"))
    assert said and 0 < float(said[1]) < float(said[2]) and said[3] == mode


def check_results(finished: Run) -> None:
    """What a finished run with an ablation leaves behind and prints."""
    steps = [line for line in finished.metrics() if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    for line in steps:
        assert set(line) == {"step", "loss", "tokens_per_second", "memory_gib", "lr", "grad_norm"}
        assert line["tokens_per_second"] > 0 and 0.05 < line["memory_gib"] < 8 and line["grad_norm"] > 0
    zeroed = plots.read_metrics(finished.out / "attention_zeroed.jsonl")
    assert len(zeroed) == len(finished.metrics()) and zeroed[0]["loss"] == pytest.approx(steps[0]["loss"], rel=1e-2)
    assert zeroed[-1]["held_out_loss"] != finished.metrics()[-1]["held_out_loss"]

    picture = (finished.out / "training.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and len(picture) > 20_000
    from matplotlib import image

    pixels = image.imread(finished.out / "training.png")
    colors = np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 1200 and len(colors) > 50
    said = finished.log.read_text(errors="replace")
    for expected in ("step 1/24: loss 5.", "a bigram table: ", "attention output zeroed: ", "sample, ", "training.png",
                     "metrics.jsonl", "checkpoints/step-000024"):
        assert expected in said, expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--cp", "3"], "--cp is 3 and --dp 1: expected a product of 2, the number of ranks"),
        (["--dp", "2", "--batch", "3"], "--batch is 3: expected a multiple of --dp, 2"),
        (["--mode", "rings"], "--mode: invalid choice: 'rings'"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "here", "--no-save"], "--resume needs --out"),
        (None, "expected to be started by torchrun: torchrun --standalone"),
    ],
)
def test_wrong_flags(
    flags: list[str] | None, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if flags is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", *(flags or [])])
    with pytest.raises(SystemExit) as ended:
        train.parse_arguments()
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "warm_up"), [(1, 1), (4, 1), (20, 4), (50, 7), (300, 7), (500, 12)])
def test_the_learning_rate_rises_in_steps_that_a_short_run_has_too(steps: int, warm_up: int) -> None:
    shares = [train.schedule(step, steps) for step in range(steps)]
    assert shares[:warm_up] == pytest.approx([(step + 1) / warm_up for step in range(warm_up)])
    assert shares[warm_up:] == sorted(shares[warm_up:], reverse=True) and all(0.05 <= share <= 1 for share in shares)


@pytest.mark.parametrize(("flags", "rates"), [
    (["--model", "tiny"], (0.02, 0.006)),
    (["--model", "1b3"], (1e-3, 4e-4)),
    (["--model", "1b3", "--lr", "0.01"], (0.01, 4e-4)),
    (["--model", "1b3", "--adam-lr", "0.001"], (1e-3, 1e-3)),
])  # fmt: skip
def test_a_wide_model_has_learning_rates_of_its_own(
    flags: list[str], rates: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    args = train.parse_arguments()
    assert (args.lr, args.adam_lr) == rates


# ---- data ------------------------------------------------------------------------------------------------------------


def test_documents_are_split_by_contents(tmp_path: Path) -> None:
    for i in range(200):
        (tmp_path / f"{i:03d}.txt").write_text(f"document {i}")
    (tmp_path / "other.bin").write_bytes(b"\xff")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "000.txt").write_text("left out")
    before = [set(side.text.tobytes().split(b"\0")[1:]) for side in data.read_documents(tmp_path, "*.txt")]
    assert before[0] | before[1] == {f"document {i}".encode() for i in range(200)} and not before[0] & before[1]
    assert 5 <= len(before[1]) <= 40
    copied = sorted(before[1])[0]
    (tmp_path / "0-copy.txt").write_bytes(copied)
    training, held_out = data.read_documents(tmp_path, "*.txt")
    assert copied not in training.text.tobytes().split(b"\0")
    assert held_out.text.tobytes().split(b"\0").count(copied) == 2
    with pytest.raises(ValueError, match="has 1 files '\\*.bin' to train on and 0 to hold out|has 0 files '\\*.bin'"):
        data.read_documents(tmp_path, "*.bin")
    with pytest.raises(ValueError, match="--data is .*: expected a folder"):
        data.read_documents(tmp_path / "absent", "*")


def test_stream_sequences(text: Path) -> None:
    documents, _ = data.read_documents(text, "*.txt")
    seqlen, stream = 100, documents.text.astype(np.int64)
    sequences = data.Sequences(documents, seqlen, False, size=4, seed=3)
    epoch = (len(stream) - 1) // seqlen
    rows = [sequences.step(step) for step in range(math.ceil(epoch / 4))]
    tokens, labels = (torch.cat([getattr(batch, side) for batch in rows]).numpy() for side in ("tokens", "labels"))
    assert (tokens[:, 1:] == labels[:, :-1]).all() and tokens.shape == labels.shape == (len(rows) * 4, seqlen)
    windows = stream[: epoch * seqlen].reshape(epoch, seqlen)
    numbers = [int(np.flatnonzero((windows == row).all(1))[0]) for row in tokens]
    assert sorted(numbers[:epoch]) == list(range(epoch)), "each window once an epoch"
    assert labels[:, -1].tolist() == [stream[(number + 1) * seqlen] for number in numbers]
    again = data.Sequences(documents, seqlen, False, size=4, seed=3)
    assert torch.equal(again.step(7).tokens, rows[7].tokens), "a step does not depend on the ones before"
    assert not torch.equal(data.Sequences(documents, seqlen, False, size=4, seed=4).step(7).tokens, rows[7].tokens)
    parts = [data.Sequences(documents, seqlen, False, 4, group, 2, seed=3).step(7) for group in range(2)]
    assert torch.equal(torch.stack([part.tokens for part in parts], dim=1).flatten(0, 1), rows[7].tokens)
    assert {part.step_tokens for part in parts} == {4 * seqlen}


def test_packed_sequences(text: Path) -> None:
    documents, _ = data.read_documents(text, "*.txt")
    seqlen = 400
    sequences = data.Sequences(documents, seqlen, True, size=1)
    batches = [sequences.step(step) for step in range(len(sequences.rows))]
    pieces = []
    for batch in batches:
        assert batch.cu_seqlens is not None and batch.tokens.shape == (1, batch.cu_seqlens[-1])
        assert batch.tokens.shape[1] == batch.step_tokens <= seqlen
        for start, end in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:]):
            assert torch.equal(batch.tokens[0, start + 1 : end], batch.labels[0, start : end - 1])
            pieces.append(bytes(batch.tokens[0, start:end].tolist()) + bytes([int(batch.labels[0, end - 1])]))
    borders = zip(documents.starts[:-1], documents.starts[1:])
    whole = [documents.text[start:end].tobytes() for start, end in borders]
    expected = [text[i : i + seqlen + 1] for text in whole for i in range(0, len(text) - 1, seqlen)]
    assert sorted(pieces) == sorted(expected), "every document once, whole unless it is longer than a sequence"
    assert sum(batch.step_tokens for batch in batches) > 0.85 * seqlen * len(batches), "sequences are well filled"


def test_held_out_batches(text: Path) -> None:
    documents, _ = data.read_documents(text, "*.txt")
    for packing in (False, True):
        together = data.Sequences(documents, 100, packing, 4).spread(9)
        assert [len(batch.tokens) if not packing else 1 for batch in together] == ([1] * 3 if packing else [4, 4, 1])
        parts = [data.Sequences(documents, 100, packing, 4, group, 2) for group in range(2)]
        counts = [sum(batch.labels.numel() for batch in part.spread(9)) for part in parts]
        assert sum(counts) == sum(batch.step_tokens for batch in parts[0].spread(9))
        assert sum(batch.labels.numel() for batch in parts[1].spread(9, all_groups=True)) == sum(counts)
    with pytest.raises(ValueError, match="--seqlen is 100000 and a side of the text has"):
        data.Sequences(documents, 100_000, False, 1)


def test_bigram_loss() -> None:
    text = np.frombuffer(b"\0abab\0ac", np.uint8)
    documents = data.Documents(text, np.array([0, 5, 8]))
    batch = data.Batch(torch.tensor([[97, 98]]), torch.tensor([[98, 97]]), None, 2)
    # After a: b twice, c once; after b: a once, 0 once.
    expected = -(math.log(3 / (256 + 3)) + math.log(2 / (256 + 2))) / 2
    assert data.bigram_loss(documents, [batch]) == pytest.approx(expected)


# ---- optimizer, checkpoints, metrics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (24, 96), (96, 24)])
def test_newton_schulz_makes_matrices_orthogonal(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vt = torch.linalg.svd(matrix, full_matrices=False)
    result = newton_schulz(matrix, torch.float32)
    singular = torch.diagonal(u.mT @ result @ vt.mT)
    assert 0.6 < singular.median() < 1.3 and singular.max() < 1.3
    assert (u.mT @ result @ vt.mT - torch.diag(singular)).abs().max() < 1e-3, "the singular vectors stay"


def test_checkpoints_of_another_run_are_refused(tmp_path: Path) -> None:
    for name in ("step-000009", "step-000010", "step-000011.unfinished"):
        (tmp_path / name).mkdir()
    path = checkpoints.newest(tmp_path)
    assert path == tmp_path / "step-000010"
    (path / "run.json").write_text(json.dumps({"step": 10, "ranks": 2, "facts": {"dim": 64, "seed": 0}}))
    with pytest.raises(ValueError, match="is of another run: expected dim 64, got dim 32"):
        checkpoints.load(path, torch.nn.Identity(), [], {"dim": 32, "seed": 0})
    assert checkpoints.newest(tmp_path / "absent") is None


def test_metrics_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = plots.MetricsFile(path)
    for step in range(1, 6):
        metrics.write(step=step, loss=1.0 / step)
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in plots.read_metrics(path)] == [1, 2, 3, 4, 5]
    plots.MetricsFile(path, steps_done=3).write(step=4, loss=0.5)
    assert [line["loss"] for line in plots.read_metrics(path)] == [1.0, 0.5, 1 / 3, 0.5]
    plots.MetricsFile(path)
    assert plots.read_metrics(path) == []
