"""Everything here runs on a CUDA device, with compiled kernels; elsewhere it is skipped, with the reason.

    python -m pytest tests/gpu

On their own: in a run together with the other tests kernels are interpreted, and these are skipped, too.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parity.conftest import model_folder  # noqa: F401

HERE = Path(__file__).parent


def missing() -> str | None:
    """What these tests lack here."""
    import torch

    from pagedllm_core.kernels import has_triton

    if not torch.cuda.is_available():
        return "needs a GPU: torch.cuda.is_available() is False"
    if not has_triton():
        return "needs Triton"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "kernels are interpreted in this run; these tests need one of their own: python -m pytest tests/gpu"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks this folder's tests, and skips all of them where something is missing."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    reason = missing() if ours else None
    for item in ours:
        item.add_marker(pytest.mark.gpu)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def free_memory() -> Iterator[None]:
    """No test leaves memory to the next."""
    import torch

    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
