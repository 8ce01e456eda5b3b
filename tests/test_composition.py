"""Context parallelism with the rest of a training stack: FSDP2, tensor parallelism, recomputation, the compiler, micro-
batches, and all of them together. Each against gradients of one process on whole documents."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fa3_dist import flash_attn_func
from fa3_dist.layers import Transformer
from fa3_dist.parallel import ContextParallel
from tests.distributed import run_distributed
from tests.test_context_parallel import (
    DENSE,
    PACKED,
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

Step = tuple[Tensor, tuple[int, ...] | None]  # tokens and cu_seqlens
STEPS: list[Step] = [(make_tokens(*DENSE), None), (make_tokens(1, PACKED[-1], seed=3), PACKED)]


def plain_step(model: nn.Module, step: Step) -> tuple[Tensor, list[Tensor]]:
    """Loss and gradients of one process."""
    documents = documents_of(*step)
    loss = plain_loss(plain_logits(model, documents), torch.cat(next_tokens(documents), dim=1)[0])
    return loss.detach(), plain_gradients(model, loss)


def loss_of(cp: ContextParallel, model: nn.Module, step: Step) -> Tensor:
    tokens, cu_seqlens = step
    batch = cp.shard(tokens, cu_seqlens=cu_seqlens)
    return cp.loss(model(batch.tokens, positions=batch.positions, attention=batch.attention), batch.labels)


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def split_over_heads(model: Transformer, mesh: DeviceMesh) -> None:
    """Megatron's tensor parallelism: heads and the MLP's features over the mesh."""
    columns, rows = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "mlp.gate_proj", "mlp.up_proj"), (
        "attention.o_proj", "mlp.down_proj")  # fmt: skip
    for block in model.blocks:
        plan = {name: ColwiseParallel() for name in columns} | {name: RowwiseParallel() for name in rows}
        parallelize_module(block, mesh, plan)


def shard_parameters(model: Transformer, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


# ---- each by itself --------------------------------------------------------------------------------------------------


def check_tensor_parallel(rank: int, world: int) -> None:
    """A (cp, tp) mesh: each rank attends with its heads to its tokens. FSDP2 over cp averages, as without tp."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    for mode in ("ring", "all_to_all"):
        cp = ContextParallel(mesh["cp"], mode=mode)
        for step in STEPS:
            plain = make_model(sink=False, kv_heads=4)
            split = copy.deepcopy(plain)
            split_over_heads(split, mesh["tp"])
            shard_parameters(split, mesh["cp"])
            expected_loss, expected = plain_step(plain, step)
            loss = loss_of(cp, split, step)
            loss.backward()
            assert_same(loss.detach(), expected_loss)
            assert_same([whole(gradient) for gradient in gradients(split)], expected)


def check_accumulation(rank: int, world: int) -> None:
    """Micro-batches with one averaging at the end, plain and under FSDP2, which synchronises at the last alone."""
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("cp",))
    cp, model = ContextParallel(mesh["cp"]), make_model()
    micro = [*STEPS, (make_tokens(2, 9, seed=7), None)]
    sums = [sum(parts) / len(micro) for parts in zip(*(plain_step(model, step)[1] for step in micro))]

    for step in micro:
        (loss_of(cp, model, step) / len(micro)).backward()
    cp.sync_gradients(model)
    assert_same(gradients(model), sums)

    sharded = make_model()
    shard_parameters(sharded, mesh["cp"])
    for i, step in enumerate(micro):
        sharded.set_requires_gradient_sync(i == len(micro) - 1)
        (loss_of(cp, sharded, step) / len(micro)).backward()
    assert_same([whole(gradient) for gradient in gradients(sharded)], sums)


def check_compiled_blocks(rank: int, world: int) -> None:
    """Blocks compiled around attention, with and without recomputation."""
    cp = ContextParallel(dist.group.WORLD)
    for recompute in (False, True):
        plain = make_model(checkpoint_activations=recompute)
        compiled = copy.deepcopy(plain)
        for block in compiled.blocks:
            block.compile(backend="aot_eager")
        for tokens, cu_seqlens in STEPS:
            expected_loss, expected = plain_step(plain, (tokens, cu_seqlens))
            loss, _ = parallel_step(cp, compiled, cp.shard(tokens, cu_seqlens=cu_seqlens))
            assert_same(loss, expected_loss)
            assert_same(gradients(compiled), expected)


