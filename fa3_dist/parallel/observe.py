"""When a rank computes attention and when its messages travel: what no attention hides is exposed.

    timeline = Timeline(device)
    cp.exchange.observer = timeline                     # None again: nothing is recorded, at no cost
    loss.backward()
    spans = timeline.spans()                            # waits for the device
    milliseconds = exposed(spans)

On CUDA a span lies between two events, recorded on the stream that the work is on, so recording holds up neither the
device nor the host. On the CPU it is read off the clock, and a transfer lasts until it has been waited for: its back
end does not say when it was through before that. A message's span includes the wait for the peer to take part in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch

COMPUTE, COMMUNICATION = "compute", "communication"


class Span(NamedTuple):
    """Work of one rank, in milliseconds since its timeline began."""

    kind: str  # COMPUTE or COMMUNICATION
    what: str  # "forward" or "backward"; the messages' names, such as "K/V"
    step: int  # the shift of the ring step, 0: local; of an all-to-all: the distance to the peer
    start: float
    end: float
    bytes_sent: int = 0


class Observer(Protocol):
    """What an exchange and its ring tell of their work, if their `observer` is not None."""

    def begin(self, kind: str, what: str, step: int, bytes_sent: int = 0) -> Any:
        """Work begins here, in the order of the current stream; what is returned goes to `end`."""

    def end(self, begun: Any) -> None:
        """That work ends here, in the order of the current stream."""


_UNOBSERVED: AbstractContextManager[None] = contextlib.nullcontext()


def computing(observer: Observer | None, what: str, step: int) -> AbstractContextManager[None]:
    """Inside, the current stream gets the attention of one step."""
    return _UNOBSERVED if observer is None else _computing(observer, what, step)


@contextlib.contextmanager
def _computing(observer: Observer, what: str, step: int) -> Iterator[None]:
    begun = observer.begin(COMPUTE, what, step)
    yield
    observer.end(begun)


class Timeline:
    """An Observer that remembers; it begins where the current stream stands when it is made.

    Args:
        device: where attention runs.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._origin = mark(device)
        self._work: list[dict[str, Any]] = []

    def begin(self, kind: str, what: str, step: int, bytes_sent: int = 0) -> dict[str, Any]:
        """See `Observer.begin`."""
        begun = {"kind": kind, "what": what, "step": step, "bytes_sent": bytes_sent, "start": mark(self.device)}
        self._work.append(begun)
        return begun

    def end(self, begun: dict[str, Any]) -> None:
        """See `Observer.end`."""
        begun["end"] = mark(self.device)

    def spans(self) -> list[Span]:
        """All work that has ended, in the order it began. Waits until the device is through with it."""
        ended = [work for work in self._work if "end" in work]
        return [
            Span(**work | {side: milliseconds(self._origin, work[side]) for side in ("start", "end")}) for work in ended
        ]


def mark(device: torch.device) -> Any:
    """A moment: on CUDA where the current stream stands, an event; on the CPU now, in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def milliseconds(start: Any, end: Any) -> float:
    """Between two marks of one device; the host waits for the second."""
    if isinstance(end, float):
        return (end - start) * 1e3
    end.synchronize()
    return start.elapsed_time(end)


# ---- arithmetic of intervals -----------------------------------------------------------------------------------------

Intervals = Sequence[tuple[float, float]]


def union(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same moments as disjoint intervals in rising order; empty intervals are left out."""
    result: list[tuple[float, float]] = []
    for start, end in sorted(interval for interval in intervals if interval[0] < interval[1]):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


def uncovered(intervals: Intervals, cover: Intervals) -> list[tuple[float, float]]:
    """What lies in some of `intervals` and in none of `cover`, as disjoint intervals in rising order."""
    covering = union(cover)
    parts = []
    for begin, end in union(intervals):
        for first, last in covering:
            if first < end and last > begin:
                parts.append((begin, first))
                begin = last
        parts.append((begin, end))
    return [(start, end) for start, end in parts if start < end]


def length(intervals: Intervals) -> float:
    """Of disjoint intervals together."""
    return sum(end - start for start, end in intervals)


def of_kind(spans: Iterable[Span], kind: str) -> list[tuple[float, float]]:
    """The intervals of the spans of one kind."""
    return [(span.start, span.end) for span in spans if span.kind == kind]


def exposed(spans: Sequence[Span]) -> float:
    """Milliseconds in which messages travelled and no attention was computed."""
    return length(uncovered(of_kind(spans, COMMUNICATION), of_kind(spans, COMPUTE)))


def busy(spans: Sequence[Span], kind: str) -> float:
    """Milliseconds in which there was work of a kind."""
    return length(union(of_kind(spans, kind)))
