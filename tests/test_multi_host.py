"""Two hosts, two processes each, started by torchrun as README.md says: every mode, and a link that is cut in a step.

The hosts are namespaces of this machine (virtual_hosts.py); the tests are skipped where it cannot make them. One job
serves them all: its ranks take a training step in every mode, then train on until the link goes.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fa3_dist import ops
from fa3_dist.parallel import ContextParallel
from fa3_dist.parallel.exchange import RingError
from tests.test_context_parallel import (
    assert_same,
    documents_of,
    gradients,
    make_model,
    make_tokens,
    next_tokens,
    parallel_step,
    plain_gradients,
    plain_logits,
    plain_loss,
)
from tests.virtual_hosts import INTERFACE, CannotMakeHosts, VirtualHosts

ROOT = Path(__file__).resolve().parents[1]
HOSTS, PROCESSES = 2, 2
WORLD = HOSTS * PROCESSES
TORCHRUN = f"--nnodes {HOSTS} --nproc-per-node {PROCESSES} --rdzv-backend c10d --rdzv-endpoint host0:29500".split()
MODES = "ring", "all_to_all", "product"
SHAPE = (2, 22)  # (B, S) of the training steps
CUT_OFF = range(WORLD - PROCESSES, WORLD)  # the ranks of the host whose link is cut
CALL = 2  # of `forward_into` in which that happens: the step of the first layer's ring that other hosts' keys feed
TIMEOUT = 5.0  # seconds, of the messages of the last part
SLACK = 20.0  # for a busy machine: to write tracebacks, to end the interpreters, and for torchrun to see it
START = 60.0  # seconds for the ranks to start and to take a step in every mode


# ---- what every rank does --------------------------------------------------------------------------------------------


def work(folder: Path) -> None:
    """A rank of the job; it leaves `rank*.pt`, and at the end `error*.json`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (HOSTS, PROCESSES), mesh_dim_names=("ring", "heads"))
    parallels = {
        "ring": ContextParallel(dist.group.WORLD, mode="ring"),
        "all_to_all": ContextParallel(dist.group.WORLD, mode="all_to_all"),
        "product": ContextParallel(mesh),
    }
    model, tokens = make_model(), make_tokens(*SHAPE)
    results: dict[str, Any] = {"host": socket.gethostname(), "world": world}
    for mode in MODES:
        cp = parallels[mode]
        batch = cp.shard(tokens)
        loss, logits = parallel_step(cp, model, batch)
        results[mode] = cp.mode, loss, cp.unshard(logits.detach(), batch), gradients(model)
    torch.save(results, folder / f"rank{rank}.pt")
    try:
        train_until_the_link_is_cut(rank, mesh, folder)
    except RingError as error:
        report = {"time": time.time(), "step": error.step, "what": error.what, "peer": error.peer, "text": str(error)}
        unfinished = folder / f"error{rank}.unfinished"
        unfinished.write_text(json.dumps(report))
        unfinished.replace(folder / f"error{rank}.json")
        raise


