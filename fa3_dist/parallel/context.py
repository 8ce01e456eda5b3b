"""Context parallelism for a training loop: shard the batch, run the model, take the loss.

    cp = ContextParallel(mesh["cp"])
    batch = cp.shard(tokens)                                  # every rank passes the same, whole tokens
    logits = model(batch.tokens, positions=batch.positions, attention=batch.attention)
    loss = cp.loss(logits, batch.labels)
    loss.backward()                                           # then average gradients, as DDP and FSDP2 do

Every layer but attention works on the rank's own tokens. What the rest of a model has to know arrives with the batch:
the positions of its tokens in their documents, the labels (a token's successor may live on another rank), and an
attention callable that reaches the keys of the other ranks. `ContextParallel.check` runs a model both ways on a short
sequence and names the layer that does something else, such as counting positions from its local length.

How attention reaches them is the mode: a ring, an all-to-all over heads, or their product. Nothing else depends on it:
the same ranks hold the same tokens, so the mode of a layer may be chosen, and chosen differently, by its head counts.

Gradient convention: parameter gradients are right once they are averaged over the ranks of the group, so that the data
parallel wrapper that a model has anyway also does this, over a flattened (data, context) mesh.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from fa3_dist import ops
from fa3_dist.interface import apply_sink, cast_for_autocast, window_bounds
from fa3_dist.parallel import sharding
from fa3_dist.parallel.all_to_all import all_to_all_attention
from fa3_dist.parallel.exchange import (
    NO_STAMP,
    DistributedExchange,
    Exchange,
    Move,
    Parts,
    Pending,
    RingError,
    Traffic,
    exchange_with_all,
)
from fa3_dist.parallel.observe import Observer
from fa3_dist.parallel.plan import Call, Choice, Links, choose, is_measured, links_of
from fa3_dist.parallel.ring import LEAST_HALF
from fa3_dist.parallel.schedule import Layout, contiguous, packed, zigzag

logger = logging.getLogger("fa3_dist")

LAYOUTS = ("auto", "zigzag", "contiguous")
MODES = ("ring", "all_to_all", "auto")
PRODUCT = ("ring", "heads")  # names of the dimensions of a mesh for the mode "product"
_BUCKET = 1 << 25  # elements of gradients averaged in one message
_WORDS_TAG = 1  # of what ranks tell each other on the host: a ring's messages, which may be of the same group, have 0


@dataclass
class LocalBatch:
    """One rank's part of a batch. B is 1 for packed documents; S_local may differ between ranks and may be 0.

    Attributes:
        tokens: (B, S_local), with further dimensions if the whole ones have them.
        labels: (B, S_local), or None.
        positions: int64 (B, S_local), of each token in its document.
        attention: what to hand to the layers.
        layout, rank: which tokens these are.
        extras: further tensors that were sharded likewise, by name.
    """

    tokens: Tensor
    labels: Tensor | None
    positions: Tensor
    attention: LocalAttention
    layout: Layout
    rank: int
    extras: dict[str, Tensor] = field(default_factory=dict)


class ContextParallel:
    """Shards sequences over the ranks of a group and puts the pieces together again.

    All ranks of the group construct it together (connections are made here) and call its methods in the same order.
    Between GPUs of one host a ring's messages go by copy engines where they can (see `DistributedExchange`), unless
    FA3_DIST_PEER_COPIES is 0 in the environment of some rank.

    Args:
        group: a 1-D DeviceMesh, such as mesh["cp"], or a ProcessGroup. A 2-D one with the dimensions "ring" and "heads"
            for the product of both modes: its rows swap tokens for heads (give them the fastest links), its columns
            are rings. `cp.group` then has all its ranks, row by row.
        layout: "auto": zigzag for a dense batch; packed documents are split zigzag if they are long and stay whole on
            one rank if they are short (`schedule.packed`). "zigzag" or "contiguous": every document is split so.
        timeout: seconds (or timedelta) until a message that does not arrive is an error, on GPUs from when the host
            queues it, which may be a whole step ahead of the device; None: the group's timeout.
        mode: "ring": keys and values go round; any number of heads. "all_to_all": ranks swap tokens for heads; query
            heads a multiple of the ranks. "auto": each call takes the one, the other or a product of both, whichever
            `plan.choose` expects to be fastest; links are measured here, once a group, so another run may choose
            otherwise and differ in the last bits. None: "ring", or "product", the only one, for a 2-D mesh.
        bandwidth: for "auto": bytes/s that a rank sends while all do, or {ranks: bytes/s} in groups of so many
            neighbours, such as {8: 400e9, 64: 45e9}; None: measured.
        sm_margin: SMs of the GPU that attention leaves to the messages under way; None: FA3_DIST_SM_MARGIN of the
            environment, or 0.
    Raises:
        TypeError: group is neither, or bandwidth is no number.
        ValueError: a mesh of other dimensions, an unknown layout or mode, one that does not fit the mesh, a bandwidth
            that is not above 0 or not used, a negative sm_margin, a process that is not in the group, or ranks that
            were given different arguments: then on every rank.
    """

    def __init__(
        self,
        group: DeviceMesh | dist.ProcessGroup,
        layout: str = "auto",
        timeout: float | timedelta | None = None,
        *,
        mode: str | None = None,
        bandwidth: float | Mapping[int, float] | None = None,
        sm_margin: int | None = None,
    ):
        if layout not in LAYOUTS:
            raise ValueError(f"layout is {layout!r}: expected one of {', '.join(map(repr, LAYOUTS))}")
        self.mode, flat_group, self._product_heads = _mode(group, mode)
        if bandwidth is not None and self.mode != "auto":
            raise ValueError(f"bandwidth was given with mode {self.mode!r}: expected mode='auto', which alone uses it")
        self.group = _process_group(flat_group, "group")
        self.rank, self.world = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.layout = layout
        self.exchange: Exchange = NoPeers()
        self._links = None if bandwidth is None else Links.given(bandwidth)
        # A layout has one attention object, so guards of torch.compile on it hold from batch to batch.
        self._attention = lru_cache(maxsize=64)(self._make_attention)
        self._choice = lru_cache(maxsize=256)(self._choose)
        self._compare_once = lru_cache(maxsize=1024)(self._compare)
        self._checked_contents = False
        if self.world > 1:
            self.exchange = exchange = DistributedExchange(self.group, timeout=timeout, sm_margin=sm_margin)
            self._host_group = _host_group(self.group, timedelta(seconds=exchange.timeout))
            self._words = DistributedExchange(self._host_group, device=torch.device("cpu"), timeout=exchange.timeout,
                                              tag=_WORDS_TAG)
            self._device_type = exchange.device.type
            links = self._links or ("measured before" if is_measured(self.group) else None)
            self._compare("ContextParallel()", {
                "layout": layout, "mode": self.mode, "heads": self._product_heads, "bandwidth": links,
                "FA3_DIST_LEAST_HALF": LEAST_HALF[self._device_type],
            })
            if self.mode == "auto" and self._links is None:
                self._links = links_of(exchange)

    def __repr__(self) -> str:
        return f"ContextParallel(rank {self.rank} of {self.world}, layout={self.layout!r}, mode={self.mode!r})"

    # ---- batches -----------------------------------------------------------------------------------------------------

    def shard(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        **extras: Tensor,
    ) -> LocalBatch:
        """This rank's part of a batch that every rank of the group holds whole.

        The ranks compare what they were given (shapes, dtypes, documents; contents too where tokens are on the CPU,
        else for the first batch), which costs one small message on the host. It is done for every batch, because a rank
        that skipped it for a known layout would leave one that has a new layout waiting.

        Args:
            tokens: (B, S) or (B, S, features): each row one document. With cu_seqlens (1, T) or (T,): documents packed
                one behind the other.
            labels: (B, S) like tokens: labels[b, s] is what the logits at s should predict. None: the next token of the
                document, -100 at its end (for integer tokens without features; else the batch has no labels).
            cu_seqlens: n + 1 rising integers from 0 to T; document d has the tokens [cu_seqlens[d], cu_seqlens[d + 1]).
                A tensor on a device costs a synchronisation here, once a batch.
            extras: further tensors (B, S, ...) or (T, ...) to shard likewise, found in batch.extras.
        Raises:
            TypeError, ValueError: an argument of the wrong form, or the ranks were given different batches: then on
                every rank, naming the ranks.
        """
        tensors = {"tokens": tokens, "labels": labels} | extras
        refused: Exception | None = None
        lengths: tuple[int, ...] = ()
        try:
            rows, lengths = _documents(tensors, cu_seqlens)
        except (TypeError, ValueError) as error:
            refused = error
        self._compare_batches(tensors, lengths, refused)
        if refused is not None:
            raise refused
        attention = self._attention(lengths, rows, cu_seqlens is not None)
        return _local_batch(attention, tensors)

    def unshard(self, tensor: Tensor, batch: LocalBatch) -> Tensor:
        """(B, S_local, ...) of every rank -> (B, S, ...) on every rank, differentiable (see `sharding.unshard`).

        For tensors of packed documents the result is (1, T, ...).
        """
        expected = tuple(batch.positions.shape)
        if tuple(tensor.shape[:2]) != expected:
            raise ValueError(f"tensor has shape {tuple(tensor.shape)}: expected {expected} (B, S_local) in front")
        if self.world == 1:
            return tensor
        whole = sharding.unshard(tensor.flatten(0, 1), batch.layout, self.group)
        return whole.unflatten(0, (expected[0], -1)) if len(whole) else tensor

    # ---- loss and gradients ------------------------------------------------------------------------------------------

    def raise_failure(self) -> None:
        """Raises the RingError of a message of attention that did not come.

        On GPUs the host does not wait for messages. One that fails is told by the next call of attention or of these
        methods, and what was computed from it is garbage. So before something that lasts, such as `optimizer.step()`
        or saving, call this once the host has waited for the device (in `loss.item()`, say). It sends nothing.
        """
        self.exchange.raise_failure()

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        ignore_index: int = -100,
        data_mesh: DeviceMesh | dist.ProcessGroup | None = None,
    ) -> Tensor:
        """Cross entropy, in nats, averaged over all valid tokens of all ranks; equal on every rank.

        A mean of the ranks' means would weigh tokens by how many valid ones their rank happens to have. Here gradients
        are those of the mean over tokens once they are averaged over the group; with `data_mesh` the mean and the
        averaging also go over the replicas. Without any valid token the loss is 0, and so are the gradients.

        Args:
            logits: (B, S_local, classes), any float dtype; computed in fp32 (fp64 stays).
            labels: (B, S_local) int64, `ignore_index` where there is nothing to predict.
            data_mesh: the data-parallel ranks, a 1-D DeviceMesh or a ProcessGroup; None: this group alone.
        """
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits has shape {tuple(logits.shape)} and labels {tuple(labels.shape)}: expected "
                "(B, S_local, classes) and (B, S_local)"
            )
        self.raise_failure()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        flat = labels.flatten()
        total = F.cross_entropy(logits.flatten(0, -2), flat, ignore_index=ignore_index, reduction="sum")
        return _GlobalMean.apply(total, (flat != ignore_index).sum(), self._averaging_groups(data_mesh))

    def sync_gradients(self, module: nn.Module, data_mesh: DeviceMesh | dist.ProcessGroup | None = None) -> None:
        """Averages the gradients of a module over the group, in place; for models without DDP or FSDP.

        A parameter without a gradient counts as 0 where another rank has one. With `data_mesh` the average goes over
        the replicas too. Raises TypeError for a sharded (FSDP2) gradient: FSDP2 averages by itself, over its own mesh.
        """
        self.raise_failure()
        groups = self._averaging_groups(data_mesh)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        if any(hasattr(parameter, "device_mesh") for parameter in parameters):
            raise TypeError("module has DTensor parameters: expected plain ones; FSDP2 averages over a mesh of its own")
        if not groups or not parameters:
            return
        present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        for group in groups:
            dist.all_reduce(present, group=group)
        used = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
        ranks = _ranks(groups)
        for bucket in _buckets(used):
            flat = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in bucket])
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            for group in groups:
                dist.all_reduce(flat, group=group)
            flat /= ranks
            for parameter, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(gradient.view_as(parameter))

    # ---- modes -------------------------------------------------------------------------------------------------------

    def choose(
        self,
        batch: LocalBatch,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        head_dim_v: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Choice:
        """The mode that attention of these sizes takes on a batch; print it to see why. Sends nothing.

        Args:
            batch: from `shard`.
            heads, kv_heads: of q, and of k and v (None: as many), as they come to attention on a rank.
            head_dim, head_dim_v: of q and k, and of v (None: the same).
            dtype, causal, window_size: of the call.
        """
        kv_heads, head_dim_v = kv_heads or heads, head_dim_v or head_dim
        if min(heads, kv_heads, head_dim, head_dim_v) < 1 or heads % kv_heads:
            raise ValueError(f"heads is {heads} and kv_heads {kv_heads}: expected a multiple, and head dims above 0")
        return self._choice(batch.layout, Call(heads, kv_heads, head_dim, head_dim_v, dtype,
                                               *window_bounds(causal, window_size)))

    def _choose(self, layout: Layout, call: Call) -> Choice:
        fixed = {"ring": 1, "all_to_all": self.world, "product": self._product_heads}.get(self.mode)
        if self.world == 1:
            return Choice(call, layout, 1, "there is one rank")
        if fixed is not None:
            return Choice(call, layout, fixed, f"mode is {self.mode!r}")
        assert self._links is not None
        choice = choose(layout, call, self._links, self._device_type)
        logger.info("%s", choice)
        return choice

    def _head_ranks(self, layout: Layout, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> int:
        """How many ranks swap tokens for heads in a call of attention, once all ranks agree about the call."""
        sizes = tuple((tuple(x.shape[2:]), x.dtype) for x in (q, k, v))
        self._compare_once("attention", ("(heads, head_dim) and dtype of q, k, v", *sizes, *options.items(),
                                         _name_of(layout)))
        ops.check_qkv(q, k, v)
        call = Call(q.shape[2], k.shape[2], q.shape[3], v.shape[3], q.dtype, options["window_left"],
                    options["window_right"])
        return self._choice(layout, call).head_ranks

    # ---- checking a model --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def check(
        self,
        model: nn.Module,
        tokens: Tensor,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        tolerance: float | None = None,
    ) -> None:
        """Runs a model on whole sequences and on shards of them and compares what every module returns.

        Nothing can tell from a module's code whether it counts positions from its local length, mixes tokens outside
        of attention, or ignores the attention it is given; its values do. Use a short batch: every rank computes all of
        it. The model is called as model(tokens, positions=..., attention=...), in eval mode and without gradients.

        Args:
            model: equal weights on all ranks. tokens, cu_seqlens: as in `shard`.
            tolerance: largest relative L2 error of a module's output; None: 1e-3 for fp32 and fp64, else 5e-2.
        Raises:
            ValueError: on every rank; names the first module that differs, its rank, and the usual reasons.
        """
        batch = self.shard(tokens, cu_seqlens=cu_seqlens)
        rows = batch.positions.shape[0]
        alone = LocalAttention(contiguous(batch.layout.documents, 1), 0, rows, NoPeers())
        whole = _local_batch(alone, {"tokens": tokens, "labels": None})
        expected: dict[tuple[str, int], Tensor] = {}
        found: list[str] = []

        def remember(key: tuple[str, int], module: nn.Module, output: Tensor) -> None:
            if output.shape[:2] == whole.positions.shape:
                expected[key] = _shard_rows(output, batch.attention)

        def compare(key: tuple[str, int], module: nn.Module, output: Tensor) -> None:
            if key in expected and not found:
                error = _relative_error(output, expected[key])
                if error > (_default_tolerance(output.dtype) if tolerance is None else tolerance):
                    found.append(f"module {key[0]!r} ({type(module).__name__}), relative error {error:.2g}")

        for each, look in ((whole, remember), (batch, compare)):
            with _observed(model, look):
                model(each.tokens, positions=each.positions, attention=each.attention)
        reports = self._gather_objects(found[0] if found else None)
        wrong = [f"rank {rank}: {report}" for rank, report in enumerate(reports) if report is not None]
        if wrong:
            raise ValueError(
                f"model gives other values on shards than on whole sequences: {'; '.join(wrong)}. Expected layers to "
                "use the positions and the attention that they are called with: does one compute positions from its "
                "local length, mix tokens outside of attention, or ignore the attention it is given?"
            )

    # ---- agreement between ranks -------------------------------------------------------------------------------------

    def _make_attention(self, lengths: tuple[int, ...], rows: int, is_packed: bool) -> LocalAttention:
        automatic = packed if is_packed else zigzag
        make = {"auto": automatic, "zigzag": zigzag, "contiguous": contiguous}[self.layout]
        split = self._head_ranks if self.world > 1 else None
        return LocalAttention(make(lengths, self.world), self.rank, rows, self.exchange, split)

    def _compare_batches(
        self, tensors: dict[str, Tensor | None], lengths: tuple[int, ...], refused: Exception | None
    ) -> None:
        """Raises ValueError on every rank if any rank was given another batch, or refused its own."""
        if self.world == 1:
            return
        description = f"a batch that it refuses ({refused})" if refused else _describe(tensors, lengths)
        contents = [] if refused else _contents(tensors.values(), even_on_device=not self._checked_contents)
        self._checked_contents = True
        if self._agree("shard()", (description, lengths, contents)):
            return
        descriptions = self._gather_objects(description)
        if refused is None:
            raise ValueError(_difference(descriptions))

    def _compare(self, where: str, arguments: Any) -> None:
        """Raises ValueError on every rank if they came here with different arguments."""
        if not self._agree(where, arguments):
            raise ValueError(
                f"the ranks came to {where} with different arguments: expected the same on all {self.world} ranks of "
                f"the context-parallel group, got {_by_rank(self._gather_objects(str(arguments)))}"
            )

    def _agree(self, where: str, value: Any) -> bool:
        """Whether all ranks came here with values of equal `repr`; one small message on the host."""
        digest = hashlib.blake2b(repr((where, value)).encode(), digest_size=16).digest()
        ours = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        theirs = [torch.empty_like(ours) for _ in range(self.world)]
        self.raise_failure()
        try:
            exchange_with_all(self._words, [ours] * self.world, theirs, "word")
        except RingError as cause:
            raise RuntimeError(f"rank {self.rank} of {self.world}: not all ranks came to {where} within "
                               f"{self._words.timeout:g} s: word {cause.reason}") from cause
        return all(torch.equal(each, ours) for each in theirs)

    def _gather_objects(self, value: Any) -> list[Any]:
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value, group=self._host_group)
        return gathered

    def _averaging_groups(self, data_mesh: DeviceMesh | dist.ProcessGroup | None) -> list[Any]:
        groups = [self.group] + ([] if data_mesh is None else [_process_group(data_mesh, "data_mesh")])
        return [group for group in groups if dist.get_world_size(group) > 1]


# ---- attention -------------------------------------------------------------------------------------------------------

# Arguments of other attention functions, with the value that asks for nothing.
_NOT_SUPPORTED: dict[str, tuple[Any, str]] = {
    "dropout_p": (0.0, "attention probabilities are never formed, so they cannot be dropped"),
    "dropout": (0.0, "attention probabilities are never formed, so they cannot be dropped"),
    "attn_mask": (None, "the mask is given by causal, window_size and the batch's documents"),
    "attention_mask": (None, "the mask is given by causal, window_size and the batch's documents"),
    "alibi_slopes": (None, "there is no position bias"),
    "attn_bias": (None, "there is no position bias"),
    "cu_seqlens_q": (None, "documents are given to ContextParallel.shard, as cu_seqlens"),
    "cu_seqlens_k": (None, "documents are given to ContextParallel.shard, as cu_seqlens"),
    "offset": (None, "offsets follow from the layout"),
    "qv": (None, "it is not implemented"),
    "attention_chunk": (0, "it is not implemented"),
    "return_attn_probs": (False, "it returns out alone"),
}


class LocalAttention:
    """Attention over the documents of a sharded batch: an attention callable bound to a layout and to messages.

    `needs_positions` tells layers that the index of a local token is not its position. `split`, called with the layout,
    q, k, v and the options of `ring_attention`, gives `head_ranks` of `all_to_all_attention`; None: 1, the ring.
    """

    needs_positions = True

    def __init__(self, layout: Layout, rank: int, rows: int, exchange: Exchange,
                 split: Callable[[Layout, Tensor, Tensor, Tensor, dict[str, Any]], int] | None = None):
        self.layout, self.rank, self.exchange, self._split = layout, rank, exchange, split
        self.shape = (rows, layout.tokens(rank) // rows if rows else 0)

    def __repr__(self) -> str:
        return f"LocalAttention(rank {self.rank} of {self.layout.world}, (B, S_local) = {self.shape})"

    @_disable_dynamo  # torch.compiler.disable, without importing the compiler before it is used
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        sink: Tensor | None = None,
        deterministic: bool = False,
        **others: Any,
    ) -> Tensor:
        """q (B, S_local, Hq, D), k (B, S_local, Hkv, D), v (B, S_local, Hkv, Dv) -> out (B, S_local, Hq, Dv).

        Arguments as in `flash_attn_func`; query and key positions are those in the documents, wherever the tokens live.
        All ranks call it together, in the same layers: one that is left out at random (LayerDrop) must be so on all of
        them, or keys of one layer would meet queries of another. Under torch.compile it runs between compiled regions.

        Raises:
            TypeError: an argument that is not supported. ValueError: shapes other than the batch's, heads that the mode
                cannot share, or ranks that call it differently, or on batches of different layouts (compared when a
                call is new for a layout): then on every rank.
        """
        _refuse(others)
        for name, tensor in (("q", q), ("k", k), ("v", v)):
            if tensor.dim() != 4 or tuple(tensor.shape[:2]) != self.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}: expected (B, S_local, heads, head_dim) with B, S_local = "
                    f"{self.shape} of this batch's layout on rank {self.rank}. Does the layer cut the sequence, or "
                    "compute from another batch?"
                )
        q, k, v = cast_for_autocast(q, k, v)
        window_left, window_right = window_bounds(causal, window_size)
        options: dict[str, Any] = {"softmax_scale": softmax_scale, "window_left": window_left,
                                   "window_right": window_right, "softcap": softcap}
        head_ranks = 1 if self._split is None else self._split(self.layout, q, k, v, options)
        out, lse = all_to_all_attention(
            *(tensor.flatten(0, 1) for tensor in (q, k, v)),
            layout=self.layout,
            rank=self.rank,
            exchange=self.exchange,
            head_ranks=head_ranks,
            deterministic=deterministic or torch.are_deterministic_algorithms_enabled(),
            **options,
        )
        out = out if sink is None else apply_sink(out, lse, sink)
        return out.reshape(*self.shape, *out.shape[1:])


class NoPeers:
    """The exchange of a ring of one: it has no messages."""

    rank, world, sm_margin = 0, 1, 0

    def __init__(self) -> None:
        self.stats = Traffic()
        self.observer: Observer | None = None

    def let_begin(self) -> None:
        pass

    def confirm(self) -> None:
        pass

    def raise_failure(self) -> None:
        pass

    def side_stream(self) -> None:
        pass

    def room(self, *message: Any) -> Parts:
        raise AssertionError(f"a ring of one rank has nobody to wait for a message from: {message}")

    def stamp(self, place: int) -> int:
        return NO_STAMP

    def remains(self, *message: Any) -> Parts:
        raise AssertionError(f"a ring of one rank has had no message from anybody: {message}")

    def exchange(self, **message: Any) -> Pending:
        raise AssertionError(f"a ring of one rank has nobody to exchange with: {message}")

    def exchange_together(self, moves: Sequence[Move]) -> list[Pending]:
        raise AssertionError(f"a ring of one rank has nobody to exchange with: {moves}")


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in _NOT_SUPPORTED:
            raise TypeError(f"attention got an unknown argument {name!r}: expected those of the attention callable")
        nothing, reason = _NOT_SUPPORTED[name]
        if isinstance(value, Tensor) or value != nothing:
            raise TypeError(f"{name} was given to context-parallel attention: expected {nothing}, because {reason}")


# ---- batches ---------------------------------------------------------------------------------------------------------


def _documents(
    tensors: dict[str, Tensor | None], cu_seqlens: Tensor | Sequence[int] | None
) -> tuple[int, tuple[int, ...]]:
    """Rows B of the batch and the lengths of its documents, from arguments that are checked here."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is a {type(tensor).__name__}: expected a tensor")
    tokens = given["tokens"]
    leading = 1 if tokens.dim() == 1 else 2
    if tokens.dim() == 0 or (cu_seqlens is not None and leading == 2 and tokens.shape[0] != 1):
        expected = "(B, S)" if cu_seqlens is None else "(1, T) or (T,) with cu_seqlens"
        raise ValueError(f"tokens has shape {tuple(tokens.shape)}: expected {expected}")
    for name, tensor in given.items():
        if tensor.shape[:leading] != tokens.shape[:leading]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}: expected {tuple(tokens.shape[:leading])} in front, as tokens"
            )
    if "labels" in given and given["labels"].dim() != leading:
        raise ValueError(f"labels has shape {tuple(given['labels'].shape)}: expected {tuple(tokens.shape[:leading])}")
    rows, seqlen = (1, tokens.shape[0]) if leading == 1 else tokens.shape[:2]
    return rows, (seqlen,) * rows if cu_seqlens is None else _lengths(cu_seqlens, seqlen)


