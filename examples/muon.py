"""Muon for FSDP2 models: momentum, then orthogonalised updates of weight matrices (Jordan et al. 2024).

Every rank holds some rows of every matrix, and an update needs whole ones. So matrices of one shape are dealt to the
ranks, one each: one all-to-all brings every rank the rows of its matrix, it orthogonalises that one, and another
all-to-all returns the rows. No rank computes what another does, and none ever holds more than one matrix whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# Five steps of the odd polynomial a x + b x^3 + c x^5 take singular values from 0.01 .. 1 into about 0.7 .. 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """For 2-D parameters that `fully_shard` has sharded by rows over one mesh dimension.

    An update is lr * max(1, rows / columns) ** 0.5 times the orthogonal factor of the Nesterov momentum.

    Args:
        compute_dtype: of the orthogonalisation; bf16 is enough, fp32 agrees more closely between numbers of ranks.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})
        self.compute_dtype = compute_dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            of_shape: dict[torch.Size, list[DTensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    of_shape[parameter.shape].append(parameter)
            for (rows, columns), parameters in of_shape.items():
                mesh = parameters[0].device_mesh
                updates = [self._momentum(parameter, group["momentum"]) for parameter in parameters]
                for first in range(0, len(parameters), mesh.size()):
                    dealt = slice(first, first + mesh.size())
                    orthogonal = self._orthogonalise(updates[dealt], rows, mesh.get_group())
                    for parameter, update in zip(parameters[dealt], orthogonal):
                        parameter.to_local().add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _momentum(self, parameter: DTensor, momentum: float) -> Tensor:
        """This rank's rows of gradient + momentum * average of gradients, up to a factor that orthogonalising drops."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        assert isinstance(parameter.grad, DTensor)
        gradient, average = parameter.grad.to_local(), state["momentum"].to_local()
        average.lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)

    def _orthogonalise(self, shards: list[Tensor], rows: int, group: dist.ProcessGroup) -> list[Tensor]:
        """The rows of up to one matrix a rank -> the same rows of their orthogonal factors."""
        rank, world = dist.get_rank(group), dist.get_world_size(group)
        columns = shards[0].shape[1]
        here = shards[0].numel()
        sent = [here if r < len(shards) else 0 for r in range(world)]  # rank r gets the rows of matrix r
        per_rank = -(-rows // world)  # rows are dealt as torch.chunk does it
        received = [columns * max(0, min(per_rank, rows - r * per_rank)) for r in range(world)]
        received = received if rank < len(shards) else [0] * world
        flat = torch.cat([shard.flatten() for shard in shards])
        mine = _all_to_all(flat, sent, received, group)
        if len(mine):
            mine = newton_schulz(mine.view(rows, columns), self.compute_dtype).to(flat.dtype).flatten()
        return [part.view(-1, columns) for part in _all_to_all(mine, received, sent, group).split(here)]


def newton_schulz(matrix: Tensor, dtype: torch.dtype, steps: int = 5) -> Tensor:
    """About U V^T for matrix = U S V^T: all singular values brought near 1."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.to(dtype)
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def _all_to_all(flat: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    result = flat.new_empty(sum(received))
    dist.all_to_all_single(result, flat.contiguous(), received, sent, group=group)
    return result
