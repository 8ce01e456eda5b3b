"""Which mode of context parallelism a call of attention should take: a ring, an all-to-all, or their product.

All modes are numbered by one integer, how many neighbouring ranks swap tokens for heads (`head_ranks` of
`all_to_all_attention`): 1 is the ring, all ranks the all-to-all, a divisor between them the product of both. `choose`
estimates the seconds of each divisor from quantities that every rank knows, so that all ranks choose alike:

- The ring moves keys and values, as many rows as the mask lets a rank see, and hides them behind attention: a step
  takes as long as the slower of the two, and the more ranks, the shorter both. It suits long sequences, few key/value
  heads, windows, and packs of documents that stay whole on a rank, which it need not move at all.
- The all-to-all moves every token once, nothing hides it, and it leaves attention whole. It suits short sequences and
  many key/value heads, with heads enough for the ranks.
- The product keeps the all-to-all where links are fast, within a host, and the ring across hosts.

These are estimates of what differs between the modes, not of a training step. What stands in `RATES` is an order of
magnitude; links are measured (`measure_links`), or given.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fa3_dist.algebra import accumulator_dtype
from fa3_dist.parallel.all_to_all import kv_copies
from fa3_dist.parallel.exchange import DistributedExchange, Exchange, Subgroup, exchange_with_all
from fa3_dist.parallel.schedule import Layout, grouped, remote_keys, remote_steps, work


class Call(NamedTuple):
    """What a call of attention has in common on all ranks, as far as its cost goes. Windows as in `ring_attention`."""

    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    window_left: int | None = None
    window_right: int | None = None

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim} and {self.head_dim_v}"
        window = self.window_left, self.window_right
        mask = "full" if window == (None, None) else "causal" if window == (None, 0) else f"window {window}"
        return f"{self.heads}:{self.kv_heads} heads of {dims}, {str(self.dtype).removeprefix('torch.')}, {mask}"


class Rates(NamedTuple):
    """What a device does. flops: of attention, a second; step_seconds: of one more ring step beside its arithmetic;
    latency: seconds a message costs whatever its size, where links were not measured."""

    flops: float
    step_seconds: float
    latency: float


# Hopper: attention of a training step in bf16, and the launches and unfilled last wave of a kernel. A core of a CPU.
RATES = {"cuda": Rates(5e14, 20e-6, 10e-6), "cpu": Rates(2e10, 100e-6, 100e-6)}


@dataclass(frozen=True)
class Links:
    """How fast messages travel. `bandwidth`: (ranks, bytes/s) in rising order of ranks: what each rank sends, while all
    do, in groups of so many neighbours. `latency`: seconds a message; None: the device's in `RATES`."""

    bandwidth: tuple[tuple[int, float], ...]
    latency: float | None = None

    def within(self, ranks: int) -> float:
        """Bytes/s in groups of `ranks` neighbours: that of the smallest known groups as large, else of the largest."""
        return next((rate for size, rate in self.bandwidth if size >= ranks), self.bandwidth[-1][1])

    @staticmethod
    def given(bandwidth: float | Mapping[int, float]) -> Links:
        """Links from a user's numbers: bytes/s for all, or {ranks: bytes/s}, such as {8: 400e9, 64: 45e9}.

        Raises TypeError, ValueError: not numbers above 0.
        """
        by_ranks = bandwidth if isinstance(bandwidth, Mapping) else {1: bandwidth}
        for ranks, rate in by_ranks.items():
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not isinstance(ranks, int):
                raise TypeError(f"bandwidth is {bandwidth!r}: expected bytes/s, or {{ranks: bytes/s}}")
            if ranks < 1 or not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"bandwidth is {bandwidth!r}: expected finite numbers of bytes/s above 0")
        if not by_ranks:
            raise ValueError("bandwidth is {}: expected bytes/s, or {ranks: bytes/s} with one entry at least")
        return Links(tuple(sorted((ranks, float(rate)) for ranks, rate in by_ranks.items())))


