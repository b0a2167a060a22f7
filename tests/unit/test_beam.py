"""Beam search over the fake model: sharing, company, preemption, cancellation."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pagedllm_core.attention.base import ForwardBatch
from pagedllm_core.errors import CapacityError, InvalidRequestError, RequestFailedError
from pagedllm_core.params import SamplingParams
from tests.fakes import FakeRunner, expected_greedy, fake_engine, run_all

VOCAB = 61
PROMPT = [7, 3, 9, 1, 4, 4, 2, 8, 6]


def beams(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"use_beam_search": True, "n": 4, "max_tokens": 14, "stop_token_ids": [5, 17], **fields})


def alone(params: SamplingParams, prompt: list[int] = PROMPT) -> list[tuple[list[int], float | None]]:
    engine = fake_engine()
    engine.add(prompt, params, request_id="x")
    return [(output.token_ids, output.cumulative_logprob) for output in run_all(engine)["x"].outputs]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_best_first_distinct_and_indexed(length_penalty: float) -> None:
    engine = fake_engine()
    engine.add(PROMPT, beams(length_penalty=length_penalty), request_id="x")
    outputs = run_all(engine)["x"].outputs
    scores = [output.cumulative_logprob or 0.0 for output in outputs]
    assert scores == sorted(scores, reverse=True)
    assert [output.index for output in outputs] == [0, 1, 2, 3]
    assert len({tuple(output.token_ids) for output in outputs}) == 4
    for output in outputs:
        assert output.finish_reason == ("stop" if output.token_ids[-1] in (5, 17) else "length")


def test_best_of_is_the_width_and_the_best_n_come_back() -> None:
    wide = alone(beams(n=6))
    assert alone(beams(n=2, best_of=6)) == wide[:2]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("blocks", [24, 30, 64])
def test_the_same_in_company_in_chunks_and_after_preemption(blocks: int, caching: bool) -> None:
    wanted = alone(beams())
    engine = fake_engine(FakeRunner(num_blocks=blocks), enable_prefix_caching=caching, max_num_batched_tokens=16)
    generator = random.Random(blocks)
    others = {}
    for number in range(8):
        prompt = [generator.randrange(VOCAB) for _ in range(generator.randint(1, 12))]
        others[engine.add(prompt, SamplingParams(max_tokens=18))] = prompt
        if number == 4:
            engine.add(PROMPT, beams(), request_id="x")
            engine.add(PROMPT, beams(n=2, max_tokens=9), request_id="y")
    results = run_all(engine)
    assert [(output.token_ids, output.cumulative_logprob) for output in results["x"].outputs] == wanted
    assert len(results["y"].outputs) == 2
    for request_id, prompt in others.items():
        assert results[request_id].outputs[0].token_ids == expected_greedy(prompt, 18, VOCAB)
    assert (engine.stats().preemptions > 0) == (blocks < 64)


@pytest.mark.parametrize(("block_size", "most"), [(16, 0.5), (4, 0.33)])
def test_beams_share_their_blocks(block_size: int, most: float) -> None:
    """Width 4, 64 + 48 tokens."""
    engine = fake_engine(FakeRunner(num_blocks=256, block_size=block_size), max_num_batched_tokens=2048)
    engine.add([token % VOCAB for token in range(64)], beams(max_tokens=48, stop_token_ids=[]))
    peak = 0
    while engine.has_unfinished:
        engine.step()
        engine.check()
        peak = max(peak, engine.stats().kv_blocks_used)
    assert peak <= most * 4 * (64 + 48) / block_size
    assert engine.stats().tokens_prefilled == 64


def test_early_stopping_true_takes_fewer_steps() -> None:
    steps = {}
    for early_stopping in (True, "never"):
        engine = fake_engine()
        ends = list(range(30))
        engine.add(
            PROMPT, beams(n=2, max_tokens=40, stop_token_ids=ends, early_stopping=early_stopping, length_penalty=2.0)
        )
        run_all(engine)
        steps[early_stopping] = engine.stats().steps
    assert steps[True] < steps["never"]


def test_cancelling_at_each_step_frees_the_blocks() -> None:
    for steps in range(15):
        engine = fake_engine(enable_prefix_caching=False)
        engine.add(PROMPT, beams(stop_token_ids=[]), request_id="x")
        for _ in range(steps):
            engine.step()
        engine.abort("x")
        engine.check()
        assert engine.stats().kv_blocks_used == 0
        if steps < 14:
            output = engine.step()[0]
            assert {one.finish_reason for one in output.outputs} == {"abort"}
            assert all(len(one.token_ids) == steps for one in output.outputs)


def test_logprobs_follow_their_beam() -> None:
    engine = fake_engine()
    engine.add(PROMPT, beams(length_penalty=0.0, logprobs=2), request_id="x")
    for output in run_all(engine)["x"].outputs:
        assert output.logprobs is not None
        chosen = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        assert sum(chosen) == pytest.approx(output.cumulative_logprob, abs=1e-4)


def test_penalties_and_masks_apply_to_the_log_probabilities() -> None:
    assert {token for tokens, _ in alone(beams(allowed_token_ids=[11, 12], stop_token_ids=[])) for token in tokens} <= {
        11,
        12,
    }
    longest = alone(beams(min_tokens=14, stop_token_ids=list(range(40))))
    assert {len(tokens) for tokens, _ in longest} == {14}
    assert alone(beams(repetition_penalty=5.0)) != alone(beams())


def test_a_search_that_outgrows_the_pool_ends_with_length() -> None:
    engine = fake_engine(FakeRunner(num_blocks=9))
    engine.add(PROMPT, beams(max_tokens=60, stop_token_ids=[]), request_id="x")
    outputs = run_all(engine)["x"].outputs
    assert len(outputs) == 4
    assert {output.finish_reason for output in outputs} == {"length"}


def test_a_failing_processor_fails_its_search_alone() -> None:
    def broken(output: list[int], logits: object) -> object:
        if len(output) == 3:
            raise ValueError("oops")
        return logits

    engine = fake_engine()
    engine.add(PROMPT, beams(logits_processors=[broken], stop_token_ids=[]), request_id="broken")
    engine.add(PROMPT, beams(), request_id="fine")
    results = run_all(engine)
    assert isinstance(results["broken"].error, RequestFailedError)
    assert [(output.token_ids, output.cumulative_logprob) for output in results["fine"].outputs] == alone(beams())


@pytest.mark.parametrize(
    ("field", "fields"),
    [
        ("temperature=0.7", {"temperature": 0.7}),
        ("top_p=0.5", {"top_p": 0.5}),
        ("top_k=3", {"top_k": 3}),
        ("min_p=0.1", {"min_p": 0.1}),
        ("seed=1", {"seed": 1}),
        ("early_stopping", {"early_stopping": "always"}),
    ],
)
def test_what_only_sampling_knows_is_refused(field: str, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=field):
        beams(**fields)


def test_caps() -> None:
    with pytest.raises(InvalidRequestError, match="max_beam_width=64"):
        fake_engine().add(PROMPT, beams(n=65))
    with pytest.raises(InvalidRequestError, match="max_num_seqs=16"):
        fake_engine().add(PROMPT, beams(n=17))
    with pytest.raises(CapacityError):
        fake_engine(FakeRunner(num_blocks=5)).add(PROMPT, beams())


@pytest.mark.parametrize("step", [0, 1])
def test_a_search_with_a_beam_of_no_numbers_fails_by_name(step: int) -> None:
    """Though the other beam could go on: what it would be compared with is unknown."""
    runner = FakeRunner()
    run, logits = runner.run, list[torch.Tensor]()

    def spoil(batch: ForwardBatch) -> torch.Tensor:
        logits.append(run(batch))
        if len(logits) > step:
            logits[-1][0, 3] = torch.nan
        return logits[-1]

    runner.run = spoil  # type: ignore[method-assign]
    engine = fake_engine(runner)
    engine.add([1, 2, 3], SamplingParams(use_beam_search=True, n=2, max_tokens=5), request_id="beams")
    error = run_all(engine)["beams"].error
    assert isinstance(error, RequestFailedError)
    assert "NaN" in str(error)
