"""ContextParallel against a plain computation: one process, each document by itself, attention from the oracle."""

from __future__ import annotations

import contextlib
import copy
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import functional as F

import fa3_dist.parallel.context as context
from fa3_dist.layers import Transformer, TransformerConfig
from fa3_dist.parallel import ContextParallel, LocalAttention, LocalBatch, contiguous, zigzag
from fa3_dist.parallel.context import NoPeers
from fa3_dist.parallel.exchange import RingError
from fa3_dist.parallel.plan import is_measured
from tests import oracle
from tests.distributed import run_distributed, run_processes

WORLDS = (1, 2, 4)
VOCABULARY = 11
IGNORED = -100
DENSE, PACKED = (2, 13), (0, 5, 5, 24, 25)  # (B, S) and cu_seqlens


def oracle_attention(q, k, v, *, causal: bool = False, window_size=(-1, -1), **options: Any) -> Tensor:
    left, right = (None if side < 0 else side for side in window_size)
    return oracle.attention(q, k, v, window_left=left, window_right=0 if causal else right, **options)[0].to(q.dtype)


def make_model(**options: Any) -> Transformer:
    torch.manual_seed(0)
    settings = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "sink": True, "softcap": 8.0} | options
    model = Transformer(TransformerConfig(vocab_size=VOCABULARY, window_size=((-1, -1), (6, 0)), **settings)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model


def make_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def documents_of(tokens: Tensor, cu_seqlens: tuple[int, ...] | None) -> list[Tensor]:
    """Each document as a (1, S) batch."""
    if cu_seqlens is None:
        return list(tokens.split(1))
    return [tokens[:, start:end] for start, end in zip(cu_seqlens, cu_seqlens[1:]) if end > start]


def next_tokens(documents: list[Tensor]) -> list[Tensor]:
    return [torch.cat((each[:, 1:], torch.full((1, 1), IGNORED)), dim=1) for each in documents]


def plain_logits(model: nn.Module, documents: list[Tensor]) -> Tensor:
    """(tokens, classes) of all documents, one behind the other."""
    return torch.cat([model(each, attention=oracle_attention)[0] for each in documents])


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    valid = labels != IGNORED
    return F.cross_entropy(logits[valid], labels[valid]) if valid.any() else logits.sum() * 0


def plain_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def parallel_step(cp: ContextParallel, model: nn.Module, batch: LocalBatch, **options: Any) -> tuple[Tensor, Tensor]:
    """(loss, logits) after forward, backward and averaging, from zero gradients."""
    model.zero_grad()
    logits = model(batch.tokens, positions=batch.positions, attention=batch.attention)
    loss = cp.loss(logits, batch.labels, **options)
    loss.backward()
    cp.sync_gradients(model, **options)
    return loss.detach(), logits


def assert_same(actual: Any, expected: Any, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


def equal_on_all_ranks(value: Tensor) -> bool:
    values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(values, value)
    return all(torch.equal(each, value) for each in values)


# ---- on every world --------------------------------------------------------------------------------------------------


def check_training_step(rank: int, world: int) -> None:
    """Logits, loss and averaged gradients of dense and packed batches in every layout; some ranks have no token."""
    model = make_model()
    for layout in ("auto", "zigzag", "contiguous"):
        cp = ContextParallel(dist.group.WORLD, layout=layout)
        for shape, cu_seqlens in ((DENSE, None), ((1, PACKED[-1]), PACKED), ((1, 3), None)):
            tokens = make_tokens(*shape)
            documents = documents_of(tokens, cu_seqlens)
            expected_logits = plain_logits(model, documents)
            expected_loss = plain_loss(expected_logits, torch.cat(next_tokens(documents), dim=1)[0])
            given = cu_seqlens if rank % 2 else cu_seqlens and torch.tensor(cu_seqlens, dtype=torch.int32)
            batch = cp.shard(tokens, cu_seqlens=given)
            assert batch.tokens.shape == batch.positions.shape == batch.labels.shape == batch.attention.shape
            loss, logits = parallel_step(cp, model, batch)
            whole = cp.unshard(logits, batch)
            assert whole.shape == (*tokens.shape, VOCABULARY)
            assert_same(whole.flatten(0, 1), expected_logits)
            assert_same(loss, expected_loss)
            assert equal_on_all_ranks(loss)
            assert_same(gradients(model), plain_gradients(model, expected_loss))


def check_modes(rank: int, world: int) -> None:
    """The same tokens, loss and gradients in every mode and layout; 4 heads with 1 and 2 key/value heads."""
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("ring", "heads"))
    for layout in ("auto", "contiguous"):
        ring = ContextParallel(dist.group.WORLD, layout=layout)
        parallels = [ContextParallel(mesh, layout=layout)]
        parallels += [ContextParallel(dist.group.WORLD, layout=layout, mode=mode) for mode in ("all_to_all", "auto")]
        for kv_heads, (shape, cu_seqlens) in ((1, (DENSE, None)), (2, ((1, PACKED[-1]), PACKED)), (2, ((1, 3), None))):
            model, tokens = make_model(kv_heads=kv_heads), make_tokens(*shape)
            documents = documents_of(tokens, cu_seqlens)
            expected_logits = plain_logits(model, documents)
            expected_loss = plain_loss(expected_logits, torch.cat(next_tokens(documents), dim=1)[0])
            expected = plain_gradients(model, expected_loss)
            for cp in parallels:
                batch, same = (each.shard(tokens, cu_seqlens=cu_seqlens) for each in (cp, ring))
                assert torch.equal(batch.tokens, same.tokens) and torch.equal(batch.positions, same.positions)
                assert batch.layout == same.layout
                loss, logits = parallel_step(cp, model, batch)
                assert_same(cp.unshard(logits, batch).flatten(0, 1), expected_logits)
                assert_same(loss, expected_loss)
                assert_same(gradients(model), expected)
    product = parallels[0]
    assert (product.mode, product.rank, product.world) == ("product", rank, world)
    columns = DeviceMesh("cpu", torch.arange(world).view(2, world // 2).mT, mesh_dim_names=("ring", "heads"))
    if world > 2:
        order = r"in the order \[0, 2, 1, 3\]: expected \[0, 1, 2, 3\], rising row by row"
        with pytest.raises(ValueError, match=order):
            ContextParallel(columns)
    choice = product.choose(batch, heads=4, head_dim=8)
    assert choice.head_ranks == 2 and choice.mode in str(choice) and "mode is 'product'" in str(choice)


def check_what_modes_send(rank: int, world: int) -> None:
    """Modes do what they say, in each direction: messages of an all-to-all go to every rank, twice."""
    tokens, q = make_tokens(1, 16), torch.randn(1, 16 // world, 4, 8)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ring", "heads"))
    for group, mode, messages in ((dist.group.WORLD, None, world - 1), (dist.group.WORLD, "ring", world - 1),
                                  (dist.group.WORLD, "all_to_all", 2 * (world - 1)), (mesh, None, 2 * (2 - 1) + 1)):
        cp = ContextParallel(group, mode=mode)
        assert cp.exchange.stats.messages_sent == 0
        cp.shard(tokens).attention(q, q, q, causal=True)
        assert cp.exchange.stats.messages_sent == messages, mode


def check_auto(rank: int, world: int) -> None:
    """Links are measured once a group, equal on all ranks; given ones decide, and say why."""
    cp = ContextParallel(dist.group.WORLD, mode="auto")
    assert cp.exchange.stats.messages_sent == 0 and is_measured(cp.group)
    links = [None] * world
    dist.all_gather_object(links, cp._links)
    assert links == [cp._links] * world and cp._links.latency > 0
    assert [ranks for ranks, rate in cp._links.bandwidth if rate > 1e5] == [2, 4]
    assert ContextParallel(dist.group.WORLD, mode="auto")._links is cp._links
    batch, sizes = cp.shard(make_tokens(1, 4096)), {"heads": 4, "kv_heads": 1, "head_dim": 8, "causal": True}
    assert str(cp.choose(batch, **sizes)).count(" ms: ") == 3
    q, k = torch.randn(1, 1024, 4, 8), torch.randn(1, 1024, 1, 8)
    for bandwidth, messages in (({2: 1e12, 4: 1.0}, 2 + 1), ({4: 1e12}, 3)):
        given = ContextParallel(dist.group.WORLD, mode="auto", bandwidth=bandwidth)
        batch = given.shard(make_tokens(1, 4096))
        batch.attention(q, k, k, causal=True)
        assert given.exchange.stats.messages_sent == messages, given.choose(batch, **sizes)


def check_loss_from_the_full_tensor(rank: int, world: int) -> None:
    """A loss of one's own from unsharded logits follows the same convention."""
    cp, model, tokens = ContextParallel(dist.group.WORLD), make_model(), make_tokens(*DENSE)
    batch = cp.shard(tokens)
    logits = cp.unshard(model(batch.tokens, positions=batch.positions, attention=batch.attention), batch)
    loss = logits.square().mean()
    loss.backward()
    cp.sync_gradients(model)
    expected = plain_logits(model, documents_of(tokens, None)).square().mean()
    assert_same(loss.detach(), expected.detach())
    assert_same(gradients(model), plain_gradients(model, expected))


def check_few_valid_tokens(rank: int, world: int) -> None:
    """One valid label somewhere gives the loss and gradients of a single process; none gives 0 and not NaN."""
    cp, model, tokens = ContextParallel(dist.group.WORLD), make_model(), make_tokens(1, 16)
    expected_logits = plain_logits(model, [tokens])
    for valid in ([], [0], [9], [15, 3]):
        labels = torch.full((1, 16), IGNORED)
        labels[0, valid] = tokens[0, valid]
        expected = plain_loss(expected_logits, labels[0])
        loss, _ = parallel_step(cp, model, cp.shard(tokens, labels))
        assert_same(loss, expected)
        for parameter, gradient in zip(model.parameters(), torch.autograd.grad(expected, list(model.parameters()),
                                                                             retain_graph=True)):
            assert_same(parameter.grad, gradient)
            assert valid or not parameter.grad.any()


def check_other_ignored_label_and_half_precision(rank: int, world: int) -> None:
    cp, tokens = ContextParallel(dist.group.WORLD), make_tokens(1, 12)
    labels = tokens.clone()
    labels[0, ::3] = 7
    batch = cp.shard(tokens, labels)
    logits = torch.randn(1, 12, VOCABULARY, generator=torch.Generator().manual_seed(0)).bfloat16()
    local = cp.shard(tokens, logits=logits).extras["logits"].requires_grad_()
    loss = cp.loss(local, batch.labels, ignore_index=7)
    loss.backward()
    assert loss.dtype == torch.float32 and local.grad.dtype == torch.bfloat16
    assert_same(loss, F.cross_entropy(logits[0].float(), labels[0], ignore_index=7), rtol=1e-6)


def check_local_batches(rank: int, world: int) -> None:
    """What a batch holds, against indexing by hand; equal layouts give the same attention object."""
    cp = ContextParallel(dist.group.WORLD, layout="zigzag", timeout=30.0)
    tokens = make_tokens(8)
    features = torch.randn(8, 3)
    batch = cp.shard(tokens, cu_seqlens=[0, 4, 8], features=features)
    rows = {1: [[0, 1, 2, 3, 4, 5, 6, 7]], 2: [[0, 3, 4, 7], [1, 2, 5, 6]], 4: [[], [0, 3, 4, 7][::2], [], []]}[world]
    if world == 2:
        assert batch.positions.tolist() == [[[0, 3, 0, 3], [1, 2, 1, 2]][rank]]
    if world < 4:
        labels = [*tokens[1:4].tolist(), IGNORED, *tokens[5:8].tolist(), IGNORED]
        assert torch.equal(batch.tokens, tokens[None, rows[rank]])
        assert torch.equal(batch.extras["features"], features[None, rows[rank]])
        assert batch.labels.tolist() == [[labels[row] for row in rows[rank]]]
    again = cp.shard(tokens.clone(), cu_seqlens=torch.tensor([0, 4, 8]))
    assert again.attention is batch.attention and again.layout is batch.layout
    assert cp.shard(tokens, cu_seqlens=[0, 5, 8]).attention is not batch.attention
    dense = cp.shard(make_tokens(3, 9), extra=torch.ones(3, 9, 2))
    assert dense.tokens.shape == dense.positions.shape == dense.extras["extra"].shape[:2] == (3, dense.tokens.shape[1])
    assert (dense.positions == dense.positions[0]).all()
    embedded = cp.shard(torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0)))
    assert embedded.labels is None and embedded.tokens.shape == (*embedded.positions.shape, 5)
    nothing = cp.shard(make_tokens(2, 0))
    assert nothing.tokens.shape == nothing.labels.shape == nothing.positions.shape == (2, 0)
    assert cp.unshard(torch.zeros(2, 0, 3), nothing).shape == (2, 0, 3)
    if world > 2:
        few = cp.shard(make_tokens(1, 2))  # ranks without a token
        assert_same(cp.unshard(few.tokens, few), make_tokens(1, 2))


def check_checkpointing(rank: int, world: int) -> None:
    """Recomputing blocks in the backward changes no bit."""
    cp, plain, recomputed = ContextParallel(dist.group.WORLD), make_model(), make_model(checkpoint_activations=True)
    batch = cp.shard(make_tokens(*DENSE))
    losses = [parallel_step(cp, model, batch)[0] for model in (plain, recomputed)]
    assert torch.equal(*losses)
    assert all(map(torch.equal, gradients(plain), gradients(recomputed)))


def check_wrappers(rank: int, world: int) -> None:
    """DDP and FSDP2 average gradients as the convention asks."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    cp, tokens = ContextParallel(dist.group.WORLD), make_tokens(*DENSE)
    batch = cp.shard(tokens)
    model = make_model()
    expected_loss = plain_loss(plain_logits(model, documents_of(tokens, None)),
                               torch.cat(next_tokens(documents_of(tokens, None)), dim=1)[0])
    expected = plain_gradients(model, expected_loss)

    replicated = DistributedDataParallel(copy.deepcopy(model))
    cp.loss(replicated(batch.tokens, batch.positions, batch.attention), batch.labels).backward()
    assert_same(gradients(replicated), expected)

    sharded, mesh = copy.deepcopy(model), init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    for block in sharded.blocks:
        fully_shard(block, mesh=mesh["cp"])
    fully_shard(sharded, mesh=mesh["cp"])
    by_mesh = ContextParallel(mesh["cp"])
    batch = by_mesh.shard(tokens)
    by_mesh.loss(sharded(batch.tokens, batch.positions, batch.attention), batch.labels).backward()
    assert_same([gradient.full_tensor() for gradient in gradients(sharded)], expected)
    with pytest.raises(TypeError, match="DTensor"):
        by_mesh.sync_gradients(sharded)


def check_gradients_that_are_missing(rank: int, world: int) -> None:
    cp, model = ContextParallel(dist.group.WORLD), nn.Linear(3, 2)
    if rank == 0:
        model.bias.grad = torch.tensor([4.0, 8.0])
    cp.sync_gradients(model)
    assert model.weight.grad is None
    assert_same(model.bias.grad, torch.tensor([4.0, 8.0]) / world)


# ---- replicas --------------------------------------------------------------------------------------------------------


def check_replicas(rank: int, world: int) -> None:
    """Data parallel times context parallel: the mean goes over the valid tokens of all replicas."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    cp, model = ContextParallel(mesh["cp"]), make_model()
    replica = mesh["dp"].get_local_rank()
    batches = [make_tokens(1, 14, seed=seed) for seed in (5, 6)]
    labels = [tokens.roll(-1) for tokens in batches]
    labels[1][0, 3:] = IGNORED
    logits = torch.cat([plain_logits(model, [tokens]) for tokens in batches])
    expected = plain_loss(logits, torch.cat(labels, dim=1)[0])
    loss, _ = parallel_step(cp, model, cp.shard(batches[replica], labels[replica]), data_mesh=mesh["dp"])
    assert_same(loss, expected)
    assert_same(gradients(model), list(torch.autograd.grad(expected, list(model.parameters()), retain_graph=True)))
    assert equal_on_all_ranks(loss)
    with pytest.raises(ValueError, match=r"DeviceMesh of 2 dimensions .*or, for ContextParallel, .*'ring', 'heads'"):
        ContextParallel(mesh)
    three = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "ring", "heads"))
    product = ContextParallel(three["ring", "heads"])
    assert (product.rank, product.world) == (rank % 2, 2)
    loss, _ = parallel_step(product, model, product.shard(batches[replica], labels[replica]), data_mesh=three["dp"])
    assert_same(loss, expected)
    assert_same(gradients(model), plain_gradients(model, expected))