class Estimate(NamedTuple):
    """What a mode is expected to cost the busiest rank."""

    head_ranks: int
    compute: float  # seconds, forward and backward, as the rest
    exposed: float  # of messages that attention does not hide, and of ring steps
    moved: int  # bytes that come to it or that it sends back

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


@dataclass(frozen=True)
class Choice:
    """A mode, and what it was chosen from. `str` is a table of it."""

    call: Call
    layout: Layout
    head_ranks: int
    reason: str
    estimates: tuple[Estimate, ...] = ()

    @property
    def mode(self) -> str:
        return mode_name(self.head_ranks, self.layout.world)

    def __str__(self) -> str:
        world, tokens = self.layout.world, sum(self.layout.documents)
        lines = [f"{self.mode}: {self.reason}",
                 f"  {self.call}; {tokens} tokens in {len(self.layout.documents)} documents on {world} ranks"]
        for each in self.estimates:
            name = f"{'*' if each.head_ranks == self.head_ranks else ' '} {mode_name(each.head_ranks, world)}"
            seconds, compute, exposed = (1e3 * value for value in (each.seconds, each.compute, each.exposed))
            lines.append(f"  {name:<24} {seconds:9.3f} ms: {compute:.3f} attention, {exposed:.3f} exposed messages; "
                         f"{each.moved / 1e6:.2f} MB a rank")
        return "\n".join(lines)


def mode_name(head_ranks: int, world: int) -> str:
    """'ring', 'all_to_all', or a product such as 'ring 2 x all_to_all 4'."""
    if head_ranks == 1:
        return "ring"
    return "all_to_all" if head_ranks == world else f"ring {world // head_ranks} x all_to_all {head_ranks}"


def choose(layout: Layout, call: Call, links: Links, device_type: str) -> Choice:
    """The mode with the smallest estimate; of equal ones the one closest to the ring.

    A pure function: ranks with the same arguments choose alike.

    Args:
        layout: of all ranks. call: heads, sizes and mask.
        links: measured, or given by the user.
        device_type: "cuda" or "cpu", for `RATES`.
    """
    divisors = [ranks for ranks in range(1, layout.world + 1) if layout.world % ranks == 0]
    possible = [ranks for ranks in divisors if call.heads % ranks == 0]
    rates = RATES[device_type]
    estimates = tuple(estimate(layout, call, ranks, links, rates) for ranks in possible)
    best = min(estimates, key=lambda each: (each.seconds, each.head_ranks))
    reason = "the smallest estimate for forward and backward" if len(possible) > 1 else "nothing else is possible"
    if missing := [str(ranks) for ranks in divisors if ranks not in possible]:
        reason += f" ({call.heads} heads cannot be shared by {' or '.join(missing)} ranks)"
    return Choice(call, layout, best.head_ranks, reason, estimates)


def estimate(layout: Layout, call: Call, head_ranks: int, links: Links, rates: Rates) -> Estimate:
    """Seconds of forward and backward, and bytes, on the busiest rank.

    Attention: 2 products of 2 * pairs * heads * head_dim FLOP in the forward, 5 in the backward. The n + 1 steps of a
    ring share them evenly, and each of the n remote ones takes as long as its messages if those are slower.
    """
    ring = grouped(layout, head_ranks)
    window = {"window_left": call.window_left, "window_right": call.window_right}
    latency = rates.latency if links.latency is None else links.latency
    heads = call.heads // head_ranks
    kv_heads = call.kv_heads * kv_copies(call.heads, call.kv_heads, head_ranks) // head_ranks
    D, E, size, sum_size = call.head_dim, call.head_dim_v, call.dtype.itemsize, accumulator_dtype(call.dtype).itemsize
    pairs = max(work(ring, rank, **window) for rank in range(ring.world))
    forward, backward = (2 * pairs * heads * dims / rates.flops for dims in (D + E, 3 * D + 2 * E))

    steps = remote_steps(ring, **window)
    kv_elements = max(remote_keys(ring, rank, **window) for rank in range(ring.world)) * kv_heads * (D + E)
    kv_bytes, dkv_bytes = kv_elements * size, kv_elements * sum_size
    exposed = 0.0
    for compute, moved, messages in ((forward, kv_bytes, 1), (backward, kv_bytes + dkv_bytes, 2)):
        wire = moved / links.within(layout.world) + steps * messages * latency
        hidden = compute * steps / (steps + 1)
        exposed += max(wire - hidden, 0.0) + steps * rates.step_seconds

    rows = max(layout.tokens(rank) for rank in range(layout.world)) * (head_ranks - 1)
    kv_gradient_size = size if kv_heads * head_ranks == call.kv_heads else sum_size
    out_bytes = heads * (E * size + sum_size)  # with lse, or delta
    swapped = rows * (2 * heads * D * size + kv_heads * (D + E) * (size + kv_gradient_size) + 2 * out_bytes)
    exposed += swapped / links.within(head_ranks) + 4 * (head_ranks - 1) * latency
    return Estimate(head_ranks, forward + backward, exposed, swapped + 2 * kv_bytes + dkv_bytes)


