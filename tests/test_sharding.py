"""Rows into a layout and back, against plain indexing; gathering over gloo with its gradients."""

from __future__ import annotations

import random
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist

from fa3_dist.parallel.schedule import Layout, Shard, contiguous, packed, zigzag
from fa3_dist.parallel.sharding import keep_for_graph, positions, shard, unshard, upload
from tests.distributed import run_distributed

PACK = (0, 1, 37, 9, 0, 20)


def index(layout: Layout, rank: int) -> list[int]:
    """Local rows as numbers of tokens, one by one."""
    starts = [sum(layout.documents[:document]) for document in range(len(layout.documents))]
    return [starts[d] + start + i for d, start, length in layout.shards[rank] for i in range(length)]


def scrambled(documents: tuple[int, ...], world: int, seed: int) -> Layout:
    """Pieces of any size on any rank in any order; with few tokens some ranks have none."""
    random_ = random.Random(seed)
    shards = [[] for _ in range(world)]
    for document, length in enumerate(documents):
        start = 0
        while start < length:
            size = random_.randint(1, length - start)
            shards[random_.randrange(world)].append(Shard(document, start, size))
            start += size
    for pieces in shards:
        random_.shuffle(pieces)
    return Layout(documents, tuple(map(tuple, shards)))


LAYOUTS = [
    contiguous(PACK, 3), zigzag(PACK, 4), packed(PACK, 4), zigzag((12, 12), 1), zigzag((1,), 4), zigzag((0,), 2),
    *(scrambled(PACK, 4, seed) for seed in range(5)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_shard_takes_the_rows_of_the_layout(layout, dim):
    tokens = sum(layout.documents)
    shape = [3, 4, 5]
    shape[dim] = tokens
    whole = torch.randn(shape, dtype=torch.float64)
    for rank in range(layout.world):
        rows = torch.tensor(index(layout, rank), dtype=torch.int64)
        assert torch.equal(shard(whole, layout, rank, dim), whole.index_select(dim, rows))


def test_shard_is_differentiable():
    layout = zigzag(PACK, 3)
    whole = torch.randn(67, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(layout.tokens(1), 2, dtype=torch.float64)
    (shard(whole, layout, 1) * weights).sum().backward()
    expected = torch.zeros(67, 2, dtype=torch.float64)
    expected[index(layout, 1)] = weights
    assert torch.equal(whole.grad, expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_positions_start_anew_in_each_document(layout):
    in_document = torch.cat([torch.arange(length) for length in layout.documents])
    for rank in range(layout.world):
        local = positions(layout, rank)
        assert local.dtype == torch.int64
        assert torch.equal(local, in_document[index(layout, rank)])


def test_positions_of_the_rotary_case():
    layout = zigzag((4, 4), 2)
    assert positions(layout, 0).tolist() == [0, 3, 0, 3]
    assert positions(layout, 1).tolist() == [1, 2, 1, 2]


def test_another_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match=r"tensor has shape \(5, 3\): expected 8 rows along dim 0"):
        shard(torch.zeros(5, 3), zigzag((4, 4), 2), 0)


# ---- several processes -----------------------------------------------------------------------------------------------


def check_unshard(rank: int, world: int) -> None:
    layouts = [contiguous(PACK, world), zigzag(PACK, world), packed(PACK, world)]
    layouts += [zigzag((1,), world), zigzag((), world)]
    layouts += [scrambled(PACK, world, seed) for seed in range(4)]
    for number, layout in enumerate(layouts):
        generator = torch.Generator().manual_seed(number)
        whole = torch.randn(sum(layout.documents), 3, dtype=torch.float64, generator=generator)
        for dtype in (torch.float64, torch.bfloat16, torch.int64, torch.bool):
            values = (whole * 9).to(dtype)
            assert torch.equal(unshard(shard(values, layout, rank), layout, dist.group.WORLD), values)
        other = whole.T.contiguous()
        assert torch.equal(unshard(shard(other, layout, rank, 1), layout, dist.group.WORLD, -1), other)
        check_gradients(rank, world, layout, whole, generator)
    with pytest.raises(ValueError, match=r"expected 1 rows|expected 0 rows"):
        unshard(torch.zeros(9), zigzag((1,), world), dist.group.WORLD)
    with pytest.raises(ValueError, match="group has"):
        unshard(torch.zeros(1), zigzag((1,), world + 1), dist.group.WORLD)


def check_gradients(rank: int, world: int, layout: Layout, whole: torch.Tensor, generator: torch.Generator) -> None:
    weights = torch.randn(whole.shape, dtype=whole.dtype, generator=generator)

    def loss_of(parameter: torch.Tensor, rows, gather) -> torch.Tensor:
        return (gather(torch.tanh(parameter * rows)) * weights).square().sum()

    # The same loss on every rank, from the full tensor: the average of the parameter gradients is its gradient.
    parameter = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    loss = loss_of(parameter, shard(whole, layout, rank), lambda x: unshard(x, layout, dist.group.WORLD))
    loss.backward()
    average = parameter.grad.clone()
    dist.all_reduce(average)
    alone = parameter.detach().clone().requires_grad_()
    expected = loss_of(alone, whole, lambda x: x)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(average / world, alone.grad, rtol=1e-12, atol=1e-12)

    # Another loss on each rank: every rank's rows get the gradient of the sum of them.
    local = shard(whole, layout, rank).clone().requires_grad_()
    (unshard(local, layout, dist.group.WORLD) * weights * (rank + 1)).sum().backward()
    factor = world * (world + 1) / 2
    torch.testing.assert_close(local.grad, shard(weights, layout, rank) * factor, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("world", [2, 4])
def test_unshard_inverts_shard_and_sums_gradients(world):
    run_distributed(world, check_unshard)


def test_nothing_is_uploaded_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured, .*: expected one step like it before"):
        upload(np.zeros(3), "cuda")
    assert upload(np.zeros(3), "cpu").tolist() == [0, 0, 0]


@pytest.mark.parametrize("device, capturing, is_kept", [
    ("cuda", True, True), ("cuda", False, False), ("cpu", True, False),
])
def test_what_a_graph_reads_outlives_the_caches(device: str, capturing: bool, is_kept: bool, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    table = torch.zeros(3)
    kept = weakref.ref(table)
    keep_for_graph(table, torch.device(device))
    del table
    assert (kept() is not None) is is_kept
