"""The GPU's decoder with its kernels interpreted on a CPU: whole models against transformers' own `generate`.

Graphs are stood in for by a recorder that calls the recorded work again, over the same padded memory.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

pytest.importorskip("triton")
from pagedllm_core.attention.base import CarriedTokens
from pagedllm_core.attention.triton_paged import TritonAttention
from pagedllm_core.config import EngineConfig
from pagedllm_core.decode.device import DeviceSampler
from pagedllm_core.engine import Engine
from pagedllm_core.errors import InvalidRequestError, UnsupportedModelError
from pagedllm_core.metrics import EngineStats
from pagedllm_core.model import determinism
from pagedllm_core.model import gpu as gpu_module
from pagedllm_core.model.determinism import shapes_that_differ
from pagedllm_core.model.graphs import Work
from pagedllm_core.model.runner import ModelRunner
from pagedllm_core.model.steps import GpuCode, GpuSteps
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams
from tests.fakes import run_all
from tests.kernels import interpreter
from tests.parity.driver import make_batch, paged_tokens, reference_tokens
from tests.parity.families import spread_weights
from tests.parity.test_engine import Limited

VOCAB = 80
FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {},
    "phi3": {"partial_rotary_factor": 0.5, "pad_token_id": 0},
    "granite": {"residual_multiplier": 0.7},  # of another shape: transformers' code with our attention
}
PROMPTS = [[5, 9, 13], [3, 4, 8, 7, 22, 31, 8], [40, 41, 42, 43, 44, 45, 46, 47, 48]]
NEW = 4


@dataclass
class Replay:
    """Recorded work, and who counts its replays."""

    recorder: Recorder
    work: Work

    def replay(self) -> None:
        self.recorder.replays += 1
        self.work()


class Recorder:
    """Remembers work, and calls it again."""

    def __init__(self, device: torch.device) -> None:
        self.captures = self.replays = 0

    def capture(self, work: Work) -> Replay:
        work()
        self.captures += 1
        return Replay(self, work)

    def free_memory(self) -> int:
        return 0

    def reset(self) -> None:
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a family's random model: 2 layers, hidden 32, heads of 16."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            config = AutoConfig.for_model(
                name, vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
                bos_token_id=1, eos_token_id=2, **FIELDS[name],
            )  # fmt: skip
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            spread_weights(model, seed=0)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
        return made[name]

    return make


def make_runner(path: Path, recorders: list[Recorder] | None = None, **fields: Any) -> ModelRunner:
    """A runner of the GPU's code on a CPU; the recorders that it makes are added to `recorders`."""

    def recorder(device: torch.device) -> Recorder:
        made = Recorder(device)
        if recorders is not None:
            recorders.append(made)
        return made

    settings: dict[str, Any] = {"block_size": 4, "kv_cache_memory": "1MiB", "device": "cpu", "max_num_seqs": 8} | fields
    return ModelRunner(EngineConfig(model=str(path), **settings), gpu=GpuCode(TritonAttention, recorder))


@pytest.mark.parametrize("name", FIELDS)
def test_greedy_tokens_are_generates(name: str, folder: Callable[[str], Path]) -> None:
    wanted = reference_tokens(folder(name), PROMPTS, NEW)
    recorders: list[Recorder] = []
    runner = make_runner(folder(name), recorders)
    assert runner.is_fused == (name != "granite")
    assert paged_tokens(runner, PROMPTS[:1], NEW) == wanted[:1]
    assert paged_tokens(runner, PROMPTS, NEW) == wanted
    assert paged_tokens(runner, PROMPTS, NEW, chunk=5, seed=1) == wanted
    (recorder,) = recorders
    assert recorder.captures >= 2
    assert recorder.replays >= 4
    runner.close()


def test_without_graphs_nothing_is_captured(folder: Callable[[str], Path]) -> None:
    recorders: list[Recorder] = []
    runner = make_runner(folder("llama"), recorders, enforce_eager=True)
    assert paged_tokens(runner, PROMPTS[:2], NEW) == reference_tokens(folder("llama"), PROMPTS[:2], NEW)
    assert not recorders
    runner.close()


