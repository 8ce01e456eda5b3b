"""Planted faults: shipped code is patched inside the worker processes, and the gate of test_ring.py must turn red.

Each mutant is what some ring got wrong, or a slip that this code invites. The gate is `run_case` and `judge`, the same
that the shipped code passes; here it also runs unpatched, so that a gate which is always red does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fa3_dist import ops, reference
from fa3_dist.parallel import ring
from fa3_dist.parallel.exchange import DistributedExchange, run_in_process
from fa3_dist.parallel.schedule import ring_schedule
from tests.distributed import run_distributed
from tests.ring_gate import Case, judge, patched, run_case
from tests.test_ring import test_only_local_tensors_are_saved_for_the_backward as gate_on_saved_tensors
from tests.test_ring import test_peak_memory_is_local as gate_on_peak_memory

WORLD = 4
BF16 = torch.bfloat16

CAUSAL = Case("causal zigzag", (333,), heads=4, kv_heads=2)
PACKED = Case("packed", (37, 301, 60), layout="packed", kv_heads=2)
WINDOW = Case("window", (333,), window_left=60)
FULL = Case("full", (200,), layout="contiguous", window_right=None)
SOFTCAP = Case("softcap and scale", (200,), softcap=2.0, softmax_scale=0.4)
BLIND = Case("rows that see nothing for several visits", (333,), layout="striped", schedule="simplest")
LONG_BF16 = Case("bf16", (1024,), dtype=BF16, dlse=False)
CASES = (CAUSAL, PACKED, WINDOW, FULL, SOFTCAP, BLIND, LONG_BF16)


# -------------------------------------------------------------------------------------------------- mutants


def dkv_lost(returning, own) -> None:
    """What came back is not added."""
    returning.arrival.wait()


def dkv_never_returns():
    return patched(ring._Returning, "add_to", dkv_lost)


def all_but_one_return(every: int):
    """Of so many messages of dK/dV the last is not added."""
    add_to, count = ring._Returning.add_to, [0]

    def add_some(*arguments):
        count[0] += 1
        (dkv_lost if count[0] % every == 0 else add_to)(*arguments)

    return patched(ring._Returning, "add_to", add_some)


def one_steps_dkv_never_returns():
    return all_but_one_return(WORLD - 1)


def one_halfs_dkv_never_returns():
    return all_but_one_return(2 * (WORLD - 1))


def of_halves(change: Callable[..., Any]):
    """A mutant of the second part of the heads of every step of the backward."""
    parts = ring._head_parts

    def changed(*arguments):
        first, second = parts(*arguments)
        return [first, change(second)]

    return patched(ring, "_head_parts", changed)


def second_half_is_the_first_one():
    return of_halves(lambda heads: heads._replace(kv_start=0))


def second_half_never_computed():
    head_parts = ring._head_parts
    return patched(ring, "_head_parts", lambda *arguments: head_parts(*arguments)[:1])


def second_half_added_to_the_first_ones_heads():
    add_to = ring._Returning.add_to

    def misplaced(returning, own):
        add_to(returning._replace(heads=returning.heads._replace(kv_start=0)), own)

    return patched(ring._Returning, "add_to", misplaced)


def query_heads_of_a_half_counted_as_key_heads():
    def of(heads, dout, q, k, v, lse, delta, dq):
        own = heads._replace(kv_start=0, kv_count=heads.kv_count)  # the first query heads, whichever half it is
        wrong = shipped(own, dout, q, k, v, lse, delta, dq)
        return (*wrong[:2], *heads.of_kv(ring._KeyRows(k, v)), *wrong[4:])

    shipped = ring._Heads.of
    return patched(ring._Heads, "of", of)


def lse_of_the_other_half():
    def of(heads, dout, q, k, v, lse, delta, dq):
        return shipped(heads, dout, q, k, v, lse.flip(0).contiguous(), delta, dq)

    shipped = ring._Heads.of
    return patched(ring._Heads, "of", of)


def of_schedule(change: Callable[..., Any]):
    """A mutant of every remote step of the schedule."""

    def changed(layout, rank, **window):
        steps = ring_schedule(layout, rank, **window)
        return tuple(change(step) if step.shift else step for step in steps)

    return patched(ring, "ring_schedule", changed)


def of_visits(change: Callable[..., Any], passes: tuple[str, ...] = ("forward", "backward")):
    def changed(step):
        return replace(step, **{name: tuple(tuple(change(step, visit) for visit in launch)
                                            for launch in getattr(step, name)) for name in passes})

    return of_schedule(changed)


def step_skipped_in_forward():
    return of_visits(lambda step, visit: visit._replace(k_len=0) if step.shift == 2 else visit, ("forward",))


def step_skipped_in_backward():
    return of_schedule(lambda step: replace(step, backward=()) if step.shift == 2 else step)


def step_skipped_in_both():
    return of_visits(lambda step, visit: visit._replace(k_len=0) if step.shift == 2 else visit)


def window_not_offset():
    """Every block masked as if it stood alone: the mask's diagonal ends in its bottom right corner."""
    return of_visits(lambda step, visit: visit._replace(offset=visit.k_len - visit.q_len))