def _lengths(cu_seqlens: Tensor | Sequence[int], tokens: int) -> tuple[int, ...]:
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise TypeError(
                f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: expected integers (documents + 1,)"
            )
        cu_seqlens = cu_seqlens.tolist()
    borders = list(cu_seqlens)
    lengths = tuple(end - start for start, end in itertools.pairwise(borders))
    if not borders or borders[0] != 0 or borders[-1] != tokens or min(lengths, default=0) < 0:
        shown = str(borders) if len(borders) <= 8 else f"[{borders[0]}, {borders[1]}, ..., {borders[-1]}]"
        raise ValueError(f"cu_seqlens is {shown}: expected rising numbers from 0 to {tokens}, the number of tokens")
    return lengths


def _local_batch(attention: LocalAttention, tensors: dict[str, Tensor | None]) -> LocalBatch:
    tokens = tensors["tokens"]
    assert tokens is not None
    labels = tensors["labels"]
    has_features = tokens.dim() > 2
    if labels is None and not (has_features or tokens.is_floating_point()):
        labels = _next_tokens(tokens, attention.layout)
    extras = {name: t for name, t in tensors.items() if name not in ("tokens", "labels") and t is not None}
    leading = min(tokens.dim(), 2)
    positions = sharding.positions(attention.layout, attention.rank, tokens.device)
    return LocalBatch(
        tokens=_shard_rows(tokens, attention, leading),
        labels=None if labels is None else _shard_rows(labels, attention, leading),
        positions=positions.view(attention.shape),
        attention=attention,
        layout=attention.layout,
        rank=attention.rank,
        extras={name: _shard_rows(extra, attention, leading) for name, extra in extras.items()},
    )


