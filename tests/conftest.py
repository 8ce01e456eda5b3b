"""Rules for all tests: one thread a process, fixed seeds, GPU tests skipped where there is no GPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the workers and their ranks share a few cores

import pytest  # noqa: E402
import torch  # noqa: E402

GPUS_NEEDED = {"gpu": 1, "multi_gpu": 2}


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips tests marked gpu or multi_gpu where there are too few CUDA devices."""
    there = torch.cuda.device_count()
    for item in items:
        for marker, needed in GPUS_NEEDED.items():
            if there < needed and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA device(s), {there} here"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def only_the_compiled_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that the compiled library does not run is an error, not a detour."""
    from fa3_dist import ops

    monkeypatch.setenv("FA3_DIST_STRICT", "1")
    ops._has_compiled_kernel.cache_clear()
