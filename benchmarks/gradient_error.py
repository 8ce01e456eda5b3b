"""Error that attention makes in a whole model's gradients: `python benchmarks/gradient_error.py`.

The model of end_to_end.py trains for some steps with our attention. Then, for each of a few batches, the gradients of
all its weights are computed three times from the same weights, with our attention, with cuDNN's and with attention in
fp32; all else is in bf16 each time. Of ours and of cuDNN's, against those of fp32:

    error    relative L2
    along    how much longer, relatively, they are along the gradients of fp32: steps that are always too long or short
    repeats  cosine between the errors of this batch and of the one before: rounding leaves none, a bias adds up

Gradients of weights in bf16 are in bf16, each time. That adds to small errors, and so hides part of what one has more
than the other: if everything were rounded at random, a ratio of 1.2 would read 1.1.

Losses of long runs tell little of this: any two runs drift apart, as far as the learning rate makes them.

Bars: ours, of all batches together, makes at most WORSE times cuDNN's error, is at most ALONG too long or too short,
and repeats at most REPEATS of it. The exit status is 1 if one is missed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import end_to_end
import timing
import torch
import torch.nn.functional as F
from torch import Tensor

import fa3_dist
from fa3_dist.interface import Attention

sys.path.insert(0, str(timing.ROOT / "examples"))

import train  # noqa: E402
from data import Batch, Sequences, python_sources, read_documents  # noqa: E402

WORSE, ALONG, REPEATS = 1.1, 3e-4, 0.05
QUERIES = 1024  # that fp32 attention computes at a time


# ---- attention in fp32 -----------------------------------------------------------------------------------------------


class _Fp32Attention(torch.autograd.Function):
    """Causal attention in fp32, written from its formula; inputs and results are rounded to their own dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        q_HSD, k_HSD, v_HSD = _by_heads(q, k, v)
        out_HSD, lse_HS = torch.empty_like(q_HSD), q_HSD.new_empty(q_HSD.shape[:2])
        for rows, end in _blocks(q.shape[1]):
            scores = _scores(q_HSD, k_HSD, rows, end, scale)
            lse_HS[:, rows] = scores.logsumexp(-1)
            out_HSD[:, rows] = scores.sub_(lse_HS[:, rows, None]).exp_() @ v_HSD[:, :end]
        ctx.save_for_backward(q, k, v, out_HSD, lse_HS)
        ctx.scale = scale
        return out_HSD.transpose(0, 1)[None].to(q.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out_HSD, lse_HS = ctx.saved_tensors
        q_HSD, k_HSD, v_HSD = _by_heads(q, k, v)
        (dout_HSD,) = _by_heads(grads[0])
        delta_HS = (out_HSD * dout_HSD).sum(-1)
        dq, dk, dv = (torch.zeros_like(x) for x in (q_HSD, k_HSD, v_HSD))
        for rows, end in _blocks(q.shape[1]):
            weights = _scores(q_HSD, k_HSD, rows, end, ctx.scale).sub_(lse_HS[:, rows, None]).exp_()
            dv[:, :end] += weights.mT @ dout_HSD[:, rows]
            dweights = dout_HSD[:, rows] @ v_HSD[:, :end].mT
            dscores = dweights.sub_(delta_HS[:, rows, None]).mul_(weights).mul_(ctx.scale)
            dq[:, rows] = dscores @ k_HSD[:, :end]
            dk[:, :end] += dscores.mT @ q_HSD[:, rows]
        dk, dv = (x.unflatten(0, (k.shape[2], -1)).sum(1) for x in (dk, dv))
        return *(x.transpose(0, 1)[None].to(q.dtype) for x in (dq, dk, dv)), None


def _by_heads(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """(1, S, H, D) as (H, S, D) in fp32, KV heads as often as they have query heads."""
    return tuple(x[0].transpose(0, 1).float().repeat_interleave(q.shape[2] // x.shape[2], 0) for x in (q, *others))


def _blocks(seqlen: int) -> list[tuple[slice, int]]:
    """Rows of queries, and how many keys the last of them sees."""
    ends = [min(first + QUERIES, seqlen) for first in range(0, seqlen, QUERIES)]
    return [(slice(end - ((end - 1) % QUERIES + 1), end), end) for end in ends]


def _scores(q_HSD: Tensor, k_HSD: Tensor, rows: slice, end: int, scale: float) -> Tensor:
    """Scaled scores of these rows and the keys before `end`, -inf where a key comes after its query."""
    scores = (q_HSD[:, rows] @ k_HSD[:, :end].mT).mul_(scale)
    own = torch.ones(end - rows.start, end - rows.start, dtype=torch.bool, device=scores.device)
    scores[:, :, rows.start :].masked_fill_(own.triu_(1), -math.inf)
    return scores


def fp32_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, sink: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """Attention in fp32 as layers call it; ValueError for what it cannot do."""
    if not causal or tuple(window_size) != (-1, -1) or softcap or sink is not None or len(q) != 1:
        raise ValueError("fp32_attention got a window, softcap, sink, batch or no mask: expected one causal sequence")
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return _Fp32Attention.apply(q, k, v, scale)


# ---- errors ----------------------------------------------------------------------------------------------------------


def gradients(model: torch.nn.Module, attention: Attention, batch: Batch) -> tuple[float, list[Tensor]]:
    """Loss, and its gradients in fp32, in the order of the model's parameters."""
    logits = model(batch.tokens.to(end_to_end.DEVICE), attention=attention)
    loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.to(end_to_end.DEVICE).flatten())
    loss.backward()
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.float())
        parameter.grad = None
    return loss.item(), found


def product(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Of two lists of tensors as if each were one vector."""
    return sum(torch.dot(x.flatten(), y.flatten()).item() for x, y in zip(a, b, strict=True))


def measure(trainee: end_to_end.Trainee, batches: Sequence[Batch]) -> list[dict[str, Any]]:
    """Of every batch its loss and the length of its gradients with fp32, and by attention the products of errors."""
    measured = []
    errors_before: dict[str, list[Tensor]] = {}
    for i, batch in enumerate(batches):
        loss, wanted = gradients(trainee.model, fp32_attention, batch)
        of_batch: dict[str, Any] = {"loss": loss, "squared": product(wanted, wanted), "attention": {}}
        for name, attention in end_to_end.attentions().items():
            own_loss, got = gradients(trainee.model, attention, batch)
            errors = [a.sub_(b) for a, b in zip(got, wanted, strict=True)]
            of_batch["attention"][name] = {
                "loss_difference": own_loss - loss,
                "squared_error": product(errors, errors),
                "error_times_gradient": product(errors, wanted),
                "error_times_error_before": product(errors, errors_before[name]) if name in errors_before else None,
            }
            errors_before[name] = errors
        measured.append(of_batch)
        print(f"[batch {i + 1}/{len(batches)}] loss {loss:.4f}, gradient's length {of_batch['squared'] ** 0.5:.3g}",
              flush=True)  # fmt: skip
    return measured


def summarise(batches: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """error, along and repeats (see above) of all batches together, and the mean difference of the loss, in nats."""
    squared = sum(batch["squared"] for batch in batches)
    summary = {}
    for name in batches[0]["attention"]:
        of = [batch["attention"][name] for batch in batches]
        lengths = [math.sqrt(one["squared_error"]) for one in of]
        pairs = sum(a * b for a, b in zip(lengths, lengths[1:]))
        summary[name] = {
            "error": math.sqrt(sum(one["squared_error"] for one in of) / squared),
            "along": sum(one["error_times_gradient"] for one in of) / squared,
            "repeats": sum(one["error_times_error_before"] for one in of[1:]) / pairs if pairs else 0.0,
            "loss_difference": sum(one["loss_difference"] for one in of) / len(of),
        }
    return summary


def complain(summary: dict[str, dict[str, float]]) -> list[str]:
    """Bars that are missed."""
    ours, cudnn = summary["ours"], summary["cudnn"]
    complaints = []
    if not ours["error"] <= WORSE * cudnn["error"]:
        complaints.append(f"error {ours['error']:.2e}: {WORSE} x cuDNN's {cudnn['error']:.2e} is the bar")
    for name, bar in (("along", ALONG), ("repeats", REPEATS)):
        if not abs(ours[name]) <= bar:
            complaints.append(f"{name} {ours[name]:+.1e}: {bar:.0e} is the bar")
    return complaints


# ---- command line ----------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Error that attention makes in a whole model's gradients.")
    add = parser.add_argument
    add("--model", choices=train.MODELS, default="1b3", help="as in examples/train.py (default: 1b3)")
    add("--seqlen", type=int, default=32768, help="tokens of a sequence (default: 32768)")
    add("--steps", type=int, default=50, help="that it trains before (default: 50)")
    add("--batches", type=int, default=6, help="whose gradients are computed (default: 6)")
    add("--seed", type=int, default=0, help="of weights and order of data (default: 0)")
    add("--lr", type=float, default=end_to_end.LR, help=f"peak learning rate (default: {end_to_end.LR})")
    add("--data", type=Path, default=python_sources(), help="folder of text (default: Python's own sources)")
    add("--output", type=Path, help="result file (default: benchmarks/results/gradient_error_GPU.json if no other flag "
        "is given, else none)")  # fmt: skip
    parsed = parser.parse_args(arguments)
    if min(parsed.steps, parsed.seqlen) < 1 or parsed.batches < 2:
        parser.error("expected --steps and --seqlen of 1 or more, --batches of 2 or more")
    if trouble := timing.why_no_hopper() or timing.why_no_library():
        print(trouble, file=sys.stderr)
        return 2
    os.environ["FA3_DIST_STRICT"] = "1"  # our kernels or none
    torch.set_float32_matmul_precision("highest")  # the environment may ask for less
    started = time.monotonic()
    flags = {name: getattr(parsed, name) for name in ("model", "seqlen", "steps", "batches", "seed", "lr")}
    is_whole = all(getattr(parsed, name) == parser.get_default(name) for name in (*flags, "data"))
    text, _ = read_documents(parsed.data, "*.py" if parsed.data == python_sources() else "*")
    config = train.transformer_config(
        argparse.Namespace(**train.MODELS[parsed.model], checkpoint_activations=False), end_to_end.EMBED_STD
    )
    sequences = Sequences(text, parsed.seqlen, packing=False, size=1, seed=parsed.seed)
    trainee = end_to_end.Trainee(config, fa3_dist.flash_attn_func, parsed.seed, parsed.lr, compile=False)
    for step in range(parsed.steps):
        loss, _ = trainee.step(sequences.step(step), train.schedule(step, end_to_end.STEPS))
        if step % 10 == 0 or step + 1 == parsed.steps:
            print(f"[step {step + 1}/{parsed.steps}] loss {loss:.4f}", flush=True)
    batches = measure(trainee, [sequences.step(parsed.steps + i) for i in range(parsed.batches)])
    summary = summarise(batches)
    complaints = complain(summary)
    for name, figures in summary.items():
        print(
            f"{name:<6} error {figures['error']:.2e}, along {figures['along']:+.1e}, "
            f"repeats {figures['repeats']:+.3f}, loss {figures['loss_difference']:+.1e} nats"
        )
    header = timing.measured_on()
    output = parsed.output or (timing.default_output("gradient_error", header["device"]) if is_whole else None)
    if output:
        timing.write_result(output, {
            "benchmark": "gradient_error", **header, **flags, "text": f"{text}, {text.digest()}", "batches": batches,
            "summary": {**summary, "complaints": complaints},
        })  # fmt: skip
        print(f"written: {output}")
    print(f"{time.monotonic() - started:.0f} s")
    return timing.exit_status(complaints)


if __name__ == "__main__":
    sys.exit(main())