# ---- models that cannot be sharded -----------------------------------------------------------------------------------


class Spoiled(nn.Module):
    """A model with one habit that does not survive sharding, or none."""

    def __init__(self, habit: str | None):
        super().__init__()
        self.model, self.habit = make_model(), habit
        self.mix = nn.Conv1d(16, 16, 3, padding=1).double()
        self.drop = nn.Dropout(0.5)
        if habit == "mixes tokens":
            self.model.blocks[1].mlp_norm.register_forward_hook(lambda module, inputs, x: self._mixed(x))

    def _mixed(self, x: Tensor) -> Tensor:
        return self.mix(x.transpose(1, 2)).transpose(1, 2)

    def forward(self, tokens: Tensor, positions: Tensor, attention: Callable[..., Tensor]) -> Tensor:
        if self.habit == "counts positions":
            positions = torch.arange(tokens.shape[1])[None]
        if self.habit == "ignores attention":
            attention = LocalAttention(contiguous((tokens.shape[1],) * len(tokens), 1), 0, len(tokens), NoPeers())
        return self.drop(self.model(tokens, positions, attention))


def check_models(rank: int, world: int) -> None:
    cp = ContextParallel(dist.group.WORLD)
    good = Spoiled(None)
    cp.check(good, make_tokens(2, 16))
    cp.check(good, make_tokens(1, 24), cu_seqlens=[0, 8, 24])
    assert good.training and good.drop.training and not good._forward_hooks
    named = {
        "counts positions": r"model\.blocks\.0\.attention\.o_proj' \(Linear\)",
        "ignores attention": r"model\.blocks\.0\.attention\.o_proj' \(Linear\)",
        "mixes tokens": r"model\.blocks\.1\.mlp_norm' \(RMSNorm\)|mix' \(Conv1d\)|model\.blocks\.1\.mlp\.gate_proj'",
    }
    for habit, name in named.items():
        if world > 1:
            with pytest.raises(ValueError, match=rf"rank \d: module '({name})"):
                cp.check(Spoiled(habit), make_tokens(2, 16))
    with pytest.raises(ValueError, match="blocks.0.attention .* positions is None"):
        batch = cp.shard(make_tokens(2, 16))
        make_model()(batch.tokens, attention=batch.attention)


