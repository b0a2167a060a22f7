"""Which families run as one native call per step. That their tokens are right is tested with all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.native import LIBRARIES
from tests.parity.driver import make_runner

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="no native code was compiled for this processor")
FUSED = ["llama", "llama_tied", "smollm3", "mistral", "qwen2", "qwen3", "phi3"]
LEFT = ["gpt2", "gemma2", "granite", "olmo2", "mixtral", "smollm3_without_rope"]


@pytest.mark.parametrize("name", FUSED)
def test_these_families_are_fused(name: str, model_folder: Callable[[str], Path]) -> None:
    runner = make_runner(model_folder(name))
    assert runner.is_fused
    runner.close()


@pytest.mark.parametrize("name", LEFT)
def test_those_are_left_as_they_are(name: str, model_folder: Callable[[str], Path]) -> None:
    runner = make_runner(model_folder(name))
    assert not runner.is_fused
    runner.close()