def _shard_rows(tensor: Tensor, attention: LocalAttention, leading: int = 2) -> Tensor:
    """(B, S, ...), or (T, ...) if `leading` is 1, -> (B, S_local, ...)."""
    flat = tensor.flatten(0, 1) if leading == 2 else tensor
    local = sharding.shard(flat, attention.layout, attention.rank)
    return local.reshape(*attention.shape, *flat.shape[1:])


def _next_tokens(tokens: Tensor, layout: Layout) -> Tensor:
    """int64 labels of the same shape: the next token of the document, -100 at its end."""
    flat = tokens.flatten().to(torch.int64)
    nothing = flat.new_full((1,), -100)
    parts, start = [], 0
    for length in layout.documents:
        if length:
            parts += [flat[start + 1 : start + length], nothing]
        start += length
    return torch.cat(parts).view(tokens.shape) if parts else flat.view(tokens.shape)


def _name_of(layout: Layout) -> str:
    """Short, and another one for another layout."""
    # NOTE: a hash of nothing but integers, which is the same in every process.
    return f"{sum(layout.documents)} tokens in {len(layout.documents)} documents, layout {hash(layout):x}"


def _describe(tensors: dict[str, Tensor | None], lengths: tuple[int, ...]) -> str:
    given = [f"{name} {tuple(t.shape)} {t.dtype}" for name, t in sorted(tensors.items()) if t is not None]
    documents = str(lengths) if len(lengths) <= 8 else f"{len(lengths)} of {sum(lengths)} tokens in all"
    return f"{', '.join(given)}, documents {documents}"