def window_off_by_one_in_backward():
    return of_visits(lambda step, visit: visit._replace(offset=visit.offset + 1), ("backward",))


def local_step_not_split_by_offset():
    split = ring._split_keys

    def without_offset(launches):
        first, rest = split(launches)
        return first, tuple(tuple(visit._replace(offset=visit.offset + 128) for visit in launch) for launch in rest)

    return patched(ring, "_split_keys", without_offset)


def opening_computed_again_at_the_end():
    split = ring._split_local
    return patched(ring, "_split_local", lambda launches: (split(launches)[0], launches))


def merge_without_guard():
    def merge(out_a, lse_a, out_b, lse_b):
        lse = torch.logaddexp(lse_a, lse_b)
        weight_a, weight_b = (torch.exp(x - lse).transpose(-1, -2).unsqueeze(-1) for x in (lse_a, lse_b))
        return weight_a * out_a + weight_b * out_b, lse

    return patched(reference, "merge", merge)


def merge_as_plain_mean():
    def merge(out_a, lse_a, out_b, lse_b):
        return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)

    return patched(reference, "merge", merge)


def rounds_after(name: str, arguments: tuple[int, ...]):
    """The operator leaves these positional arguments, its running sums, in bf16 precision."""
    operator = getattr(ops, name)

    def rounded(*args, **kwargs):
        operator(*args, **kwargs)
        for i in arguments:
            args[i].copy_(args[i].bfloat16())

    return patched(ops, name, rounded)


def partial_out_in_bf16():
    return rounds_after("forward_into", (3,))


def dq_in_bf16():
    return rounds_after("backward", (6,))


def dkv_travels_in_bf16():
    send_home = ring._send_home

    def rounded(dkv, *rest):
        return send_home(type(dkv)(*(x.bfloat16().to(x.dtype) for x in dkv)), *rest)

    return patched(ring, "_send_home", rounded)


def spans_sent_in_the_wrong_order():
    gather = ring._gather
    return patched(ring, "_gather", lambda x, spans: gather(x, spans[::-1]))


def spans_added_in_the_wrong_order():
    add_rows = ring._add_rows
    return patched(ring, "_add_rows", lambda x, rows, spans, to: add_rows(x, rows, spans[::-1], to))


def first_flag_lost():
    return patched(ops, "FIRST", 0)


def lse_gradient_dropped():
    delta = ops.delta
    return patched(ops, "delta", lambda dout, out, dlse=None: delta(dout, out))


def delta_of_the_wrong_sign():
    delta = ops.delta
    return patched(ops, "delta", lambda dout, out, dlse=None: -delta(dout, out, dlse))


def option_dropped(name: str, value: Any):
    operator = ops.backward
    return patched(ops, "backward", lambda *args, **kwargs: operator(*args, **(kwargs | {name: value})))


def softcap_dropped_in_backward():
    return option_dropped("softcap", 0.0)


def scale_dropped_in_backward():
    return option_dropped("softmax_scale", None)


def gradients_overwritten():
    return option_dropped("accumulate_kv", False)


def dq_overwritten():
    operator = ops.backward
    return patched(ops, "backward", lambda *args, **options: operator(
        *args, **(options | {"accumulate": False, "accumulate_kv": False})))  # fmt: skip


def keys_met_more_than_once_written():
    return patched(ring, "_meets_each_once", lambda *arguments: True)


