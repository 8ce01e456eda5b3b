"""Training steps of a whole model, with our attention and with cuDNN's: `python benchmarks/end_to_end.py`.

Two models of examples/train.py's shapes, equal but for attention, train on its text on one GPU: weights and arithmetic
in bf16, an fp32 copy of the weights and AdamW, every block through torch.compile (--eager: as it is, which takes both a
tenth longer and so makes less of what attention saves). Both start from the same weights, get the same batches and take
turns step by step, each going first every other step; a step is timed by the clock on the wall, from batch to new
weights.

What it prints is the ratio of the step times and, averaged over the steps, how much the losses differ. Two runs drift
apart, so differences of neighbouring steps depend on each other and those of different seeds do not: the interval is
Student's, at 95 %, over the seeds' means. The exit status is 1 if attention differs before the first step, if a loss
is not finite or if the GPU is slow (see attention.py).

The whole takes half an hour. Seeds may run apart, and at the same time on several GPUs:

    python benchmarks/end_to_end.py --seeds 1 --output 0.json                             # seed 0
    python benchmarks/end_to_end.py --seeds 2 --first-seed 1 --output 1.json              # seeds 1 and 2
    python benchmarks/end_to_end.py --continue 0.json 1.json --output all.json            # all three: none is left

What it trades away: one GPU, no FSDP2, no ring; that is examples/train.py.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timing
import torch
import torch.nn.functional as F
from attention import relative_l2
from attention_peers import sdpa_func
from attention_report import GEMM_LEAST, gemm_complaint
from torch import Tensor
from torch.nn.attention import SDPBackend

import fa3_dist
from fa3_dist.interface import Attention
from fa3_dist.layers import Transformer, TransformerBlock, TransformerConfig

sys.path.insert(0, str(timing.ROOT / "examples"))

import train  # noqa: E402
from data import Batch, Sequences, python_sources, read_documents  # noqa: E402

DEVICE = "cuda"
BACKEND = SDPBackend.CUDNN_ATTENTION
WARMUPS = 2  # steps of a seed that are not timed
LARGEST_DIFFERENCE = 0.01  # relative L2 of what the first layers' attention gives for equal weights
SEEDS, STEPS = 3, 200
EMBED_STD = 0.02  # of the first embeddings, as of matrices: the usual, not the example's
LR = 3e-5  # what a warm-up of 2000 steps to 3e-4 has come to by then; with 3e-4 at once the loss is 12 after four steps
SETTINGS = (  # what seeds must have in common to be averaged
    "model", "parameters", "seqlen", "batch", "steps", "lr", "compile", "checkpoint_activations", "text", "device",
    "torch", "csrc_hash",
)
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided, by seeds - 2


# ---- training --------------------------------------------------------------------------------------------------------


def cudnn_attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, sink: Tensor | None = None,
    deterministic: bool = False,
) -> Tensor:
    """scaled_dot_product_attention on cuDNN as layers call it; ValueError for what it cannot do."""
    if tuple(window_size) != (-1, -1) or softcap or sink is not None or deterministic:
        raise ValueError("cuDNN's attention got a window, softcap, sink or deterministic: expected none of them")
    return sdpa_func(BACKEND, q, k, v, causal=causal, softmax_scale=softmax_scale)


def attentions() -> dict[str, Attention]:
    """What the models differ in, ours first."""
    return {"ours": fa3_dist.flash_attn_func, "cudnn": cudnn_attention}  # type: ignore[dict-item]


class Trainee:
    """A model in bf16 with its optimizer, which keeps the weights in fp32."""

    def __init__(self, config: TransformerConfig, attention: Attention, seed: int, lr: float, compile: bool) -> None:
        torch.manual_seed(seed)
        with torch.device(DEVICE):
            self.model = Transformer(config)
        self.attention, self.lr = attention, lr
        self.weights = [parameter.detach().clone() for parameter in self.model.parameters()]
        self.model.to(torch.bfloat16)
        self.optimizer = torch.optim.AdamW(self.weights, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        if compile:
            for block in self.model.blocks:
                block.compile()

    @torch.no_grad()
    def first_layer(self, batch: Batch) -> Tensor:
        """What attention adds in the first layer, (B, S, dim)."""
        block, x = self.model.blocks[0], self.model.embed(batch.tokens.to(DEVICE))
        assert isinstance(block, TransformerBlock)
        return block.attention(block.attention_norm(x), attention=self.attention)

    def step(self, batch: Batch, share: float) -> tuple[float, float]:
        """Loss and seconds of a step at a share of the peak learning rate."""
        torch.cuda.synchronize()
        began = time.perf_counter()
        logits = self.model(batch.tokens.to(DEVICE), attention=self.attention)
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.to(DEVICE).flatten())
        loss.backward()
        for weight, parameter in zip(self.weights, self.model.parameters(), strict=True):
            assert parameter.grad is not None
            weight.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.param_groups[0]["lr"] = self.lr * share
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for weight, parameter in zip(self.weights, self.model.parameters(), strict=True):
                parameter.copy_(weight)
        torch.cuda.synchronize()
        return loss.item(), time.perf_counter() - began


def train_seed(
    config: TransformerConfig, sequences: Sequences, seed: int, arguments: argparse.Namespace, deadline: float
) -> dict[str, Any]:
    """Losses and seconds of every step of both models; ends when another step would last beyond the deadline."""
    trainees = {
        name: Trainee(config, attention, seed, arguments.lr, compile=not arguments.eager)
        for name, attention in attentions().items()
    }
    difference = relative_l2(*(trainee.first_layer(sequences.step(0)) for trainee in trainees.values()))
    losses: dict[str, list[float]] = {name: [] for name in trainees}
    seconds: dict[str, list[float]] = {name: [] for name in trainees}
    last = 0.0  # how long a step of both took
    for step in range(arguments.steps):
        began = time.monotonic()
        if began + last > deadline:
            break
        batch, share = sequences.step(step), train.schedule(step, arguments.steps)
        for name in list(trainees) if step % 2 == 0 else reversed(trainees):
            loss, taken = trainees[name].step(batch, share)
            losses[name].append(loss)
            seconds[name].append(taken)
        last = time.monotonic() - began
    gib = torch.cuda.max_memory_allocated() / 2**30  # of both models
    return {"seed": seed, "difference": difference, "memory_gib": gib, "losses": losses, "seconds": seconds}


class OtherSettings(ValueError):
    """Result files that do not go together."""


def earlier_seeds(files: Sequence[Path], settings: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """The seeds of result files that went all the way. OtherSettings if these are not those of one of them."""
    found: dict[int, dict[str, Any]] = {}
    for file in files:
        result = json.loads(file.read_text())
        for name in SETTINGS:
            if result.get(name) != settings[name]:
                got = result.get(name)
                raise OtherSettings(f"{file} has {name} {got}: expected {settings[name]}; run its seeds again")
        found |= {seed["seed"]: seed for seed in result["seeds"] if len(seed["losses"]["ours"]) == settings["steps"]}
    return found


# ---- what the steps come to ------------------------------------------------------------------------------------------


def step_times(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a step without the warm-ups, and ours over cuDNN's: medians over all steps, and over each seed's."""
    timed = [{name: values[WARMUPS:] for name, values in seed["seconds"].items()} for seed in seeds]
    timed = [seed for seed in timed if all(seed.values())]
    if not timed:
        return {"seconds": None, "ratio": None, "ratio_of_seeds": []}
    pooled = {name: [value for seed in timed for value in seed[name]] for name in timed[0]}

    def ratio(of: dict[str, list[float]]) -> float:
        return statistics.median(of["ours"]) / statistics.median(of["cudnn"])

    return {
        "seconds": {name: timing.spread(values) for name, values in pooled.items()},
        "ratio": ratio(pooled),
        "ratio_of_seeds": list(map(ratio, timed)),
    }


