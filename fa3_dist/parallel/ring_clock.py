"""A ring in time: when its last rank is through, from seconds of work and bytes of messages at every rank and step.

It plays `ring.ring_forward` and `ring.ring_backward` with clocks instead of tensors. A rank starts a step when the step
before is done and its keys are there; it then asks for the next keys. A message moves when both of its ends have come
to it and are through with their messages before, which travel in the order in which they were started; sending and
receiving don't slow each other down. Arrays have a row a rank and a column a step, the local step first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fa3_dist.parallel.schedule import neighbour


@dataclass
class Wires:
    """The messages of a ring of `world` ranks with these shifts in blocks of so many.

    bandwidth: given two arrays of ranks, the bytes/s from each one to its partner. latency: seconds a message.
    """

    shifts: tuple[int, ...]
    block: int
    world: int
    bandwidth: Callable[[np.ndarray, np.ndarray], np.ndarray]
    latency: float

    def __post_init__(self) -> None:
        self.free = np.zeros(self.world)  # when each rank is through with its messages so far
        ranks = np.arange(self.world)
        self.sources = np.column_stack([neighbour(ranks, -shift, self.block) for shift in self.shifts])
        self.destinations = np.column_stack([neighbour(ranks, shift, self.block) for shift in self.shifts])

    def fetch(self, ready: np.ndarray, step: int, received: np.ndarray) -> np.ndarray:
        """When the keys of a step are there, and those that others want are gone: every rank gets so many bytes."""
        return self._exchange(ready, self.sources[:, step], self.destinations[:, step], received)

    def send_home(self, ready: np.ndarray, step: int, sent: np.ndarray) -> np.ndarray:
        """The same for the gradients of the keys of a step, of which every rank sends so many bytes."""
        source, destination = self.destinations[:, step], self.sources[:, step]
        return self._exchange(ready, source, destination, sent[source])

    def _exchange(self, ready: np.ndarray, source: np.ndarray, destination: np.ndarray,
                  received: np.ndarray) -> np.ndarray:
        start = np.maximum(ready, self.free)
        seconds = self.latency + received / self.bandwidth(np.arange(self.world), source)
        arrived = np.where(received > 0, np.maximum(start, start[source]) + seconds, 0.0)
        self.free = np.maximum(self.free, np.maximum(arrived, arrived[destination]))
        return np.maximum(ready, np.maximum(arrived, arrived[destination]))


def forward_end(wires: Wires, work: np.ndarray, message: np.ndarray) -> np.ndarray:
    """Seconds after which each rank is through with the forward.

    Args:
        work: (world, steps) seconds of attention. message: (world, steps) bytes of K/V that come.
    """
    now, steps = np.zeros(len(work)), work.shape[1]
    arriving = wires.fetch(now, 1, message[:, 1]) if steps > 1 else now
    now = now + work[:, 0]
    for step in range(1, steps):
        now = np.maximum(now, arriving)
        if step + 1 < steps:
            arriving = wires.fetch(now, step + 1, message[:, step + 1])
        now = now + work[:, step]
    return now


def backward_end(wires: Wires, opening: np.ndarray, work: np.ndarray, closing: np.ndarray,
                 message: np.ndarray, gradient: np.ndarray, add: np.ndarray, parts: Sequence[int]) -> np.ndarray:
    """Seconds after which each rank is through with the backward.

    Args:
        work, message: as in `forward_end`, but no bytes of K/V that are there; step 0 is not looked at.
        opening, closing: (world,) seconds of the two parts of the local step.
        gradient: (world, steps) bytes of dK/dV that go home. add: (world, steps) seconds to add up those that come.
        parts: (steps,) launches of a step, each of as many heads; the dK/dV of one travel while the next computes.
    """
    now, steps = np.zeros(len(work)), work.shape[1]
    arriving = wires.fetch(now, steps - 1, message[:, -1]) if steps > 1 else now
    now = now + opening
    returning: list[tuple[np.ndarray, np.ndarray]] = []  # when a message is there, and the seconds to add it up

    def add_returned(now: np.ndarray, messages: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        for arrived, seconds in messages:
            now = np.maximum(now, arrived) + seconds
        return now

    for step in range(steps - 1, 0, -1):
        now = np.maximum(now, arriving)
        if step > 1:
            arriving = wires.fetch(now, step - 1, message[:, step - 1])
        earlier, returning = returning, []
        for _ in range(parts[step]):
            now = add_returned(now + work[:, step] / parts[step], earlier[:1])
            del earlier[:1]
            arrived = wires.send_home(now, step, gradient[:, step] / parts[step])
            returning.append((arrived, add[:, step] / parts[step]))
        now = add_returned(now, earlier)
    return add_returned(now + closing, returning)
