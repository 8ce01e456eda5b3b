"""A rank that dies or stalls in the middle of a step ends all others with an error that names what they waited for."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest
import torch

from fa3_dist import ops
from fa3_dist.parallel.exchange import DistributedExchange, RingError
from fa3_dist.parallel.ring import ring_attention
from fa3_dist.parallel.schedule import zigzag
from tests.distributed import Outcome, run_processes

WORLD, VICTIM = 4, 2
TIMEOUT = 4.0  # seconds, of the process group
SLACK = 6.0  # for a busy machine


@dataclass
class Report:
    """What a surviving rank saw."""

    rank: int
    step: int
    what: str
    peer: int
    text: str
    cause: str
    waited: float  # seconds from the moment the victim fell to the error


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def freeze() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def train_until_error(rank: int, world: int, operator: str, call: int, fall, clock: str) -> Report:
    """Forward and backward until the ring breaks; the victim falls inside call number `call` of `operator`."""
    if rank == VICTIM:
        original, calls = getattr(ops, operator), 0

        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                with open(clock, "w") as file:
                    file.write(str(time.time()))
                fall()
            return original(*args, **kwargs)

        setattr(ops, operator, wrapped)
    layout, exchange = zigzag([256], world), DistributedExchange()
    torch.manual_seed(rank)
    rows = layout.tokens(rank)
    try:
        for _ in range(1000):
            q, k, v = (torch.randn(rows, 2, 16, requires_grad=True) for _ in range(3))
            out, lse = ring_attention(q, k, v, layout=layout, rank=rank, exchange=exchange, window_right=0)
            (out.sum() + lse.sum()).backward()
    except RingError as error:
        with open(clock) as file:
            waited = time.time() - float(file.read())
        return Report(error.rank, error.step, error.what, error.peer, str(error), str(error.__cause__), waited)
    raise AssertionError("the ring went on without the victim")


def survivors(tmp_path, operator: str, call: int, fall) -> list[Report]:
    """Runs the ring and checks that the victim has no result and every other rank a complete report."""
    outcomes: list[Outcome] = run_processes(
        WORLD, train_until_error, operator, call, fall, str(tmp_path / "clock"),
        timeout=60.0, group_timeout=TIMEOUT, without=[VICTIM],
    )  # fmt: skip
    assert outcomes[VICTIM].result is None
    others = [outcome for outcome in outcomes if outcome.rank != VICTIM]
    for outcome in others:
        assert outcome.error is None, outcome.error
        assert outcome.seconds is not None, f"rank {outcome.rank} hangs"
        assert outcome.exitcode == 0, f"rank {outcome.rank} did not leave cleanly"
        report: Report = outcome.result
        assert report.rank == outcome.rank and report.peer != outcome.rank and 1 <= report.step < WORLD
        assert report.text.startswith(f"rank {report.rank}, ring step {report.step}: {report.what} ")
        assert f" rank {report.peer} " in report.text
        assert report.what in ("K/V", "dK/dV")
        assert report.cause not in ("", "None"), "the back end's own error is chained"
    assert any(outcome.result.peer == VICTIM for outcome in others)
    return [outcome.result for outcome in others]


@pytest.mark.parametrize("operator, call", [("forward_into", 2), ("backward", 3)])
def test_a_killed_rank_ends_the_others_at_once(tmp_path, operator, call):
    for report in survivors(tmp_path, operator, call, die):
        assert report.waited < TIMEOUT, "the broken connection should be noticed before the timeout"


@pytest.mark.parametrize("operator, call", [("forward_into", 2), ("backward", 3)])
def test_a_stalled_rank_ends_the_others_within_the_timeout(tmp_path, operator, call):
    reports = survivors(tmp_path, operator, call, freeze)
    for report in reports:
        assert report.waited < TIMEOUT + SLACK
    overdue = [report for report in reports if report.peer == VICTIM]
    assert overdue and all(f"within {TIMEOUT:g} s: rank {VICTIM} is dead, stuck" in r.text for r in overdue)
    assert any(report.what == ("K/V" if operator == "forward_into" else "dK/dV") for report in overdue)
