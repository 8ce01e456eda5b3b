"""Attention for transformers' models: `register()`, then `attn_implementation="fa3_dist"`.

    from fa3_dist.integrations import huggingface
    huggingface.register()
    model.set_attn_implementation("fa3_dist")          # or from_pretrained(..., attn_implementation="fa3_dist")

transformers calls two functions of ours. `make_mask`, once a forward and kind of layer, is told which queries may see
which keys; it answers with a short table of ranges instead of a (B, 1, Sq, Sk) mask. `attention_forward`, once a layer,
runs the operators over that table. Causal, sliding-window and bidirectional attention, left and right padding, packed
documents and key/value caches are ranges and bounds; whatever is not (prefix-LM, chunks, arbitrary 4-D masks, ...)
raises. Rows of padding get 0.

Sharded sequences: `model(**inputs(batch))` with a batch of ContextParallel, or `with attention(batch.attention): ...`.

Shapes here: query (B, Hq, Sq, D), key (B, Hkv, Sk, D), value (B, Hkv, Sk, Dv), as transformers has them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
except ImportError as error:
    raise ImportError(
        "fa3_dist.integrations.huggingface needs transformers 4.56 or newer: pip install 'transformers>=4.56'"
    ) from error

from fa3_dist import ops
from fa3_dist.interface import Attention, apply_sink
from fa3_dist.parallel import sharding
from fa3_dist.parallel.context import LocalAttention, LocalBatch

_attention: ContextVar[Attention | None] = ContextVar("fa3_dist_attention", default=None)
_open_blocks: list[None] = []  # of `attention(...)`, in any thread: torch.compile can ask a list, but no ContextVar

# What an index function of transformers says without being asked; others are probed.
_PLAIN = [getattr(masking_utils, f"{name}_mask_function", None) for name in ("causal", "bidirectional")]

_EXPECTED = (
    "fa3_dist expected causal, sliding-window or bidirectional attention, with padding at the ends of rows or packed "
    "documents; use attn_implementation='sdpa' for other masks"
)
_NO_PADDING = (
    "attention_mask has padding and an attention callable was given: expected no padding, pack the documents of a "
    "sharded batch instead, ContextParallel.shard(tokens, cu_seqlens=...)"
)

# Arguments that change the result and that we have no answer to.
_REFUSED = {
    "position_bias": "a bias on the scores",
    "head_mask": "a mask of heads",
    "cache": "a paged key/value cache (continuous batching)",
    "block_table": "a paged key/value cache (continuous batching)",
    "output_attentions": "attention probabilities, which are never formed",
}


def register(name: str = "fa3_dist") -> None:
    """Makes `attn_implementation=name` known to transformers. Calling it again changes nothing.

    Raises:
        ValueError: the name contains "flash", which transformers takes for its own FlashAttention back ends.
    """
    if "flash" in name:
        raise ValueError(f"name is {name!r}: expected one without 'flash', a mark that transformers keeps for its own")
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, make_mask)


@contextlib.contextmanager
def attention(callable_: Attention) -> Iterator[None]:
    """Runs the models called inside with an attention callable, `batch.attention` of a sharded batch say.

    For models and trainers without a way for a keyword. Where there is one, `model(..., attention=callable_)` does the
    same and works with activation checkpointing too, whose recomputation happens outside of the block (which raises).
    """
    token = _attention.set(callable_)
    _open_blocks.append(None)
    try:
        yield
    finally:
        _open_blocks.pop()
        _attention.reset(token)


def _injected() -> Attention | None:
    return _attention.get() if _open_blocks else None


def inputs(batch: LocalBatch) -> dict[str, Any]:
    """Keyword arguments that run a model of transformers on a sharded batch: model(**inputs(batch)).logits.

    Raises:
        ValueError: a rank has no tokens, which transformers' models cannot run on; raised on all ranks.
    """
    empty = [rank for rank in range(batch.layout.world) if batch.layout.tokens(rank) == 0]
    if empty:
        raise ValueError(
            f"ranks {empty} of {batch.layout.world} have no tokens of this batch: expected at least one each, "
            "transformers' models cannot run on none; use fewer ranks, or more tokens a batch"
        )
    return {
        "input_ids": batch.tokens, "position_ids": batch.positions, "attention": batch.attention, "use_cache": False,
    }


def document_mask(position_ids: Tensor) -> Tensor:
    """The mask of documents packed into rows, for `model(..., position_ids=position_ids, attention_mask=...)`.

    transformers separates packed documents by itself, but not if there is an attention_mask or a cache, not in every
    model (gpt-oss), and not in one that torch.compile makes one graph of. This is for those cases, called once a batch.

    Args:
        position_ids: (B, S) int64; a document starts where they do not go on by 1.
    """
    starts = torch.nn.functional.pad(position_ids.diff() != 1, (1, 0), value=True)
    return Pattern(None, 0, _documents(starts)).encode()


# ---- masks -----------------------------------------------------------------------------------------------------------


class Pattern(NamedTuple):
    """Which keys a query sees: bounds as in `ops.forward`, inside ranges of the flattened batch.

    ranges: int32 (n, 5), q_start, q_len, k_start, k_len, offset; or (n, 2), start and length of packed documents;
    (0, 5): each row of the batch is one sequence, queries and keys aligned at their ends; (0, 0): what the attention
    callable of `attention(...)` knows.
    """

    left: int | None
    right: int | None
    ranges: Tensor

    def encode(self) -> Tensor:
        """As a 4-D tensor, the form that transformers hands on untouched: (left + 2, right + 2, n, columns).

        Bounds are sizes of dimensions (of stride 0: no memory) because a size is known without asking the device.
        """
        left, right = (-1 if bound is None else bound for bound in (self.left, self.right))
        return self.ranges[None, None].expand(left + 2, right + 2, *self.ranges.shape)

    @staticmethod
    def decode(mask: Tensor) -> Pattern:
        left, right = (None if size == 1 else size - 2 for size in mask.shape[:2])
        return Pattern(left, right, mask[0, 0])


def make_mask(
    batch_size: int, kv_length: int, mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None, *, q_length: int | None = None, q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0, cache_position: Tensor | None = None, local_size: int | None = None,
    use_vmap: bool = False, device: torch.device | str | None = None, **others: Any,
) -> Tensor:
    """transformers' mask interface: the `Pattern` of a forward, encoded. Reads a few numbers from the device.

    Args:
        mask_function: (batch, head, query, key) indices -> visible, padding left aside.
        attention_mask: (B, tokens so far), True for tokens and False for padding.
        q_length, q_offset: queries are at positions q_offset, q_offset + 1, ... (transformers 4: cache_position).
        kv_length, kv_offset: the same for keys.
        local_size: the sliding window; with causal attention a query counts as one of its own keys.
        others: allow_is_bidirectional_skip marks attention that is not causal; the rest does not concern us.

    Raises:
        ValueError: a pattern that is not one of bounds and ranges. While torch.compile traces, nothing can be read: the
            same checks are assertions on the device, and packed documents fail them.
    """
    if cache_position is not None:
        q_length, q_offset, device = cache_position.shape[0], cache_position[0], cache_position.device
    assert q_length is not None
    causal = "allow_is_bidirectional_skip" not in others
    left, right = local_size, 0 if causal else local_size
    if causal and left is not None:
        left -= 1
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}: expected (B, tokens); {_EXPECTED}")
    if use_vmap:
        raise ValueError(f"the model adds a mask function of its own: {_EXPECTED}")
    if _injected() is not None:
        _refuse_padding(attention_mask)
        return Pattern(left, right, torch.empty(0, 0, dtype=torch.int32, device=device)).encode()
    if not _compiling():
        q_offset, kv_offset = int(q_offset), int(kv_offset)
    sizes = _Sizes(batch_size, q_length, kv_length, q_offset, kv_offset, device)
    if mask_function is not None and mask_function not in _PLAIN:
        starts = _check_pattern(mask_function, left, right, sizes, may_be_packed=attention_mask is None)
        if starts is not None:
            return Pattern(left, right, _documents(starts)).encode()
    return Pattern(left, right, _ranges(attention_mask, left, right, sizes)).encode()


class _Sizes(NamedTuple):
    """Queries are at positions q_offset, q_offset + 1, ..., keys at kv_offset, kv_offset + 1, ..."""

    batch: int
    q_length: int
    kv_length: int
    q_offset: Any  # int, or a tensor while torch.compile traces
    kv_offset: Any
    device: torch.device | str | None


def _check_pattern(
    mask_function: Callable[..., Tensor], left: int | None, right: int | None, sizes: _Sizes, may_be_packed: bool
) -> Tensor | None:
    """Checks that mask_function is what the bounds say, by asking it about keys on both sides of either bound.

    Returns: (B, Sq) bool, where documents start, or None if every row is one document.
    """
    rows = torch.arange(sizes.batch, device=sizes.device)[:, None]
    query = torch.arange(sizes.q_length, device=sizes.device)[None] + sizes.q_offset
    start = first = query * 0 + sizes.kv_offset
    last = first + sizes.kv_length - 1

    def visible(key: Tensor) -> Tensor:
        key = torch.minimum(torch.maximum(key, first), last)
        return mask_function(rows, rows * 0, query, key).expand(sizes.batch, sizes.q_length)

    document_starts = None
    if may_be_packed and right == 0 and left != 0 and sizes.q_length == sizes.kv_length and not _compiling():
        document_starts = ~visible(query - 1)
        document_starts[:, 0] = True
        start = torch.where(document_starts, query, 0).cummax(dim=1).values
    low = start if left is None else torch.maximum(start, query - left)
    high = last if right is None else torch.minimum(last, query + right)
    inside = (low, high, (low + high) // 2, torch.minimum(torch.maximum(query - 1, low), high))
    sees = torch.stack([visible(key) for key in inside]).all(dim=0) | (low > high)
    no_more_before = ~(visible(low - 1) | visible(first)) | (low <= first)
    no_more_after = ~(visible(high + 1) | visible(last)) | (high >= last)
    fits = (sees & no_more_before & no_more_after).all()
    if _compiling():
        packed = "documents are packed (compiling, pass attention_mask=document_mask(position_ids))"
        torch._assert_async(fits, f"the model's mask has another pattern, or {packed}: {_EXPECTED}")
    elif not fits:
        raise ValueError(f"the model's mask has another pattern: {_EXPECTED}")
    return document_starts if document_starts is not None and document_starts[:, 1:].any() else None


def _documents(starts: Tensor) -> Tensor:
    """(B, Sq) bool, document starts -> (n, 2), their starts and lengths in the flattened batch."""
    start = starts.flatten().nonzero().flatten()
    return torch.stack((start, start.diff(append=start.new_tensor([starts.numel()]))), dim=1).to(torch.int32)


def _ranges(padding: Tensor | None, left: int | None, right: int | None, sizes: _Sizes) -> Tensor:
    """The ranges of a batch whose rows are one sequence each: (B, 5), or (0, 5) where nothing needs saying."""
    kv_end = sizes.kv_offset + sizes.kv_length
    aligned: bool | Tensor = left is None and right is None or sizes.q_offset + sizes.q_length == kv_end
    if padding is None:
        first = torch.zeros(sizes.batch, dtype=torch.int64, device=sizes.device)
        end = first + kv_end
    else:
        tokens = (padding != 0).to(torch.int64)
        first = tokens.argmax(dim=1)
        end = first + tokens.sum(dim=1)
        _check_contiguous(tokens, first, end)
    if aligned is True and (padding is None or not _compiling() and not first.any() and bool((end == kv_end).all())):
        return torch.empty(0, 5, dtype=torch.int32, device=sizes.device)
    k_first, k_end = (x.clamp(sizes.kv_offset, kv_end) for x in (first, end))
    if right != 0:  # not causal: queries may be another sequence than the keys, whose padding says nothing of them
        first, end = first * 0, first * 0 + sizes.q_offset + sizes.q_length
    q_first, q_end = (x.clamp(sizes.q_offset, sizes.q_offset + sizes.q_length) for x in (first, end))
    row = torch.arange(sizes.batch, device=first.device)
    q_start = row * sizes.q_length + q_first - sizes.q_offset
    k_start = row * sizes.kv_length + k_first - sizes.kv_offset
    columns = (q_start, q_end - q_first, k_start, k_end - k_first, q_first - k_first)
    return torch.stack(columns, dim=1).to(torch.int32)


def _check_contiguous(tokens: Tensor, first: Tensor, end: Tensor) -> None:
    index = torch.arange(tokens.shape[1], device=tokens.device)
    whole = (((index >= first[:, None]) & (index < end[:, None])) == tokens.bool()).all()
    message = f"attention_mask has padding between tokens of a row: {_EXPECTED}"
    if _compiling():
        torch._assert_async(whole, message)
    elif not whole:
        raise ValueError(message)


def _refuse_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None and (_compiling() or not bool(attention_mask.all())):
        raise ValueError(_NO_PADDING)


def _compiling() -> bool:
    return torch.compiler.is_compiling()


# ---- attention -------------------------------------------------------------------------------------------------------


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None, softcap: float | None = None,
    is_causal: bool | None = None, s_aux: Tensor | None = None, attention: Attention | None = None,
    position_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        attention_mask: what `make_mask` returned, or (B, Sk) padding. None: no padding, queries and keys aligned at
            their ends, causal if the module is.
        sliding_window: keys that a causal query sees, itself included.
        s_aux: (Hq,) learnable sinks.
        attention: attention callable to use instead of ours; it knows which tokens are one sequence.
        cu_seq_lens_q, cu_seq_lens_k: (n + 1,) documents packed into one row.

    Returns:
        (B, Sq, Hq, Dv), and None for the attention probabilities, which are never formed.

    Raises:
        ValueError: dropout > 0, or an argument or mask that we cannot honour.
    """
    _refuse(module, dropout, others)
    q, k, v = _prepare(query, key, value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    pattern = _pattern(attention_mask, causal, sliding_window, q.shape, k.shape[1], q.device)
    first_layer = getattr(module, "layer_idx", None) in (0, None)  # what is the same for all layers is checked once
    injected = _injected() if attention is None else attention
    if injected is None:
        return _attend(q, k, v, pattern, position_ids if first_layer else None, cu_seq_lens_q, cu_seq_lens_k, s_aux,
                       softmax_scale=scaling, softcap=softcap or 0.0), None
    if pattern.ranges.shape[1] == 5 and pattern.ranges.shape[0] > 0:
        raise ValueError(f"{_NO_PADDING} (or key/value cache)")
    if first_layer:
        _check_positions(injected, position_ids, q.shape)
    left, right = (-1 if bound is None else bound for bound in (pattern.left, pattern.right))
    out = injected(
        q, k, v, softmax_scale=scaling, causal=right == 0, window_size=(left, -1 if right == 0 else right),
        softcap=softcap or 0.0, sink=s_aux,
    )
    return out, None


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, position_ids: Tensor | None, cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None, sink: Tensor | None, **scores: Any,
) -> Tensor:
    """Attention over a pattern, all tensors (B, S, H, D)."""
    count, columns = pattern.ranges.shape
    if columns == 0:
        raise ValueError(
            "a layer runs outside of the attention(...) block that the model was called in, as it does when activation "
            "checkpointing recomputes it: call the model with attention=... instead of opening a block"
        )
    scores |= {"window_left": pattern.left, "window_right": pattern.right}
    ranges: dict[str, Any]
    if cu_seq_lens_q is not None and cu_seq_lens_k is not None:
        if count > 0 and columns == 5:
            raise ValueError("attention_mask with padding was given together with cu_seq_lens_q: expected one of them")
        ranges = {
            f"{side}_{name}": column
            for side, bounds in (("q", cu_seq_lens_q.to(torch.int32)), ("k", cu_seq_lens_k.to(torch.int32)))
            for name, column in (("start", bounds[:-1]), ("len", bounds.diff()))
        }
    elif count > 0:
        names = ("q_start", "q_len", "k_start", "k_len", "offsets")
        table = pattern.ranges.unbind(1)
        ranges = dict(zip(names, table if columns == 5 else table * 2))
    else:
        _refuse_unseen_documents(position_ids, pattern, q.shape[1], k.shape[1])
        out, lse = ops.forward(q, k, v, **scores)
        return out if sink is None else apply_sink(out, lse, sink)
    batch = q.shape[0]
    q, k, v = (rearrange(x, "b s h d -> (b s) h d") for x in (q, k, v))
    out, lse = ops.forward(q, k, v, **ranges, **scores)
    out = out if sink is None else apply_sink(out, lse, sink)
    return rearrange(out, "(b s) h d -> b s h d", b=batch)


