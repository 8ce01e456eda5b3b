"""Context parallelism as pure data: which rank holds which tokens, and who attends to whom, when.

A *layout* says which tokens of which document each rank holds (`contiguous`, `zigzag`, `packed`). From it
`ring_schedule` derives what one rank does: at each step a few rows of another rank's keys and values arrive, and a
list of visits (a range of local queries, a range of keys, an offset) says what to compute with them. Nothing here
touches a tensor or a process group, so the tests prove from the visits alone that every (query, key) pair that the mask
allows is computed exactly once.

Keys and values go straight from their owner to the rank that needs them: at shift s a rank receives from rank - s and
sends to rank + s, counted round the ring, or round its block of neighbouring ranks where no document is in two blocks
(`block_of`, `neighbour`). The ring of the literature forwards all keys from neighbour to neighbour instead. Every step
moves at most the same bytes here, and knowing both ends of a message buys three things:
- only rows that some visit reads travel: half of them when an earlier rank of a causal zigzag is the source;
- a shift that no rank needs does not exist, so a sliding window costs a halo exchange with a few ranks, under zigzag
  too, where the neighbours of a chunk sit on both sides of the rank;
- the gradients of the keys and values return to their owner in one hop and not with the remainder of the tour.
All ranks have the same list of shifts, in the same order; a rank for which a shift brings nothing keeps the step, with
nothing to send or receive where that is so. Message orders therefore agree everywhere and cannot deadlock.

Mask: query position p sees key position c of the same document when p - window_left <= c <= p + window_right; None is
unlimited, causal is window_right = 0.

Names: a *row* counts tokens of a rank's local packed tensor or of a receive buffer, a *position* counts tokens from
the start of a document.
"""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import NamedTuple, TypeVar

import numpy as np


class Shard(NamedTuple):
    """Tokens [start, start + length) of a document."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Who holds what: `documents` are lengths in tokens, `shards[rank]` that rank's pieces in local row order.

    Every token of every document belongs to exactly one shard (ValueError otherwise). Layouts are hashable and
    compare by value.
    """

    documents: tuple[int, ...]
    shards: tuple[tuple[Shard, ...], ...]

    def __post_init__(self) -> None:
        _check_partition(self)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.documents, self.shards))

    @property
    def world(self) -> int:
        return len(self.shards)

    def tokens(self, rank: int) -> int:
        """Rows of the local packed tensor of `rank`."""
        return self._tokens[rank]

    @cached_property
    def _tokens(self) -> tuple[int, ...]:
        return tuple(sum(shard.length for shard in shards) for shards in self.shards)


class Span(NamedTuple):
    """Rows [start, start + length) of the owner's local packed tensor."""

    start: int
    length: int


class Visit(NamedTuple):
    """Local query rows [q_start, q_start + q_len) meet key rows [k_start, k_start + k_len).

    Row i of the query range sees column j of the key range when
    i + offset - window_left <= j <= i + offset + window_right. `offset` is the position of the first query minus that
    of the first key; where a range joins two pieces of a document, it is the offset under which this mask equals the
    documents' one. `first`: no earlier visit touched these query rows; `last`: no later one will (forward only).
    """

    q_start: int
    q_len: int
    k_start: int
    k_len: int
    offset: int
    first: bool
    last: bool


@dataclass(frozen=True)
class Step:
    """What one rank does at one shift. `forward` and `backward` are launches, each a tuple of visits.

    k_start counts rows of the receive buffer, where the `receive` spans lie one behind the other; at shift 0 it counts
    rows of the local keys. The query ranges of a forward launch are disjoint, and so are the key ranges of a backward
    launch (its query ranges may repeat; `first` and `last` are False there).
    """

    shift: int
    source: int
    receive: tuple[Span, ...]
    destination: int
    send: tuple[Span, ...]
    forward: tuple[tuple[Visit, ...], ...]
    backward: tuple[tuple[Visit, ...], ...]


# ---- layouts ---------------------------------------------------------------------------------------------------------


def contiguous(lengths: Sequence[int], world: int) -> Layout:
    """Each document in `world` nearly equal pieces, rank r has the r-th; for bidirectional masks and short windows."""
    return _split(tuple(lengths), world, lambda length: _cut(length, [1] * world))


def zigzag(lengths: Sequence[int], world: int) -> Layout:
    """Each document in 2 * world nearly equal chunks, rank r holds chunks r and 2 * world - 1 - r.

    Under a causal mask late chunks see more keys than early ones; a pair of mirrored chunks sees the same everywhere,
    so all ranks do equal work at every step, up to the rounding of chunk lengths.
    """
    return _split(tuple(lengths), world, lambda length: _cut_zigzag(length, [1] * world))


