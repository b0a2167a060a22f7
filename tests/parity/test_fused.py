"""Which families run as one native call per step. That their tokens are right is tested with all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pagedllm_core.attention.base import ForwardBatch
from tests.native import LIBRARIES
from tests.parity.driver import make_runner

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="no native code was compiled for this processor")
FUSED = ["llama", "llama_tied", "llama_odd", "smollm3", "mistral", "qwen2", "qwen3", "phi3"]
LEFT = ["gpt2", "gemma2", "granite", "olmo2", "mixtral", "smollm3_without_rope"]


@pytest.mark.parametrize("name", FUSED)
def test_these_families_are_fused(name: str, model_folder: Callable[[str], Path]) -> None:
    runner = make_runner(model_folder(name))
    assert runner.is_fused
    runner.close()


@pytest.mark.parametrize("name", FUSED)
def test_int8_stays_near(name: str, model_folder: Callable[[str], Path]) -> None:
    exact, rounded = (make_runner(model_folder(name), quantization=kind) for kind in (None, "int8"))
    rows = np.arange(40)
    step = ForwardBatch(
        token_ids=5 + 2 * rows,
        positions=rows,
        slot_mapping=rows,
        query_starts=np.array([0, 40], dtype=np.int32),
        context_lens=np.array([40], dtype=np.int32),
        block_tables=np.arange(10, dtype=np.int32)[None],
        logits_rows=rows,
    )
    wanted, found = exact.run(step), rounded.run(step)
    distance = (found - wanted).norm(dim=1) / (wanted - wanted.mean(1, keepdim=True)).norm(dim=1)
    assert 1e-4 < float(distance.median()) < 0.1
    for runner in (exact, rounded):
        runner.close()


@pytest.mark.parametrize("name", LEFT)
def test_those_are_left_as_they_are(name: str, model_folder: Callable[[str], Path]) -> None:
    runner = make_runner(model_folder(name))
    assert not runner.is_fused
    runner.close()
