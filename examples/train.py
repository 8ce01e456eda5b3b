"""Trains a byte-level transformer on a folder of real text, every sequence sharded over ranks.

    torchrun --standalone --nproc-per-node 2 examples/train.py                 # two processes, CPU or GPU
    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 \\
        examples/train.py --model 1b3 --seqlen 131072 --cp 8 --steps 2000      # 32 GPUs: 4 sequences, each on 8

Ranks form a (dp, cp) mesh: the cp ranks of a row share each sequence, the dp rows take different sequences, and FSDP2
shards parameters, gradients and optimizer state over all of them. The text is the Python standard library's own sources
unless --data names another folder. At the end: held-out loss beside that of a bigram table, a sample, a picture, and by
default the same training once more with the attention output zeroed, which shows what attention is worth.

What it trades away: no tokeniser, no key/value cache, the text lives in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import checkpoints
import torch
import torch.distributed as dist
from data import Batch, Sequences, bigram_loss, python_sources, read_documents
from muon import Muon
from plots import MetricsFile, plot, read_metrics
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from fa3_dist.layers import Transformer, TransformerConfig
from fa3_dist.parallel import ContextParallel
from fa3_dist.parallel.context import MODES as CP_MODES
from fa3_dist.parallel.observe import Timeline, exposed
from fa3_dist.parallel.plan import Choice

MODELS = {
    "tiny": {"dim": 128, "layers": 2, "heads": 2, "kv_heads": 1, "rope_base": 300.0},
    "small": {"dim": 768, "layers": 12, "heads": 12, "kv_heads": 4, "rope_base": 10000.0},
    "1b3": {"dim": 2048, "layers": 28, "heads": 16, "kv_heads": 8, "rope_base": 500000.0},
}
# Peak learning rates of weight matrices. What Muon's first steps do to the logits grows with dim: with 0.02 the loss of
# the 1.3 G model is 5.8, 5.5, 6.3, 3.4, 7.8, and runs that differ by rounding drift apart.
LR = {"tiny": 0.02, "small": 0.02, "1b3": 0.001}
# Peak learning rates of embedding, head and norms. AdamW's first steps move every weight by so much, and the logits by
# that times dim: with 0.006 the loss of the 1.3 G model is 17 after three steps.
ADAM_LR = {"tiny": 0.006, "small": 0.006, "1b3": 0.0004}
# Deviation of the first embeddings. With 0.02, as matrices have it, the gradient of the 1.3 G model is 400 long
# at first. With this it learns more, as tiny does, and runs that differ by rounding stay closer (benchmarks/LOG.md,
# context parallelism, 34).
EMBED_STD = 0.2
FACTS = (  # what a run must have in common with a checkpoint to go on from it
    "dim", "layers", "heads", "kv_heads", "rope_base", "seqlen", "batch", "packing", "precision", "attention", "steps",
    "lr", "adam_lr", "seed",
)
OBSERVED = 5  # steps at the end of a run in which messages are timed
PROMPT = 48  # bytes of held-out text that the sample begins with
STOPPED = 128 + signal.SIGTERM  # exit code after SIGTERM: everything is saved, but the run is not finished


# ---- the command line ------------------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """The flags, with every default filled in for this machine and this number of ranks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", type=Path, default=python_sources(), help="folder of text; default: Python's own sources")
    add("--glob", help="names of the files to read, such as '*.txt'; default: *.py in Python's sources, else all")
    add("--seqlen", type=int, help="tokens of a sequence; default: 2048, on GPUs 32768")
    add("--packing", action="store_true", help="whole documents packed into sequences, attention inside each document")
    add("--batch", type=int, help="sequences of a step, all ranks together; default: --dp")
    add("--cp", type=int, help="ranks that share a sequence; default: all ranks, divided by --dp")
    add("--dp", type=int, help="groups of ranks that take different sequences; default: all ranks, divided by --cp")
    add("--mode", choices=CP_MODES, default="ring", help="how those ranks work together: see ContextParallel; default: "
        "ring")
    add("--model", choices=MODELS, help="default: tiny, on GPUs small; the next four change single sizes")
    for size in ("dim", "layers", "heads", "kv-heads"):
        add(f"--{size}", type=int)
    add("--attention", choices=("ring", "none"), default="ring", help="none: attention's output is zeroed")
    add("--ablation", action=argparse.BooleanOptionalAction, help="then train again with --attention none; default: "
        "only if --steps is not given")
    add("--precision", choices=("fp32", "bf16"), help="of computation; weights stay fp32; default: fp32, on GPUs bf16")
    add("--steps", type=int, help="default: 500, on GPUs 300")
    add("--lr", type=float, help="peak learning rate of weight matrices (Muon); default: that of the model, "
        + ", ".join(f"{model} {rate}" for model, rate in LR.items()))
    add("--adam-lr", type=float, help="of embedding, head and norms (AdamW); default: that of the model, "
        + ", ".join(f"{model} {rate}" for model, rate in ADAM_LR.items()))
    add("--seed", type=int, default=0, help="of weights, order of data, and sample; default: 0")
    add("--eval-every", type=int, help="steps between scores of held-out text; default: a third of --steps")
    add("--eval-sequences", type=int, help="held-out sequences that are scored; default: 48, on GPUs 16")
    add("--checkpoint-activations", action="store_true", help="recompute blocks in the backward, to save memory")
    add("--compile", action="store_true", help="torch.compile every block, around attention")
    add("--out", type=Path, help="folder of results; default: runs/MODEL-DATE-TIME")
    add("--checkpoint-dir", type=Path, help="default: checkpoints in --out; all hosts must see it")
    add("--save-every", type=int, default=0, help="steps between checkpoints; default: 0, only at the end or SIGTERM")
    add("--save", action=argparse.BooleanOptionalAction, default=True, help="--no-save: no checkpoints at all")
    add("--resume", action="store_true", help="go on from the newest checkpoint, or begin if there is none yet")
    add("--sample", type=int, default=256, help="bytes of text to generate at the end; default: 256")
    args = parser.parse_args()

    world = int(os.environ.get("WORLD_SIZE", 0))
    if not world:
        parser.error("expected to be started by torchrun: torchrun --standalone --nproc-per-node 2 examples/train.py")
    for name, cpu, gpu in (
        ("model", "tiny", "small"), ("seqlen", 2048, 32768), ("precision", "fp32", "bf16"), ("eval_sequences", 48, 16),
    ):
        _default(args, name, gpu if torch.cuda.is_available() else cpu)
    for name, value in MODELS[args.model].items():
        _default(args, name, value)
    _default(args, "lr", LR[args.model])
    _default(args, "adam_lr", ADAM_LR[args.model])
    _default(args, "ablation", args.attention == "ring" and args.steps is None)
    _default(args, "steps", 300 if torch.cuda.is_available() else 500)
    _default(args, "eval_every", math.ceil(args.steps / 3))
    _default(args, "dp", max(1, world // args.cp) if args.cp else 1)
    _default(args, "cp", max(1, world // args.dp))
    _default(args, "batch", args.dp)
    _default(args, "glob", "*.py" if args.data == python_sources() else "*")
    if args.cp * args.dp != world:
        parser.error(f"--cp is {args.cp} and --dp {args.dp}: expected a product of {world}, the number of ranks")
    if args.batch % args.dp:
        parser.error(f"--batch is {args.batch}: expected a multiple of --dp, {args.dp}")
    if args.resume and (args.out is None or not args.save):
        parser.error("--resume needs --out, the folder of the run to go on with, and goes on saving: no --no-save")
    return args


def _default(args: argparse.Namespace, name: str, value: Any) -> None:
    if getattr(args, name, None) is None:
        setattr(args, name, value)


# ---- ranks -----------------------------------------------------------------------------------------------------------


class StopOnSigterm:
    """Remembers that SIGTERM came; the training loop looks after every step."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, *_: Any) -> None:
        self.asked = True


@dataclass
class Job:
    """What the main run and its ablation have in common."""

    args: argparse.Namespace
    out: Path
    device: torch.device
    mesh: DeviceMesh  # (dp, cp)
    everyone: DeviceMesh  # the same ranks in one dimension
    cp: ContextParallel
    training: Sequences
    held_out: list[Batch]
    facts: dict[str, Any]
    stop: StopOnSigterm

    @property
    def is_main(self) -> bool:
        return dist.get_rank() == 0


def connect() -> torch.device:
    """Joins the process group that torchrun described and returns this rank's device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        return device
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    dist.init_process_group("gloo")
    return torch.device("cpu")


def say(*lines: str) -> None:
    """Prints on rank 0, above the progress bar if there is one."""
    if dist.get_rank() == 0:
        for line in lines:
            tqdm.write(line)
        sys.stdout.flush()


def output_folder(args: argparse.Namespace) -> Path:
    names = [f"runs/{args.model}-{datetime.now():%Y%m%d-%H%M%S}"]
    dist.broadcast_object_list(names, src=0)  # the ranks' clocks differ
    return args.out or Path(names[0])


def over_all_ranks(values: list[float], device: torch.device) -> list[float]:
    """The largest of each value on any rank."""
    largest = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.tolist()


# ---- the model and its optimizers ------------------------------------------------------------------------------------


def transformer_config(args: argparse.Namespace, embed_std: float = EMBED_STD) -> TransformerConfig:
    return TransformerConfig(
        vocab_size=256, dim=args.dim, layers=args.layers, heads=args.heads, kv_heads=args.kv_heads,
        rope_base=args.rope_base, qk_norm=True, checkpoint_activations=args.checkpoint_activations,
        embed_std=embed_std,
    )


def make_model(job: Job) -> Transformer:
    """Equal weights on all ranks, then each keeps its share (FSDP2) and gathers a block's when it computes it."""
    torch.manual_seed(job.args.seed)
    with job.device:
        model = Transformer(transformer_config(job.args))
    bf16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    policy = bf16 if job.args.precision == "bf16" else MixedPrecisionPolicy()
    for block in model.blocks:
        if job.args.compile:
            block.compile()
        fully_shard(block, mesh=job.everyone, mp_policy=policy)
    fully_shard(model, mesh=job.everyone, mp_policy=policy)
    return model


def make_optimizers(model: Transformer, args: argparse.Namespace, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside blocks, AdamW for everything else."""
    matrices = [parameter for parameter in model.blocks.parameters() if parameter.dim() == 2]
    others = set(model.parameters()) - set(matrices)
    in_order = [parameter for parameter in model.parameters() if parameter in others]
    compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return [
        Muon(matrices, lr=args.lr, compute_dtype=compute_dtype),
        torch.optim.AdamW(in_order, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine down to 1/20.

    The warm-up takes a fortieth of the steps; of a short run 7 steps, or a fifth of it.
    """
    warm_up = max(1, steps // 40, min(7, steps // 5))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return 0.05 + 0.95 * (1 + math.cos(math.pi * progress)) / 2


def choice(job: Job) -> Choice:
    """The mode that attention of the first batch takes, and what it was chosen from."""
    args, whole = job.args, job.training.step(0)
    batch = job.cp.shard(whole.tokens, whole.labels, whole.cu_seqlens)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    return job.cp.choose(batch, heads=args.heads, kv_heads=args.kv_heads, head_dim=args.dim // args.heads, dtype=dtype,
                         causal=True)


def no_attention(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    """Attention that returns zeros: what is left of a transformer sees one byte at a time."""
    return torch.zeros_like(q)


class Exposure:
    """What the messages of a run's last steps cost beyond the attention that hides them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._timelines: list[Timeline] = []
        self._seconds: list[float] = []

    @contextlib.contextmanager
    def of_step(self, step: int) -> Iterator[None]:
        """Inside are all messages of the step's attention."""
        if step < self._job.args.steps - OBSERVED:
            yield
            return
        self._timelines.append(Timeline(self._job.device))
        self._job.cp.exchange.observer = self._timelines[-1]
        try:
            yield
        finally:
            self._job.cp.exchange.observer = None

    def step_took(self, seconds: float) -> None:
        self._seconds.append(seconds)

    def __str__(self) -> str:
        """Of the rank with most of it; all ranks call it together."""
        steps = len(self._timelines)
        if self._job.args.cp == 1 or not steps:
            return "exposed communication: none, for no rank shares its sequences or no step was taken"
        sums = sum(exposed(timeline.spans()) for timeline in self._timelines), 1e3 * sum(self._seconds[-steps:])
        communication, all_of_it = (total / steps for total in over_all_ranks(list(sums), self._job.device))
        return (f"exposed communication: {communication:.3f} ms a step of {all_of_it:.1f} ms, "
                f"{communication / all_of_it:.1%} (--mode {self._job.args.mode}, the last {steps} steps, the rank with "
                "most of it)")


# ---- training --------------------------------------------------------------------------------------------------------


def compute_loss(job: Job, model: nn.Module, whole: Batch, attention: str) -> Tensor:
    """Mean loss over all tokens of the step, equal on every rank."""
    batch = job.cp.shard(whole.tokens.to(job.device), whole.labels.to(job.device), whole.cu_seqlens)
    logits = model(
        batch.tokens, positions=batch.positions, attention=batch.attention if attention == "ring" else no_attention
    )
    assert batch.labels is not None
    return job.cp.loss(logits, batch.labels, data_mesh=job.mesh["dp"])


@torch.no_grad()
def held_out_loss(job: Job, model: nn.Module, attention: str) -> float:
    """Nats a byte over the held-out batches."""
    nats = sum(batch.step_tokens * compute_loss(job, model, batch, attention).item() for batch in job.held_out)
    return nats / sum(batch.step_tokens for batch in job.held_out)


def clip_gradients(model: nn.Module, limit: float = 1.0) -> float:
    """Scales all gradients so that their norm is at most `limit`; the norm before."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    assert isinstance(norm, DTensor)
    return norm.full_tensor().item()


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Trained(NamedTuple):
    """What a run leaves behind."""

    model: Transformer
    held_out_loss: float
    exposure: str


def train(job: Job, attention: str, metrics_path: Path, checkpoint_dir: Path | None = None) -> Trained:
    """One run. Goes on from the newest checkpoint; ends the process on SIGTERM."""
    args = job.args
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = make_model(job)
    optimizers = make_optimizers(model, args, job.device)
    newest = checkpoints.newest(checkpoint_dir) if checkpoint_dir else None
    done = checkpoints.load(newest, model, optimizers, job.facts) if newest else 0
    if newest:
        say(f"resumed from {newest}: {done} steps are done")
    metrics = MetricsFile(metrics_path, done) if job.is_main else None
    exposure = Exposure(job)
    bar = tqdm(total=args.steps, initial=done, unit="step", disable=not (job.is_main and sys.stderr.isatty()))

    for step in range(done, args.steps):
        began = time.perf_counter()
        for optimizer, peak in zip(optimizers, (args.lr, args.adam_lr)):
            optimizer.param_groups[0]["lr"] = peak * schedule(step, args.steps)

        batch = job.training.step(step)
        with exposure.of_step(step):
            loss = compute_loss(job, model, batch, attention)
            loss.backward()
        grad_norm = clip_gradients(model)
        job.cp.raise_failure()  # the host has waited for all gradients, so it knows of every message that failed
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        stop, memory = over_all_ranks([job.stop.asked, peak_memory(job.device)], job.device)
        seconds = time.perf_counter() - began
        exposure.step_took(seconds)
        report(job, metrics, bar, step == done, {
            "step": step + 1, "loss": loss.item(), "tokens_per_second": batch.step_tokens / seconds,
            "memory_gib": memory, "lr": optimizers[0].param_groups[0]["lr"], "grad_norm": grad_norm,
        })
        finished = step + 1 == args.steps
        if (step + 1) % args.eval_every == 0 and not finished:
            report_held_out(job, metrics, step + 1, held_out_loss(job, model, attention))
        if checkpoint_dir and (stop or finished or (args.save_every and (step + 1) % args.save_every == 0)):
            newest = checkpoints.save(checkpoint_dir, step + 1, model, optimizers, job.facts)
        if stop:
            bar.close()
            if not args.save:
                saved = "not saved"
            elif newest:
                saved = f"saved in {newest}; go on with --resume --out {job.out}"
            else:
                saved = f"not saved, being the ablation; the main run is; go on with --resume --out {job.out}"
            say(f"SIGTERM: stopped after step {step + 1} of {args.steps}, {saved}")
            dist.destroy_process_group()
            sys.exit(STOPPED)
    bar.close()

    final = held_out_loss(job, model, attention)
    if done < args.steps:
        report_held_out(job, metrics, args.steps, final)
    return Trained(model, final, str(exposure))


def report(job: Job, metrics: MetricsFile | None, bar: tqdm, first: bool, line: dict[str, Any]) -> None:
    """A step's metrics to the file and to the progress bar or, where no one watches a bar, as a line now and then."""
    if metrics is None:
        return
    metrics.write(**line)
    short = f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s"
    bar.set_postfix_str(short, refresh=False)
    bar.update()
    if first or (bar.disable and line["step"] % max(1, job.args.steps // 12) == 0):
        say(f"step {line['step']}/{job.args.steps}: {short}")


def report_held_out(job: Job, metrics: MetricsFile | None, step: int, loss: float) -> None:
    if metrics is not None:
        metrics.write(step=step, held_out_loss=loss)
    say(f"step {step}/{job.args.steps}: held-out loss {loss:.3f}")


# ---- the end of a run ------------------------------------------------------------------------------------------------


def sample(job: Job, model: Transformer) -> str:
    """Text that the model writes behind the first line of a held-out sequence; empty on all ranks but the first."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not job.is_main:
        return ""
    whole = Transformer(transformer_config(job.args))
    whole.load_state_dict(weights)
    whole.to(job.device, torch.bfloat16 if job.args.precision == "bf16" else torch.float32).eval()
    prompt = job.held_out[0].tokens[0, :PROMPT].tolist()
    text = bytes(generate(whole, prompt, job.args.sample, job.args.seed)).decode(errors="replace")
    return text.replace("\0", "")


@torch.no_grad()
def generate(model: Transformer, tokens: list[int], count: int, seed: int, temperature: float = 0.9) -> list[int]:
    """`count` more tokens, each from a full pass over the last 512: simple, and long enough for a look."""
    device = model.embed.weight.device
    random = torch.Generator().manual_seed(seed)
    for _ in range(count):
        logits = model(torch.tensor([tokens[-512:]], device=device))[0, -1]
        chances = torch.softmax(logits.float().cpu() / temperature, dim=-1)
        tokens = [*tokens, int(torch.multinomial(chances, 1, generator=random))]
    return tokens


def describe(args: argparse.Namespace, device: torch.device) -> str:
    kind = "packed sequences" if args.packing else "sequences"
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    size = f"{args.model} model, {kind} of {args.seqlen:,} bytes"
    return f"{size}, cp {args.cp} x dp {args.dp}, {args.precision} on {where}"


@record  # torchrun then reports the first exception of any rank
def main() -> None:
    args = parse_arguments()
    device = connect()
    out = output_folder(args)
    checkpoint_dir = args.checkpoint_dir or out / "checkpoints"
    if checkpoints.newest(checkpoint_dir) and not args.resume:
        raise ValueError(f"{checkpoint_dir} has an earlier run's checkpoints: add --resume to go on, or change --out")

    mesh = init_device_mesh(device.type, (args.dp, args.cp), mesh_dim_names=("dp", "cp"))
    training, held_out = read_documents(args.data, args.glob)
    dealt = args.seqlen, args.packing, args.batch, mesh["dp"].get_local_rank(), args.dp
    scored = Sequences(held_out, *dealt)
    job = Job(
        args, out, device, mesh, init_device_mesh(device.type, (mesh.size(),)),
        ContextParallel(mesh["cp"], mode=args.mode),
        training=Sequences(training, *dealt, seed=args.seed), held_out=scored.spread(args.eval_sequences),
        facts={name: getattr(args, name) for name in FACTS} | {"text": training.digest()}, stop=StopOnSigterm(),
    )
    if args.mode == "auto":
        say(str(choice(job)))
    bigram = bigram_loss(training, scored.spread(args.eval_sequences, all_groups=True))
    title = describe(args, device)
    say(title, f"text below {args.data}: {training} to train on, {held_out} held out")

    runs = {"with attention" if args.attention == "ring" else "attention zeroed": out / "metrics.jsonl"}
    trained = train(job, args.attention, out / "metrics.jsonl", checkpoint_dir if args.save else None)
    text = sample(job, trained.model)
    results = [
        trained.exposure, f"held-out loss: {trained.held_out_loss:.3f} nats a byte", f"  a bigram table: {bigram:.3f}",
    ]
    if args.ablation:
        say(f"the same {args.steps} steps with the attention output zeroed")
        runs["attention zeroed"] = out / "attention_zeroed.jsonl"
        zeroed = train(job, "none", runs["attention zeroed"]).held_out_loss
        results.append(f"  this model trained with its attention output zeroed: {zeroed:.3f}")
    if job.is_main:
        plot(out / "training.png", title, {label: read_metrics(path) for label, path in runs.items()}, bigram)
    saved = checkpoints.newest(checkpoint_dir) if args.save else "none"
    say("", f"sample, from its byte {PROMPT} on:", text, "", *results, f"picture: {out / 'training.png'}",
        f"metrics: {out / 'metrics.jsonl'}", f"checkpoint: {saved}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
