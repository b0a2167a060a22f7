"""The blocking facade over the bundled model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pagedllm_core
from pagedllm_core import LLM, AsyncEngine, SamplingParams, get_engine
from pagedllm_core.errors import CapacityError, EngineClosedError, InvalidRequestError, ModelLoadError
from pagedllm_core.streams import merge_outputs

TINY = Path(pagedllm_core.__file__).parent / "bundled" / "tiny"
PROMPTS = ["Hello, how are you?", "The library opens at", "1 2 3 4 5", "x"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(model="tiny", dtype="float32", kv_cache_memory="32MiB") as llm:
        yield llm
        stats = llm.stats()
        assert stats.kv_blocks_used == 0
        assert stats.kv_blocks_free + stats.kv_blocks_cached == stats.kv_blocks_total


def test_generate_equals_transformers_in_input_order(llm: LLM) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    params = [SamplingParams(max_tokens=count, ignore_eos=True) for count in (24, 3, 12, 30)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    for prompt, one, output in zip(PROMPTS, params, outputs, strict=True):
        ids = torch.tensor([llm.get_tokenizer()(prompt)["input_ids"]])
        config = {"max_new_tokens": one.max_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **config)[0, ids.shape[1] :].tolist()
        assert output.outputs[0].token_ids == wanted
        assert output.outputs[0].text == llm.get_tokenizer().decode(wanted, skip_special_tokens=True)
        assert output.prompt == prompt
        assert output.metrics.output_tokens == one.max_tokens


def test_every_form_of_a_prompt(llm: LLM) -> None:
    params = SamplingParams(max_tokens=5)
    ids = llm.get_tokenizer()(PROMPTS[0])["input_ids"]
    forms = [PROMPTS[0], ids, {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}]
    alone = [llm.generate(form, params, use_tqdm=False)[0].outputs[0].token_ids for form in forms]
    assert alone == [alone[0]] * 4
    assert [output.outputs[0].token_ids for output in llm.generate(forms, params, use_tqdm=False)] == alone
    assert llm.generate([], use_tqdm=False) == []
    assert len(llm.generate("Hi", use_tqdm=False)[0].outputs[0].token_ids) <= 16


def test_each_call_has_a_share_of_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str] = []
    enqueue = llm.engine.enqueue
    monkeypatch.setattr(llm.engine, "enqueue", lambda one: (keys.append(one.share_key), enqueue(one))[1])
    params = SamplingParams(max_tokens=1)
    llm.generate(PROMPTS, params, use_tqdm=False)
    llm.chat([[{"role": "user", "content": "Hi"}]] * 2, params, use_tqdm=False)
    llm.generate("Hi", params, use_tqdm=False)
    assert [keys.count(key) for key in dict.fromkeys(keys)] == [4, 2, 1]
    assert None not in keys


def test_one_bad_prompt_starts_none(llm: LLM) -> None:
    steps = llm.stats().steps
    with pytest.raises(InvalidRequestError, match="empty"):
        llm.generate(["good", []], use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="2 given for 3 prompts"):
        llm.generate(["a", "b", "c"], [SamplingParams()] * 2, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="prompts=7"):
        llm.generate(7, use_tqdm=False)  # type: ignore[arg-type]
    assert llm.stats().steps == steps


PICTURE = {"type": "image_url", "image_url": {"url": "http://x"}}


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (lambda llm: llm.generate("bad \ud800 text"), "prompt: is not valid Unicode"),
        (lambda llm: llm.generate("x", SamplingParams(bad_words=["\ud800"])), "bad_words: is not valid Unicode"),
        (lambda llm: llm.chat([{"role": "user", "content": "\ud800"}]), "messages: is not valid Unicode"),
        (lambda llm: llm.chat([{"role": "user", "content": ["See:", PICTURE]}]), "messages.0.*holds 'image_url'"),
        (lambda llm: llm.chat([{"role": "user", "content": 5}]), "messages.0.*=5: must be text"),
        (lambda llm: llm.generate({"prompt": "x", "multi_modal_data": {"image": 1}}), "multi_modal_data"),
        (lambda llm: llm.chat([{"role": "user", "content": "x"}], chat_template=True), "chat_template=True: must be"),
    ],
)
def test_what_cannot_be_read_is_refused(llm: LLM, ask: Callable[[LLM], Any], field: str) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        ask(llm)
    assert os.fstat(1), "standard output is still open"


def test_a_pool_beyond_the_memory_is_refused() -> None:
    with pytest.raises(CapacityError, match=r"kv_cache_memory: a KV pool of 1000000\.0 GiB"):
        LLM(model="tiny", kv_cache_memory="1000000GiB")


def test_engines_by_the_model_s_name() -> None:
    with closing(AsyncEngine("tiny", kv_cache_memory="8MiB")) as engine:
        assert engine.config.model == "tiny"
        assert engine.config.kv_cache_memory == 8 << 20
    with pytest.raises(InvalidRequestError, match="model=''"):
        get_engine("")


def test_stream_holds_only_what_is_new(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)
    whole = llm.generate(PROMPTS[1], params, use_tqdm=False)[0].outputs[0]
    deltas = list(llm.stream(PROMPTS[1], params))
    assert "".join(delta.outputs[0].text for delta in deltas) == whole.text
    merged = merge_outputs(deltas).outputs[0]
    assert merged.token_ids == whole.token_ids
    assert merged.logprobs is not None
    assert len(merged.logprobs) == 12
    for _ in llm.stream(PROMPTS[1], SamplingParams(max_tokens=500, ignore_eos=True)):
        break
    assert llm.stats().kv_blocks_used == 0


def test_stop_string_across_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    text = llm.generate(PROMPTS[1], params, use_tqdm=False)[0].outputs[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 6]
    stopped = llm.generate(PROMPTS[1], params.model_copy(update={"stop": [stop]}), use_tqdm=False)[0].outputs[0]
    assert stopped.text == text[: text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)


def test_chat_renders_the_template_and_continues_a_turn(llm: LLM) -> None:
    user = {"role": "user", "content": "Who are you?"}
    rendered = llm.get_tokenizer().apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    params = SamplingParams(max_tokens=10)
    one = llm.chat([user], params, use_tqdm=False)
    assert len(one) == 1
    assert one[0].prompt == rendered
    two = llm.chat([[user], [user, {"role": "assistant", "content": "I am"}, user]], params, use_tqdm=False)
    assert two[0].outputs[0].token_ids == one[0].outputs[0].token_ids
    begun = [user, {"role": "assistant", "content": "I am Paged"}]
    continued = llm.chat(begun, params, continue_final_message=True, add_generation_prompt=False, use_tqdm=False)[0]
    assert continued.prompt is not None
    assert continued.prompt.endswith("I am Paged")
    custom = llm.chat([user], params, chat_template="{{ messages[0]['content'] }}!", use_tqdm=False)[0]
    assert custom.prompt == "Who are you?!"


def test_seed_repeats_and_samples_differ(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    first, second = (llm.generate("Once", params, use_tqdm=False)[0] for _ in range(2))
    tokens = [output.token_ids for output in first.outputs]
    assert tokens == [output.token_ids for output in second.outputs]
    assert len({tuple(one) for one in tokens}) == 3


def test_progress_is_shown(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.generate(["a", "b"], SamplingParams(max_tokens=2))
    shown = capsys.readouterr().err
    assert "2/2" in shown
    assert "tokens/s" in shown


def test_beam_search_equals_transformers(llm: LLM) -> None:
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    outputs = llm.beam_search(PROMPTS, SamplingParams(n=3, max_tokens=10), use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = torch.tensor([llm.get_tokenizer()(prompt)["input_ids"]])
        config = {"max_new_tokens": 10, "num_beams": 3, "num_return_sequences": 3, "do_sample": False}
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), **config)[:, ids.shape[1] :].tolist()
        for found, one in zip(output.outputs, wanted, strict=True):
            assert found.token_ids == one[: len(found.token_ids)]
            assert len(found.token_ids) == 10 or found.finish_reason == "stop"


def test_a_closed_model_says_so() -> None:
    llm = LLM(model="tiny", kv_cache_memory="4MiB")
    llm.close()
    llm.close()
    with pytest.raises(EngineClosedError, match="make a new one"):
        llm.generate("Hi", use_tqdm=False)


def test_a_missing_model_names_what_was_asked(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nowhere"):
        LLM(model=str(tmp_path / "nowhere"))


def test_importing_brings_in_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, pagedllm_core; from pagedllm_core import EngineConfig, SamplingParams; "
        "EngineConfig(model='tiny'); SamplingParams(); "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=TINY.parents[2], check=False)
    assert run.returncode == 0


def test_scores_show_special_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, logprobs=0)
    (output,) = llm.chat([{"role": "user", "content": "Repeat: red"}], params, use_tqdm=False)
    (completion,) = output.outputs
    shown = [
        entries[token].decoded_token
        for token, entries in zip(completion.token_ids, completion.logprobs or (), strict=True)
    ]
    assert (completion.text, "".join(shown)) == ("red", "red<|im_end|>")


def test_tools_that_the_template_does_not_show_are_warned_of(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    for tools in (None, [tool]):
        llm.chat([{"role": "user", "content": "Hi"}], tools=tools, chat_template=template, use_tqdm=False)
        assert ("does not show them" in caplog.text) is (tools is not None)
