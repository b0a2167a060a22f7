"""Runs one step: a ragged batch in, logits out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from pagedllm_core.attention.base import AttentionBackend, ForwardBatch
from pagedllm_core.attention.native import NativeAttention
from pagedllm_core.attention.torch_paged import TorchPagedAttention
from pagedllm_core.config import EngineConfig
from pagedllm_core.errors import CapacityError, InvalidRequestError, UnsupportedModelError
from pagedllm_core.kv.storage import KVStorage, block_bytes
from pagedllm_core.model.determinism import shapes_that_differ
from pagedllm_core.model.fuse import fuse
from pagedllm_core.model.hf import Layer, PagedContext, RaggedModel
from pagedllm_core.model.loader import LoadedModel, load_model
from pagedllm_core.model.memory import available_memory, give_back_memory
from pagedllm_core.model.probe import ProbedLayer, probe_layers
from pagedllm_core.native.library import load, tier

logger = logging.getLogger("pagedllm.model")

_DEFAULT_POOL = 4 << 30
_DEFAULT_SHARE = 0.4
_DEFAULT_SWAP = 4 << 30
_WORTH_A_THREAD = 256 << 20  # bytes of weights
_ONLY_FUSED = (
    "{field}={value!r}: {model!r} runs on torch here; use a model that the native code runs whole (Llama, Mistral, "
    "Qwen2, Qwen3, Phi-3) on a CPU with AVX2, with float32 or bfloat16, or leave {field} out"
)


class ModelRunner:
    """A loaded model with its KV pool. One thread at a time may call it.

    Args:
        config: What to load, and how large the pool is.

    Attributes:
        vocab_size: Width of the logits.
        max_model_len: Context limit in tokens.
        num_blocks: Blocks in the pool.
        num_host_blocks: Blocks in host memory, for swapping.
        block_size: Tokens in a block.
        eos_token_ids: Ids that end a sequence.
        generation_defaults: The model's own sampling values.
        tokenizer: The tokenizer, or None where the model has none.
        device: Where model and pool lie.
        dtype: Type of the weights.
        model_name: What the user called the model.

    Raises:
        ModelLoadError: The model's files cannot be loaded.
        UnsupportedModelError: The model cannot be served exactly.
        CapacityError: The pool is smaller than one block.
        InvalidRequestError: A configuration field does not fit the model or the machine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._num_threads = config.num_threads
        with self._threads():
            loaded = load_model(config)
        library = load(tier()) if loaded.device.type == "cpu" else None
        attention = TorchPagedAttention if library is None else partial(NativeAttention, library=library)
        # A model is tried on a few tokens: hundreds of small operations, which wait for threads longer than they work.
        size = sum(parameter.nbytes for parameter in loaded.model.parameters())
        with self._threads(most=1 + size // _WORTH_A_THREAD):
            probe = partial(probe_layers, loaded.model, loaded.hf_config, attention)
            int8 = config.quantization == "int8"
            self._fused = None
            if library is not None:
                layers = probe(prove=False)  # the fused form is compared with the model's own logits, too
                self._fused = fuse(loaded.model, loaded.hf_config, layers, library, int8)
            if self._fused is None:
                layers = probe()
        if int8 and self._fused is None:
            raise UnsupportedModelError(_ONLY_FUSED.format(field="quantization", value="int8", model=loaded.name))
        self.max_model_len = loaded.max_model_len
        self.block_size = config.block_size
        self.eos_token_ids = loaded.eos_token_ids
        self.generation_defaults = loaded.generation_config
        self.tokenizer = loaded.tokenizer
        self.device = loaded.device
        self.dtype = loaded.dtype
        self.model_name = loaded.name
        self.vocab_size = _logits_width(loaded)
        self._model = RaggedModel(torch.nn.Identity() if self._fused else loaded.model)
        self._backend: AttentionBackend = attention(self.device, self.block_size)
        geometry = [layer.geometry for layer in layers]
        self.num_blocks = self._pool_size(config, layers)
        self.num_host_blocks = self._host_blocks(config, block_bytes(geometry, self.block_size))
        self._storage = KVStorage(geometry, self.num_blocks, self.block_size, self.device, self.num_host_blocks)
        if self._fused is not None:
            self._fused.bind(self._storage)
        if config.deterministic:
            self._check_determinism()
        self._layers = {} if self._fused else self._serve(layers, self._storage)
        give_back_memory()
        logger.info(
            "%s on %s in %s: %d blocks of %d tokens (%.1f MiB); %s",
            self.model_name, self.device, self.dtype, self.num_blocks, self.block_size, self._storage.nbytes / 2**20,
            self._describe_code(library is not None),
        )  # fmt: skip

    @property
    def is_fused(self) -> bool:
        """True where native code runs whole steps."""
        return self._fused is not None

    @torch.inference_mode()
    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute a step: keys and values go into their slots, logits come back.

        Where `num_threads` is set, torch's thread count is changed for the time of the call and restored; it is a
        setting of the calling thread, but threads that first use torch meanwhile inherit it.

        Args:
            batch: The step.

        Returns:
            float32 [L, vocab], one row for each of `batch.logits_rows`, on the device. Inference tensors.
        """
        with self._threads():
            if self._fused is not None:
                return self._fused.logits(batch)
            return self._forward(batch, self._layers)

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (source, destination) each, in all layers at once; before the step that writes to them."""
        with torch.inference_mode():
            self._storage.copy_blocks(copies)

    def swap_out(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy blocks to host memory, (device, host) each, before anything is written in a step."""
        with torch.inference_mode():
            self._storage.swap_out(moves)

    def swap_in(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy blocks back from host memory, (host, device) each."""
        with torch.inference_mode():
            self._storage.swap_in(moves)

    def close(self) -> None:
        """Free the model and the pool. The runner cannot be used afterwards."""
        self._layers, self._fused = {}, None
        self._storage.free()
        self._model = RaggedModel(torch.nn.Identity())
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _check_determinism(self) -> None:
        """Only the native code keeps the order of its sums; what it promises is tried on some shapes.

        Raises:
            UnsupportedModelError: This model on this machine is not deterministic.
        """
        if self._fused is None:
            raise UnsupportedModelError(_ONLY_FUSED.format(field="deterministic", value=True, model=self.model_name))
        with self._threads():
            different = shapes_that_differ(self._fused.logits, self.vocab_size, self.num_blocks, self.block_size)
        if different:
            raise UnsupportedModelError(
                f"deterministic=True: {self.model_name!r} gave other bits on this machine for {', '.join(different)}; "
                "leave deterministic out"
            )

    def _describe_code(self, native: bool) -> str:
        """Which code runs the steps, and why."""
        if self.device.type != "cpu":
            return "torch"
        if not native:
            return (
                f"torch, as no native code is compiled for this processor ({tier() or 'unknown to it'}); "
                "python -m pagedllm_core.native.build compiles it"
            )
        return f"native code ({tier()}), {'the whole step' if self._fused else 'attention only'}"

    def _forward(self, batch: ForwardBatch, layers: dict[torch.nn.Module, Layer]) -> torch.Tensor:
        context = PagedContext(self._backend, layers, self._backend.prepare(batch))
        return self._model.logits(
            torch.from_numpy(batch.token_ids).to(self.device, non_blocking=True),
            torch.from_numpy(batch.positions).to(self.device, non_blocking=True),
            torch.from_numpy(batch.logits_rows).to(self.device, non_blocking=True),
            context,
        )

    @contextmanager
    def _threads(self, most: int | None = None) -> Iterator[None]:
        """Use the configured number of CPU threads, or `most`, and give back what was set before."""
        before = torch.get_num_threads()
        wanted = min(self._num_threads or before, most or before)
        if wanted == before:
            yield
            return
        torch.set_num_threads(wanted)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def _serve(self, layers: list[ProbedLayer], storage: KVStorage) -> dict[torch.nn.Module, Layer]:
        return {layer.module: Layer(layer.spec, storage.layer(layer.spec.kv_group)) for layer in layers}

    def _pool_size(self, config: EngineConfig, layers: list[ProbedLayer]) -> int:
        """Blocks that the pool holds."""
        size = block_bytes([layer.geometry for layer in layers], self.block_size)
        if config.kv_cache_memory is not None:
            if config.kv_cache_memory < size:
                raise CapacityError(
                    f"kv_cache_memory={config.kv_cache_memory}: one block of {self.block_size} tokens takes {size} "
                    "bytes in this model; give at least that, or leave kv_cache_memory out"
                )
            return config.kv_cache_memory // size
        usable = config.max_num_seqs * -(-self.max_model_len // self.block_size)
        if self.device.type == "cuda":
            memory = self._free_cuda_memory(config, layers)
        else:
            memory = min(_DEFAULT_POOL, int(_DEFAULT_SHARE * available_memory()))
        if memory < size:
            raise CapacityError(
                f"kv_cache_memory: {memory} bytes are left on {self.device}, and one block of {self.block_size} tokens "
                f"takes {size}; free memory, set kv_cache_memory, or choose a smaller model or block_size"
            )
        return min(memory // size, usable)

    def _host_blocks(self, config: EngineConfig, size: int) -> int:
        """Blocks of host memory that `swap_space` allows; by default 4 GiB beside a GPU, and none elsewhere."""
        available = available_memory()
        if config.swap_space is None:
            return min(_DEFAULT_SWAP, available // 4) // size if self.device.type == "cuda" else 0
        wanted = int(config.swap_space * 2**30)
        if wanted > available:
            raise InvalidRequestError(
                f"swap_space={config.swap_space}: only {available / 2**30:.1f} GiB of host memory are available; "
                "give less, or 0 to recompute what is preempted"
            )
        return wanted // size

    def _free_cuda_memory(self, config: EngineConfig, layers: list[ProbedLayer]) -> int:
        """Bytes that `gpu_memory_utilization` leaves after the weights and the largest forward pass."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        self._profile(config, layers)
        activations = torch.cuda.max_memory_allocated(self.device) - before
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self.device)
        return int(free - (1 - config.gpu_memory_utilization) * total - activations)

    @torch.inference_mode()
    def _profile(self, config: EngineConfig, layers: list[ProbedLayer]) -> None:
        """Run the largest step once, over a small pool."""
        tokens = min(config.max_num_batched_tokens, self.max_model_len)
        blocks = -(-tokens // self.block_size)
        storage = KVStorage([layer.geometry for layer in layers], blocks, self.block_size, self.device)
        rows = min(config.max_num_seqs, tokens)
        self._forward(
            ForwardBatch(
                token_ids=np.zeros(tokens, dtype=np.int64),
                positions=np.arange(tokens, dtype=np.int64),
                slot_mapping=np.arange(tokens, dtype=np.int64),
                query_starts=np.array([0, tokens], dtype=np.int32),
                context_lens=np.array([tokens], dtype=np.int32),
                block_tables=np.arange(blocks, dtype=np.int32)[None],
                logits_rows=np.arange(tokens - rows, tokens, dtype=np.int64),
            ),
            self._serve(layers, storage),
        )


def _logits_width(loaded: LoadedModel) -> int:
    """Width of the logits, which may be padded beyond the configured vocabulary."""
    head: Any = loaded.model.get_output_embeddings()  # type: ignore[operator]
    width = getattr(head, "out_features", None) or getattr(getattr(head, "weight", None), "shape", [None])[0]
    return int(width or loaded.hf_config.get_text_config(decoder=True).vocab_size)