@pytest.mark.parametrize("sampling", ["on the host", "overlapping", "overlapping kernels"])
def test_an_engine_gives_the_same_tokens_under_preemption(sampling: str, folder: Callable[[str], Path]) -> None:
    """With overlapping steps, decoding sequences carry their tokens from step to step on the device."""
    wanted = reference_tokens(folder("qwen3"), PROMPTS, NEW)
    block = 4 * 2 * 2 * 2 * 16 * 4  # tokens, keys and values, layers, heads, head size, bytes
    fields: dict[str, Any] = {"kv_cache_memory": 6 * block, "max_num_batched_tokens": 8, "swap_space": 0}
    recorders: list[Recorder] = []
    runner = make_runner(folder("qwen3"), recorders, **fields)
    if sampling != "on the host":
        runner.sampler = DeviceSampler(runner.device, VOCAB, 8, kernels=sampling == "overlapping kernels")
    config = EngineConfig(model=str(folder("qwen3")), block_size=4, device="cpu", max_num_seqs=8, **fields)
    engine = Engine(config, runner=runner)
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    ids = [engine.add({"prompt_token_ids": prompt}, params) for prompt in PROMPTS]
    found: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            engine.check()
            found.setdefault(output.request_id, []).extend(output.outputs[0].token_ids)
    assert [found[request] for request in ids] == wanted
    assert engine.stats().preemptions > 0
    assert recorders[0].captures > 0
    engine.close()


@pytest.mark.parametrize("eager", [False, True])
def test_a_carried_token_is_computed_like_a_known_one(eager: bool, folder: Callable[[str], Path]) -> None:
    runner = make_runner(folder("llama"), enforce_eager=eager)
    table = [7, 3]
    runner.run(make_batch([([5, 9, 13], table)], [(0, 3)], 4))
    logits = []
    for carried in (False, True):
        batch = make_batch([([5, 9, 13, 0 if carried else 22], table)], [(3, 4)], 4)
        if carried:
            batch.carried = CarriedTokens(np.array([0]), np.array([1]), torch.tensor([60, 22]))
        logits.append(runner.run(batch).clone())
    assert torch.equal(*logits)
    runner.close()


def test_an_eight_bit_cache_stays_near(folder: Callable[[str], Path]) -> None:
    batch = make_batch([(list(range(5, 25)), [4, 1, 3, 0, 2])], [(0, 20)], 4)
    batch.logits_rows = np.arange(20)
    logits = []
    for dtype in ("auto", "fp8"):
        config = EngineConfig(model=str(folder("llama")), block_size=4, kv_cache_memory="1MiB", device="cpu")
        config = config.model_copy(update={"kv_cache_dtype": dtype})
        runner = ModelRunner(config, gpu=GpuCode(TritonAttention, Recorder))
        logits.append(runner.run(batch).clone())
        runner.close()
    distance = (logits[1] - logits[0]).norm(dim=1) / (logits[0] - logits[0].mean(1, keepdim=True)).norm(dim=1)
    assert 1e-4 < float(distance.median()) < 0.1


def test_eight_bits_need_the_kernels(folder: Callable[[str], Path]) -> None:
    config = EngineConfig(model=str(folder("llama")), kv_cache_memory="1MiB", device="cpu")
    with pytest.raises(InvalidRequestError, match="kv_cache_dtype"):
        ModelRunner(config.model_copy(update={"kv_cache_dtype": "fp8"}))