# ---- links -----------------------------------------------------------------------------------------------------------

_measured: weakref.WeakKeyDictionary[Any, Links] = weakref.WeakKeyDictionary()  # by process group


def is_measured(group: Any) -> bool:
    """Whether `links_of` knows the links of this process group."""
    return group in _measured


def links_of(exchange: DistributedExchange) -> Links:
    """The links of the exchange's process group, measured when they are asked for first. All ranks call it together."""
    if exchange.group not in _measured:
        _measured[exchange.group] = measure_links(exchange, exchange.device)
    return _measured[exchange.group]


SMALL, REPETITIONS = 256, 3  # bytes of a message that measures the latency; the fastest of so many counts
LARGE = {"cuda": 1 << 24, "cpu": 1 << 18}


def measure_links(exchange: Exchange, device: torch.device) -> Links:
    """Times messages among all ranks, and in groups of neighbours of every size that divides them; takes milliseconds.

    All ranks call it together; all get the same numbers, those of the slowest rank. Its messages are not counted.
    """
    large = LARGE[device.type]
    buffers = torch.zeros(2, large, dtype=torch.uint8, device=device)
    sizes = [ranks for ranks in range(2, exchange.world + 1) if exchange.world % ranks == 0]
    seconds = []
    for ranks in sizes:
        first = exchange.rank // ranks * ranks
        group = Subgroup(exchange, range(first, first + ranks))
        seconds += [_swap_seconds(group, buffers[:, :SMALL].contiguous()), _swap_seconds(group, buffers)]
    slowest = _largest_of_all_ranks(torch.tensor(seconds, dtype=torch.float64, device=device), exchange).tolist()
    exchange.stats.reset()
    bandwidth, latency = [], 0.0
    for ranks, small_seconds, large_seconds in zip(sizes, slowest[::2], slowest[1::2], strict=True):
        latency = small_seconds / (ranks - 1)  # of the last, which are all ranks
        moved = (large - SMALL) * (ranks - 1)
        bandwidth.append((ranks, moved / max(large_seconds - small_seconds, 0.1 * large_seconds)))
    return Links(tuple(bandwidth), latency)


def _swap_seconds(group: Exchange, buffers: Tensor) -> float:
    """The shortest of some times in which every rank of a group sends a message to every other one."""
    sent, received = ([buffer] * group.world for buffer in buffers)
    best = float("inf")
    for _ in range(REPETITIONS + 1):  # the first one warms up
        start = _now(buffers.device)
        exchange_with_all(group, sent, received, "a message that measures links")
        best = min(best, _now(buffers.device) - start)
    return best


def _largest_of_all_ranks(values: Tensor, exchange: Exchange) -> Tensor:
    theirs = [torch.empty_like(values) for _ in range(exchange.world)]
    exchange_with_all(exchange, [values] * exchange.world, theirs, "measured times")
    return torch.stack(theirs).amax(0)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
