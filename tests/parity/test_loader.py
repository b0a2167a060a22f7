"""What the loader reads, and what it refuses and with which words."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from pagedllm_core.config import EngineConfig
from pagedllm_core.errors import CapacityError, InvalidRequestError, ModelLoadError, UnsupportedModelError
from pagedllm_core.model import resolve
from pagedllm_core.model.direct import DirectDecoder
from pagedllm_core.model.loader import load_model
from tests.parity.driver import make_runner, paged_tokens, reference_tokens
from tests.parity.families import VOCAB, make_config

Folders = Callable[[str], Path]
Load = Callable[..., Any]


@pytest.fixture
def llama(model_folder: Folders, tmp_path: Path) -> Path:
    """A copy of the tiny llama that a test may damage."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "llama"))


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(params=[False, True], ids=["transformers", "direct"])
def load(request: pytest.FixtureRequest) -> Load:
    """Loads with transformers' code, and directly where that is possible: errors and figures are the same."""

    def load_one(folder: Path | str, **fields: Any) -> Any:
        return load_model(EngineConfig(model=str(folder), device="cpu", **fields), direct=request.param)

    return load_one


def test_bundled_model_loads_without_a_socket(monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = load("tiny")
    assert loaded.name == "tiny"
    assert loaded.dtype == torch.bfloat16
    assert loaded.tokenizer.decode(loaded.tokenizer.encode("Hello")) == "Hello"
    assert loaded.generation_config["do_sample"] is False
    assert loaded.eos_token_ids


def test_only_pickled_weights_are_refused(llama: Path, load: Load) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pytorch_model\.bin.*safetensors.*save_pretrained"):
        load(llama)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_is_refused_and_not_run(llama: Path, tmp_path: Path, file: str, load: Load) -> None:
    marker = tmp_path / "ran"
    (llama / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    (llama / file).touch()
    if not (llama / file).read_text():
        (llama / file).write_text("{}")
    change_json(llama / file, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    with pytest.raises(ModelLoadError, match=r"auto_map.*trust_remote_code=True"):
        load(llama)
    assert not marker.exists()


def test_missing_folder_and_files(llama: Path, tmp_path: Path, load: Load) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ModelLoadError, match="is a file"):
        load(llama / "config.json")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r'holds no model\.safetensors.*load_format="dummy"'):
        load(llama)
    (llama / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json: the file is missing"):
        load(llama)


@pytest.mark.parametrize(
    "content", ["{", "[]", "\x00", '{"hidden_size": 3}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_malformed_config(llama: Path, content: str, load: Load) -> None:
    (llama / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load(llama)


def test_unknown_architecture(llama: Path, load: Load) -> None:
    change_json(llama / "config.json", model_type="frobnicator")
    with pytest.raises(UnsupportedModelError, match="frobnicator"):
        load(llama)


def test_truncated_weights(llama: Path, load: Load) -> None:
    path = llama / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: not a whole safetensors file"):
        load(llama)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("model.norm.weight"), "missing weights: model.norm.weight"),
        (lambda w: w.update(extra=torch.ones(2)), "unexpected weights: extra"),
        (lambda w: w.update({"model.norm.weight": torch.ones(9)}), r"wrong shapes: model.norm.weight has shape \(9,\)"),
    ],
)
def test_weights_that_do_not_fit(
    llama: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str, load: Load
) -> None:
    change_weights(llama, change)
    with pytest.raises(ModelLoadError, match=message):
        load(llama)


def test_shards_must_be_complete(model_folder: Folders, tmp_path: Path, load: Load) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load(tmp_path).dtype == torch.float32
    shards[-1].unlink()
    with pytest.raises(ModelLoadError, match=rf"{shards[-1].name}: the file is missing"):
        load(tmp_path)


def test_context_limit(llama: Path, load: Load) -> None:
    assert load(llama).max_model_len == 256
    assert load(llama, max_model_len=64).max_model_len == 64
    with pytest.raises(InvalidRequestError, match=r"max_model_len=257: the model's own limit is 256"):
        load(llama, max_model_len=257)


def test_scaled_rope_has_its_own_limit(model_folder: Folders, load: Load) -> None:
    folder = model_folder("dynamic_rope")
    assert load(folder).max_model_len == 128
    assert load(folder, max_model_len=512).max_model_len == 512
    with pytest.raises(InvalidRequestError, match="limit is 512"):
        load(folder, max_model_len=513)


def test_dummy_weights_are_seeded_and_not_flat(tmp_path: Path, load: Load) -> None:
    folder = make_config("qwen3", tmp_path / "dummy")
    first, again, other = (load(folder, load_format="dummy", seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    runner = make_runner(folder, load_format="dummy")
    assert runner.tokenizer is None
    tokens = paged_tokens(runner, [[5, 6, 7], [8, 9]], 8)
    assert tokens[0] != tokens[1]


def test_dummy_does_not_touch_the_random_state(tmp_path: Path, load: Load) -> None:
    before = torch.random.get_rng_state()
    load(make_config("llama", tmp_path), load_format="dummy")
    assert torch.equal(before, torch.random.get_rng_state())


def test_dtype(llama: Path, load: Load) -> None:
    assert load(llama).dtype == torch.float32
    model = load(llama, dtype="bfloat16").model
    head = model.parts.head if isinstance(model, DirectDecoder) else model.lm_head
    assert head.weight.dtype == torch.bfloat16
    change_json(llama / "config.json", dtype="float16")
    assert load(llama).dtype == torch.float32  # on a CPU
    assert load(llama, dtype="float16").dtype == torch.float16


def test_generation_config_and_end_tokens(llama: Path, tmp_path: Path, load: Load) -> None:
    (llama / "generation_config.json").write_text(
        json.dumps({"temperature": 0.6, "top_k": None, "eos_token_id": [7, 9]})
    )
    loaded = load(llama)
    assert loaded.generation_config == {"temperature": 0.6, "eos_token_id": [7, 9]}
    assert loaded.eos_token_ids == (7, 9)
    loaded = load(llama, generation_config="none")
    assert loaded.generation_config == {}
    assert loaded.eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text('{"top_p": 0.5}')
    assert load(llama, generation_config=str(tmp_path)).generation_config == {"top_p": 0.5}
    with pytest.raises(ModelLoadError, match=r"generation_config\.json: the file is missing"):
        load(llama, generation_config=str(tmp_path / "nowhere"))
    (llama / "generation_config.json").unlink()
    assert load(llama).eos_token_ids == (2,)


def test_tokenizer_of_another_folder(llama: Path, tmp_path: Path, load: Load) -> None:
    assert load(llama).tokenizer is None
    assert load(llama, tokenizer="tiny").tokenizer.encode("Hello")
    with pytest.raises(ModelLoadError, match="holds no tokenizer files"):
        load(llama, tokenizer=str(tmp_path))


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(InvalidRequestError, match=f'device="{device}"'):
        load_model(EngineConfig(model="tiny", device=device))


def test_a_pool_below_one_block_is_refused(model_folder: Folders) -> None:
    with pytest.raises(CapacityError, match=r"kv_cache_memory=100: one block of 4 tokens takes 3072 bytes"):
        make_runner(model_folder("llama"), kv_cache_memory=100)


def test_pool_size(model_folder: Folders) -> None:
    runner = make_runner(model_folder("llama"), kv_cache_memory=3072 * 10 + 5)
    assert runner.num_blocks == 10
    runner = make_runner(model_folder("llama"), kv_cache_memory=None, max_num_seqs=3)
    assert runner.num_blocks == 3 * 256 // 4  # as many as can be used


def test_thread_count_is_restored(model_folder: Folders) -> None:
    before = torch.get_num_threads()
    runner = make_runner(model_folder("llama"), num_threads=before + 1)
    paged_tokens(runner, [[3, 4]], 2)
    assert torch.get_num_threads() == before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"n_layer": 2, "hidden_size": 32, "n_head": 2}, "ALiBi"),
    "mpt": ({"n_layers": 2, "d_model": 32, "n_heads": 2}, "ALiBi"),
    "falcon": ({"alibi": True, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}, "ALiBi"),
    "gptj": ({"n_layer": 2, "n_embd": 32, "n_head": 2, "rotary_dim": 8}, "attention cannot be replaced"),
    "codegen": ({"n_layer": 2, "n_embd": 32, "n_head": 4, "rotary_dim": 8}, "called the attention interface 0 times"),
    "deepseek_v3": ({}, "MLA"),
    "llama4_text": ({}, "chunked_attention"),
    "qwen3_next": ({}, "linear_attention"),
    "mamba": ({"num_hidden_layers": 2, "hidden_size": 32}, "linear_attention|state"),
    "bart": ({"d_model": 32, "decoder_layers": 2, "encoder_layers": 2}, "encoder-decoder"),
    "moshi": ({"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "sliding_window": 8}, "cache"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_would_be_served_wrongly(model_type: str, tmp_path: Path) -> None:
    fields, reason = REFUSED[model_type]
    config = AutoConfig.for_model(model_type, **({"vocab_size": VOCAB} | fields))
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=f"not supported: .*({reason})"):
        make_runner(tmp_path, load_format="dummy")


def test_quantized_weights_are_refused(llama: Path, load: Load) -> None:
    change_json(llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match="quantized"):
        load(llama)


def test_a_model_that_mixes_tokens_outside_attention(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No list knows this one: every layer calls the hook, but a neighbour's state leaks through the MLP."""
    own = LlamaMLP.forward

    def shifted(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = own(self, x + 0.5 * torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1])
        return result

    change_json(llama / "config.json", mixes_tokens=True)  # no plain Llama, which is read without transformers' code
    monkeypatch.setattr(LlamaMLP, "forward", shifted)
    with pytest.raises(UnsupportedModelError, match="something beside attention looks across tokens"):
        make_runner(llama)


def test_hub_name_is_fetched_with_its_revision(llama: Path, monkeypatch: pytest.MonkeyPatch, load: Load) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def fetch(name: str, **arguments: Any) -> str:
        calls.append((name, arguments))
        return str(llama)

    monkeypatch.setattr(resolve, "snapshot_download", fetch)
    load("someone/some-model", revision="v2")
    [(name, arguments)] = calls
    assert (name, arguments["revision"]) == ("someone/some-model", "v2")
    assert "*.py" not in arguments["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pt")) for pattern in arguments["allow_patterns"])
    with pytest.raises(ModelLoadError, match="holds no tokenizer files"):
        load("someone/some-model", tokenizer="someone/other")
    assert calls[-1][1]["revision"] is None
    assert not any("safetensors" in pattern for pattern in calls[-1][1]["allow_patterns"])


def test_cached_hub_model_loads_offline(
    model_folder: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: Load
) -> None:
    """The layout of huggingface_hub's cache, read without a socket."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--someone--some-model"
    shutil.copytree(model_folder("llama"), repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prompts = [[5, 6, 7, 8]]
    runner = make_runner(Path("someone/some-model"), revision="v2")
    assert paged_tokens(runner, prompts, 4) == reference_tokens(model_folder("llama"), prompts, 4)
    with pytest.raises(ModelLoadError, match=r'revision="v3".*not in the local cache'):
        load("someone/some-model", revision="v3")
    with pytest.raises(ModelLoadError, match="not in the local cache"):
        load("someone/else")


def test_two_runners_on_two_threads(model_folder: Folders) -> None:
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12]]
    names = ("llama", "mistral")
    expected = {name: reference_tokens(model_folder(name), prompts, 12) for name in names}
    got: dict[str, list[list[int]]] = {}

    def serve(name: str) -> None:
        got[name] = paged_tokens(make_runner(model_folder(name)), prompts, 12)

    threads = [threading.Thread(target=serve, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == expected
