"""The sampler of an overlapped step chooses and scores what `advance` does, with and without kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from pagedllm_core.decode.device import DeviceSampler, SampleRow
from pagedllm_core.decode.logprobs import num_logprobs, score_tokens
from pagedllm_core.decode.sample import Draw, sample
from pagedllm_core.decode.staging import ROW, Staging, column
from pagedllm_core.kernels import has_triton
from pagedllm_core.params import SamplingParams
from pagedllm_core.request import Request
from tests.fakes import FakeRunner, fake_engine

KINDS = pytest.mark.parametrize(
    "kind", ["torch", pytest.param("triton", marks=pytest.mark.skipif(not has_triton(), reason="needs triton"))]
)

VOCAB = 331
END = 17
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5, "logprobs": 3},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 2.0, "min_p": 0.1, "top_k": 40, "top_p": 0.9},
    {"temperature": 0.0, "repetition_penalty": 1.4, "logprobs": 0},
    {"temperature": 0.9, "presence_penalty": 1.5, "frequency_penalty": 0.5, "repetition_penalty": 0.8},
    {"temperature": 0.0, "logit_bias": {5: 4.0, 9: -math.inf}, "min_tokens": 4},
    {"temperature": 1.0, "allowed_token_ids": [3, 7, 7, 200], "logit_bias": {200: 20.0, 8: 50.0}},
    {"temperature": 0.0, "min_tokens": 3, "stop_token_ids": [30, 31]},
]


def sampler(kind: str, max_rows: int = 64) -> DeviceSampler:
    return DeviceSampler(torch.device("cpu"), VOCAB, max_rows, kernels=kind == "triton")


def requests(params: list[dict[str, Any]]) -> list[Request]:
    """One running request per entry, with a prompt and a few generated tokens."""
    engine = fake_engine(FakeRunner(vocab_size=VOCAB, eos_token_ids=(END,)))
    for number, fields in enumerate(params):
        prompt = [(7 * number + 3 * place) % VOCAB for place in range(5 + number)]
        engine.add(prompt, SamplingParams(**{"max_tokens": 30, "seed": number, **fields}), request_id=str(number))
    found = [engine._requests[str(number)] for number in range(len(params))]
    for number, request in enumerate(found):
        request.sequences[0].token_ids += [11, 13, 11][: number % 4]
    return found


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def chosen_alone(request: Request, child: int, row: torch.Tensor) -> int:
    """The token by today's path, for one row."""
    sequence = request.sequences[0]
    processed = request.rules.apply(row.clone(), sequence)
    return int(sample(processed[None], [Draw(request.sampling, child, sequence.num_tokens)]))


@KINDS
def test_tokens_are_those_of_the_step_by_step_path(kind: str) -> None:
    running = requests(PARAMS)
    raw = logits(len(running))
    rows = [SampleRow(request, request.sequences[0], 0, row) for row, request in enumerate(running)]
    pending = sampler(kind).launch(raw.clone(), rows)
    wanted = [chosen_alone(request, 0, raw[row]) for row, request in enumerate(running)]
    assert pending.tokens.dtype == torch.int64
    assert pending.tokens.tolist() == wanted
    result = pending.result()
    assert result.tokens == wanted
    assert all(result.possible)


@KINDS
def test_scores_are_those_of_the_raw_logits(kind: str) -> None:
    running = requests([*PARAMS, {"best_of": 3, "temperature": 1.0}])
    raw = logits(len(running), seed=1)
    rows = [SampleRow(request, request.sequences[0], 0, row) for row, request in enumerate(running)]
    result = sampler(kind).launch(raw.clone(), rows).result()
    wanted = score_tokens(raw, torch.tensor(result.tokens), [num_logprobs(request) for request in running])
    assert result.scored is not None
    assert wanted is not None
    for row, request in enumerate(running):
        if (count := num_logprobs(request)) is not None:
            ours, theirs = result.scored.entry(row, count, None), wanted.entry(row, count, None)
            assert list(ours) == list(theirs)
            assert [one.rank for one in ours.values()] == [one.rank for one in theirs.values()]
            for token, entry in theirs.items():
                assert ours[token].logprob == pytest.approx(entry.logprob, abs=1e-5)