def _difference(descriptions: list[str]) -> str:
    expected = f"expected the same whole batch on all {len(descriptions)} ranks of the context-parallel group"
    if len(set(descriptions)) == 1:
        return (
            f"the contents of tokens, labels or other tensors differ between ranks: {expected}, got {descriptions[0]} "
            "with other values; select data by the data-parallel rank alone"
        )
    return f"the ranks were given different batches: {expected}, got {_by_rank(descriptions)}"


def _by_rank(descriptions: list[str]) -> str:
    return "; ".join(f"rank {rank}: {each}" for rank, each in enumerate(descriptions))


def _contents(tensors: Any, even_on_device: bool) -> list[int]:
    """Checksums of the tensors that are on the CPU, or of all."""
    return [
        zlib.crc32(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        for tensor in tensors
        if tensor is not None and tensor.numel() and (tensor.device.type == "cpu" or even_on_device)
    ]


# ---- loss and gradients ----------------------------------------------------------------------------------------------


class _GlobalMean(torch.autograd.Function):
    """Sum over all ranks of `total` over that of `count`; its gradient is scaled for an average over the ranks."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor, groups: list[Any]) -> Tensor:
        sums = torch.stack((total.to(torch.float64), count.to(torch.float64)))
        for group in groups:
            dist.all_reduce(sums, group=group)
        everything, valid = sums[0], sums[1].clamp(min=1)
        ctx.scale = (_ranks(groups) / valid).to(total.dtype)
        return (everything / valid).to(total.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.scale, None, None


def _ranks(groups: list[Any]) -> int:
    ranks = 1
    for group in groups:
        ranks *= dist.get_world_size(group)
    return ranks


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one dtype and device, about _BUCKET elements together."""
    open_buckets: dict[Any, list[nn.Parameter]] = {}
    elements: dict[Any, int] = {}
    for parameter in parameters:
        kind = parameter.dtype, parameter.device
        open_buckets.setdefault(kind, []).append(parameter)
        elements[kind] = elements.get(kind, 0) + parameter.numel()
        if elements[kind] >= _BUCKET:
            elements[kind] = 0
            yield open_buckets.pop(kind)
    yield from open_buckets.values()


# ---- process groups --------------------------------------------------------------------------------------------------


def _process_group(group: Any, name: str) -> Any:
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"{name} is a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}: expected one dimension, "
                f"such as mesh['cp'], or, for ContextParallel, the two {PRODUCT}"
            )
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name} is a {type(group).__name__}: expected a 1-D DeviceMesh or a ProcessGroup")
    if dist.get_rank(group) < 0:
        raise ValueError(f"{name}: this process is not in the group; expected a group that it belongs to")
    return group


