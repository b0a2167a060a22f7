"""Runs one step: a ragged batch in, logits out."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.attention.native import NativeAttention
from pagedllm_core.attention.torch_paged import TorchPagedAttention
from pagedllm_core.config import EngineConfig
from pagedllm_core.decode.device import DeviceSampler
from pagedllm_core.decode.logprobs import score_tokens
from pagedllm_core.errors import CapacityError, InvalidRequestError, UnsupportedModelError, is_out_of_memory
from pagedllm_core.kernels import triton_version
from pagedllm_core.kv.storage import KVStorage, LayerGeometry, block_bytes
from pagedllm_core.model.cuda import check_device, clear_workspaces, empty_cache
from pagedllm_core.model.determinism import LONG, SHORT, shapes_that_differ
from pagedllm_core.model.direct import DirectDecoder
from pagedllm_core.model.fuse import FusedDecoder, fuse
from pagedllm_core.model.loader import LoadedModel, load_model, pick_device
from pagedllm_core.model.memory import give_back_memory
from pagedllm_core.model.probe import AttentionLayer, probe_layers
from pagedllm_core.model.sizing import graph_memory, host_blocks, largest_step, pool_blocks
from pagedllm_core.model.steps import GpuCode, GpuSteps, MakeBackend, Steps, TorchSteps, gpu_code
from pagedllm_core.native.library import load, tier

if TYPE_CHECKING:
    from pagedllm_core.model.gpu import GpuDecoder

logger = logging.getLogger("pagedllm.model")

_WORTH_A_THREAD = 256 << 20  # bytes of weights
_MOST_REPLAYED = 512  # sequences; a larger step takes the GPU longer than its launches take
_ONLY_FUSED = (
    "{field}={value!r}: {model!r} runs on {code} here; use a model that runs whole in code of our own (Llama, Mistral, "
    "Qwen2, Qwen3, Phi-3) on {where}, or leave {field} out"
)
_CPU = "a CPU with AVX2, with float32 or bfloat16"


class ModelRunner:
    """A loaded model with its KV pool. One thread at a time may call it.

    Args:
        config: What to load, and how large the pool is.
        gpu: What runs steps on a GPU; by default `gpu_code` of the device.

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
        sampler: Chooses tokens on the device; None where the host is the device.
        is_fused: True where steps run in a form of their own instead of transformers' code.

    Raises:
        ModelLoadError: The model's files cannot be loaded.
        UnsupportedModelError: The model cannot be served exactly.
        CapacityError: The pool is smaller than one block.
        InvalidRequestError: A configuration field does not fit the model or the machine.
    """

    def __init__(self, config: EngineConfig, *, gpu: GpuCode | None = None) -> None:
        self._num_threads = config.num_threads
        self.sampler: DeviceSampler | None = None
        device = pick_device(config.device)
        gpu = gpu or gpu_code(device)
        library = load(tier()) if gpu is None and device.type == "cpu" else None
        with self._threads(), _memory_is_short(device):
            loaded = load_model(config, direct=library is not None)
        self.max_model_len = loaded.max_model_len
        self.block_size = config.block_size
        self.eos_token_ids = loaded.eos_token_ids
        self.generation_defaults = loaded.generation_config
        self.tokenizer = loaded.tokenizer
        self.device = loaded.device
        self.dtype = loaded.dtype
        self.model_name = loaded.name
        self.vocab_size = _logits_width(loaded)
        with self._on_device(), _memory_is_short(device):
            self._steps, layers = self._make_steps(loaded, config, library, gpu)
            del loaded  # a fused form has the weights that it needs
            self._geometry = [_stored(layer.geometry, config, gpu) for layer in layers]
            if gpu is not None and isinstance(self._steps, GpuSteps):
                self._use_gpu(self._steps, gpu, config)
            size = block_bytes(self._geometry, self.block_size)
            profile = partial(self._profile, config)
            self.num_blocks = pool_blocks(config, size, self.max_model_len, self.device, profile)
            self.num_host_blocks = host_blocks(config, size, self.device)
            self._storage = self._make_storages(config)
            self._steps.bind(self._storage)
        if config.deterministic:
            self._check_determinism()
        give_back_memory()
        logger.info(
            "%s on %s in %s: %d blocks of %d tokens (%.1f MiB); %s",
            self.model_name, self.device, self.dtype, self.num_blocks, self.block_size, self._storage.nbytes / 2**20,
            self._describe_code(library is not None, gpu is not None),
        )  # fmt: skip

    def _make_steps(
        self, loaded: LoadedModel, config: EngineConfig, library: ctypes.CDLL | None, gpu: GpuCode | None
    ) -> tuple[Steps, Sequence[AttentionLayer]]:
        """What computes the steps, and the model's attention layers."""
        model, hf_config, int8 = loaded.model, loaded.hf_config, config.quantization == "int8"
        if isinstance(model, DirectDecoder):
            if library is None:
                raise RuntimeError("a model was read directly, and there is no native code to run it")
            self.is_fused = True
            with self._threads():
                return FusedDecoder(*model, library, int8, config.deterministic), model.attention
        attention: MakeBackend = TorchPagedAttention
        if library is not None:
            attention = partial(NativeAttention, library=library)
        elif gpu is not None:
            attention = partial(gpu.attention, deterministic=config.deterministic)
        # A model is tried on a few tokens: hundreds of small operations, which wait for threads longer than they work.
        size = sum(parameter.nbytes for parameter in model.parameters())
        with self._threads(most=1 + size // _WORTH_A_THREAD):
            probe = partial(probe_layers, model, hf_config, attention)
            fused: FusedDecoder | GpuDecoder | None = None
            if library is not None or gpu is not None:
                layers = probe(prove=False)  # the fused form is compared with the model's own logits, too
            if library is not None:
                fused = fuse(model, hf_config, layers, library, int8, config.deterministic)
            elif gpu is not None:
                from pagedllm_core.model.gpu import fuse_on_gpu

                fused = fuse_on_gpu(model, hf_config, layers, attention, self.max_model_len, config.deterministic)
            if fused is None:
                layers = probe()
        self.is_fused = fused is not None
        if config.quantization is not None and not isinstance(fused, FusedDecoder):
            self._refuse("quantization", config.quantization, "torch" if fused is None else "Triton kernels", _CPU)
        if config.deterministic and fused is None:
            self._refuse("deterministic", True, "torch", f"{_CPU}, or on a GPU with Triton")
        if isinstance(fused, FusedDecoder):
            return fused, layers
        forward = fused or TorchSteps(model, layers, attention, self.device)
        return (forward if gpu is None else GpuSteps(forward, self.device, to_host=config.deterministic)), layers

    def _refuse(self, field: str, value: Any, code: str, where: str) -> NoReturn:
        raise UnsupportedModelError(
            _ONLY_FUSED.format(field=field, value=value, model=self.model_name, code=code, where=where)
        )

    def _use_gpu(self, steps: GpuSteps, gpu: GpuCode, config: EngineConfig) -> None:
        """Sampling and graphs take their memory before the pool gets the rest."""
        # Without a sampler all tokens are chosen on the host; with one, the company's requests decide who chooses.
        if self.device.type == "cuda" and not config.deterministic:
            self.sampler = DeviceSampler(self.device, self.vocab_size, config.max_num_seqs)
            self.sampler.warm_up()
        limit = graph_memory(config, self.device)
        if limit:
            blocks = -(-self.max_model_len // self.block_size)
            sequences = min(config.max_num_seqs, _MOST_REPLAYED)
            steps.use_graphs(gpu.recorder(self.device), sequences, blocks, self.vocab_size, limit)

    def run(self, batch: ForwardBatch) -> torch.Tensor:
        """Compute a step: keys and values go into their slots, logits come back.

        Where `num_threads` is set, torch's thread count is changed for the time of the call and restored; it is a
        setting of the calling thread, but threads that first use torch meanwhile inherit it.

        Args:
            batch: The step.

        Returns:
            float32 [L, vocab], one row for each of `batch.logits_rows`, on the device; on a GPU valid until the next
            step. Inference tensors.

        Raises:
            MemoryError: The step does not fit into the device's memory. What torch kept for later was given back.
        """
        with self._threads(), self._on_device():
            try:
                return self._steps.logits(batch)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Outside of `except`: the traceback held the step's activations.
            if isinstance(self._steps, GpuSteps):
                self._steps.drop_graphs()
            if self.device.type == "cuda":
                empty_cache()
        raise MemoryError(
            f"a step of {len(batch.token_ids)} tokens of {len(batch.context_lens)} sequences does not fit on "
            f"{self.device}; lower gpu_memory_utilization ({reason})"
        )

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, (source, destination) each, in all layers at once; before the step that writes to them."""
        with torch.inference_mode(), self._on_device():
            self._storage.copy_blocks(copies)

    def swap_out(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy blocks to host memory, (device, host) each, before anything is written in a step; waits for the copy."""
        with torch.inference_mode(), self._on_device():
            self._storage.swap_out(moves)
            self._wait()

    def swap_in(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy blocks back from host memory, (host, device) each; waits for the copy."""
        with torch.inference_mode(), self._on_device():
            self._storage.swap_in(moves)
            self._wait()

    def _wait(self) -> None:
        """For the device, so that whoever measures a copy measures all of it."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def check_device(self) -> None:
        """See `Runner.check_device`."""
        check_device(self.device)

    def close(self) -> None:
        """Free the model, the pool and all else on the device. The runner cannot be used afterwards."""
        with self._on_device():
            if isinstance(self._steps, GpuSteps):
                with suppress(RuntimeError):  # of a device that computes no more
                    self._steps.close()
            self._steps = TorchSteps(torch.nn.Identity(), [], TorchPagedAttention, self.device)
            self.sampler = None
            self._storage.free()
            if self.device.type == "cuda":
                with suppress(AttributeError, RuntimeError):
                    clear_workspaces()
                    empty_cache()
                    torch._C._host_emptyCache()  # pinned memory that torch keeps for later

    def _check_determinism(self) -> None:
        """Only code of our own keeps the order of its sums; what it promises is tried on some shapes.

        Raises:
            UnsupportedModelError: This model on this machine is not deterministic.
        """
        longest = min(self.max_model_len, LONG if isinstance(self._steps, GpuSteps) else SHORT)
        with self._threads(), self._on_device():
            different = shapes_that_differ(
                self._steps.logits, self.vocab_size, self.num_blocks, self.block_size, longest
            )
        if different:
            raise UnsupportedModelError(
                f"deterministic=True: {self.model_name!r} gave other bits on this machine for {', '.join(different)}; "
                "leave deterministic out"
            )

    def _describe_code(self, native: bool, triton: bool) -> str:
        """Which code runs the steps, and why."""
        part = "the whole step" if self.is_fused else "attention only"
        if triton:
            graphs = isinstance(self._steps, GpuSteps) and self._steps.graphs is not None
            return f"Triton kernels, {part}, {'with' if graphs else 'without'} CUDA graphs"
        if self.device.type != "cpu":
            return "torch"
        if not native:
            return (
                f"torch, as no native code is compiled for this processor ({tier() or 'unknown to it'}); "
                "python -m pagedllm_core.native.build compiles it"
            )
        return f"native code ({tier()}), {part}"

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

    def _on_device(self) -> AbstractContextManager[Any]:
        """Kernels are launched on the thread's current device, which may be another GPU."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _make_storages(self, config: EngineConfig) -> KVStorage:
        """The pool, and the host memory; without that where the user did not ask for it and it cannot be locked."""
        try:
            return self._make_storage(self.num_blocks, self.num_host_blocks)
        except CapacityError as error:
            if config.swap_space is not None or not self.num_host_blocks:
                raise
            logger.warning("preempted requests are recomputed, not swapped: %s", error)
        self.num_host_blocks = 0
        return self._make_storage(self.num_blocks)

    def _make_storage(self, blocks: int, host: int = 0) -> KVStorage:
        try:
            return KVStorage(self._geometry, blocks, self.block_size, self.device, host)
        except (MemoryError, torch.OutOfMemoryError) as error:
            size = blocks * block_bytes(self._geometry, self.block_size) / 2**30
            raise CapacityError(
                f"kv_cache_memory: a KV pool of {size:.1f} GiB does not fit into the memory of {self.device}; give less"
            ) from error

    def _profile(self, config: EngineConfig) -> None:
        """Run the largest step once, and score its logits, over a small pool that is gone afterwards."""
        batch = largest_step(config, self.max_model_len)
        self._steps.bind(self._make_storage(batch.block_tables.shape[1]))
        logits = self._steps.logits(batch)
        score_tokens(logits, logits.argmax(-1), [1] * len(logits))  # what takes most of all that is done with logits
        self._steps.bind(self._make_storage(1))


@contextmanager
def _memory_is_short(device: torch.device) -> Iterator[None]:
    """Turn what torch raises where memory is short into a typed error; idle engines then make room (`registry.py`)."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise CapacityError(
            f"{device} has too little memory for this model ({reason}); free memory, or choose a smaller model or dtype"
        ) from error


def _stored(geometry: LayerGeometry, config: EngineConfig, gpu: GpuCode | None) -> LayerGeometry:
    """What a layer's cache holds: the model's own type, or eight bits.

    Raises:
        InvalidRequestError: Eight bits are asked for where the kernels do not run.
    """
    if config.kv_cache_dtype != "fp8":
        return geometry
    if gpu is None or (torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9)):
        raise InvalidRequestError(
            f"kv_cache_dtype={config.kv_cache_dtype!r}: needs a GPU with 8-bit floats (Ada, Hopper or newer) and "
            "Triton; leave kv_cache_dtype out"
        )
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0) and triton_version() < (3, 9):
        # 3.6 fails on the conversion to bfloat16; those in between were not tried.
        raise InvalidRequestError(
            f"kv_cache_dtype={config.kv_cache_dtype!r}: on this GPU needs Triton 3.9 or newer, as older ones do not "
            "compile it; upgrade triton, or leave kv_cache_dtype out"
        )
    return replace(geometry, dtype=torch.float8_e4m3fn)


def _logits_width(loaded: LoadedModel) -> int:
    """Width of the logits, which may be padded beyond the configured vocabulary."""
    if isinstance(loaded.model, DirectDecoder):
        return loaded.model.parts.head.out_features
    head: Any = loaded.model.get_output_embeddings()  # type: ignore[operator]
    width = getattr(head, "out_features", None) or getattr(getattr(head, "weight", None), "shape", [None])[0]
    return int(width or loaded.hf_config.get_text_config(decoder=True).vocab_size)