def _refuse(module: nn.Module, dropout: float, others: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(
            f"{type(module).__name__} has attention dropout {dropout}: expected 0, set config.attention_dropout = 0"
        )
    for name, what in _REFUSED.items():
        value = others.get(name)
        if value is not None and value is not False:
            raise ValueError(
                f"{type(module).__name__} passes {name}, {what}: fa3_dist does not support it, use "
                "attn_implementation='eager' or 'sdpa'"
            )


def _prepare(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, S, H, D) views of one dtype: autocast's, else the value's (rotary embeddings and norms may return fp32)."""
    dtype = value.dtype
    if torch.is_autocast_enabled(value.device.type) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(value.device.type)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (query, key, value))
    return q, k, v


def _pattern(
    mask: Tensor | None, causal: bool, sliding_window: int | None, q_shape: torch.Size, kv_length: int,
    device: torch.device,
) -> Pattern:
    """What the mask says, or the layer where there is none; a causal layer's own window counts in any case."""
    if mask is not None and (mask.dim() not in (2, 4) or mask.dim() == 4 and mask.dtype != torch.int32):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)} and dtype {mask.dtype}: {_EXPECTED}")
    if mask is None or mask.dim() == 2:
        if sliding_window is not None and not causal:
            raise ValueError(f"the layer has a window of {sliding_window}, is not causal and has no mask: {_EXPECTED}")
        call: dict[str, Any] = {"q_length": q_shape[1], "q_offset": kv_length - q_shape[1], "device": device}
        if not causal:
            call["allow_is_bidirectional_skip"] = True
        mask = make_mask(q_shape[0], kv_length, None, mask, **call)
    pattern = Pattern.decode(mask)
    if sliding_window is None or pattern.right != 0:
        return pattern
    left = sliding_window - 1
    return pattern._replace(left=left if pattern.left is None else min(left, pattern.left))


