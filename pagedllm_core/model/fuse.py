"""Decoders of the common shape, run by native code on a CPU: one call for a whole step. What fits: see `parts.py`."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.attention.native import MOST_DIM, describe_attention
from pagedllm_core.errors import UnsupportedModelError
from pagedllm_core.kv.storage import KVStorage
from pagedllm_core.model.parts import (
    FARTHEST,
    DecoderParts,
    DoesNotFit,
    Limits,
    find_parts,
    is_near,
    prove_fused,
    try_small,
)
from pagedllm_core.model.probe import AttentionLayer, ProbedLayer
from pagedllm_core.model.support import unsupported
from pagedllm_core.native.library import DTYPES, DecoderStruct, LayerStruct, PackedLinear, Step

logger = logging.getLogger("pagedllm.model")

LIMITS = Limits(DTYPES, MOST_DIM)
_POSITIONS = 2048  # rows by which the table of rotations grows


class FusedDecoder:
    """A model's weights, packed, and its step as one native call. The model itself is empty afterwards.

    Args:
        parts: The model's modules; their linear weights are dropped one after the other.
        attention: Its attention layers.
        library: The native code.
        int8: Round all linear layers to int8, the head included.
        in_order: Let no sum depend on what else is in a step; chunks are slower then.
    """

    def __init__(
        self,
        parts: DecoderParts,
        attention: Sequence[AttentionLayer],
        library: ctypes.CDLL,
        int8: bool = False,
        in_order: bool = False,
    ) -> None:
        self._library, self._rotary, self._int8, self._in_order = library, parts.rotary, int8, in_order
        self._attention = [(layer.spec, layer.geometry) for layer in attention]  # no modules: those hold the file
        self._held: list[Any] = []  # what the structures point to
        self._rotations = (torch.empty(0, 0), torch.empty(0, 0))
        lanes, intermediate = library.lanes(), parts.layers[0].down.in_features
        turns = lanes if intermediate % lanes == 0 else 0  # a gate meets what it multiplies while both are in registers
        self._layers = (LayerStruct * len(parts.layers))()
        for struct, layer in zip(self._layers, parts.layers, strict=True):
            struct.qkv, struct.o = self._pack(layer.qkv), self._pack([layer.o])
            struct.gate_up, struct.down = self._pack(layer.gate_up, turns=turns), self._pack([layer.down])
            struct.input_norm, struct.post_norm = self._floats(layer.input_norm), self._floats(layer.post_norm)
            struct.q_norm, struct.k_norm = self._floats(layer.q_norm), self._floats(layer.k_norm)
        embedding = None  # where the head has the same weights, they are there once
        if int8 or parts.head.weight is not parts.embedding:
            embedding = parts.embedding.detach().clone()  # the weights' file, which it may be mapped from, is let go
            self._held.append(embedding)
        hidden, is_bf16 = parts.embedding.shape[1], parts.embedding.dtype == torch.bfloat16
        self.vocab_size = parts.head.out_features
        head = self._pack([parts.head])
        self._decoder = DecoderStruct(
            layers=self._layers,
            num_layers=len(parts.layers),
            hidden=hidden,
            intermediate=intermediate,
            is_gated=turns > 0,
            epsilon=parts.epsilon,
            embedding=None if embedding is None else embedding.data_ptr(),
            embedding_is_bf16=is_bf16,
            norm=self._floats(parts.norm),
            head=head,
        )

    def _pack(self, modules: list[nn.Linear], turns: int = 0) -> Any:
        """The merged weight as one packed matrix; the modules' own is dropped.

        The outputs of its two halves take turns of `turns` where that is given.
        """
        weight = modules[0].weight if len(modules) == 1 else torch.cat([module.weight for module in modules])
        biases = [
            torch.zeros(one.out_features, dtype=torch.float32) if one.bias is None else one.bias.float()
            for one in modules
        ]
        bias = torch.cat(biases) if any(module.bias is not None for module in modules) else None
        if turns:
            weight = weight.view(2, -1, turns, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
            bias = None if bias is None else bias.view(2, -1, turns).transpose(0, 1).reshape(-1)
        packed = PackedLinear(self._library, weight, bias, self._int8)
        self._held.append(packed)
        for module in modules:
            module.weight.data = torch.empty(0, dtype=module.weight.dtype)
        return packed.matrix

    def _floats(self, values: torch.Tensor | None) -> int | None:
        if values is None:
            return None
        self._held.append(values.detach().to(torch.float32, copy=True).contiguous())
        return int(self._held[-1].data_ptr())

    def bind(self, storage: KVStorage) -> None:
        """Read and write this storage from now on."""
        self._storage = storage  # the structures point into it
        for struct, (spec, geometry) in zip(self._layers, self._attention, strict=True):
            heads = struct.qkv.outputs // geometry.head_dim - 2 * geometry.kv_heads
            struct.attention = describe_attention(storage.layer(spec.kv_group), heads, spec, None, self._in_order)

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        """One step: float32 [L, vocab], one row for each of `batch.logits_rows`."""
        highest = int(batch.context_lens.max())
        if highest > len(self._rotations[0]):
            self._grow_rotations(highest)
        out = torch.empty(len(batch.logits_rows), self.vocab_size, dtype=torch.float32)
        self._library.decode(self._decoder, Step.of(batch), out.data_ptr(), torch.get_num_threads())
        return out

    def _grow_rotations(self, length: int) -> None:
        """The model's own cosines and sines for every position below `length`, and some more."""
        positions = torch.arange(-(-length // _POSITIONS) * _POSITIONS)[None]
        cosines, sines = (
            table[0].float().contiguous() for table in self._rotary(torch.zeros(1, dtype=torch.float32), positions)
        )
        self._rotations = (cosines, sines)
        self._decoder.rotary_dim = cosines.shape[1]
        self._decoder.cosines, self._decoder.sines = cosines.data_ptr(), sines.data_ptr()


def fuse(
    model: nn.Module,
    hf_config: Any,
    probed: list[ProbedLayer],
    library: ctypes.CDLL,
    int8: bool = False,
    in_order: bool = False,
) -> FusedDecoder | None:
    """The model as a fused decoder where it is one; its weights are then gone.

    Args:
        model: A probed causal LM on a CPU.
        hf_config: Its configuration.
        probed: Its attention layers.
        library: The native code.
        int8: Round its linear layers to int8.
        in_order: Let no sum depend on what else is in a step.

    Returns:
        None, and the model as it was, where it does not fit.

    Raises:
        UnsupportedModelError: It seemed to fit, and with its own weights it did not.
    """
    try:
        parts = find_parts(model, probed, LIMITS)
        try_small(model, hf_config, LIMITS, lambda parts, probed: FusedDecoder(parts, probed, library))
    except DoesNotFit as reason:
        logger.info("%s is not fused: %s", type(model).__name__, reason)
        return None
    decoder, distance = prove_fused(
        model, hf_config, probed, lambda: FusedDecoder(parts, probed, library, int8, in_order)
    )
    exact = probed[0].geometry.dtype == torch.float32 and not int8
    if distance is not None and not is_near(distance, exact):  # the small model was no fair sample of it
        if int8:
            raise UnsupportedModelError(
                f"quantization='int8': changes this model's logits too much (by {distance:.2g} of their size, at most "
                f"{FARTHEST:g} is allowed): its weights or inputs do not round well to 8 bits; leave quantization out"
            )
        raise unsupported(
            hf_config,
            f"its fused form has other logits than its own (relative difference {distance:.2g}); "
            "PAGEDLLM_NATIVE=none runs it unfused",
        )
    return decoder