def test_eight_bits_before_hopper_need_a_newer_triton(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(InvalidRequestError, match=r"Triton 3\.9 or newer"):
        make_runner(folder("llama"), kv_cache_dtype="fp8")


def test_int8_is_refused(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"quantization='int8': .* runs on Triton kernels here"):
        make_runner(folder("llama"), quantization="int8")


@pytest.fixture
def few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test of the deterministic mode on fewer shapes, with the sums of a GPU's products."""
    monkeypatch.setattr(interpreter, "sums_in_order", True)
    monkeypatch.setattr(determinism, "_LENGTHS", (1, 3, 20))
    monkeypatch.setattr(determinism, "_CHUNKS", (1, 7))


@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_deterministic_steps_are_bit_equal_in_any_shape(name: str, folder: Callable[[str], Path]) -> None:
    """Biases and a sliding window, or norms of queries and keys; eagerly and through graphs."""
    recorders: list[Recorder] = []
    runner = make_runner(folder(name), recorders, deterministic=True, max_model_len=24)
    (recorder,) = recorders
    assert recorder.captures == 3  # buckets of 1, 2 and 4
    assert recorder.replays > 20
    runner.close()


@pytest.mark.usefixtures("few_shapes")
def test_a_product_whose_sums_depend_on_the_batch_is_found(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_module, "linear", torch.nn.functional.linear)
    with pytest.raises(UnsupportedModelError, match=r"gave other bits on this machine for .*chunks of 1"):
        make_runner(folder("qwen2"), deterministic=True, max_model_len=24)


@pytest.mark.usefixtures("few_shapes")
def test_without_the_mode_bits_depend_on_the_batch(folder: Callable[[str], Path]) -> None:
    runner = make_runner(folder("qwen2"), max_model_len=24)
    assert shapes_that_differ(runner.run, VOCAB, runner.num_blocks, runner.block_size, longest=24)
    runner.close()


def test_deterministic_is_refused_where_transformers_runs_the_model(folder: Callable[[str], Path]) -> None:
    with pytest.raises(UnsupportedModelError, match=r"deterministic=True: .* runs on torch here; .* or on a GPU with"):
        make_runner(folder("granite"), deterministic=True)


def answers(runner: Any, together: bool = True, **fields: Any) -> tuple[list[Any], EngineStats]:
    """Tokens and log-probabilities of greedy, penalised and sampled requests, together or one after the other."""
    settings: dict[str, Any] = {"block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 64} | fields
    engine = Engine(EngineConfig(model="any", **settings), runner=runner)
    found: dict[str, RequestOutput] = {}
    for number, prompt in enumerate(PROMPTS):
        sampling: dict[str, Any] = {"temperature": 0, "repetition_penalty": 1.2}
        if number % 2:
            sampling = {"temperature": 0.9, "top_p": 0.9, "n": 2, "seed": 5}
        params = SamplingParams(max_tokens=NEW, logprobs=2, ignore_eos=True, **sampling)
        engine.add({"prompt_token_ids": prompt}, params, request_id=str(number), stream=False)
        if not together:
            found |= run_all(engine)
    found |= run_all(engine)
    outputs = [found[str(number)].outputs for number in range(len(PROMPTS))]
    return [[(one.token_ids, one.logprobs) for one in parts] for parts in outputs], engine.stats()


@pytest.mark.usefixtures("few_shapes")
def test_deterministic_answers_are_bit_equal_however_they_are_computed(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelRunner, "_check_determinism", lambda self: None)  # tried above
    recorders: list[Recorder] = []
    make = partial(make_runner, folder("qwen2"), recorders, deterministic=True)
    eager, runner = make(enforce_eager=True), make()
    alone, _ = answers(eager, together=False)
    assert alone == answers(eager)[0]
    assert alone == answers(runner)[0]
    assert recorders[0].replays > 0
    assert alone == answers(runner, max_num_batched_tokens=8)[0]
    squeezed, stats = answers(Limited(runner, 7), enable_prefix_caching=False)
    assert alone == squeezed
    assert stats.preemptions > 0
    eager.close()
    runner.close()


def test_a_wrong_fused_form_is_found_and_left(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The small model agrees and the real one does not: the model then runs on transformers' code, and rightly."""
    right = gpu_module.silu_mul
    seen = []

    def wrong(gate_up: torch.Tensor) -> torch.Tensor:
        seen.append(gate_up.shape[1])
        return right(gate_up) if gate_up.shape[1] == 2 * 80 else right(gate_up.flip(1))

    monkeypatch.setattr(gpu_module, "silu_mul", wrong)
    runner = make_runner(folder("llama"))
    assert set(seen) == {2 * 80, 2 * 48}
    assert not runner.is_fused
    assert any("other logits than its own" in record.message for record in caplog.records)
    assert paged_tokens(runner, PROMPTS[:1], NEW) == reference_tokens(folder("llama"), PROMPTS[:1], NEW)
    runner.close()


def test_a_step_that_does_not_fit_says_what_to_lower(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorders: list[Recorder] = []
    runner = make_runner(folder("llama"), recorders)
    step = partial(make_batch, [([5, 9, 13], [7])], block_size=4)
    before = runner.run(step(spans=[(0, 3)])).clone()
    decode = runner.run(step(spans=[(2, 3)])).clone()

    def fails(*arguments: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(gpu_module, "silu_mul", fails)
        with pytest.raises(MemoryError, match=r"3 tokens of 1 sequences.*gpu_memory_utilization.*9 GiB") as caught:
            runner.run(step(spans=[(0, 3)]))
    assert caught.value.__context__ is None
    assert torch.equal(runner.run(step(spans=[(0, 3)])), before)
    assert torch.equal(runner.run(step(spans=[(2, 3)])), decode)
    assert recorders[0].captures == 2  # the first graph was let go of
    runner.close()


def test_a_closed_runner_keeps_no_memory(folder: Callable[[str], Path]) -> None:
    """Nothing but reference counts frees: a collection of cycles may come much later."""
    runner = make_runner(folder("llama"))
    logits = runner.run(make_batch([([5, 9, 13], [7])], [(2, 3)], 4))
    assert (logits.shape, logits.dtype) == ((1, VOCAB), torch.float32)
    steps = runner._steps
    assert isinstance(steps, GpuSteps)
    held = [weakref.ref(one) for one in (steps, steps.graphs, steps._forward, runner._storage._pools[0])]
    del steps, logits
    gc.collect()
    gc.disable()
    try:
        runner.close()
        assert [one() for one in held] == [None] * 4
    finally:
        gc.enable()