@lru_cache(maxsize=64)
def grouped(layout: Layout, size: int) -> Layout:
    """The layout of groups of `size` neighbouring ranks: group g holds all that the ranks from g * size on hold.

    Its rows are in the order of the documents. Groups of a zigzag layout have a zigzag one, up to the rounding of chunk
    lengths, groups of a contiguous one a contiguous one, and all ranks as one group hold whole documents.
    Raises ValueError where `size` does not divide the layout's ranks.
    """
    if size < 1 or layout.world % size:
        raise ValueError(f"size is {size}, expected a divisor of {layout.world}, the ranks of the layout")
    groups = []
    for first in range(0, layout.world, size):
        shards: list[Shard] = []
        for shard in sorted(shard for rank in layout.shards[first : first + size] for shard in rank):
            previous = shards[-1] if shards else None
            if previous and (previous.document, previous.start + previous.length) == (shard.document, shard.start):
                shards[-1] = previous._replace(length=previous.length + shard.length)
            else:
                shards.append(shard)
        groups.append(tuple(shards))
    return Layout(layout.documents, tuple(groups))


# The most by which the busiest rank may exceed the mean. Attention waits for the largest area; tokens cost the other
# layers' time and memory, and moving them costs messages.
TOLERATED_AREA, TOLERATED_TOKENS = 0.025, 0.05
# Of a split document every rank gets at least so much of an even part: small parts would make its steps uneven.
LEAST_PART = 0.5


def packed(lengths: Sequence[int], world: int, causal: bool = True) -> Layout:
    """Documents of mixed lengths: the longest are split over neighbours (zigzag if causal), the others stay whole.

    A whole document needs no communication and has the largest tiles, and one that few ranks share needs few steps. So
    the ranks form blocks, as small as the documents allow, each with documents of its own, and in a block the fewest,
    longest ones are split over its ranks, with which all ranks are balanced within TOLERATED_AREA in mask area, which
    attention costs, and within TOLERATED_TOKENS in tokens, which memory and every other layer cost.
    Whole documents go, largest first, to the rank, or block, that has least of what they bring most of, area or tokens;
    blocks, and ranks where none is split, then exchange some. What they leave uneven in area the split documents make
    up for: a rank with less gets larger parts of them, in chunks that are mirrored as in `zigzag`, so that a part's
    area grows as its tokens do. Documents shorter than two tokens for each rank of a block stay whole; where that
    leaves every choice outside of the tolerances, the best balanced one is taken.
    Deterministic: every rank computes the same layout from the same lengths.
    """
    lengths = tuple(lengths)
    _check_lengths(lengths, world)
    order = sorted(range(len(lengths)), key=lambda document: (-lengths[document], document))
    shares = _shares(lengths, world, causal)
    best: _Placement | None = None
    for size in _divisors(world):
        placement = _place_in_blocks(shares, lengths, order, world, size)
        if best is None or placement.excess < best.excess:
            best = placement
        if best.excess <= 1:
            break
    assert best is not None
    cut = _cut_zigzag if causal else _cut
    shards: list[list[Shard]] = [[] for _ in range(world)]
    for document, length in enumerate(lengths):
        if document in best.owner:
            shards[best.owner[document]] += [Shard(document, 0, length)] if length else []
            continue
        first, parts = best.split[document]
        for rank, pieces in enumerate(cut(length, parts), first):
            shards[rank] += [Shard(document, start, size) for start, size in pieces if size]
    return Layout(lengths, tuple(map(tuple, shards)))


def work(layout: Layout, rank: int, *, window_left: int | None = None, window_right: int | None = None) -> int:
    """Number of (query, key) pairs that the mask lets the queries of `rank` see."""
    left, right = _band(window_left, window_right)
    if left + right < 0:
        return 0
    total = 0
    for document, start, length in layout.shards[rank]:
        seqlen = layout.documents[document]
        # Row p sees keys [p - left, p + right] inside [0, seqlen): a difference of two clipped positions.
        total += _sum_clipped(start + right + 1, length, seqlen) - _sum_clipped(start - left, length, seqlen)
    return total


def imbalance(layout: Layout, *, window_left: int | None = None, window_right: int | None = None) -> float:
    """Work of the busiest rank over the mean of all ranks: 1 is even, `layout.world` is one rank doing everything."""
    works = [work(layout, rank, window_left=window_left, window_right=window_right) for rank in range(layout.world)]
    return max(works) * layout.world / sum(works) if sum(works) else 1.0


@dataclass(frozen=True)
class StepSizes:
    """How much there is to do at each step: int64 arrays (world, steps), one row a rank, one column an entry of shifts.

    pairs: (query, key) pairs that the mask shows. queries: local rows that see a key of the source. keys: rows of the
    source that a local query sees, which are those that come in this step.
    """

    shifts: tuple[int, ...]
    block: int  # ranks, as `neighbour` counts them
    pairs: np.ndarray
    queries: np.ndarray
    keys: np.ndarray


