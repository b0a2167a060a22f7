"""The sampling kernels choose and score what the torch path does, over vocabularies of real models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pagedllm_core.decode.device import DeviceSampler, SampleRow
from pagedllm_core.params import SamplingParams
from pagedllm_core.request import Request
from tests.fakes import FakeRunner, fake_engine
from tests.gpu.helpers import DEVICE
from tests.unit.test_device_sampler import PARAMS

ROUNDS = 8


def requests(vocabulary: int) -> list[Request]:
    """Running requests of every kind, several of each."""
    engine = fake_engine(FakeRunner(vocab_size=vocabulary, eos_token_ids=(17,)))
    for number, fields in enumerate(PARAMS * 4):
        prompt = [(7 * number + 3 * place) % 331 for place in range(5 + number)]
        params: dict[str, Any] = {"max_tokens": 30, "seed": number, **fields}
        engine.add(prompt, SamplingParams(**params), request_id=str(number))
    found = list(engine._requests.values())
    for number, request in enumerate(found):
        request.sequences[0].token_ids += [11, 13, 11][: number % 4]
    return found


@pytest.mark.parametrize("vocabulary", [331, 50_257, 151_936, 262_144])
def test_kernels_choose_what_torch_does(vocabulary: int) -> None:
    """Greedy rows exactly; of drawn ones 1 in 200 may fall on the other side of a rounding of the cumulative sum."""
    running = requests(vocabulary)
    rows = [SampleRow(request, request.sequences[0], 0, row) for row, request in enumerate(running)]
    kernels, plain = (DeviceSampler(DEVICE, vocabulary, 64, kernels=one) for one in (True, False))
    kernels.warm_up()
    drawn = different = 0
    for seed in range(ROUNDS):
        logits = 3 * torch.randn(len(rows), vocabulary, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        found, wanted = (one.launch(logits.clone(), rows).result() for one in (kernels, plain))
        assert found.possible == wanted.possible
        for row, request in enumerate(running):
            if request.params.temperature == 0:
                assert found.tokens[row] == wanted.tokens[row]
            else:
                drawn += 1
                different += found.tokens[row] != wanted.tokens[row]
        check_scores(running, found, wanted)
    assert different <= drawn / 200


def check_scores(running: list[Request], found: Any, wanted: Any) -> None:
    """Log-probabilities of rows that chose the same token."""
    for row, request in enumerate(running):
        count = request.params.logprobs
        if count is None or found.tokens[row] != wanted.tokens[row]:
            continue
        ours, theirs = (one.scored.entry(row, count, None) for one in (found, wanted))
        assert list(ours) == list(theirs)
        for token, entry in theirs.items():
            assert ours[token].rank == entry.rank
            assert ours[token].logprob == pytest.approx(entry.logprob, abs=2e-5)


def test_a_row_draws_the_same_in_any_company() -> None:
    running = requests(151_936)
    sampler = DeviceSampler(DEVICE, 151_936, 64)
    logits = 3 * torch.randn(len(running), 151_936, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    rows = [SampleRow(request, request.sequences[0], 0, row) for row, request in enumerate(running)]
    together = sampler.launch(logits, rows).result().tokens
    for row in rows[::5]:
        assert sampler.launch(logits, [row]).result().tokens == [together[row.row]]


def test_a_carried_token_is_read_on_the_device() -> None:
    """A row whose newest token only the device knows chooses what it does once the host knows it."""
    running = requests(50_257)
    sampler = DeviceSampler(DEVICE, 50_257, 64)
    logits = 3 * torch.randn(len(running), 50_257, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    carried = torch.randint(0, 50_257, (len(running),), generator=torch.Generator().manual_seed(3))
    ahead = [SampleRow(request, request.sequences[0], 0, row, row) for row, request in enumerate(running)]
    found = sampler.launch(logits, ahead, carried.to(DEVICE)).result().tokens
    for request, token in zip(running, carried.tolist(), strict=True):
        request.sequences[0].token_ids.append(token)
    known = [SampleRow(request, request.sequences[0], 0, row) for row, request in enumerate(running)]
    assert sampler.launch(logits, known).result().tokens == found