# Wrappers and recomputation import much of torch, so one world has to do for them.
CHECKS = {
    check_training_step: WORLDS,
    check_modes: (2, 4),
    check_what_modes_send: (4,),
    check_auto: (4,),
    check_loss_from_the_full_tensor: WORLDS,
    check_few_valid_tokens: WORLDS,
    check_other_ignored_label_and_half_precision: WORLDS,
    check_local_batches: WORLDS,
    check_gradients_that_are_missing: WORLDS,
    check_models: WORLDS,
    check_replicas: (4,),
    check_checkpointing: (2,),
    check_wrappers: (2,),
}


def all_checks(rank: int, world: int) -> None:
    for check, worlds in CHECKS.items():
        if world in worlds:
            check(rank, world)


@pytest.mark.parametrize("world", WORLDS)
def test_every_world(world):
    """One set of processes for all checks: starting them is most of the time."""
    run_distributed(world, all_checks)


# ---- ranks that disagree ---------------------------------------------------------------------------------------------


def check_disagreements(rank: int, world: int) -> None:
    cp = ContextParallel(dist.group.WORLD, timeout=20.0)
    tokens, odd = make_tokens(1, 12), rank == world - 1
    wrong: list[tuple[str, Callable[[], object]]] = [
        (rf"rank 0: .*\(1, 12\).*rank {world - 1}: .*\(1, 11\)", lambda: cp.shard(tokens[:, 1:] if odd else tokens)),
        (r"rank 0: .*documents \(5, 7\).*documents \(6, 6\)", lambda: cp.shard(tokens, cu_seqlens=[0, 5 + odd, 12])),
        ("contents", lambda: cp.shard(tokens + odd)),
        ("contents", lambda: cp.shard(tokens, extra=tokens + odd)),
        ("int32", lambda: cp.shard(tokens.int() if odd else tokens)),
        ("extra", lambda: cp.shard(tokens, **({"extra": tokens} if odd else {}))),
        ("cu_seqlens is .0, 9.: expected rising numbers from 0 to 12",
         lambda: cp.shard(tokens, cu_seqlens=[0, 9 if odd else 12])),
        ("cu_seqlens is .0, 9.: expected rising numbers from 0 to 12", lambda: cp.shard(tokens, cu_seqlens=[0, 9])),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    different: list[tuple[str, Callable[[], object]]] = [
        (rf"rank 0: .*'mode': 'ring'.*rank {world - 1}: .*'mode': 'all_to_all'",
         lambda: ContextParallel(dist.group.WORLD, mode="all_to_all" if odd else "ring")),
        ("'layout': 'zigzag'", lambda: ContextParallel(dist.group.WORLD, layout="zigzag" if odd else "auto")),
        (r"'bandwidth': Links\(bandwidth=\(\(1, 1.0\)",
         lambda: ContextParallel(dist.group.WORLD, mode="auto", bandwidth=1 + odd)),
        ("'bandwidth': None", lambda: ContextParallel(dist.group.WORLD, mode="auto", bandwidth=9.0 if odd else None)),
    ]
    for message, call in different:
        with pytest.raises(ValueError, match=rf"came to ContextParallel\(\) with different arguments: .*{message}"):
            call()
    for cp_of_mode in (cp, ContextParallel(dist.group.WORLD, mode="all_to_all", timeout=20.0)):
        attention, sent = cp_of_mode.shard(tokens).attention, cp_of_mode.exchange.stats.messages_sent
        q, k = torch.randn(1, 4, 6, 8), torch.randn(1, 4, 3, 8)
        for message, tensors, options in [
            (r"\(\(6, 8\), torch.float32\).*\(\(3, 8\), torch.float32\)", (q[:, :, :3] if odd else q, k, k), {}),
            ("torch.float64", (q.double(), k.double(), k.double()) if odd else (q, k, k), {}),
            ("'window_left', 3", (q, k, k), {"window_size": (3 + odd, 0)}),
            ("'softcap', 2.0", (q, k, k), {"softcap": 2.0 + odd}),
            ("'softmax_scale', None", (q, k, k), {"softmax_scale": 0.25 if odd else None}),
        ]:
            with pytest.raises(ValueError, match=f"came to attention with different arguments: expected .*{message}"):
                attention(*tensors, **options)
        with pytest.raises(ValueError, match="k and v have 3 heads and q has 4: expected the heads of q"):
            attention(q[:, :, :4], k, k)
        assert cp_of_mode.exchange.stats.messages_sent == sent
    split = ContextParallel(dist.group.WORLD, layout="zigzag")  # both batches have 4 rows on each rank
    one, two = split.shard(tokens), split.shard(tokens, cu_seqlens=[0, 6, 12])
    assert one.tokens.shape == two.tokens.shape
    with pytest.raises(ValueError, match="attention with different arguments: .*in 1 documents.*in 2 documents"):
        (two if odd else one).attention(q, k, k)
    assert split.exchange.stats.messages_sent == 0
    with pytest.raises(ValueError, match="q has 4 heads: expected a multiple of 3, .*take mode='ring'"):
        attention(q[:, :, :4], k[:, :, :1], k[:, :, :1])
    assert cp_of_mode.exchange.stats.messages_sent == sent
    batch = cp.shard(tokens)  # and all is well again
    assert torch.equal(cp.unshard(batch.tokens, batch), tokens)
    late = ContextParallel(dist.group.WORLD, timeout=1.0)
    if not odd:
        start = time.monotonic()
        late_word = rf": word (from|to) rank {world - 1} did not (arrive within 1 s: rank {world - 1} is dead|get)"
        with pytest.raises(RuntimeError, match=rf"rank {rank} of {world}: not all ranks came to shard\(\) within 1 s"
                                               + late_word):
            late.shard(tokens)
        assert time.monotonic() - start < 15


def test_ranks_that_disagree_all_raise():
    run_distributed(3, check_disagreements)


def shard_until_a_rank_is_lost(rank: int, world: int) -> str:
    cp, tokens = ContextParallel(dist.group.WORLD, timeout=60.0), make_tokens(1, 12)
    cp.shard(tokens)
    if rank == 1:
        os._exit(1)
    with pytest.raises(RuntimeError) as error:
        cp.shard(tokens)
    return str(error.value)


def test_a_rank_that_is_lost_between_steps_is_named_at_once():
    outcomes = run_processes(3, shard_until_a_rank_is_lost, without=[1], timeout=50.0)
    for rank in (0, 2):
        assert outcomes[rank].error is None, outcomes[rank].error
        assert outcomes[rank].result.startswith(f"rank {rank} of 3: not all ranks came to shard() within 60 s: word ")
    assert any("rank 1 did not get through: the connection broke" in outcomes[rank].result for rank in (0, 2))


# ---- one rank --------------------------------------------------------------------------------------------------------

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "all_gather_single", "isend",
               "irecv", "batch_isend_irecv", "broadcast", "barrier", "reduce_scatter_tensor", "reduce_scatter_single",
               "new_group")


