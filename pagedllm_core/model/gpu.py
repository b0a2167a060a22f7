"""Decoders of the common shape on a GPU: a step as matrix products and a few kernels between them.

    rows of the step ── embedding ── residual
      each layer    norm ─ qkv product ─ rotate q, k; k and v into the cache ─ attend ─ o product ─ add + norm
                    ─ gate and up product ─ SiLU·mul ─ down product ─ add + norm of the next layer
      at the end    the rows whose logits are wanted ─ head product

Six launches of our own in a layer; the four products are cuBLAS's, or in deterministic mode our own as well
(kernels/linear.py). Everything else treats each row alone anyway. Which models fit, and the proof: see `parts.py`.
Nothing in a step looks at data on the host, so that a step over static tensors can be a CUDA graph (`graphs.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.attention.triton_paged import TritonAttention
from pagedllm_core.kernels.fused import add_rms_norm, rope_and_cache, silu_mul
from pagedllm_core.kernels.linear import linear
from pagedllm_core.kv.storage import KVStorage
from pagedllm_core.model.parts import (
    DecoderParts,
    DoesNotFit,
    LayerParts,
    Limits,
    find_parts,
    is_near,
    prove_fused,
    try_small,
)
from pagedllm_core.model.probe import ProbedLayer
from pagedllm_core.model.staging import Staging, StepTensors

logger = logging.getLogger("pagedllm.model")

LIMITS = Limits((torch.float32, torch.float16, torch.bfloat16), 256)
_SMALL_POSITIONS = 64  # a small model is tried on a few tokens
_CHUNK = 1 << 16  # positions whose rotations are computed at a time

MakeAttention = Callable[[torch.device, int], TritonAttention]
"""Makes the attention for a device and a block size."""
Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""What `F.linear` computes."""


@dataclass(frozen=True, slots=True)
class _Linear:
    """y = x W^T + bias."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    product: Product

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer's weights, merged where products read the same rows."""

    qkv: _Linear
    o: _Linear
    gate_up: _Linear
    down: _Linear
    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None

    @classmethod
    def of(cls, parts: LayerParts, product: Product) -> _Layer:
        """The parts of a layer; its modules hold views of the merged weights from now on."""
        return cls(
            qkv=_merge(parts.qkv, product),
            o=_merge([parts.o], product),
            gate_up=_merge(parts.gate_up, product),
            down=_merge([parts.down], product),
            input_norm=parts.input_norm.detach(),
            post_norm=parts.post_norm.detach(),
            q_norm=None if parts.q_norm is None else parts.q_norm.detach(),
            k_norm=None if parts.k_norm is None else parts.k_norm.detach(),
        )


class GpuDecoder:
    """A model's merged weights, and its step. The model itself still works, on views of the same weights.

    Args:
        parts: The model's modules.
        probed: Its attention layers.
        attention: Makes the attention backend.
        positions: Positions that sequences can have.
        deterministic: Let no sum of a row depend on the other rows of a step; the attention must do so, too.

    Attributes:
        attention: The attention backend, once a storage is bound.
    """

    attention: TritonAttention

    def __init__(
        self,
        parts: DecoderParts,
        probed: list[ProbedLayer],
        attention: MakeAttention,
        positions: int,
        deterministic: bool = False,
    ) -> None:
        product = linear if deterministic else F.linear
        self._device = parts.embedding.device
        self._layers = [_Layer.of(layer, product) for layer in parts.layers]
        self._specs = [layer.spec for layer in probed]
        self._embedding, self._norm = parts.embedding.detach(), parts.norm.detach()
        self._head, self._epsilon = _merge([parts.head], product), parts.epsilon
        self._cosines, self._sines = _rotations(parts.rotary, positions, self._device)
        self._make_attention = attention

    def bind(self, storage: KVStorage) -> None:
        """Read and write this storage from now on."""
        self.attention = self._make_attention(self._device, storage.block_size)
        self._caches = [storage.layer(spec.kv_group) for spec in self._specs]
        self._staging = Staging(self._device)

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        """One step: float32 [L, vocab], one row for each of `batch.logits_rows`."""
        return self.compute(self._staging.stage(batch, self.attention.prepare(batch))).float()

    def compute(self, step: StepTensors) -> torch.Tensor:
        """One step over tensors on the device: [L, vocab] in the model's type. `step.meta` is `TritonAttention`'s."""
        residual = F.embedding(step.token_ids, self._embedding)
        x = add_rms_norm(residual, None, self._layers[0].input_norm, self._epsilon)
        next_norms = [*(layer.input_norm for layer in self._layers[1:]), None]
        for layer, spec, cache, next_norm in zip(self._layers, self._specs, self._caches, next_norms, strict=True):
            q = rope_and_cache(
                layer.qkv(x), cache, self._cosines, self._sines, step.positions, step.meta.slot_mapping,
                layer.q_norm, layer.k_norm, self._epsilon,
            )  # fmt: skip
            x = layer.o(self.attention.attend(q.transpose(0, 1), cache, spec, step.meta).flatten(1))
            x = add_rms_norm(x, residual, layer.post_norm, self._epsilon)
            x = layer.down(silu_mul(layer.gate_up(x)))
            if next_norm is not None:
                x = add_rms_norm(x, residual, next_norm, self._epsilon)
        if step.rows is not None:
            x, residual = x.index_select(0, step.rows), residual.index_select(0, step.rows)
        return self._head(add_rms_norm(x, residual, self._norm, self._epsilon))