@KINDS
def test_no_scores_where_nobody_asks(kind: str) -> None:
    running = requests(PARAMS[:2])
    rows = [SampleRow(request, request.sequences[0], 0, row) for row, request in enumerate(running)]
    assert sampler(kind).launch(logits(2), rows).result().scored is None


@KINDS
def test_a_carried_token_counts_as_if_it_were_known(kind: str) -> None:
    """Position of the draw, minimum length and penalties all see the token that only the device knows."""
    penalised = {"temperature": 0.0, "presence_penalty": 2.0, "frequency_penalty": 2.0}
    running = requests([PARAMS[1], PARAMS[5], penalised, {"temperature": 0.0, "min_tokens": 4}, PARAMS[9]])
    raw = logits(len(running), seed=2)
    carried_tokens = torch.tensor([11, 40, 13, 200])  # some were generated before, some are new
    raw[1:3, carried_tokens] = torch.tensor([12.0, 11.5, 11.0, 10.5])
    raw[3:, [END, 30]] = 15.0
    device = sampler(kind)
    found = set()
    for shift in range(4):
        carried = [(number + shift) % 4 for number in range(len(running))]
        rows = [
            SampleRow(request, request.sequences[0], 0, row, place)
            for row, (request, place) in enumerate(zip(running, carried, strict=True))
        ]
        tokens = device.launch(raw.clone(), rows, carried_tokens).result().tokens
        for request, place in zip(running, carried, strict=True):
            request.sequences[0].token_ids.append(int(carried_tokens[place]))
        assert tokens == [chosen_alone(request, 0, raw[row]) for row, request in enumerate(running)]
        found.add(tuple(tokens[1:3]))
        for request in running:
            request.sequences[0].token_ids.pop()
    assert len(found) > 2  # the penalties made a difference


@KINDS
def test_forks_of_a_prompt_share_its_row_and_differ_in_their_draw(kind: str) -> None:
    (request,) = requests([{"temperature": 2.0, "n": 5}])
    raw = logits(3, seed=3)
    rows = [SampleRow(request, request.sequences[0], child, 2) for child in range(5)]
    tokens = sampler(kind).launch(raw.clone(), rows).result().tokens
    assert tokens == [chosen_alone(request, child, raw[2]) for child in range(5)]
    assert len(set(tokens)) > 1


@KINDS
def test_rows_without_a_possible_token_are_flagged_and_leave_others_alone(kind: str) -> None:
    running = requests(
        [{"temperature": 1.0}, {"allowed_token_ids": [END], "min_tokens": 9}, {}, {}, {"temperature": 0.5}, {}]
    )
    raw = logits(6, seed=4)
    raw[2, 100] = math.nan
    raw[3] = -math.inf
    raw[5, 3] = math.inf
    rows = [SampleRow(request, request.sequences[0], 0, row) for row, request in enumerate(running)]
    pending = sampler(kind).launch(raw.clone(), rows)
    result = pending.result()
    assert result.possible == [True, False, False, False, True, False]
    assert [result.tokens[row] for row in (1, 2, 3, 5)] == [0, 0, 0, 0]
    assert [result.tokens[row] for row in (0, 4)] == [chosen_alone(running[row], 0, raw[row]) for row in (0, 4)]


