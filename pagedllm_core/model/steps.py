"""What computes a model's steps: transformers' modules with our attention, and how steps run on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch

from pagedllm_core.attention.base import AttentionBackend, ForwardBatch
from pagedllm_core.kernels import has_triton
from pagedllm_core.kv.storage import KVStorage
from pagedllm_core.model.graphs import CudaRecorder, DecodeGraphs, DecodeInputs, Forward, Recorder
from pagedllm_core.model.hf import Layer, PagedContext, RaggedModel
from pagedllm_core.model.probe import ProbedLayer
from pagedllm_core.model.staging import Staging, StepTensors, stage_token_ids

MakeBackend = Callable[[torch.device, int], Any]
"""Makes an attention backend for a device and a block size."""


class Steps(Protocol):
    """Computes steps over a storage."""

    def bind(self, storage: KVStorage) -> None:
        """Read and write this storage from now on."""

    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        """One step: float32 [L, vocab], one row for each of `batch.logits_rows`."""


class TorchSteps:
    """A transformers module with attention replaced.

    Args:
        model: A causal LM in eval mode.
        layers: Its attention layers.
        backend: Makes the attention backend.
        device: Where the model is.

    Attributes:
        attention: The attention backend, once a storage is bound.
    """

    attention: AttentionBackend

    def __init__(
        self, model: torch.nn.Module, layers: list[ProbedLayer], backend: MakeBackend, device: torch.device
    ) -> None:
        self._model, self._probed = RaggedModel(model), layers
        self._make_backend, self._device = backend, device

    def bind(self, storage: KVStorage) -> None:
        """Read and write this storage from now on."""
        self.attention = self._make_backend(self._device, storage.block_size)
        self._layers = {layer.module: Layer(layer.spec, storage.layer(layer.spec.kv_group)) for layer in self._probed}

    def compute(self, step: StepTensors) -> torch.Tensor:
        """One step over tensors on the device: float32 [L, vocab]."""
        context = PagedContext(self.attention, self._layers, step.meta)
        return self._model.logits(step.token_ids, step.positions, step.rows, context)

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        """One step: float32 [L, vocab], one row for each of `batch.logits_rows`."""
        positions, rows = (
            torch.from_numpy(one).to(self._device, non_blocking=True) for one in (batch.positions, batch.logits_rows)
        )
        meta = self.attention.prepare(batch)
        return self.compute(StepTensors(stage_token_ids(batch, self._device), positions, rows, meta))


class GpuCode(NamedTuple):
    """What runs steps on a GPU; tests bring their own, and run on a CPU.

    Attributes:
        attention: Makes a `TritonAttention` from what it takes.
        recorder: Makes what records graphs.
    """

    attention: Callable[..., Any]
    recorder: Callable[[torch.device], Recorder] = CudaRecorder


def gpu_code(device: torch.device) -> GpuCode | None:
    """The GPU's code, on a CUDA device where Triton is installed."""
    if device.type != "cuda" or not has_triton():
        return None
    from pagedllm_core.attention.triton_paged import TritonAttention

    return GpuCode(TritonAttention)


class GpuSteps:
    """Runs a forward pass on a GPU: through graphs where every sequence decodes, else eagerly.

    Args:
        forward: The forward pass, over `TritonAttention`.
        device: The GPU.
        to_host: Give the logits to the host, which waits for them.
    """

    def __init__(self, forward: Forward, device: torch.device, to_host: bool = False) -> None:
        self._forward, self._device, self._to_host = forward, device, to_host
        self._staging = Staging(device)
        self.graphs: DecodeGraphs | None = None

    def use_graphs(self, recorder: Recorder, sequences: int, blocks: int, vocab_size: int, limit: int) -> None:
        """Replay decode steps from now on.

        Args:
            recorder: Records work.
            sequences: Most sequences of a step.
            blocks: Most blocks of a sequence.
            vocab_size: Width of the logits.
            limit: Bytes that graphs may take.
        """
        inputs = DecodeInputs(self._device, self._staging, sequences, blocks)
        self.graphs = DecodeGraphs(self._forward, inputs, recorder, vocab_size, limit)

    def bind(self, storage: KVStorage) -> None:
        """Read and write this storage from now on."""
        self.drop_graphs()  # they read the old one
        self._forward.bind(storage)

    def drop_graphs(self) -> None:
        """Let go of captured graphs; they are captured again when they are needed."""
        if self.graphs is not None:
            self.graphs.clear()

    def close(self) -> None:
        """Let go of all graphs and their memory."""
        if self.graphs is not None:
            self.graphs.close()
            self.graphs = None

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch) -> torch.Tensor:
        """One step: float32 [L, vocab], one row for each of `batch.logits_rows`; valid until the next step."""
        logits = None if self.graphs is None else self.graphs.run(batch)
        if logits is None:
            step = self._staging.stage(batch, self._forward.attention.prepare(batch))
            logits = self._forward.compute(step).float()
        return logits.cpu() if self._to_host else logits
