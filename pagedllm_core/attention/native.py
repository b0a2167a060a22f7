"""Paged attention in native code, straight over the pool: nothing is gathered, padded or masked."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from pagedllm_core.attention.base import ForwardBatch, LayerSpec
from pagedllm_core.attention.torch_paged import StepMeta, TorchPagedAttention
from pagedllm_core.native.library import DTYPES, Attention, Step

MOST_DIM = MOST_BLOCK = 256  # as in native/attention.h


def describe_attention(
    kv: torch.Tensor, heads: int, spec: LayerSpec, sinks: torch.Tensor | None, in_order: bool = False
) -> Attention:
    """What one layer attends over.

    Args:
        kv: Its cache [2, kv_heads, blocks, block_size, head_dim], contiguous halves.
        heads: Query heads.
        spec: What the layer computes.
        sinks: float32 [heads], or None.
        in_order: Add up in one order, whether a token comes alone or in a chunk; slower for chunks.
    """
    _, kv_heads, blocks, block_size, width = kv.shape
    return Attention(
        kv[0].data_ptr(), kv[1].data_ptr(), None if sinks is None else sinks.data_ptr(), heads, kv_heads, width,
        blocks, block_size, kv.dtype == torch.bfloat16, spec.window or 0, in_order, spec.scale, spec.softcap or 0.0,
    )  # fmt: skip


def serves(kv: torch.Tensor) -> bool:
    """True where the native code can attend over this cache."""
    return kv.dtype in DTYPES and kv.shape[4] <= MOST_DIM and kv.shape[3] <= MOST_BLOCK


@dataclass(slots=True)
class NativeMeta:
    """The step as pointers, what they point to, and the step for the layers that torch attends over."""

    batch: ForwardBatch
    step: Step
    torch: StepMeta


class NativeAttention:
    """Hands each layer to the native code; the few that it does not know (wide heads, float16) to torch.

    Args:
        device: A CPU.
        block_size: Tokens in a KV block.
        library: The native code.
    """

    def __init__(self, device: torch.device, block_size: int, library: ctypes.CDLL) -> None:
        self._library = library
        self._torch = TorchPagedAttention(device, block_size)

    def prepare(self, batch: ForwardBatch) -> NativeMeta:
        """Nothing is computed here."""
        return NativeMeta(batch, Step.of(batch), self._torch.prepare(batch))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv: torch.Tensor, spec: LayerSpec, meta: NativeMeta
    ) -> torch.Tensor:
        """Attention of one layer; shapes as in `AttentionBackend.forward`."""
        if not serves(kv):
            return self._torch.forward(q, k, v, kv, spec, meta.torch)
        inputs = [one.float() if one.stride(2) == 1 else one.float().contiguous() for one in (q, k, v)]
        strides = (ctypes.c_int64 * 6)(*(stride for one in inputs for stride in one.stride()[:2]))
        sinks = None if spec.sinks is None else spec.sinks.float().contiguous()
        out = torch.empty(q.shape[1], q.shape[0], q.shape[2], dtype=torch.float32)
        self._library.attention(
            describe_attention(kv, q.shape[0], spec, sinks), meta.step, *(one.data_ptr() for one in inputs), strides,
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return out.to(q.dtype)
