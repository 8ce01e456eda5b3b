"""Checkpoints that resume exactly: model, optimizers, random-number state and the number of steps done.

torch.distributed.checkpoint writes every rank's shards and reads them back onto any number of ranks; the ranks of all
hosts must see the same folder. A checkpoint is written under another name and renamed when it is complete, so a job
that is killed while it saves leaves the one before as the newest.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

FACTS = "run.json"


def newest(folder: Path) -> Path | None:
    """The complete checkpoint of the most steps, if there is one."""
    names = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return max(names, key=lambda path: int(path.name[5:]), default=None)


def save(
    folder: Path, step: int, model: nn.Module, optimizers: list[torch.optim.Optimizer], facts: dict[str, Any]
) -> Path:
    """Writes folder/step-NNNNNN. All ranks call it together; `facts` is what `load` will insist on."""
    complete, unfinished = folder / f"step-{step:06d}", folder / f"step-{step:06d}.unfinished"
    if dist.get_rank() == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(complete, ignore_errors=True)
    dist.barrier()
    dcp.save(_state(model, optimizers, _random_state()), checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        (unfinished / FACTS).write_text(json.dumps({"step": step, "ranks": dist.get_world_size(), "facts": facts}))
        unfinished.rename(complete)
    dist.barrier()
    return complete


def load(path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], facts: dict[str, Any]) -> int:
    """Restores a checkpoint in place and returns its number of steps.

    Raises:
        ValueError: it is of a run with other facts; the message names them.
    """
    written = json.loads((path / FACTS).read_text())
    others = {name: value for name, value in written["facts"].items() if facts.get(name) != value}
    if others:
        expected = ", ".join(f"{name} {value}" for name, value in others.items())
        came = ", ".join(f"{name} {facts.get(name)}" for name in others)
        raise ValueError(f"{path} is of another run: expected {expected}, got {came}; give its flags, or another --out")
    same_ranks = written["ranks"] == dist.get_world_size()
    state = _state(model, optimizers, _random_state() if same_ranks else {})
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizers, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if same_ranks:
        _restore_random_state(state["random"])
    return written["step"]


def _state(model: nn.Module, optimizers: list[torch.optim.Optimizer], random: dict[str, Tensor]) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizers)
    return {"model": model_state, "optimizer": optimizer_state, "random": random}


def _random_state() -> dict[str, Tensor]:
    """Of this rank's generators, under names that no other rank uses."""
    state = {f"cpu of rank {dist.get_rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        state[f"cuda of rank {dist.get_rank()}"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, Tensor]) -> None:
    for name, value in state.items():
        (torch.set_rng_state if name.startswith("cpu") else torch.cuda.set_rng_state)(value)