def check_all_together(rank: int, world: int) -> None:
    """FSDP2 x tensor parallel, compiled blocks, recomputation and two micro-batches, in the mode "all_to_all"."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    cp, plain = ContextParallel(mesh["cp"], mode="all_to_all"), make_model(sink=False, checkpoint_activations=True)
    model = copy.deepcopy(plain)
    split_over_heads(model, mesh["tp"])
    for block in model.blocks:
        # NOTE: with dynamic shapes torch's compiler recurses without end in DTensor's views (torch 2.13).
        block.compile(backend="aot_eager", dynamic=False)
    shard_parameters(model, mesh["cp"])
    sums = [sum(parts) / len(STEPS) for parts in zip(*(plain_step(plain, step)[1] for step in STEPS))]
    for i, step in enumerate(STEPS):
        model.set_requires_gradient_sync(i == len(STEPS) - 1)
        (loss_of(cp, model, step) / len(STEPS)).backward()
    assert_same([whole(gradient) for gradient in gradients(model)], sums)


def check_in_bf16(rank: int, world: int, device: str = "cpu") -> None:
    """FSDP2, recomputation, micro-batches, on GPUs compiled blocks: about as far from fp64 as bf16 on one device."""
    micro: list[Step] = [(make_tokens(2, 300), None), (make_tokens(1, 800, seed=3), (0, 200, 201, 700, 800))]
    exact = make_model(dim=256, sink=False, checkpoint_activations=True)
    for parameter in exact.parameters():
        nn.init.normal_(parameter, std=0.08)
    alone = copy.deepcopy(exact).to(device, torch.bfloat16)
    model = copy.deepcopy(alone)
    if device == "cuda":  # elsewhere it takes as long as all the rest
        for block in model.blocks:
            block.compile(backend="aot_eager")
    mesh = init_device_mesh(device, (world,), mesh_dim_names=("cp",))
    shard_parameters(model, mesh["cp"])
    cp = ContextParallel(mesh["cp"])
    for i, (tokens, cu_seqlens) in enumerate(micro):
        model.set_requires_gradient_sync(i == len(micro) - 1)
        (loss_of(cp, model, (tokens.to(device), cu_seqlens)) / len(micro)).backward()
        documents = documents_of(tokens, cu_seqlens)
        labels = torch.cat(next_tokens(documents), dim=1)[0]
        (plain_loss(plain_logits(exact, documents), labels) / len(micro)).backward()
        logits = torch.cat([alone(each.to(device), attention=flash_attn_func)[0] for each in documents])
        (plain_loss(logits.float(), labels.to(device)) / len(micro)).backward()

    def distance(gradient: Tensor, expected: Tensor) -> float:
        return float((gradient.cpu().double() - expected).norm() / expected.norm())

    for of_ring, of_one, expected in zip(gradients(model), gradients(alone), gradients(exact), strict=True):
        assert distance(whole(of_ring), expected) < 1.2 * distance(of_one, expected) + 1e-3


CHECKS: dict[Callable[[int, int], None], int] = {
    check_tensor_parallel: 4,
    check_accumulation: 2,
    check_compiled_blocks: 2,
    check_all_together: 4,
    check_in_bf16: 2,
}


def run_checks(rank: int, world: int) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for check, needed in CHECKS.items():
        if needed == world:
            try:
                check(rank, world)
                found[check.__name__] = None
            except Exception:
                found[check.__name__] = traceback.format_exc()
    return found


@cache
def results_of(world: int) -> list[dict[str, str | None]]:
    return run_distributed(world, run_checks, timeout=300.0)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_composition(check: Callable[[int, int], None]):
    for rank, found in enumerate(results_of(CHECKS[check])):
        assert found[check.__name__] is None, f"rank {rank}: {found[check.__name__]}"


@pytest.mark.multi_gpu
def test_composition_on_two_gpus():
    run_distributed(2, check_in_bf16, "cuda", backend="nccl", timeout=300.0)