@lru_cache(maxsize=64)
def step_sizes(layout: Layout, *, window_left: int | None = None, window_right: int | None = None) -> StepSizes:
    """The steps of `ring_schedule` of all ranks as numbers: far cheaper than the visits, for estimates.

    Windows are 0 or more, or None, so that every token sees itself.
    """
    band, world, block = _band(window_left, window_right), layout.world, block_of(layout)
    sizes = np.zeros((3, world, block), dtype=np.int64)  # pairs, queries and keys, by rank and shift
    holders: dict[int, list[tuple[int, _Piece]]] = defaultdict(list)
    for rank in range(world):
        for document, pieces in _pieces(layout, rank).items():
            holders[document] += [(rank, piece) for piece in sorted(pieces, key=lambda piece: piece.start)]
    for document, held in holders.items():
        rank, start, end = np.array([(rank, piece.start, piece.end) for rank, piece in held], dtype=np.int64).T
        # A side without a limit needs one for the arithmetic, past the ends of the document.
        left, right = (min(side, layout.documents[document]) for side in band)
        keys = _seen(rank, start, end, left, right)
        queries = _seen(rank, start, end, right, left).T
        pairs = _pairs_of(start, end, left, right)
        shift = (rank[:, None] - rank[None, :]) % block
        for size, values in zip(sizes, (pairs, queries, keys)):
            np.add.at(size, (rank[:, None], shift), values)
    shifts = _shifts(layout, band)
    return StepSizes(shifts, block, *sizes[:, :, list(shifts)])


