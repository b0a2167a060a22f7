"""The Muon optimiser; its matrix products run in bfloat16 where the processor has them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

BFLOAT16 = torch.cpu._is_avx512_bf16_supported()
"""Whether the processor multiplies in bfloat16 faster than in float32."""
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 4) -> Tensor:
    """The nearest semi-orthogonal matrix, approximately, by Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    tall = matrix.size(0) > matrix.size(1)
    x: Tensor = matrix.T if tall else matrix
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    x = x.bfloat16() if BFLOAT16 else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.T if tall else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, scaled to the root mean square of an AdamW update.

    With several processes each one orthogonalises its share of the matrices; the updates are then summed.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all matrices."""
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            parameters: list[Tensor] = group["params"]
            flat = torch.zeros(sum(parameter.numel() for parameter in parameters))
            parts = torch.split(flat, [parameter.numel() for parameter in parameters])
            for index, (parameter, part) in enumerate(zip(parameters, parts, strict=True)):
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(gradient)
                state["momentum"].lerp_(gradient, 1 - group["momentum"])
                if index % size == rank:
                    update = orthogonalise(gradient.lerp(state["momentum"], group["momentum"]))
                    part.copy_((update * (0.2 * max(parameter.shape) ** 0.5)).flatten())
            if size > 1:
                dist.all_reduce(flat)
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(part.view_as(parameter), alpha=-group["lr"])
