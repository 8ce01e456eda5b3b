"""Which mode of context parallelism a call of attention should take: a ring, an all-to-all, or their product.

All modes are numbered by one integer, how many neighbouring ranks swap tokens for heads (`head_ranks` of
`all_to_all_attention`): 1 is the ring, all ranks the all-to-all, a divisor between them the product of both. `choose`
estimates the seconds of each divisor from quantities that every rank knows, so that all ranks choose alike:

- The ring moves keys and values, as many rows as the mask lets a rank see, and hides them behind attention: a step
  takes as long as the slower of the two, and the more ranks, the shorter both. It suits long sequences, few key/value
  heads, windows, and packs of documents that stay whole on a rank, which it need not move at all.
- The all-to-all moves every token once, and it leaves attention whole. What hides its messages is attention to other
  heads, where a rank computes its heads in parts (`head_parts`). It suits many key/value heads, with heads enough for
  the ranks, and short sequences.
- The product keeps the all-to-all where links are fast, within a host, and the ring across hosts.

These are estimates of attention, not of a training step. What stands in `RATES` is an order of magnitude; links are
measured (`measure_links`), or given. benchmarks/scaling_model.py asks the same function with measured rates.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fa3_dist.algebra import accumulator_dtype
from fa3_dist.parallel.all_to_all import LEAST_PART, arrive_in_order, head_parts, kv_copies
from fa3_dist.parallel.exchange import DistributedExchange, Exchange, Place, Subgroup, exchange_with_all, pause
from fa3_dist.parallel.ring import KV_PLACES, LEAST_HALF, LEAST_OPENING, backward_parts
from fa3_dist.parallel.ring_clock import Wires, backward_end, forward_end
from fa3_dist.parallel.schedule import Layout, grouped, step_sizes


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


# (length, FLOP/s) in rising order: how far a tile of a kernel goes on average. In a forward, keys that a query sees; in
# a backward, queries that see a key, of all heads that share it.
Speed = tuple[tuple[float, float], ...]


class Rates(NamedTuple):
    """What a device does."""

    forward: Speed
    backward: Speed
    memory: float  # bytes/s of its memory, read and written
    step_seconds: float  # of one more launch beside its arithmetic: the launch, and the last wave that fills few SMs
    part_seconds: float  # of a part of an all-to-all: that launch, those that pack and unpack, streams that wait
    latency: float  # seconds a message costs whatever its size, where links were not measured
    least_half: int  # bytes of a message of dK/dV of half the heads from which on a step is two launches
    least_opening: int  # rows times key/value heads from which on the local backward is two launches
    least_part: int  # rows times query heads that a part of an all-to-all has at least


# Hopper: attention of a training step in bf16; memory as our passes over it were measured on an H200; of a part of an
# all-to-all what meets twelve measurements on two best (benchmarks/LOG.md, context parallelism, 35). A core of a CPU.
RATES = {
    "cuda": Rates(((1, 5e14),), ((1, 5e14),), 3.5e12, 20e-6, 80e-6, 10e-6, LEAST_HALF["cuda"], LEAST_OPENING["cuda"],
                  LEAST_PART["cuda"]),
    "cpu": Rates(((1, 2e10),), ((1, 2e10),), 1e10, 100e-6, 100e-6, 100e-6, LEAST_HALF["cpu"], LEAST_OPENING["cpu"],
                 LEAST_PART["cpu"]),
}


class Copies(NamedTuple):
    """How fast messages travel by copy engines."""

    bandwidth: float  # bytes/s that each rank sends to one other, while all do
    latency: float  # seconds a message


@dataclass(frozen=True)
class Links:
    """How fast messages travel. `bandwidth`: (ranks, bytes/s) in rising order of ranks: what each rank sends, while all
    do, in groups of so many neighbours. `latency`: seconds a message; None: the device's in `RATES`. `copies`: of
    messages into places (`Exchange.room`), where these go by copy engines; None: as all others."""

    bandwidth: tuple[tuple[int, float], ...]
    latency: float | None = None
    copies: Copies | None = None

    @property
    def in_ring(self) -> Links:
        """Those of a ring of all ranks. NOTE: the rings of a product have no places (`Subgroup.room`)."""
        return self if self.copies is None else Links(((1, self.copies.bandwidth),), self.copies.latency)

    def within(self, ranks: int) -> float:
        """Bytes/s in groups of `ranks` neighbours: that of the smallest known groups as large, else of the largest."""
        return next((rate for size, rate in self.bandwidth if size >= ranks), self.bandwidth[-1][1])

    def between(self, ranks: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Bytes/s of a message from each of `ranks` to its one of `others`: of the smallest known groups with both."""
        rates = np.full(len(ranks), self.bandwidth[-1][1])
        for size, rate in reversed(self.bandwidth):
            rates[ranks // size == others // size] = rate
        return rates

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


class Pass(NamedTuple):
    """Seconds of a forward or a backward until the last rank is through."""

    compute: float  # attention of the busiest rank
    exposed: float  # the rest: messages that attention does not hide, waits, copies, launches of ring steps

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


class Estimate(NamedTuple):
    """What a mode is expected to cost."""

    head_ranks: int
    forward: Pass
    backward: Pass
    moved: int  # bytes that come to the busiest rank or that it sends back

    @property
    def compute(self) -> float:
        return self.forward.compute + self.backward.compute

    @property
    def exposed(self) -> float:
        return self.forward.exposed + self.backward.exposed

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
            lines.append(f"  {name:<24} {seconds:9.3f} ms: {compute:.3f} attention, {exposed:.3f} messages, copies and "
                         f"waits; {each.moved / 1e6:.2f} MB a rank")
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


def estimate(layout: Layout, call: Call, head_ranks: int, links: Links, rates: Rates,
             finds_kv: bool = False) -> Estimate:
    """Seconds of forward and backward, and bytes.

    finds_kv: a ring's backward finds the last K/V where its forward got them, as in a layer whose activations are
    checkpointed; else all travel again, as they do where other layers' forwards came in between.

    Attention: 2 products of 2 * pairs * heads * head_dim FLOP in the forward, 5 in the backward. The ring is played
    through by `ring_clock`, with the pairs and rows of every rank and step. The all-to-all before and after it hides
    behind it as far as it comes in parts. Copies, such as those around it, take the time that their bytes take in
    memory.
    """
    copies = kv_copies(call.heads, call.kv_heads, head_ranks)
    heads, kv_heads = call.heads // head_ranks, call.kv_heads * copies // head_ranks
    D, E, size, sum_size = call.head_dim, call.head_dim_v, call.dtype.itemsize, accumulator_dtype(call.dtype).itemsize
    part = call._replace(heads=heads, kv_heads=kv_heads)
    ring_links = links.in_ring if head_ranks == 1 else links
    finds_kv = finds_kv and head_ranks == 1 and links.copies is not None  # other rings have no places
    forward, backward, come, again = _ring_passes(grouped(layout, head_ranks), part, head_ranks, ring_links, rates,
                                                  finds_kv)
    moved = (come + again) * size + come * sum_size
    if head_ranks > 1:
        rows = max(layout.tokens(rank) for rank in range(layout.world))
        out_bytes = heads * (E * size + sum_size)  # with lse, or delta
        qkv_bytes = heads * D * size + kv_heads * (D + E) * size
        gradient_bytes = heads * D * size + kv_heads * (D + E) * (size if copies == 1 else sum_size)
        in_ring = head_ranks < layout.world
        tokens = sum(layout.documents)
        parts = 1 if in_ring else head_parts(tokens, call.heads, call.kv_heads, head_ranks, rates.least_part)
        swap = partial(_with_swaps, rows=rows, ranks=head_ranks, parts=parts, links=links, rates=rates,
                       copies=1 if arrive_in_order(layout, head_ranks) else 2)
        forward = swap(forward, row_bytes=qkv_bytes + out_bytes)
        backward = swap(backward, row_bytes=out_bytes + gradient_bytes)
        moved += rows * (head_ranks - 1) * (qkv_bytes + 2 * out_bytes + gradient_bytes)
    return Estimate(head_ranks, forward, backward, moved)


def _with_swaps(ring: Pass, *, rows: int, row_bytes: int, ranks: int, parts: int, copies: int, links: Links,
                rates: Rates) -> Pass:
    """A pass with an all-to-all before it and one after it, which together move so many bytes a row and other rank.

    copies: how often a byte is read and written on either way: when it is packed or unpacked, and when rows are put in
    the order of the documents or back.
    """
    wire = rows * (ranks - 1) * row_bytes / links.within(ranks) + 2 * parts * (ranks - 1) * _latency(links, rates)
    copied = 2 * copies * rows * ranks * row_bytes / rates.memory
    exposed = exposed_by_parts(wire, ring.compute, parts) + copied + parts * rates.part_seconds
    return ring._replace(exposed=ring.exposed + exposed)


def exposed_by_parts(messages: float, compute: float, parts: int) -> float:
    """Time of an all-to-all's messages, as many there as back, that attention does not hide: those of the first part
    there and of the last one back, and beside each part those that are longer than it."""
    if parts == 1:
        return messages
    beside_ends, beside_others = max(messages / 2, compute), max(messages, compute)
    return (messages + 2 * beside_ends + (parts - 2) * beside_others) / parts - compute


# The part of the local backward that comes before the remote steps: that of the later half of the keys.
OPENING, OPENING_CAUSAL = 1 / 2, 1 / 4


def _ring_passes(layout: Layout, call: Call, distance: int, links: Links, rates: Rates,
                 finds_kv: bool) -> tuple[Pass, Pass, int, int]:
    """Forward and backward of a ring whose ranks are `distance` apart, and the most elements of K/V that come to one in
    either."""
    sizes = step_sizes(layout, window_left=call.window_left, window_right=call.window_right)
    D, E, size, sum_size = call.head_dim, call.head_dim_v, call.dtype.itemsize, accumulator_dtype(call.dtype).itemsize
    pairs = sizes.pairs * call.heads
    forward = attention_seconds(pairs, 2 * (D + E), sizes.queries * call.heads, rates.forward)
    backward = attention_seconds(pairs, 2 * (3 * D + 2 * E), sizes.keys * call.kv_heads, rates.backward)
    busiest = forward.sum(1).max(), backward.sum(1).max()
    if len(sizes.shifts) == 1:
        return Pass(float(busiest[0]), 0.0), Pass(float(busiest[1]), 0.0), 0, 0

    def copying(elements: np.ndarray, bytes_each: int) -> np.ndarray:
        return elements * (bytes_each / rates.memory)

    def wires() -> Wires:
        return Wires(sizes.shifts, sizes.block, layout.world, lambda a, b: links.between(a * distance, b * distance),
                     _latency(links, rates))

    kv_rows = np.array([layout.tokens(rank) for rank in range(layout.world)]) * call.kv_heads
    owned = kv_rows * (D + E)
    come = sizes.keys * call.kv_heads * (D + E)  # elements of K/V; as many of dK/dV go
    home = np.take_along_axis(come, wires().destinations, axis=0)  # those that come back
    head_bytes = sizes.keys.max(axis=0) * (D + E) * sum_size
    parts = [len(backward_parts(call.kv_heads, int(each), rates.least_half)) for each in head_bytes]
    # A remote step reads and writes the running out, and writes dK/dV.
    continuing = copying(sizes.queries * call.heads * E, 2 * sum_size) + rates.step_seconds
    summing = copying(come, sum_size) + rates.step_seconds * np.array(parts)
    begun_with_zeros = sum_size if len(sizes.shifts) > 2 else 0
    adding = copying(home, 3 * sum_size)
    adding[:, 1] /= 3  # the last that come are added as own dK/dV are rounded: only they are read besides
    finishing = copying(owned, begun_with_zeros + sum_size + size)  # own dK/dV, rounded at last
    opening = backward[:, 0] * (OPENING_CAUSAL if (call.window_left, call.window_right) == (None, 0) else OPENING)
    opening = np.where(finds_kv | (kv_rows < rates.least_opening), 0.0, opening)
    again = come.copy()
    if finds_kv:
        again[:, max(1, again.shape[1] - len(KV_PLACES)) :] = 0
    ends = (
        forward_end(wires(), np.column_stack((forward[:, 0], (forward + continuing)[:, 1:])), come * size),
        backward_end(wires(), opening, backward + summing, backward[:, 0] - opening, again * size,
                     come * sum_size, adding, parts) + finishing,
    )
    passes = [Pass(float(most), float(end.max() - most)) for most, end in zip(busiest, ends)]
    elements = [int(each[:, 1:].sum(1).max()) for each in (come, again)]
    return passes[0], passes[1], elements[0], elements[1]


def attention_seconds(pairs: np.ndarray, flop_a_pair: int, rows: np.ndarray, speed: Speed) -> np.ndarray:
    """(world, steps): of the attention of each step, with so many rows of tiles."""
    return pairs * flop_a_pair / speed_at(speed, pairs / np.maximum(rows, 1))


def speed_at(speed: Speed, lengths: np.ndarray) -> np.ndarray:
    """FLOP/s of tiles so long: between the known lengths on a logarithmic axis, beyond them as they are."""
    known, rates = zip(*speed)
    return np.interp(np.log(np.maximum(lengths, 1)), np.log(known), rates)


def _latency(links: Links, rates: Rates) -> float:
    return rates.latency if links.latency is None else links.latency


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
HEAD_START = 2e-3  # seconds a rank for which a GPU is kept from messages that are timed, for the host to queue them
LARGE = {"cuda": 1 << 24, "cpu": 1 << 18}
LARGE_COPY = {"cuda": 1 << 26, "cpu": 1 << 18}  # of one by copy engines: K/V of 16 k tokens, 8 heads of 128


def measure_links(exchange: Exchange, device: torch.device) -> Links:
    """Times messages among all ranks, and in groups of neighbours of every size that divides them; takes milliseconds.
    Those by copy engines too, if the exchange has some, whose places it gives back.

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
    slowest = _largest_of_all_ranks(seconds, exchange, device)
    copies = _measure_copies(exchange) if isinstance(exchange, DistributedExchange) and exchange.has_copies else None
    exchange.stats.reset()
    bandwidth, latency = [], 0.0
    for ranks, small_seconds, large_seconds in zip(sizes, slowest[::2], slowest[1::2], strict=True):
        latency = small_seconds / (ranks - 1)  # of the last, which are all ranks
        bandwidth.append((ranks, _bandwidth((large - SMALL) * (ranks - 1), small_seconds, large_seconds)))
    return Links(tuple(bandwidth), latency, copies)


def _measure_copies(exchange: DistributedExchange) -> Copies | None:
    """Times messages into a place. None, on all ranks, where some rank has no memory for it."""
    large, others = LARGE_COPY[exchange.device.type], exchange.world - 1
    sent, place = torch.zeros(large, dtype=torch.uint8, device=exchange.device), Place(0, large)
    exchange.room([sent], large, place)  # made here, so that no message that is timed waits for that
    if not exchange.has_copies:
        return None
    seconds = [_shortest(partial(_send_around, exchange, part, place), exchange.world, exchange.device)
               for part in (sent[:SMALL], sent)]
    exchange.confirm()
    exchange.free_places()
    small_seconds, large_seconds = _largest_of_all_ranks(seconds, exchange, exchange.device)
    bandwidth = _bandwidth((large - SMALL) * others, small_seconds, large_seconds)
    return Copies(bandwidth, small_seconds / others)


def _bandwidth(moved: int, small_seconds: float, large_seconds: float) -> float:
    """Bytes/s of large messages that moved so many bytes more than small ones did."""
    return moved / max(large_seconds - small_seconds, 0.1 * large_seconds)


def _swap_seconds(group: Exchange, buffers: Tensor) -> float:
    """The shortest of some times in which every rank of a group sends a message to every other one."""
    sent, received = ([buffer] * group.world for buffer in buffers)
    swap = partial(exchange_with_all, group, sent, received, "a message that measures links")
    return _shortest(swap, group.world, buffers.device)


def _send_around(exchange: Exchange, sent: Tensor, place: Place) -> None:
    """Sends a message to every other rank, one after the other, as a ring does."""
    for shift in range(1, exchange.world):
        destination, source = (exchange.rank + shift) % exchange.world, (exchange.rank - shift) % exchange.world
        room = exchange.room([sent], len(sent), place)
        exchange.exchange(send=sent, destination=destination, receive=room, source=source,
                          what="a message that measures copies", step=shift, place=place).wait()


def _shortest(swap: Callable[[], None], ranks: int, device: torch.device) -> float:
    seconds = partial(_seconds_on_gpu, ranks, device) if device.type == "cuda" else _seconds
    return min(seconds(swap) for _ in range(REPETITIONS + 1))  # the first one warms up


def _seconds(swap: Callable[[], None]) -> float:
    start = time.perf_counter()
    swap()
    return time.perf_counter() - start


def _seconds_on_gpu(ranks: int, device: torch.device, swap: Callable[[], None]) -> float:
    """Of messages in a queue of work, as those of a ring are: not of the host, nor of ranks that come to it later."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        pause(ranks * HEAD_START)
        swap()  # here they meet
        start.record()
        swap()
        end.record()
        end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def _largest_of_all_ranks(seconds: list[float], exchange: Exchange, device: torch.device) -> list[float]:
    values = torch.tensor(seconds, dtype=torch.float64, device=device)
    theirs = [torch.empty_like(values) for _ in range(exchange.world)]
    exchange_with_all(exchange, [values] * exchange.world, theirs, "measured times")
    return torch.stack(theirs).amax(0).tolist()