def queries_of_keys(launch: Sequence[Visit], *, window_left: int | None = None,
                    window_right: int | None = None) -> tuple[int, int]:
    """How many queries see a key of a launch, at most and on the mean over its keys, rounded up."""
    left, right = _band(window_left, window_right)
    queries, keys, offset = (np.array([getattr(visit, name) for visit in launch if visit.k_len], dtype=np.int64)
                             for name in ("q_len", "k_len", "offset"))
    if not len(keys) or left + right < 0:
        return 0, 0
    # Key j is seen by the queries from j - offset - right to j - offset + left: most see it where these begin at 0, or,
    # if they do so for no key, as close to it as they get.
    first = np.clip(0, -offset - right, keys - 1 - offset - right)
    most = np.minimum(first + left + right + 1, queries) - np.maximum(first, 0)
    pairs = int(_pairs(queries, keys, offset, left, right).sum())
    return max(0, int(most.max())), -(-pairs // int(keys.sum()))


def _seen(rank: np.ndarray, start: np.ndarray, end: np.ndarray, left: int, right: int) -> np.ndarray:
    """[i, j]: how many rows of piece j piece i sees that no earlier one of the same rank sees. A rank's pieces rise."""
    first = np.maximum(start[:, None] - left, start[None, :])
    last = np.minimum(end[:, None] + right, end[None, :])
    counted = np.zeros_like(last)
    counted[1:] = np.where(rank[1:, None] == rank[:-1, None], last[:-1], 0)
    return np.maximum(last - np.maximum(first, counted), 0)


def _pairs_of(start: np.ndarray, end: np.ndarray, left: int, right: int) -> np.ndarray:
    """[i, j]: number of pairs of a query of piece i and a key of piece j that the band shows."""
    length = end - start
    return _pairs(length[:, None], length[None, :], start[:, None] - start[None, :], left, right)


def _pairs(queries: np.ndarray, keys: np.ndarray, offset: np.ndarray, left: int, right: int) -> np.ndarray:
    """Number of pairs that the band shows of so many queries and so many keys, as in `Visit`."""

    def clipped(first: np.ndarray) -> np.ndarray:
        return _below(first + queries, keys) - _below(first, keys)

    return clipped(offset + right + 1) - clipped(offset - left)


def _below(end: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Sum of min(max(x, 0), limit) for x below `end`."""
    inside = np.minimum(np.maximum(end, 0), limit + 1)
    return inside * (inside - 1) // 2 + limit * (np.maximum(end, 0) - inside)


_Pieces = list[list[tuple[int, int]]]  # for each rank the (start, length) of its pieces of one document


def _split(lengths: tuple[int, ...], world: int, cut: Callable[[int], _Pieces]) -> Layout:
    _check_lengths(lengths, world)
    pieces_of = {length: cut(length) for length in set(lengths)}
    shards = tuple(
        tuple(
            Shard(document, start, size)
            for document, length in enumerate(lengths)
            for start, size in pieces_of[length][rank]
            if size
        )
        for rank in range(world)
    )
    return Layout(lengths, shards)


def _cut(length: int, parts: Sequence[int]) -> _Pieces:
    """One piece a rank, in proportion to `parts`."""
    total = sum(parts)
    cuts = [end * length // total for end in accumulate(parts, initial=0)]
    return [[(start, end - start)] for start, end in zip(cuts, cuts[1:], strict=False)]


def _cut_zigzag(length: int, parts: Sequence[int]) -> _Pieces:
    """Two chunks for each rank, in proportion to `parts`; the last rank's two are neighbours and become one piece."""
    world = len(parts)
    chunks = [chunk[0] for chunk in _cut(length, [*parts, *reversed(parts)])]
    pieces = [[chunks[rank], chunks[2 * world - 1 - rank]] for rank in range(world)]
    (start, head), (_, tail) = pieces[-1]
    pieces[-1] = [(start, head + tail)]
    return pieces


def _rising(end: int) -> Iterator[int]:
    """0 to `end`, both included: each number at first, then in growing steps, so that there are few."""
    number = 0
    while number < end:
        yield number
        number += 1 + number // 8
    yield end


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


class _Placement(NamedTuple):
    """Where documents go. excess: of the busiest rank over the mean in area or tokens, 1 is what is tolerated."""

    excess: float
    owner: dict[int, int]  # document -> rank, of those that stay whole
    split: dict[int, tuple[int, tuple[int, ...]]]  # of the others the first rank and, for each from there on, the part


def _shares(lengths: Sequence[int], world: int, causal: bool) -> np.ndarray:
    """(documents, 2): of all mask area and of all tokens, times `world`: a rank's even load is 1 of each."""
    sizes = [(length * (length + 1) // 2 if causal else length * length, length) for length in lengths]
    totals = [max(sum(column), 1) for column in zip(*sizes, strict=True)] or [1, 1]
    shares = np.array([[world * size / total for size, total in zip(each, totals, strict=True)] for each in sizes])
    return shares.reshape(-1, 2)


def _place_in_blocks(shares: np.ndarray, lengths: Sequence[int], order: Sequence[int], world: int,
                     size: int) -> _Placement:
    """Of all documents, in blocks of `size` ranks. Where one has too much for a block, that is not even tried."""
    blocks = world // size
    if blocks > 1 and size > 1 and _excess(shares.max(axis=0, initial=0.0) / size) > 1:
        return _Placement(float("inf"), {}, {})
    # Ranks will share what a block has, and be no better balanced than blocks are.
    of_blocks = _place(shares / size, blocks, (), order, goal=1.0 if size == 1 else 0.5)
    if size == 1:
        return of_blocks
    held: list[list[int]] = [[] for _ in range(blocks)]
    for document in order:
        held[of_blocks.owner[document]].append(document)
    whole = _Placement(0.0, {}, {})
    for block, documents in enumerate(held):
        splittable = sum(lengths[document] >= 2 * size for document in documents)
        best = None
        for split in _rising(splittable):
            placement = _place(shares, size, documents[:split], documents[split:])
            if best is None or placement.excess < best.excess:
                best = placement
            if best.excess <= 1:
                break
        assert best is not None
        first = block * size
        whole.owner.update((document, first + rank) for document, rank in best.owner.items())
        whole.split.update((document, (first, parts)) for document, (_, parts) in best.split.items())
        whole = whole._replace(excess=max(whole.excess, best.excess))
    return whole


def _place(shares: np.ndarray, world: int, split: Sequence[int], whole: Sequence[int], goal: float = 1.0) -> _Placement:
    """Places the documents `whole`, in their order, and cuts the documents `split` so that areas become even.

    NOTE: ranks on different machines must agree, so there are no sums here whose order a library may choose.
    """
    area, tokens, owner = np.zeros(world), np.zeros(world), {}
    for document in whole:
        more_area, more_tokens = shares[document]
        # The squares of all loads grow least there.
        owner[document] = rank = int((area * more_area + tokens * more_tokens).argmin())
        area[rank] += more_area
        tokens[rank] += more_tokens
    cut: tuple[int, ...] = ()
    if not split:
        _even_out(shares, np.stack((area, tokens)), owner, goal)
        area, tokens = _loads(shares, owner, world)
    else:
        split_area, split_tokens = (math.fsum(column) for column in shares[list(split)].T)
        mean = (math.fsum(area) + split_area) / world
        # The parts that make all areas the mean. Of those too small we make the least part, at the others' expense.
        least = LEAST_PART / world
        above = np.maximum((mean - area) / split_area - least, 0)
        parts = least + above * ((1 - LEAST_PART) / math.fsum(above))
        area, tokens = area + parts * split_area, tokens + parts * split_tokens
        cut = tuple(round(part * (1 << 30)) for part in parts.tolist())
    excess = float(_excess(np.stack((area, tokens))).max())
    return _Placement(excess, owner, {document: (0, cut) for document in split})


_EXCHANGES = 64  # at most
_LONG, _OTHERS = 96, 32  # documents of a rank that are looked at for an exchange: its longest, and some of the others


def _excess(loads: np.ndarray) -> np.ndarray:
    """(2, ...) area and tokens -> (...): by how much the worse of them exceeds the mean, 1 is what is tolerated."""
    return np.maximum((loads[0] - 1) / TOLERATED_AREA, (loads[1] - 1) / TOLERATED_TOKENS)


def _loads(shares: np.ndarray, owner: dict[int, int], world: int) -> np.ndarray:
    """(2, world): area and tokens of the whole documents of each rank, summed in the order of `owner`."""
    loads = np.zeros((2, world))
    for document, rank in owner.items():
        loads[:, rank] += shares[document]
    return loads


def _even_out(shares: np.ndarray, loads: np.ndarray, owner: dict[int, int], goal: float) -> None:
    """Lets the busiest rank exchange a document for a smaller one, or for none, until the excess is `goal`, in place.

    Without split documents nothing travels and no running sums are kept, which is worth some search: placed one after
    the other, web_64k's documents leave 9 % of area uneven on 2 ranks, after four exchanges 2 %.
    """
    if not owner or shares[list(owner), 0].max() > 1 + TOLERATED_AREA:
        return  # a document that is too much for any rank has to be split
    nothing = len(shares)
    sizes = np.vstack((shares, np.zeros((1, 2))))
    held: list[list[int]] = [[] for _ in range(loads.shape[1])]
    for document, rank in owner.items():
        held[rank].append(document)
    for _ in range(_EXCHANGES):
        excess = _excess(loads)
        busiest = int(excess.argmax())
        if excess[busiest] <= goal:
            return
        best, exchange = float(excess[busiest]), None
        given = _candidates(held[busiest], shares)
        for rank in range(len(held)):
            if rank == busiest:
                continue
            taken = [*_candidates(held[rank], shares), nothing]
            moved = sizes[given].T[:, :, None] - sizes[taken].T[:, None, :]
            ours, theirs = loads[:, busiest, None, None] - moved, loads[:, rank, None, None] + moved
            after = np.maximum(_excess(ours), _excess(theirs))
            index = int(after.argmin())
            if after.flat[index] < best - 1e-9:
                best, exchange = float(after.flat[index]), (rank, given[index // len(taken)], taken[index % len(taken)])
        if exchange is None:
            return
        rank, document, other = exchange
        moves = [(document, busiest, rank)] + ([(other, rank, busiest)] if other != nothing else [])
        for each, source, destination in moves:
            held[source].remove(each)
            held[destination].append(each)
            owner[each] = destination
            loads[:, source] -= sizes[each]
            loads[:, destination] += sizes[each]


def _candidates(documents: list[int], shares: np.ndarray) -> list[int]:
    ordered = sorted(documents, key=lambda document: (-shares[document, 1], document))
    return ordered[:_LONG] + ordered[_LONG :: 1 + max(0, len(ordered) - _LONG) // _OTHERS]


def _sum_clipped(first: int, count: int, limit: int) -> int:
    """Sum of min(max(x, 0), limit) for x in [first, first + count)."""

    def below(end: int) -> int:
        inside = min(max(end, 0), limit + 1)
        return inside * (inside - 1) // 2 + limit * (max(end, 0) - inside)

    return below(first + count) - below(first)


def _check_lengths(lengths: tuple[int, ...], world: int) -> None:
    if world < 1:
        raise ValueError(f"world is {world}, expected the number of ranks, at least 1")
    for document, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"lengths[{document}] is {length}, expected document lengths in tokens, 0 or more")


def _check_partition(layout: Layout) -> None:
    pieces = defaultdict(list)
    for rank, shards in enumerate(layout.shards):
        for shard in shards:
            if not 0 <= shard.document < len(layout.documents) or shard.length < 1:
                expected = f"a document below {len(layout.documents)} and a length of 1 or more"
                raise ValueError(f"rank {rank} has {shard}, expected {expected}")
            pieces[shard.document].append((shard.start, shard.start + shard.length))
    for document, length in enumerate(layout.documents):
        cuts = sorted(pieces[document])
        starts, ends = [start for start, _ in cuts], [end for _, end in cuts]
        if starts + [length] != [0] + ends and (length or cuts):
            raise ValueError(
                f"the shards of document {document} are {cuts}, expected each of {length} tokens in exactly one of them"
            )


# ---- schedule --------------------------------------------------------------------------------------------------------

_UNLIMITED = 1 << 60


class _Band(NamedTuple):
    left: int
    right: int


class _Piece(NamedTuple):
    """A run of rows whose positions in the document are consecutive."""

    row: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def origin(self) -> int:
        """Position that row 0 would have if the run went back that far."""
        return self.start - self.row


class _Box(NamedTuple):
    """Query rows [q, q + q_len) against key rows [k, k + k_len) at an offset: a visit before `first` and `last`."""

    q: int
    q_len: int
    k: int
    k_len: int
    offset: int


@lru_cache(maxsize=64)
def block_of(layout: Layout) -> int:
    """The least size of blocks of neighbouring ranks of which no two have parts of one document."""
    ends: dict[int, tuple[int, int]] = {}
    for rank, shards in enumerate(layout.shards):
        for shard in shards:
            ends[shard.document] = ends.get(shard.document, (rank, rank))[0], rank
    pairs = set(ends.values())
    return next(size for size in _divisors(layout.world) if all(first // size == last // size for first, last in pairs))


_Ranks = TypeVar("_Ranks", int, np.ndarray)


def neighbour(rank: _Ranks, shift: int, block: int) -> _Ranks:
    """The rank so many further in its block of ranks, of which the first follows the last."""
    return rank - rank % block + (rank + shift) % block


# A packed batch has a new layout every step and a schedule may hold many thousand visits, so the cache stays small.
@lru_cache(maxsize=64)
def ring_schedule(
    layout: Layout, rank: int, *, window_left: int | None = None, window_right: int | None = None
) -> tuple[Step, ...]:
    """The steps of `rank`, the local one first; all ranks have the same shifts in the same order.

    Every local query row is in at least one forward visit; one that sees nothing is in a visit of step 0 with
    k_len = 0. Visits are as few and large as the mask allows: under causal zigzag one per document and step, cut in two
    only where the two halves differ in `first` or `last`.
    Raises ValueError where `rank` is not one of the layout's.
    """
    if not 0 <= rank < layout.world:
        raise ValueError(f"rank is {rank}, expected one of the layout's {layout.world} ranks")
    band, block = _band(window_left, window_right), block_of(layout)
    queries = _pieces(layout, rank)
    shifts = _shifts(layout, band)
    boxes_of, received = [], []
    for shift in shifts:
        received.append(_needed(layout, rank, neighbour(rank, -shift, block), band) if shift else {})
        keys = _in_buffer(received[-1]) if shift else queries
        boxes_of.append([box for doc in queries for box in _cover(queries[doc], keys.get(doc, ()), band)])
    forward_of = _flagged([_launches(boxes, "q") for boxes in boxes_of], layout.tokens(rank), band)
    steps = []
    for shift, boxes, needed, forward in zip(shifts, boxes_of, received, forward_of, strict=True):
        source, destination = neighbour(rank, -shift, block), neighbour(rank, shift, block)
        backward = tuple(tuple(Visit(*box, False, False) for box in launch) for launch in _launches(boxes, "k"))
        send = _needed(layout, destination, rank, band) if shift else {}
        steps.append(Step(shift, source, _spans(needed), destination, _spans(send), forward, backward))
    return tuple(steps)


def _band(window_left: int | None, window_right: int | None) -> _Band:
    return _Band(*(_UNLIMITED if window is None else window for window in (window_left, window_right)))


@lru_cache(maxsize=64)
def _all_pieces(layout: Layout) -> tuple[dict[int, tuple[_Piece, ...]], ...]:
    """For each rank: document -> its pieces in row order; shards that continue each other are one piece."""
    ranks = []
    for shards in layout.shards:
        rows = accumulate((shard.length for shard in shards), initial=0)
        documents: dict[int, list[_Piece]] = {}
        for shard, row in zip(shards, rows, strict=False):
            pieces = documents.setdefault(shard.document, [])
            previous = pieces[-1] if pieces else None
            if previous and previous.end == shard.start and previous.row + previous.length == row:
                pieces[-1] = previous._replace(end=previous.end + shard.length)
            else:
                pieces.append(_Piece(row, shard.start, shard.start + shard.length))
        ranks.append({document: tuple(pieces) for document, pieces in documents.items()})
    return tuple(ranks)


def _pieces(layout: Layout, rank: int) -> dict[int, tuple[_Piece, ...]]:
    return _all_pieces(layout)[rank]


@lru_cache(maxsize=64)
def _shifts(layout: Layout, band: _Band) -> tuple[int, ...]:
    """The shifts that any rank needs, 0 always. All ranks must agree on them, so this looks at all pairs."""
    block = block_of(layout)
    holdings: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for rank in range(layout.world):
        for document, pieces in _pieces(layout, rank).items():
            holdings[document] += [(rank, piece.start, piece.end) for piece in pieces]
    used = np.zeros(block, dtype=bool)
    used[0] = True
    for held in holdings.values():
        rank, start, end = np.array(held, dtype=np.int64).T
        sees = (start[None, :] <= end[:, None] - 1 + band.right) & (end[None, :] - 1 >= start[:, None] - band.left)
        if band.left + band.right >= 0:
            used[((rank[:, None] - rank[None, :]) % block)[sees]] = True
    return tuple(np.flatnonzero(used).tolist())


def _needed(layout: Layout, rank: int, source: int, band: _Band) -> dict[int, list[_Piece]]:
    """Document -> the runs of `source`'s rows, in row order, that some query of `rank` sees."""
    queries, needed = _pieces(layout, rank), {}
    for document, keys in _pieces(layout, source).items():
        runs = [run for key in keys for run in _runs_seen(queries.get(document, ()), key, band)]
        if runs:
            needed[document] = runs
    return needed


def _runs_seen(queries: Sequence[_Piece], key: _Piece, band: _Band) -> list[_Piece]:
    seen = [trimmed[2:] for query in queries if (trimmed := _trim(query, key, band))]
    runs: list[tuple[int, int]] = []
    for lo, hi in sorted(seen):
        if runs and lo <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], hi)
        else:
            runs.append((lo, hi))
    return [_Piece(lo - key.origin, lo, hi) for lo, hi in runs]


def _in_row_order(needed: dict[int, list[_Piece]]) -> list[tuple[int, _Piece]]:
    return sorted(((document, run) for document, runs in needed.items() for run in runs), key=lambda item: item[1].row)


def _in_buffer(needed: dict[int, list[_Piece]]) -> dict[int, list[_Piece]]:
    """The same runs, with the rows they have in the receive buffer."""
    buffer, row = defaultdict(list), 0
    for document, run in _in_row_order(needed):
        buffer[document].append(run._replace(row=row))
        row += run.length
    return buffer


def _spans(needed: dict[int, list[_Piece]]) -> tuple[Span, ...]:
    spans: list[Span] = []
    for _, run in _in_row_order(needed):
        if spans and spans[-1].start + spans[-1].length == run.row:
            spans[-1] = Span(spans[-1].start, spans[-1].length + run.length)
        else:
            spans.append(Span(run.row, run.length))
    return tuple(spans)


def _trim(query: _Piece, key: _Piece, band: _Band) -> tuple[int, int, int, int] | None:
    """Positions (q_lo, q_hi, k_lo, k_hi) of the queries that see a key and of the keys seen; None if there are none."""
    left, right = band
    _, q_lo, q_hi = query
    _, k_lo, k_hi = key
    if left + right < 0 or q_lo - left >= k_hi or k_lo - right >= q_hi:
        return None
    return max(q_lo, k_lo - right), min(q_hi, k_hi + left), max(k_lo, q_lo - left), min(k_hi, q_hi + right)


def _cover(queries: Sequence[_Piece], keys: Sequence[_Piece], band: _Band) -> list[_Box]:
    """Boxes that hold every visible pair of one document's query and key pieces exactly once, few and large.

    Each pair of pieces is a cell of a grid. A box grows from the first cell without one, by rows and columns of the
    grid, for as long as one offset describes all of it.
    """
    grid = _Grid(queries, keys, band)
    if len(grid.cells) > 1 and (box := grid.box(_Area(0, len(queries), 0, len(keys)))):
        return [box]
    boxes = []
    while grid.cells:
        i, j = next(iter(grid.cells))
        area = _Area(i, i + 1, j, j + 1)
        box = grid.box(area)
        while wider := next(filter(grid.box, grid.wider(area)), None):
            area, box = wider, grid.box(wider)
        assert box is not None
        boxes.append(box)
        grid.close(area)
    return boxes


class _Area(NamedTuple):
    """Query pieces [i_lo, i_hi) and key pieces [j_lo, j_hi)."""

    i_lo: int
    i_hi: int
    j_lo: int
    j_hi: int


class _Grid:
    """The pairs (i, j) of query and key pieces of one document.

    `cells` has those with visible pairs and no box yet, with the rows (q_lo, q_hi, k_lo, k_hi) these pairs span.
    """

    def __init__(self, queries: Sequence[_Piece], keys: Sequence[_Piece], band: _Band):
        self.queries, self.keys, self.band = queries, keys, band
        self.cells: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        self.closed: set[tuple[int, int]] = set()
        for i, query in enumerate(queries):
            for j, key in enumerate(keys):
                if trimmed := _trim(query, key, band):
                    q_lo, q_hi, k_lo, k_hi = trimmed
                    q, k = query.origin, key.origin
                    self.cells[i, j] = (q_lo - q, q_hi - q, k_lo - k, k_hi - k)

    def wider(self, area: _Area) -> list[_Area]:
        """The areas that are one row, one column or both larger and have more cells."""
        i_hi, j_hi = min(area.i_hi + 1, len(self.queries)), min(area.j_hi + 1, len(self.keys))
        wider = [area._replace(i_hi=i_hi), area._replace(j_hi=j_hi), area._replace(i_hi=i_hi, j_hi=j_hi)]
        return [candidate for candidate in wider if len(self._inside(candidate)) > len(self._inside(area))]

    def close(self, area: _Area) -> None:
        for cell in self._inside(area):
            del self.cells[cell]
            self.closed.add(cell)

    def box(self, area: _Area) -> _Box | None:
        """One box for all cells of the area, if some offset makes its mask the true one.

        Its first and last row and column then see something, and so do all between them, the mask being a band.
        """
        block = [(i, j) for i in range(area.i_lo, area.i_hi) for j in range(area.j_lo, area.j_hi)]
        if not self.closed.isdisjoint(block) or not self._without_gaps(area):
            return None
        cells = self._inside(area)
        q_los, q_his, k_los, k_his = zip(*(self.cells[cell] for cell in cells), strict=True)
        q, k = min(q_los), min(k_los)
        for offset in dict.fromkeys(self._offset(i, j, q, k) for i, j in cells):
            box = _Box(q, max(q_his) - q, k, max(k_his) - k, offset)
            if all(self._same_mask(box, i, j) for i, j in block):
                return box
        return None

    def _offset(self, i: int, j: int, q: int, k: int) -> int:
        """The offset of cell (i, j) for rows counted from q and k."""
        return (self.queries[i].origin + q) - (self.keys[j].origin + k)

    def _without_gaps(self, area: _Area) -> bool:
        sides = self.queries[area.i_lo : area.i_hi], self.keys[area.j_lo : area.j_hi]
        return all(a.row + a.length == b.row for side in sides for a, b in zip(side, side[1:], strict=False))

    def _inside(self, area: _Area) -> list[tuple[int, int]]:
        return [(i, j) for i, j in self.cells if area.i_lo <= i < area.i_hi and area.j_lo <= j < area.j_hi]

    def _same_mask(self, box: _Box, i: int, j: int) -> bool:
        """Whether the box shows of cell (i, j) exactly what the document's mask shows."""
        query, key = self.queries[i], self.keys[j]
        rows = max(query.row - box.q, 0), min(query.row + query.length - box.q, box.q_len)
        columns = max(key.row - box.k, 0), min(key.row + key.length - box.k, box.k_len)
        if rows[0] >= rows[1] or columns[0] >= columns[1]:
            return True
        offset = self._offset(i, j, box.q, box.k)
        return offset == box.offset or self._shown(rows, columns, offset) == self._shown(rows, columns, box.offset)

    def _shown(self, rows: tuple[int, int], columns: tuple[int, int], offset: int) -> tuple[int, int] | None:
        """First and last diagonal (column - row) of a block that the band shows; None if it shows none of the block."""
        lo = max(offset - self.band.left, columns[0] - (rows[1] - 1))
        hi = min(offset + self.band.right, columns[1] - 1 - rows[0])
        return (lo, hi) if lo <= hi else None


def _launches(boxes: Sequence[_Box], side: str) -> list[list[_Box]]:
    """Fewest launches whose boxes have disjoint query ('q') or key ('k') ranges: first fit in the order of starts."""
    start, length = (0, 1) if side == "q" else (2, 3)
    launches: list[list[_Box]] = []
    for box in sorted(boxes, key=lambda box: (box[start], box)):
        for launch in launches:
            if launch[-1][start] + launch[-1][length] <= box[start]:
                launch.append(box)
                break
        else:
            launches.append([box])
    return launches


def _flagged(steps: list[list[list[_Box]]], tokens: int, band: _Band) -> list[tuple[tuple[Visit, ...], ...]]:
    """Boxes as visits: cut where rows differ in being met for the first or last time; blind rows are put in step 0."""
    launches = [launch for step in steps for launch in step]
    cuts = sorted({0, tokens}.union(*((box.q, box.q + box.q_len) for launch in launches for box in launch)))
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for order, launch in enumerate(launches):
        for box in launch:
            for part in _parts(box, cuts):
                first.setdefault(part, order)
                last[part] = order
    orders = iter(range(len(launches)))
    result = [[_flagged_launch(launch, next(orders), cuts, first, last, band) for launch in step] for step in steps]
    blind = [part for part in range(len(cuts) - 1) if part not in first]
    if blind:
        result[0] = result[0] or [()]
        result[0][0] += tuple(Visit(cuts[part], cuts[part + 1] - cuts[part], 0, 0, 0, True, True) for part in blind)
    return [tuple(visits) for visits in result]


def _flagged_launch(
    launch: list[_Box], order: int, cuts: list[int], first: dict[int, int], last: dict[int, int], band: _Band
) -> tuple[Visit, ...]:
    visits = []
    for box in launch:
        flags = [(first[part] == order, last[part] == order, part) for part in _parts(box, cuts)]
        for (is_first, is_last), group in groupby(flags, key=lambda flag: flag[:2]):
            parts = [part for _, _, part in group]
            rows = _rows_of(box, cuts[parts[0]], cuts[parts[-1] + 1], band)
            visits.append(Visit(*rows, first=is_first, last=is_last))
    return tuple(visits)


def _parts(box: _Box, cuts: list[int]) -> range:
    return range(bisect.bisect_left(cuts, box.q), bisect.bisect_left(cuts, box.q + box.q_len))


def _rows_of(box: _Box, q_lo: int, q_hi: int, band: _Band) -> _Box:
    """The rows [q_lo, q_hi) of a box, with the keys that they see."""
    offset = box.offset + q_lo - box.q
    k_lo = max(0, offset - band.left)
    k_hi = min(box.k_len, offset + (q_hi - q_lo) + band.right)
    return _Box(q_lo, q_hi - q_lo, box.k + k_lo, k_hi - k_lo, offset - k_lo)