def loss_difference(seeds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ours minus cuDNN's, nats: each seed's mean over the steps, their mean, and half the width of its 95 % interval.

    One seed has no interval.
    """
    means = []
    for seed in seeds:
        differences = [a - b for a, b in zip(seed["losses"]["ours"], seed["losses"]["cudnn"], strict=True)]
        if differences:
            means.append(statistics.fmean(differences))
    half_width = None
    if len(means) > 1:
        half_width = T_95[len(means) - 2] * statistics.stdev(means) / math.sqrt(len(means))
    return {"mean": statistics.fmean(means) if means else None, "half_width": half_width, "of_seeds": means}


def summarise(seeds: Sequence[dict[str, Any]], step_flop: float) -> dict[str, Any]:
    """Step times, the model's TFLOP/s at their medians, and the difference of the losses."""
    times = step_times(seeds)
    spreads = times["seconds"] or {}
    return {
        "step_time": times,
        "tflops": {name: step_flop / spread["median"] / 1e12 for name, spread in spreads.items()},
        "loss_difference": loss_difference(seeds),
    }


def complain(result: dict[str, Any]) -> list[str]:
    """What makes the result a failure."""
    complaints = []
    for seed in result["seeds"]:
        losses = [loss for values in seed["losses"].values() for loss in values]
        if not all(map(math.isfinite, losses)):
            complaints.append(f"seed {seed['seed']}: a loss is not finite")
        if not seed["difference"] <= LARGEST_DIFFERENCE:
            complaints.append(
                f"seed {seed['seed']}: attention of the first layer differs by {seed['difference']:.1e} in relative "
                f"L2: {LARGEST_DIFFERENCE:.0e} is the bound"
            )
    if result["summary"]["step_time"]["ratio"] is None:
        complaints.append(f"no seed came further than its {WARMUPS} warm-up steps: give it more --seconds or --steps")
    return complaints + gemm_complaint(result)


def print_result(result: dict[str, Any]) -> None:
    """The figures for people."""
    times, difference = result["summary"]["step_time"], result["summary"]["loss_difference"]
    steps = [len(seed["losses"]["ours"]) for seed in result["seeds"]]
    print(f"{result['parameters'] / 1e9:.2f} G parameters, {result['batch']} x {result['seqlen']} tokens a step")
    print(f"steps of each seed: {', '.join(map(str, steps))}; the first {WARMUPS} are not timed")
    for name, spread in (times["seconds"] or {}).items():
        model = result["summary"]["tflops"][name]
        print(
            f"{name:<6} {spread['median']:.3f} s a step ({spread['min']:.3f} to {spread['max']:.3f}), "
            f"{model:.0f} TFLOP/s of the model"
        )
    if times["ratio"] is not None:
        seeds = ", ".join(f"{ratio:.3f}" for ratio in times["ratio_of_seeds"])
        print(f"step time, ours / cudnn: {times['ratio']:.3f} (seeds: {seeds})")
    if difference["mean"] is not None:
        seeds = ", ".join(f"{mean:+.1e}" for mean in difference["of_seeds"])
        width = difference["half_width"]
        interval = "no interval from one seed" if width is None else f"+- {width:.1e} at 95 % over {len(steps)} seeds"
        print(f"loss, ours - cudnn, mean over the steps: {difference['mean']:+.1e} nats, {interval} (seeds: {seeds})")
    gemm = result["gemm"]["tflops"]
    print(f"GEMM of 8192^3: {gemm['median']:.0f} TFLOP/s ({gemm['worst']:.0f} to {gemm['best']:.0f})")


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Command line; `is_whole` says that nothing was asked for that makes figures of another kind."""
    parser = argparse.ArgumentParser(description="Training steps of a model, with our attention and with cuDNN's.")
    add = parser.add_argument
    add("--model", choices=train.MODELS, default="1b3", help="as in examples/train.py (default: 1b3)")
    add("--seqlen", type=int, default=32768, help="tokens of a sequence (default: 32768)")
    add("--batch", type=int, default=1, help="sequences of a step (default: 1)")
    add("--steps", type=int, default=STEPS, help=f"of each seed, both models (default: {STEPS})")
    add("--seeds", type=int, default=SEEDS, help=f"of weights and order of data (default: {SEEDS})")
    add("--first-seed", type=int, default=0, help="default: 0")
    add("--continue", type=Path, nargs="+", default=[], dest="earlier", metavar="FILE", help="result files, of the "
        "same flags, that have some of the seeds already")
    add("--lr", type=float, default=LR, help=f"peak learning rate (default: {LR})")
    add("--seconds", type=float, default=math.inf, help="measure no longer than this; each seed gets its share")
    add("--data", type=Path, default=python_sources(), help="folder of text (default: Python's own sources)")
    add("--eager", action="store_true", help="no torch.compile of the blocks")
    add("--checkpoint-activations", action="store_true", help="recompute blocks in the backward, to save memory")
    add("--output", type=Path, help="result file (default: benchmarks/results/end_to_end_GPU.json if no other flag is "
        "given, else none)")
    parsed = parser.parse_args(arguments)
    if min(parsed.seqlen, parsed.batch, parsed.steps) < 1:
        parser.error("--seqlen, --batch and --steps: expected 1 or more")
    if parsed.first_seed < 0:
        parser.error(f"--first-seed is {parsed.first_seed}: expected 0 or more")
    if not 1 <= parsed.seeds <= len(T_95) + 1:
        parser.error(f"--seeds is {parsed.seeds}: expected 1 to {len(T_95) + 1}")
    parsed.is_whole = all(value == parser.get_default(name) for name, value in vars(parsed).items() if name != "output")
    return parsed


def run(
    arguments: argparse.Namespace, header: dict[str, Any], time_gemm: Callable[[], list[float]],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Trains seed after seed, saving the result after each. The GEMM runs before and after them."""
    started = time.monotonic()
    text, _ = read_documents(arguments.data, "*.py" if arguments.data == python_sources() else "*")
    sizes = train.MODELS[arguments.model]
    config = train.transformer_config(
        argparse.Namespace(**sizes, checkpoint_activations=arguments.checkpoint_activations), EMBED_STD
    )
    with torch.device("meta"):
        shape = Transformer(config)
    step_flop = shape.flops_per_token(arguments.seqlen) * arguments.seqlen * arguments.batch
    settings = {
        **header, "model": arguments.model, **sizes, "parameters": shape.number_of_parameters(),
        "seqlen": arguments.seqlen, "batch": arguments.batch, "steps": arguments.steps, "lr": arguments.lr,
        "compile": not arguments.eager, "checkpoint_activations": arguments.checkpoint_activations,
        "text": f"{text}, {text.digest()}", "step_flop": step_flop,
    }
    earlier = earlier_seeds(arguments.earlier, settings)
    wanted = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    seeds = [earlier[seed] for seed in wanted if seed in earlier]
    gemm_ms = time_gemm()

    def result() -> dict[str, Any]:
        product = timing.speed(gemm_ms, timing.GEMM_FLOP)
        return {
            **settings, "gemm": product, "valid": product["tflops"]["median"] >= GEMM_LEAST, "seeds": seeds,
            "summary": summarise(seeds, step_flop),
        }

    missing = [seed for seed in wanted if seed not in earlier]
    for i, seed in enumerate(missing):
        deadline = started + arguments.seconds * (i + 1) / len(missing)
        sequences = Sequences(text, arguments.seqlen, packing=False, size=arguments.batch, seed=seed)
        trained = train_seed(config, sequences, seed, arguments, deadline)
        seeds = sorted([*seeds, trained], key=lambda of_seed: of_seed["seed"])
        gc.collect()
        print(f"[seed {seed}, {time.monotonic() - started:.0f} s] {len(trained['losses']['ours'])} steps", flush=True)
        save(result())
    gemm_ms += time_gemm()
    save(result())
    return result()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parsed = parse_arguments(arguments)
    if trouble := timing.why_no_hopper() or timing.why_no_library():
        print(trouble, file=sys.stderr)
        return 2
    os.environ["FA3_DIST_STRICT"] = "1"  # our kernels or none
    header = {
        "benchmark": "end_to_end",
        **timing.measured_on(),
        "attention": {"ours": f"fa3_dist {fa3_dist.__version__}", "cudnn": f"cuDNN {timing.cudnn_version()}"},
    }
    output = parsed.output
    if output is None and parsed.is_whole:
        output = timing.default_output("end_to_end", header["device"])
    save = functools.partial(timing.write_result, output) if output else lambda result: None

    def time_gemm() -> list[float]:
        return timing.time_in_turn({"gemm": timing.gemm()}, timing.Flush().overwrite, repeats=20)["gemm"]

    try:
        result = run(parsed, header, time_gemm, save)
    except OtherSettings as error:
        print(error, file=sys.stderr)
        return 2
    print_result(result)
    if output:
        print(f"written: {output}")
    return timing.exit_status(complain(result))


if __name__ == "__main__":
    sys.exit(main())