def others_gradients_lost_where_the_opening_is_final():
    return patched(ring, "_finished_rows", lambda launches, sent, rows: shipped_finished_rows(launches, (), rows))


shipped_finished_rows = ring._finished_rows

MUTANTS: dict[Callable[[], Any], Case] = {  # each with a case that must turn red
    dkv_never_returns: CAUSAL,
    one_steps_dkv_never_returns: FULL,
    one_halfs_dkv_never_returns: CAUSAL,
    second_half_is_the_first_one: CAUSAL,
    second_half_never_computed: CAUSAL,
    second_half_added_to_the_first_ones_heads: CAUSAL,
    query_heads_of_a_half_counted_as_key_heads: CAUSAL,
    lse_of_the_other_half: CAUSAL,
    step_skipped_in_forward: CAUSAL,
    step_skipped_in_backward: FULL,
    step_skipped_in_both: CAUSAL,
    window_not_offset: WINDOW,
    window_off_by_one_in_backward: WINDOW,
    local_step_not_split_by_offset: LONG_BF16,
    opening_computed_again_at_the_end: LONG_BF16,
    merge_without_guard: BLIND,
    merge_as_plain_mean: FULL,
    partial_out_in_bf16: CAUSAL,
    dq_in_bf16: CAUSAL,
    dkv_travels_in_bf16: CAUSAL,
    spans_sent_in_the_wrong_order: PACKED,
    spans_added_in_the_wrong_order: PACKED,
    first_flag_lost: CAUSAL,
    lse_gradient_dropped: CAUSAL,
    delta_of_the_wrong_sign: LONG_BF16,
    softcap_dropped_in_backward: SOFTCAP,
    scale_dropped_in_backward: SOFTCAP,
    gradients_overwritten: BLIND,
    dq_overwritten: CAUSAL,
    keys_met_more_than_once_written: BLIND,
    others_gradients_lost_where_the_opening_is_final: LONG_BF16,
}


# ----------------------------------------------------------------------------------------------------- tests


def worker(rank: int, world: int) -> tuple[dict[str, dict], dict[str, dict]]:
    exchange, mutated = DistributedExchange(), {}
    for mutant, case in MUTANTS.items():
        with mutant():
            mutated[mutant.__name__] = run_case(exchange, case)
    shipped = {case.name: run_case(exchange, case) for case in CASES}  # after the mutants: nothing of them is left
    return mutated, shipped


@cache
def results() -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    by_rank = run_distributed(WORLD, worker)
    mutated, shipped = ({name: [result[part][name] for result in by_rank] for name in by_rank[0][part]}
                        for part in (0, 1))
    return mutated, shipped


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gate_passes_unpatched(case: Case):
    assert judge(case, results()[1][case.name]) == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_gate_catches(mutant: Callable[[], Any]):
    assert judge(MUTANTS[mutant], results()[0][mutant.__name__]) != []


# Mutants that need the in-process exchange, where a message arrives at the wait and no earlier.


def test_gate_catches_a_buffer_read_before_it_is_filled():
    class Early(ring._Arrival):
        def wait(self):
            rows = ring._KeyRows(*(x.clone() for x in self.rows))
            self.pending.wait()
            return rows

    with patched(ring, "_Arrival", Early):
        assert judge(CAUSAL, run_in_process(WORLD, run_case, CAUSAL)) != []
    assert judge(CAUSAL, run_in_process(WORLD, run_case, CAUSAL)) == []


@contextmanager
def all_received_kv_kept() -> Iterator[None]:
    kept = []

    class Keeping(ring._Arrival):
        def wait(self):
            kept.append(self.rows)
            return super().wait()

    with patched(ring, "_Arrival", Keeping):
        yield


def test_memory_gate_catches_received_kv_that_is_kept():
    with all_received_kv_kept(), pytest.raises(AssertionError):
        gate_on_peak_memory()


def test_memory_gate_catches_received_kv_that_is_saved():
    shipped = ring._RingAttention

    class Saving(shipped):
        @staticmethod
        def forward(ctx, *args):
            results = shipped.forward(ctx, *args)
            ctx.save_for_backward(*ctx.to_save, torch.ones(64 * 8, 2, 16))
            return results

    with patched(ring, "_RingAttention", Saving), pytest.raises(AssertionError):
        gate_on_saved_tensors()
