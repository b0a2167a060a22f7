"""The compiled code as Python sees it: which tier runs here, and its structures and functions.

The structures mirror `interface.h`, field by field.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.native.build import library_path

logger = logging.getLogger("pagedllm.native")

DTYPES = (torch.float32, torch.bfloat16)
"""Types of weights and caches that the native code can read."""


class Matrix(Structure):
    """y = x W^T + bias, packed."""

    _fields_ = [
        ("data", c_void_p), ("bias", c_void_p), ("scales", c_void_p), ("outputs", c_int64), ("inputs", c_int64),
        ("type", c_int64),
    ]  # fmt: skip


class Attention(Structure):
    """One layer's cache and what its attention computes."""

    _fields_ = [
        ("keys", c_void_p), ("values", c_void_p), ("sinks", c_void_p), ("heads", c_int64), ("kv_heads", c_int64),
        ("dim", c_int64), ("blocks", c_int64), ("block_size", c_int64), ("is_bf16", c_int64), ("window", c_int64),
        ("in_order", c_int64), ("scale", c_float), ("softcap", c_float),
    ]  # fmt: skip


class Step(Structure):
    """A `ForwardBatch`."""

    _fields_ = [
        ("tokens", c_int64), ("sequences", c_int64), ("logits", c_int64), ("token_ids", c_void_p),
        ("positions", c_void_p), ("slots", c_void_p), ("logits_rows", c_void_p), ("query_starts", c_void_p),
        ("context_lens", c_void_p), ("block_tables", c_void_p), ("table_width", c_int64),
    ]  # fmt: skip

    @classmethod
    def of(cls, batch: ForwardBatch) -> Step:
        """The step as pointers; `batch` must outlive it."""
        return cls(
            len(batch.token_ids),
            len(batch.context_lens),
            len(batch.logits_rows),
            batch.token_ids.ctypes.data,
            batch.positions.ctypes.data,
            batch.slot_mapping.ctypes.data,
            batch.logits_rows.ctypes.data,
            batch.query_starts.ctypes.data,
            batch.context_lens.ctypes.data,
            batch.block_tables.ctypes.data,
            batch.block_tables.shape[1],
        )


class LayerStruct(Structure):
    """One decoder layer."""

    _fields_ = [
        ("qkv", Matrix), ("o", Matrix), ("gate_up", Matrix), ("down", Matrix), ("input_norm", c_void_p),
        ("post_norm", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p), ("attention", Attention),
    ]  # fmt: skip


class DecoderStruct(Structure):
    """A whole model."""

    _fields_ = [
        ("layers", POINTER(LayerStruct)), ("num_layers", c_int64), ("hidden", c_int64), ("intermediate", c_int64),
        ("rotary_dim", c_int64), ("is_gated", c_int64), ("epsilon", c_float), ("embedding", c_void_p),
        ("embedding_is_bf16", c_int64), ("cosines", c_void_p), ("sines", c_void_p), ("norm", c_void_p),
        ("head", Matrix),
    ]  # fmt: skip


def tier() -> str | None:
    """The best tier that this processor can run, compiled or not; `PAGEDLLM_NATIVE` names another, or "none"."""
    wanted = os.environ.get("PAGEDLLM_NATIVE")
    if wanted is not None:
        return wanted if wanted in ("avx512", "avx2") else None
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability())


@functools.cache
def load(name: str | None) -> ctypes.CDLL | None:
    """The library of a tier, or None where it was not compiled."""
    if name is None or not library_path(name).exists():
        return None
    try:
        library = open_library(library_path(name))
    except (OSError, AttributeError) as error:  # an older library lacks functions
        logger.warning("the native code cannot be loaded: %s; python -m pagedllm_core.native.build compiles it", error)
        return None
    if library.uses_bf16_products():
        logger.info("native code (%s) uses bfloat16 products, as this processor has AVX512-BF16", name)
    return library


def open_library(path: Path) -> ctypes.CDLL:
    """A compiled library, its functions declared."""
    library = ctypes.CDLL(str(path))
    library.uses_bf16_products.restype = library.lanes.restype = c_int64
    library.packed_size.argtypes = [c_int64, c_int64, c_int64]
    library.packed_size.restype = c_int64
    library.pack_weight.argtypes = [c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int64]
    library.matmul.argtypes = [POINTER(Matrix), c_void_p, c_int64, c_void_p, c_int64]
    library.attention.argtypes = [
        POINTER(Attention), POINTER(Step), c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64,
    ]  # fmt: skip
    library.decode.argtypes = [POINTER(DecoderStruct), POINTER(Step), c_void_p, c_int64]
    for function in (library.pack_weight, library.matmul, library.attention, library.decode):
        function.restype = None
    return library


class PackedLinear:
    """A linear layer's weight in the order in which the native code reads it.

    Args:
        library: Packs it.
        weight: [outputs, inputs], float32 or bfloat16, contiguous; not needed afterwards.
        bias: [outputs], or None.
        int8: Round the weights to int8, scaled by output; the rows they meet will be rounded too, each by its largest
            number (W8A8).
    """

    def __init__(
        self, library: ctypes.CDLL, weight: torch.Tensor, bias: torch.Tensor | None = None, int8: bool = False
    ) -> None:
        outputs, inputs = weight.shape
        kind = 1 if int8 else weight.dtype.itemsize
        weight = weight.detach().contiguous()
        self._data = aligned(library.packed_size(outputs, inputs, kind), torch.uint8)
        self._bias = None if bias is None else bias.detach().to(torch.float32, copy=True).contiguous()
        self._scales = torch.empty(outputs if int8 else 0, dtype=torch.float32)
        library.pack_weight(
            weight.data_ptr(), outputs, inputs, weight.dtype.itemsize, kind, self._data.data_ptr(),
            self._scales.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        self._library = library
        bias_pointer = None if self._bias is None else self._bias.data_ptr()
        self.matrix = Matrix(self._data.data_ptr(), bias_pointer, self._scales.data_ptr(), outputs, inputs, kind)

    def __call__(self, x: torch.Tensor, threads: int = 1) -> torch.Tensor:
        """float32 [rows, inputs], contiguous, to float32 [rows, outputs].

        Beside bfloat16 weights, rows are rounded to bfloat16 where the library `uses_bf16_products`.
        """
        out = torch.empty(x.shape[0], self.matrix.outputs, dtype=torch.float32)
        self._library.matmul(self.matrix, x.data_ptr(), x.shape[0], out.data_ptr(), threads)
        return out


def aligned(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Untouched memory for `count` numbers, at the start of a page, in huge pages where the system has them."""
    page = 1 << 21 if count * dtype.itemsize > 1 << 22 else 64
    raw = np.empty(count * dtype.itemsize + page, dtype=np.uint8)
    start = -raw.ctypes.data % page
    memory = torch.from_numpy(raw[start : start + count * dtype.itemsize])
    if page > 64:
        _advise_huge_pages(memory)
    return memory.view(dtype)


def _advise_huge_pages(memory: torch.Tensor) -> None:
    """Ask for huge pages; a system that has none ignores it."""
    try:
        libc = ctypes.CDLL(None)
        libc.madvise(c_void_p(memory.data_ptr()), ctypes.c_size_t(memory.numel()), c_int32(14))  # MADV_HUGEPAGE
    except (OSError, AttributeError):
        logger.debug("no huge pages here")
