"""What all engines of a process share on a CUDA device."""

from __future__ import annotations

import threading
from contextlib import suppress

import torch

from pagedllm_core.errors import EngineClosedError

capturing = threading.RLock()
"""Held while a CUDA graph is captured: torch allows one capture at a time, and memory is given back by nobody else."""


def empty_cache() -> None:
    """Give back the device memory that torch keeps for later."""
    with capturing:
        torch.cuda.empty_cache()


def clear_workspaces() -> None:
    """Let go of cuBLAS's workspaces, which torch keeps by handle and stream; they are made anew when needed."""
    with capturing, suppress(AttributeError):  # not a public function
        torch._C._cuda_clearCublasWorkspaces()


def check_device(device: torch.device) -> None:
    """Find out whether a device still computes: after an illegal access, say, every later call of the process fails.

    Raises:
        EngineClosedError: It does not.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise EngineClosedError(f"{device} computes no more ({reason}); start the process again") from None
