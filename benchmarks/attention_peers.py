"""Who is timed: our kernel, cuDNN and others, each as a function of a case and its tensors."""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import timing
import torch
import torch.nn.functional as F
from attention_cases import Case, Inputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fa3_dist

T = TypeVar("T")
Call = Callable[[], Tensor]
Work = Callable[[], tuple[Tensor, ...]]  # what is timed of a call, with everything that it computes


class CannotRun(Exception):
    """Why a peer has no figure for a case; the text goes into the result file."""


class Peer(NamedTuple):
    """An implementation: `build` makes of a case and its inputs a call that returns out, in the layout of q."""

    about: str
    build: Callable[[Case, Inputs], Call]


def flash_attention(dense: Callable[..., Any], packed: Callable[..., Any], case: Case, x: Inputs) -> Call:
    """Functions with the interface of FlashAttention, which ours share."""
    window = (-1, -1) if case.left is None else (case.left, 0)
    options: dict[str, Any] = {"causal": case.causal, "window_size": window}
    if case.packed:
        longest = max(case.lengths)
        call = functools.partial(packed, x.q, x.k, x.v, x.cu_seqlens, x.cu_seqlens, longest, longest, **options)
    else:
        call = functools.partial(dense, x.q, x.k, x.v, **options)
    return lambda: _first(call())


def ours(case: Case, x: Inputs, deterministic: bool = False) -> Call:
    """The package's own functions."""
    functions = fa3_dist.flash_attn_func, fa3_dist.flash_attn_varlen_func
    dense, packed = (functools.partial(function, deterministic=deterministic) for function in functions)
    return flash_attention(dense, packed, case, x)


def _first(result: Any) -> Tensor:
    """out of what a function returns, which in some versions is (out, lse)."""
    return result[0] if isinstance(result, tuple) else result


def sdpa(backend: SDPBackend, case: Case, x: Inputs) -> Call:
    """torch's scaled_dot_product_attention on one backend, on transposed views: no copies."""
    if case.packed or case.left is not None:
        raise CannotRun("scaled_dot_product_attention takes no packed sequences and no window")
    return functools.partial(sdpa_func, backend, x.q, x.k, x.v, causal=case.causal)


def sdpa_func(
    backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, softmax_scale: float | None = None
) -> Tensor:
    """scaled_dot_product_attention in our layout: q (B, S, H, D), k and v (B, S, Hkv, D) -> out (B, S, H, D)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(backend):
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=gqa)
    return out.transpose(1, 2)


def torch_flash(case: Case, x: Inputs) -> Call:
    """The FlashAttention-2 inside torch: through its varlen_attn where scaled_dot_product_attention cannot say it."""
    if not case.packed and case.left is None:
        return sdpa(SDPBackend.FLASH_ATTENTION, case, x)
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise CannotRun(f"torch {torch.__version__} has no varlen_attn") from None
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = (-1 if case.left is None else case.left, 0 if case.causal else -1)
    elif case.left is None:
        options["is_causal"] = case.causal
    else:
        raise CannotRun(f"varlen_attn of torch {torch.__version__} has no windows")
    if case.heads != case.kv_heads and "enable_gqa" in known:
        options["enable_gqa"] = True
    q, k, v = (t.flatten(0, -3) for t in x[:3])
    longest = max(case.lengths)
    call = functools.partial(varlen_attn, q, k, v, x.cu_seqlens, x.cu_seqlens, longest, longest, **options)
    return lambda: _first(call()).view(*x.q.shape[:-1], case.head_dim_v)


def flex_attention(case: Case, x: Inputs) -> Call:
    """torch's FlexAttention, compiled for this case (which takes it many seconds)."""
    from torch.nn.attention import flex_attention as flex

    torch._dynamo.reset()  # else the limit on recompilations ends in the slow eager form
    torch._functorch.config.donated_buffer = False  # else its backward runs only once a forward
    q, k, v = ((t.unsqueeze(0) if case.packed else t).transpose(1, 2) for t in x[:3])
    seqlen = q.shape[2]
    left = seqlen if case.left is None else case.left
    tokens = torch.arange(seqlen, dtype=torch.int32, device=q.device)
    document = torch.searchsorted(x.cu_seqlens, tokens, right=True) if case.packed else torch.zeros_like(tokens)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (j >= i - left) & (document[i] == document[j])

    mask = None
    if case.causal:
        mask = torch.compile(flex.create_block_mask)(visible, None, None, seqlen, seqlen, device=q.device.type)
    attend = functools.partial(
        torch.compile(flex.flex_attention, dynamic=False), q, k, v, block_mask=mask,
        enable_gqa=case.heads != case.kv_heads,
    )
    return lambda: attend().transpose(1, 2).view(*x.q.shape[:-1], case.head_dim_v)


def find_peers() -> dict[str, Peer | str]:
    """Every peer there could be, ours first: the peer, or why it is not here."""
    found: dict[str, Peer | str] = {
        "ours": Peer(f"fa3_dist {fa3_dist.__version__}", ours),
        "cudnn": Peer(
            f"cuDNN {timing.cudnn_version()} through torch", functools.partial(sdpa, SDPBackend.CUDNN_ATTENTION)
        ),
        "fa2": Peer(f"FlashAttention-2 of torch {torch.__version__}", torch_flash),
    }
    for name, module_name in (("fa3", "flash_attn_interface"), ("flash_attn", "flash_attn")):
        try:
            module = importlib.import_module(module_name)
            functions = module.flash_attn_func, module.flash_attn_varlen_func
        except (ImportError, OSError, AttributeError) as error:
            found[name] = f"{module_name} does not import: {_one_line(error)}"
        else:
            version = getattr(module, "__version__", "of unknown version")
            found[name] = Peer(f"{module_name} {version}", functools.partial(flash_attention, *functions))
    found["flex"] = Peer(f"FlexAttention of torch {torch.__version__}", flex_attention)
    return found


def forward_work(build: Callable[[Case, Inputs], Call], case: Case, x: Inputs) -> Work:
    """A peer's out."""
    call = build(case, x)
    return lambda: (call(),)


def backward_work(build: Callable[[Case, Inputs], Call], case: Case, x: Inputs) -> Work:
    """A peer's gradients of q, k and v, through autograd: all that a user's backward runs, after one forward."""
    out = build(case, x)()
    return lambda: torch.autograd.grad(out, x[:3], x.dout, retain_graph=True)


BY_REQUEST = ("flex",)  # peers that run only if --peers names them: they compile for every case


def choose_peers(found: dict[str, Peer | str], wanted: Sequence[str]) -> dict[str, Peer]:
    """Ours and the wanted ones; without a wish all that are here but those BY_REQUEST.

    Raises ValueError for a wanted peer that is unknown or not here.
    """
    for name in wanted:
        if name not in found:
            raise ValueError(f"unknown peer '{name}': the peers are {', '.join(found)}")
        if isinstance(reason := found[name], str):
            raise ValueError(f"peer '{name}' is not here: {reason}")
    names = [name for name in found if name == "ours" or (name in wanted if wanted else name not in BY_REQUEST)]
    return {name: peer for name in names if isinstance(peer := found[name], Peer)}


def _one_line(error: BaseException | str, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def first_result(call: Callable[[], T]) -> T:
    """A call's result, waited for. Raises CannotRun where the call fails, with what it said and warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return result
        except CannotRun:
            raise
        except Exception as error:
            if "CUDA error" in str(error):  # the GPU's context is lost: nothing measured after this would mean anything
                raise
            said = [_one_line(error), *(_one_line(warning.message, 150) for warning in caught)]
            raise CannotRun("; ".join(dict.fromkeys(said))) from error