def _refuse_unseen_documents(position_ids: Tensor | None, pattern: Pattern, q_length: int, kv_length: int) -> None:
    """Raises if positions tell of packed documents that the model's mask leaves together (see `document_mask`)."""
    if position_ids is None or position_ids.dim() != 2 or pattern.right != 0 or _compiling():
        return
    if q_length == kv_length > 1 and bool((position_ids.diff() <= 0).any()):
        raise ValueError(
            "position_ids start again inside of a row, as they do for packed documents, but transformers made no mask "
            "that separates those; it does so only without attention_mask and cache (use_cache=False), and not in all "
            "models: expected attention_mask=huggingface.document_mask(position_ids)"
        )


def _check_positions(attention: Attention, position_ids: Tensor | None, q_shape: torch.Size) -> None:
    """Raises if a sharded attention's model counts positions for itself, as transformers' models do by default."""
    if not isinstance(attention, LocalAttention) or _compiling():
        return
    expected = sharding.positions(attention.layout, attention.rank).reshape(q_shape[:2])
    if position_ids is None or not torch.equal(position_ids.cpu().expand_as(expected), expected):
        raise ValueError(
            "position_ids are not those of the shard's tokens: expected position_ids=batch.positions (`inputs(batch)` "
            "has everything), because an index in the shard is not a position"
        )