@KINDS
def test_launches_do_not_disturb_those_before_them(kind: str) -> None:
    """Three launches are in flight before the first is looked at; staging buffers are used in turn."""
    device = sampler(kind)
    running = requests([PARAMS[0], PARAMS[6], PARAMS[7]])
    steps = [logits(len(running), seed=seed) for seed in range(5, 10)]
    rows = [SampleRow(request, request.sequences[0], 0, row) for row, request in enumerate(running)]
    pendings = [device.launch(raw.clone(), rows) for raw in steps]
    for raw, pending in zip(steps, pendings, strict=True):
        wanted = [chosen_alone(request, 0, raw[row]) for row, request in enumerate(running)]
        assert pending.result().tokens == wanted
        assert pending.result().tokens == wanted  # may be asked twice


@pytest.mark.skipif(not has_triton(), reason="needs triton")
def test_a_launch_waits_for_the_step_before_the_last_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose staging buffer it writes to; the step under way keeps its own."""
    from pagedllm_core.decode import launch

    settled: list[object] = []
    monkeypatch.setattr(launch._Copied, "settle", lambda pending: settled.append(pending))
    (request,) = requests([{"temperature": 0.0}])
    device = sampler("triton")
    pendings = []
    for number in range(4):
        pendings.append(device.launch(logits(1), [SampleRow(request, request.sequences[0], 0, 0)]))
        assert settled == pendings[: max(0, number - 1)]


def test_what_is_accepted() -> None:
    device = sampler("torch")
    refused = [
        {"use_beam_search": True, "n": 2, "seed": None},
        {"logits_processors": [lambda output, scores: scores]},
        {"prompt_logprobs": 1},
    ]
    assert all(device.accepts(request) for request in requests(PARAMS))
    assert not any(device.accepts(request) for request in requests(refused))
    scored = requests(refused)[2]
    scored.prompt_logprobs = [None] * len(scored.prompt_token_ids)
    assert device.accepts(scored)


@KINDS
def test_warming_up_leaves_no_trace(kind: str) -> None:
    device = sampler(kind)
    device.warm_up()
    (request,) = requests([{"temperature": 0.8, "top_p": 0.9}])
    raw = logits(1, seed=11)
    tokens = device.launch(raw.clone(), [SampleRow(request, request.sequences[0], 0, 0)]).result().tokens
    assert tokens == [chosen_alone(request, 0, raw[0])]


def test_staged_lists_of_any_length_arrive() -> None:
    """The buffer grows; what an earlier step left in it does not matter."""
    staging = Staging(torch.device("cpu"), max_rows=3)
    for lengths in [(0, 0), (5, 3), (3000, 1), (2, 9000), (1, 0)]:
        edits, past = (np.arange(2 * length, dtype=np.int32).reshape(2, length) for length in lengths)
        record = np.zeros(2, dtype=ROW)
        record["source"], record["frequency"] = [7, 8], 0.25
        numbers = np.array([0.125, 0.75])
        staged = staging.put(numbers, record, [*edits, *past])
        assert staged.uniforms.tolist() == numbers.tolist()
        assert staged.records[:, column("source")].tolist() == [7, 8]
        assert staged.records.view(torch.float32)[:, column("frequency")].tolist() == [0.25, 0.25]
        assert np.array_equal(staged.edit_tokens[: lengths[0]], edits[0])
        assert np.array_equal(staged.edit_biases.view(torch.int32)[: lengths[0]], edits[1])
        assert np.array_equal(staged.past_tokens[: lengths[1]], past[0])
        assert np.array_equal(staged.past_counts[: lengths[1]], past[1])


@KINDS
def test_wrong_arguments_are_named(kind: str) -> None:
    device = sampler(kind, max_rows=2)
    (request,) = requests([{}])
    row = SampleRow(request, request.sequences[0], 0, 0)
    wrong: list[tuple[torch.Tensor, list[SampleRow], str]] = [
        (logits(3), [row] * 3, "rows"),
        (logits(3), [], "rows"),
        (logits(3)[:, :-1], [row], "logits"),
        (logits(3).half(), [row], "logits"),
        (logits(3), [row._replace(carried=0)], "carried_tokens"),
    ]
    for raw, rows, name in wrong:
        with pytest.raises(ValueError, match=name):
            device.launch(raw, rows)
