"""Checkpoints that go straight into native code: to the same bits as through transformers' code, and without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.config import EngineConfig
from pagedllm_core.engine import Engine
from pagedllm_core.errors import ModelLoadError
from pagedllm_core.model import fuse as fuse_module
from pagedllm_core.model import runner as runner_module
from pagedllm_core.model.direct import DirectDecoder
from pagedllm_core.model.loader import load_model
from pagedllm_core.model.resolve import BUNDLED
from pagedllm_core.params import SamplingParams
from tests.native import LIBRARIES
from tests.parity.driver import make_runner
from tests.parity.families import make_config

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="no native code was compiled for this processor")
Folders = Callable[[str], Path]

DIRECT = ["llama", "llama_tied", "llama_odd", "mistral", "qwen2", "qwen3", "llama3_rope", "llama_old_rope"]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.fixture
def checkpoint(model_folder: Folders, tmp_path: Path) -> Folders:
    """Gives a copy of a family's folder, some with other positions, that a test may change."""

    def copy(name: str) -> Path:
        family = "llama" if name in ("llama3_rope", "llama_old_rope") else name
        folder = Path(shutil.copytree(model_folder(family), tmp_path / name))
        if name == "llama3_rope":
            change(folder, rope_parameters=LLAMA3)
        if name == "llama_old_rope":  # as configurations were written before transformers 5
            old = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
            change(folder, rope_parameters=None, rope_theta=500000.0, rope_scaling=old)
        return folder

    return copy