def fuse_on_gpu(
    model: nn.Module,
    hf_config: Any,
    probed: list[ProbedLayer],
    attention: MakeAttention,
    positions: int,
    deterministic: bool = False,
) -> GpuDecoder | None:
    """The model as a fused decoder, where it is one.

    Args:
        model: A probed causal LM on a GPU; it works as before, whatever comes out.
        hf_config: Its configuration.
        probed: Its attention layers.
        attention: Makes the attention backend.
        positions: Positions that sequences can have.
        deterministic: As for `GpuDecoder`.

    Returns:
        None where it does not fit.
    """

    def make(parts: DecoderParts, layers: list[ProbedLayer], positions: int) -> GpuDecoder:
        return GpuDecoder(parts, layers, attention, positions, deterministic)

    try:
        parts = find_parts(model, probed, LIMITS)
        if any((layer.q_norm is None) != (layer.k_norm is None) for layer in parts.layers):
            raise DoesNotFit("it has a norm for queries or keys alone")
        try_small(model, hf_config, LIMITS, lambda small, layers: make(small, layers, _SMALL_POSITIONS))
    except DoesNotFit as reason:
        logger.info("%s is not fused: %s", type(model).__name__, reason)
        return None
    decoder, distance = prove_fused(model, hf_config, probed, lambda: make(parts, probed, positions))
    if distance is None or is_near(distance, probed[0].geometry.dtype == torch.float32):
        return decoder
    logger.warning(
        "%s runs unfused: its fused form has other logits than its own (relative difference %.2g)",
        type(model).__name__, distance,
    )  # fmt: skip
    return None


def _merge(modules: list[nn.Linear], product: Product) -> _Linear:
    """One product for modules that read the same rows; each keeps a view of the merged weight."""
    if len(modules) == 1:
        only = modules[0]
        return _Linear(only.weight.detach(), None if only.bias is None else only.bias.detach(), product)
    weight = torch.cat([module.weight.detach() for module in modules])
    bias = None
    if any(module.bias is not None for module in modules):
        zeros = [weight.new_zeros(module.out_features) for module in modules]
        bias = torch.cat(
            [zero if one.bias is None else one.bias.detach() for one, zero in zip(modules, zeros, strict=True)]
        )
    for module, part in zip(modules, weight.split([module.out_features for module in modules]), strict=True):
        module.weight.data = part
    return _Linear(weight, bias, product)


def _rotations(
    rotary: Callable[..., tuple[torch.Tensor, torch.Tensor]], positions: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own cosines and sines of every position: float32 [positions, rotary_dim] each."""
    chunks = []
    with torch.inference_mode():
        for start in range(0, positions, _CHUNK):
            places = torch.arange(start, min(start + _CHUNK, positions), device=device)[None]
            chunks.append(
                [table[0].float() for table in rotary(torch.zeros(1, dtype=torch.float32, device=device), places)]
            )
        cosines, sines = (torch.cat(tables) for tables in zip(*chunks, strict=True))
    return cosines, sines