@contextlib.contextmanager
def group_of_one(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def test_one_rank_calls_no_collective(tmp_path, monkeypatch):
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a collective was called")

    with group_of_one(tmp_path) as group:
        for name in COLLECTIVES:
            monkeypatch.setattr(dist, name, refuse, raising=False)
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ring", "heads"))
        for each, mode in ((group, "all_to_all"), (group, "auto"), (mesh, None)):
            other = ContextParallel(each, mode=mode)
            other.shard(make_tokens(1, 6)).attention(*torch.randn(3, 1, 6, 5, 8))
        cp, model, tokens = ContextParallel(group), make_model(), make_tokens(*DENSE)
        batch = cp.shard(tokens)
        assert "there is one rank" in str(cp.choose(batch, heads=4, head_dim=8))
        loss, logits = parallel_step(cp, model, batch)
        assert torch.equal(cp.unshard(logits, batch), logits) and torch.equal(batch.tokens, tokens)
        cp.check(model, tokens)
        assert_same(loss, plain_loss(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).detach())


def test_a_message_that_failed_is_told_before_gradients_are_used(tmp_path):
    class Failed(NoPeers):
        def raise_failure(self) -> None:
            raise RingError(0, 1, "dK/dV", 3, "from rank 3 did not arrive")

    with group_of_one(tmp_path) as group:
        cp, model = ContextParallel(group), make_model()
        batch = cp.shard(make_tokens(*DENSE))
        cp.raise_failure()
        logits = model(batch.tokens, positions=batch.positions, attention=batch.attention)
        cp.exchange = Failed()
        for call in (cp.raise_failure, lambda: cp.loss(logits, batch.labels), lambda: cp.sync_gradients(model)):
            with pytest.raises(RingError, match="rank 0, ring step 1: dK/dV from rank 3 did not arrive"):
                call()


def test_bad_arguments(tmp_path):
    with group_of_one(tmp_path) as group:
        cp, tokens = ContextParallel(group), make_tokens(2, 6)
        batch = cp.shard(tokens)
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("ring", "heads"))
        wrong: list[tuple[type[Exception], str, Callable[[], object]]] = [
            (TypeError, "group is a str", lambda: ContextParallel("cp")),
            (ValueError, "layout is 'ring'", lambda: ContextParallel(group, layout="ring")),
            (ValueError, "mode is 'ulysses': expected one of 'ring', ", lambda: ContextParallel(group, mode="ulysses")),
            (ValueError, "mode is 'product': expected a 2-D mesh", lambda: ContextParallel(group, mode="product")),
            (ValueError, "bandwidth was given with mode 'ring'", lambda: ContextParallel(group, bandwidth=1e9)),
            (ValueError, "bandwidth is 0: expected finite",
             lambda: ContextParallel(group, mode="auto", bandwidth=0)),
            (TypeError, "bandwidth is 'fast': expected bytes/s",
             lambda: ContextParallel(group, mode="auto", bandwidth="fast")),
            (ValueError, "mode is 'ring' with a mesh of the dimensions", lambda: ContextParallel(mesh, mode="ring")),
            (ValueError, "heads is 4 and kv_heads 3", lambda: cp.choose(batch, heads=4, kv_heads=3, head_dim=8)),
            (TypeError, "tokens is a list", lambda: cp.shard([1, 2])),
            (ValueError, r"tokens has shape \(\)", lambda: cp.shard(torch.tensor(3))),
            (ValueError, r"tokens has shape \(2, 6\): expected \(1, T\)", lambda: cp.shard(tokens, cu_seqlens=[0, 12])),
            (ValueError, r"labels has shape \(2, 5\)", lambda: cp.shard(tokens, tokens[:, 1:])),
            (ValueError, r"labels has shape \(2, 6, 1\)", lambda: cp.shard(tokens, tokens[..., None])),
            (ValueError, r"mask has shape \(6,\)", lambda: cp.shard(tokens, mask=tokens[0])),
            (TypeError, "mask is a list", lambda: cp.shard(tokens, mask=[1])),
            (ValueError, "from 0 to 6", lambda: cp.shard(tokens[:1], cu_seqlens=[0, 7])),
            (ValueError, "from 0 to 6", lambda: cp.shard(tokens[:1], cu_seqlens=[1, 6])),
            (ValueError, "from 0 to 6", lambda: cp.shard(tokens[0], cu_seqlens=[0, 4, 2, 6])),
            (ValueError, "from 0 to 6", lambda: cp.shard(tokens[0], cu_seqlens=[])),
            (TypeError, "cu_seqlens is torch.float32", lambda: cp.shard(tokens[0], cu_seqlens=torch.tensor([0.0, 6]))),
            (ValueError, r"expected \(2, 6\) \(B, S_local\) in front", lambda: cp.unshard(torch.zeros(2, 5), batch)),
            (ValueError, "logits has shape", lambda: cp.loss(torch.zeros(2, 5, 3), batch.labels)),
            (TypeError, "data_mesh is a int", lambda: cp.loss(torch.zeros(2, 6, 11), batch.labels, data_mesh=2)),
        ]
        for error, message, call in wrong:
            with pytest.raises(error, match=message):
                call()