def _mode(group: Any, mode: str | None) -> tuple[str, Any, int | None]:
    """The mode, the group of all ranks, and, for a product, how many of them swap tokens for heads."""
    if isinstance(group, DeviceMesh) and group.mesh_dim_names == PRODUCT:
        if mode not in (None, "product"):
            raise ValueError(f"mode is {mode!r} with a mesh of the dimensions {PRODUCT}: expected None or 'product', "
                             "which such a mesh stands for; for others give a 1-D mesh of the same ranks")
        flat = group._flatten()
        ranks, in_group = group.mesh.flatten().tolist(), dist.get_process_group_ranks(flat.get_group())
        if ranks != in_group:
            raise ValueError(f"the mesh with the dimensions {PRODUCT} has its ranks in the order {ranks}: expected "
                             f"{in_group}, rising row by row, since rows swap tokens for heads")
        return "product", flat, group.size(1)
    if mode == "product":
        raise ValueError(f"mode is 'product': expected a 2-D mesh with the dimensions {PRODUCT}, which says how many "
                         "ranks each has; mode='auto' takes a product where it is faster")
    if mode not in (None, *MODES):
        raise ValueError(f"mode is {mode!r}: expected one of {', '.join(map(repr, MODES))}")
    return mode or "ring", group, None


def _host_group(group: Any, timeout: timedelta) -> Any:
    """A group of the same ranks whose messages don't pass through the device: the group itself where it can do both."""
    if "cpu:" in dist.get_backend_config(group):
        return group
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, backend="gloo", timeout=timeout, use_local_synchronization=True)


# ---- checking a model ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _observed(model: nn.Module, look: Callable[[tuple[str, int], nn.Module, Tensor], None]) -> Iterator[None]:
    """Inside, `model` is in eval mode and `look((name, call), module, output)` sees every tensor its modules return."""
    calls: dict[str, Iterator[int]] = {}
    modes = {module: module.training for module in model.modules()}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(first, Tensor) and first.is_floating_point() and first.dim() >= 2:
                look((name, next(calls.setdefault(name, itertools.count()))), module, first)

        return after

    handles = [module.register_forward_hook(hook(name or "model")) for name, module in model.named_modules()]
    model.eval()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes.items():
            module.training = training


def _relative_error(output: Tensor, expected: Tensor) -> float:
    if output.shape != expected.shape:
        return float("inf")
    difference = (output.double() - expected.double()).norm()
    return (difference / expected.double().norm().clamp(min=1e-12)).nan_to_num(float("inf")).item()


def _default_tolerance(dtype: torch.dtype) -> float:
    return 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