def train_until_the_link_is_cut(rank: int, mesh: DeviceMesh, folder: Path) -> None:
    """Training steps with the ring across hosts. In the middle of one the ranks of `CUT_OFF` ask for the cut, and wait.

    All of them: of a message still on the link, only one rank would be without, and the rest of its host wait for that.
    """
    cp = ContextParallel(mesh, timeout=TIMEOUT)
    original, calls = ops.forward_into, 0

    def forward_into(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank in CUT_OFF and calls == CALL:
            (folder / f"ready{rank}").touch()
            while not (folder / "cut").exists():
                time.sleep(0.01)
        return original(*arguments, **options)

    model, tokens = make_model(), make_tokens(*SHAPE)
    batch = cp.shard(tokens)
    parallel_step(cp, model, batch)
    ops.forward_into = forward_into
    for _ in range(100):
        parallel_step(cp, model, batch)
    raise AssertionError("the ring went on without the link")


# ---- the job ---------------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """What became of the hosts' torchruns, once the link of the last host was cut."""

    results: list[dict[str, Any]]  # by rank
    errors: dict[int, dict[str, Any]]  # by rank; torchrun may end a rank before it has written one
    cut: float  # when
    ended: float  # when the first host's torchrun had
    status: int  # of it
    log: str


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("multi_host")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": INTERFACE}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, __file__, str(folder)]
    with ExitStack() as stack:
        try:
            hosts = stack.enter_context(VirtualHosts(HOSTS, folder))
        except CannotMakeHosts as reason:
            pytest.skip(f"no virtual hosts on this machine: {reason}")
        logs = [stack.enter_context((folder / f"host{host}.log").open("w")) for host in range(HOSTS)]
        launchers = [hosts.start(host, command, environment, log) for host, log in enumerate(logs)]
        for rank in CUT_OFF:
            wait_for(folder / f"ready{rank}", launchers, folder)
        hosts.cut(HOSTS - 1)
        cut = time.time()
        (folder / "cut").touch()
        try:
            status = launchers[0].wait(TIMEOUT + SLACK)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the job hangs\n{read_logs(folder)}")
        ended = time.time()
        while len(list(folder.glob("error*.json"))) < PROCESSES + 1 and time.time() < cut + TIMEOUT + SLACK:
            time.sleep(0.02)
        return Job(
            results=[torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD)],
            errors={
                rank: json.loads(path.read_text())
                for rank in range(WORLD) if (path := folder / f"error{rank}.json").exists()
            },
            cut=cut, ended=ended, status=status, log=(folder / "host0.log").read_text(),
        )  # fmt: skip


def wait_for(path: Path, launchers: list[subprocess.Popen], folder: Path) -> None:
    deadline = time.monotonic() + START
    while not path.exists():
        running = all(launcher.poll() is None for launcher in launchers)
        assert running and time.monotonic() < deadline, f"the job did not come to its last part\n{read_logs(folder)}"
        time.sleep(0.02)


def read_logs(folder: Path) -> str:
    return "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*.log")))


# ---- the tests -------------------------------------------------------------------------------------------------------


def test_ranks_are_on_two_hosts_row_by_row(job: Job):
    assert [result["host"] for result in job.results] == ["host0"] * PROCESSES + ["host1"] * PROCESSES
    assert {result["world"] for result in job.results} == {WORLD}


@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_over_two_hosts_is_right(job: Job, mode: str):
    """Logits, loss and all gradients, in fp64, of whole sequences in one process with the oracle's attention."""
    model, tokens = make_model(), make_tokens(*SHAPE)
    documents = documents_of(tokens, None)
    expected_logits = plain_logits(model, documents)
    expected_loss = plain_loss(expected_logits, torch.cat(next_tokens(documents), dim=1)[0])
    expected_gradients = plain_gradients(model, expected_loss)
    for result in job.results:
        ran, loss, logits, parameter_gradients = result[mode]
        assert ran == mode
        assert_same(logits.flatten(0, 1), expected_logits)
        assert_same(loss, expected_loss)
        assert_same(parameter_gradients, expected_gradients)


def test_a_cut_link_ends_the_job_on_the_other_host(job: Job):
    assert job.status != 0
    assert job.ended - job.cut < TIMEOUT + SLACK
    check_errors(job, range(PROCESSES), CUT_OFF)
    shown = [f"RingError: {error['text']}" in job.log for error in job.errors.values()]
    assert any(shown), "torchrun shows it to the user, of those ranks that it does not end first"


def test_ranks_that_are_cut_off_end_too(job: Job):
    """Only they: their torchrun waits for its rendezvous, which is on the first host."""
    check_errors(job, CUT_OFF, range(PROCESSES))


def check_errors(job: Job, ranks: range, lost: range) -> None:
    """Errors of the ranks of one host name rank, step and peer; the first one is about a rank that is lost to them."""
    errors = {rank: job.errors[rank] for rank in ranks if rank in job.errors}
    assert errors, job.log
    for rank, error in errors.items():
        assert error["time"] - job.cut < TIMEOUT + SLACK
        assert error["text"].startswith(f"rank {rank}, ring step {error['step']}: {error['what']} "), error
        assert 1 <= error["step"] < WORLD and error["what"] in ("K/V", "dK/dV")
        assert f" rank {error['peer']} " in error["text"] and error["peer"] != rank
    first = min(errors.values(), key=lambda error: error["time"])
    assert first["peer"] in lost and f"within {TIMEOUT:g} s" in first["text"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