def change(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; None takes one out."""
    path = folder / "config.json"
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def is_direct(folder: Path, **fields: Any) -> bool:
    return isinstance(load_model(EngineConfig(model=str(folder), device="cpu", **fields), True).model, DirectDecoder)


def logits(runner: Any) -> torch.Tensor:
    """Of every position of a sequence in two chunks beside another."""
    rows = np.arange(48)
    owner = (rows >= 30).astype(np.int64)
    step = ForwardBatch(
        token_ids=3 + 7 * rows % 150,
        positions=rows - 30 * owner,
        slot_mapping=rows + 2 * owner,
        query_starts=np.array([0, 30, 48], dtype=np.int32),
        context_lens=np.array([30, 18], dtype=np.int32),
        block_tables=np.stack([np.arange(8), np.arange(8) + 8]).astype(np.int32),
        logits_rows=rows,
    )
    found: torch.Tensor = runner.run(step).clone()
    runner.close()
    return found


@pytest.mark.parametrize(
    "fields", [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"deterministic": True}], ids=str
)
@pytest.mark.parametrize("name", DIRECT)
def test_the_bits_are_those_of_the_other_route(
    name: str, fields: dict[str, Any], checkpoint: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(name)
    assert is_direct(folder)
    direct = logits(make_runner(folder, **fields))
    monkeypatch.setattr(runner_module, "load_model", lambda config, direct: load_model(config))
    assert torch.equal(direct, logits(make_runner(folder, **fields)))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
        ("llama", {"partial_rotary_factor": 0.5}),
        ("llama", {"rms_norm_eps": None}),
        ("llama", {"tie_word_embeddings": None}),
        ("llama", {"num_key_value_heads": None}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 3}),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}),
        ("qwen3", {"head_dim": None}),
        ("llama", {"something_new": 2}),
        ("llama", {"sliding_window": 16}),
        ("llama", {"eos_token_id": None}),
        ("llama", {"rope_scaling": LLAMA3}),  # beside rope_parameters, which it takes the place of
        ("llama", {"rope_scaling": "linear", "rope_parameters": None, "rope_theta": 1e4}),
        ("llama", {"layer_types": 5}),
        ("llama", {"layer_types": ["full_attention"]}),
        ("llama", {"dtype": "torch.bfloat16"}),
    ],
    ids=str,
)
def test_unusual_configurations_are_left_to_transformers(
    name: str, fields: dict[str, Any], checkpoint: Folders
) -> None:
    folder = checkpoint(name)
    assert is_direct(folder)
    change(folder, **fields)
    with suppress(ModelLoadError):  # a change may make the weights wrong for transformers, too
        assert not is_direct(folder)


def test_other_names_shapes_and_types_of_weights_are_left_to_transformers(checkpoint: Folders) -> None:
    folder = checkpoint("llama")
    weights = load_file(folder / "model.safetensors")
    without_prefix = {name.removeprefix("model."): tensor.contiguous() for name, tensor in weights.items()}
    save_file(without_prefix, folder / "model.safetensors", metadata={"format": "pt"})
    assert not is_direct(folder)
    save_file({n: t.double() for n, t in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert not is_direct(folder)


def test_types_that_native_code_does_not_compute_and_random_weights(checkpoint: Folders, tmp_path: Path) -> None:
    assert not is_direct(checkpoint("llama"), dtype="float16")
    assert not is_direct(make_config("llama", tmp_path / "config"), load_format="dummy")


def test_half_precision_checkpoints_are_widened(checkpoint: Folders) -> None:
    folder = checkpoint("llama")
    weights = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    loaded = load_model(EngineConfig(model=str(folder), device="cpu", dtype="float32"), True)
    assert isinstance(loaded.model, DirectDecoder)
    assert torch.equal(loaded.model.parts.layers[1].o.weight, weights["model.layers.1.self_attn.o_proj.weight"].float())


def test_the_tokenizer_is_the_one_that_transformers_chooses() -> None:
    loaded = load_model(EngineConfig(model="tiny", device="cpu"), True)
    assert isinstance(loaded.model, DirectDecoder)
    own = AutoTokenizer.from_pretrained(BUNDLED["tiny"])
    assert type(loaded.tokenizer) is type(own)
    text = "Naïve 123 <tool_call> 田中<|im_end|>"
    assert loaded.tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert loaded.tokenizer.chat_template == own.chat_template


def test_threads_are_limited_while_weights_are_packed(checkpoint: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    packed = fuse_module.PackedLinear

    def watched(*arguments: Any) -> Any:
        seen.add(torch.get_num_threads())
        return packed(*arguments)

    before = torch.get_num_threads()
    monkeypatch.setattr(fuse_module, "PackedLinear", watched)
    torch.set_num_threads(2)
    try:
        make_runner(checkpoint("llama"), num_threads=1).close()
        assert (seen, torch.get_num_threads()) == ({1}, 2)
    finally:
        torch.set_num_threads(before)


def test_another_threads_default_type_changes_nothing() -> None:
    """transformers sets torch's default type while it loads a model, for all threads."""

    def sampled(dtype: torch.dtype) -> list[tuple[list[int], Any]]:
        engine = Engine(EngineConfig(model="tiny", device="cpu", kv_cache_memory="32MiB", dtype="float32"))
        torch.set_default_dtype(dtype)
        try:
            for number, values in enumerate(({"temperature": 0.7}, {"temperature": 1.3, "top_p": 0.9, "min_p": 0.01})):
                params = SamplingParams(seed=7, max_tokens=40, logprobs=2, presence_penalty=0.3, **values)
                engine.add([300, 301, 302], params, request_id=str(number))
            outputs = []
            while engine.has_unfinished:
                outputs += [output for output in engine.step() if output.finished]
        finally:
            torch.set_default_dtype(torch.float32)
            engine.close()
        return [(one.outputs[0].token_ids, one.outputs[0].logprobs) for one in outputs]

    assert sampled(torch.bfloat16) == sampled(torch.float32)


def test_a_new_process_answers_without_the_modelling_code() -> None:
    """What makes the start fast, counted in modules and not in seconds."""
    program = """
import sys
from pagedllm_core import LLM, SamplingParams
with LLM(model="tiny", kv_cache_memory="32MiB") as llm:
    llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=3), use_tqdm=False)
heavy = ["transformers.modeling_utils", "transformers.activations", "torch._dynamo", "sympy", "scipy"]
sys.exit(", ".join(name for name in heavy if name in sys.modules) or None)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