# ---- the attention callable ------------------------------------------------------------------------------------------


def attention_alone(rows: int = 2, seqlen: int = 6) -> LocalAttention:
    return LocalAttention(zigzag((seqlen,) * rows, 1), 0, rows, NoPeers())


@pytest.mark.parametrize(
    "options",
    [
        {}, {"causal": True}, {"window_size": (2, 1)}, {"causal": True, "window_size": (3, -1)},
        {"window_size": (-1, 2)}, {"causal": True, "softcap": 2.0, "softmax_scale": 0.3},
        {"deterministic": True, "sink": torch.tensor([0.5, -1.0])},
    ],
    ids=str,
)
def test_attention_takes_the_arguments_of_flash_attention(options):
    q, k, v = (torch.randn(2, 6, heads, 8, dtype=torch.float64) for heads in (2, 1, 1))
    expected = oracle_attention(q, k, v, **{name: each for name, each in options.items() if name != "deterministic"})
    assert_same(attention_alone()(q, k, v, **options), expected)
    assert attention_alone().needs_positions


@pytest.mark.parametrize("asked, by_torch", [(False, False), (True, False), (False, True)])
def test_attention_is_deterministic_where_torch_is_asked_to_be(asked: bool, by_torch: bool, monkeypatch):
    called: list[bool] = []
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: by_torch)
    monkeypatch.setattr(context, "all_to_all_attention", lambda q, k, v, *, deterministic, **_: (
        called.append(deterministic), (q, q))[1])
    attention_alone()(*torch.randn(3, 2, 6, 1, 8), deterministic=asked)
    assert called == [asked or by_torch]


