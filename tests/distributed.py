"""Runs a function on several processes of one group, for tests: nothing it starts outlives it, and it never hangs.

Processes are forked from a server that has imported torch once, so starting eight of them takes a fraction of a second.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

STORE_TIMEOUT = 60.0  # seconds for the processes to find each other on a busy machine
PRELOADED = ["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest"]  # imported once, by the server
GRACE = 2.0  # seconds that a process gets to end after its last word, or after another one's failure


@dataclass
class Outcome:
    """How one process ended: with a result, with the traceback of an exception, or, killed, with neither."""

    rank: int
    result: Any = None
    error: str | None = None
    exitcode: int | None = None
    seconds: float | None = None  # from the start of the run to the end of `fn`; None: it did not end in time


def run_distributed(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0,
                    backend: str = "gloo") -> list[Any]:
    """Runs `fn(rank, world, *args)` on `world` processes of one group and returns the results by rank.

    `fn`, its arguments and its results must be picklable. With backend "nccl" each process has a GPU of its own. Raises
    AssertionError with the traceback of the rank that failed first, or with the ranks that were not done within
    `timeout` seconds. All processes are dead afterwards.
    """
    outcomes = run_processes(world, fn, *args, timeout=timeout, stop_at_error=True, backend=backend)
    failed = sorted((o.seconds, o.rank, o.error) for o in outcomes if o.error is not None)
    if failed:
        raise AssertionError(f"rank {failed[0][1]} of {world} failed after {failed[0][0]:.1f} s:\n{failed[0][2]}")
    late = [o.rank for o in outcomes if o.seconds is None]
    assert not late, f"ranks {late} of {world} were not done within {timeout:g} s"
    killed = {o.rank: o.exitcode for o in outcomes if o.exitcode != 0}
    assert not killed, f"ranks of {world} ended without a result; exit codes: {killed}"
    return [o.result for o in outcomes]


def run_processes(world: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0, group_timeout: float = 60.0,
                  stop_at_error: bool = False, without: Collection[int] = (), backend: str = "gloo") -> list[Outcome]:
    """The same, but reports how each process ended instead of raising.

    Args:
        timeout: seconds until whatever still runs is killed.
        group_timeout: the process group's timeout in seconds.
        stop_at_error: give up soon after the first failure instead of waiting for the other processes.
        without: ranks whose end is not waited for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    payload = pickle.dumps((fn, args))
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        processes, pipes = [], []
        try:
            for rank in range(world):
                receiving, sending = context.Pipe(duplex=False)
                arguments = (rank, world, f"{folder}/store", payload, sending, group_timeout, timeout, backend)
                processes.append(context.Process(target=_main, args=arguments, daemon=True))
                processes[-1].start()
                sending.close()
                pipes.append(receiving)
            outcomes = _collect(pipes, started, timeout, stop_at_error, without)
            for process, outcome in zip(processes, outcomes, strict=True):
                if outcome.seconds is not None:
                    process.join(GRACE)
                    outcome.exitcode = process.exitcode
            return outcomes
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(pipes: Sequence[Connection], started: float, timeout: float, stop_at_error: bool,
             without: Collection[int]) -> list[Outcome]:
    """Waits for the last word of every process, at most until the timeout."""
    outcomes = [Outcome(rank) for rank in range(len(pipes))]
    waiting = {pipe: outcome for pipe, outcome in zip(pipes, outcomes, strict=True) if outcome.rank not in without}
    deadline = started + timeout
    while waiting and time.monotonic() < deadline:
        for pipe in wait(list(waiting), timeout=max(deadline - time.monotonic(), 0.0)):
            assert isinstance(pipe, Connection)
            outcome = waiting.pop(pipe)
            outcome.seconds = time.monotonic() - started
            try:
                outcome.result, outcome.error = pickle.loads(pipe.recv_bytes())
            except EOFError:
                pass  # the process was killed: its end of the pipe closed without a word
            if outcome.error is not None and stop_at_error:
                deadline = min(deadline, time.monotonic() + GRACE)
    return outcomes


def _main(rank: int, world: int, store: str, payload: bytes, pipe: Connection, group_timeout: float, timeout: float,
          backend: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.9 * timeout)  # where it stood, should it not come back
    try:
        file_store = dist.FileStore(store, world)
        file_store.set_timeout(timedelta(seconds=STORE_TIMEOUT))
        if backend == "nccl":
            torch.cuda.set_device(rank)
        dist.init_process_group(backend, store=file_store, rank=rank, world_size=world,
                                timeout=timedelta(seconds=group_timeout))
        fn, args = pickle.loads(payload)
        answer = pickle.dumps((fn(rank, world, *args), None))
    except BaseException:
        answer = pickle.dumps((None, traceback.format_exc()))
    faulthandler.cancel_dump_traceback_later()
    pipe.send_bytes(answer)
    pipe.close()