def test_attention_refuses_what_it_cannot_do():
    attention = attention_alone()
    q = torch.randn(2, 6, 2, 8)
    mask = torch.ones(6, 6)
    for refused in ({"dropout_p": 0.1}, {"attn_mask": mask}, {"attention_mask": mask}, {"alibi_slopes": q[0, 0]},
                    {"qv": q}, {"attention_chunk": 4}, {"return_attn_probs": True}, {"cu_seqlens_q": mask[0]}):
        (name,) = refused
        with pytest.raises(TypeError, match=f"{name} was given to context-parallel attention: expected"):
            attention(q, q, q, **refused)
    with pytest.raises(TypeError, match="unknown argument 'widnow'"):
        attention(q, q, q, widnow=3)
    attention(q, q, q, dropout_p=0.0, attn_mask=None, return_attn_probs=False)
    for short in ((q[:, 1:], q, q), (q, q[:1], q), (q, q, q[0]), (q.flatten(0, 1)[None], q, q)):
        with pytest.raises(ValueError, match=r"expected \(B, S_local, heads, head_dim\) with B, S_local = \(2, 6\)"):
            attention(*short)
    with pytest.raises(ValueError, match="window_size"):
        attention(q, q, q, window_size=3)


def test_attention_follows_autocast():
    q = torch.randn(2, 6, 2, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_alone()(q, q, q).dtype == torch.bfloat16


def test_compiled_model_is_not_compiled_again_for_a_new_layout():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, counter = make_model(layers=1), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    tokens, positions = make_tokens(1, 12), torch.arange(12)[None]
    frames = 0
    for documents in ((12,), (12,), (5, 7), (3, 9)):
        attention = LocalAttention(zigzag(documents, 1), 0, 1, NoPeers())
        out = compiled(tokens, positions=positions, attention=attention)
        assert_same(out, model(tokens, positions=positions, attention=attention))
        frames = frames or counter.frame_count
        assert counter.frame_count == frames > 0
