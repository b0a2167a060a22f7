"""Changes to the logits that a request asks for, before a token is chosen.

Order (vLLM's): allowed tokens, bad words, minimum length, bias, penalties, then the caller's own functions. Every
change is sparse: it touches the rows and tokens it concerns, never a [rows, vocabulary] mask built on the host.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pagedllm_core.errors import RequestFailedError
from pagedllm_core.params import LogitsProcessor, SamplingParams

if TYPE_CHECKING:
    from pagedllm_core.request import Sequence


@dataclass(frozen=True, slots=True)
class LogitsRules:
    """What of a request touches its logits, prepared once at submission.

    Attributes:
        params: The caller's parameters.
        repetition_penalty: With the model's default filled in; 1.0 is off.
        eos_token_ids: The model's end tokens, empty where the request ignores them.
        bad_word_ids: Token sequences of the bad words; the last token of each is what is forbidden.
        takes_prompt: For each of the caller's functions, whether it takes the prompt's ids as well.
    """

    params: SamplingParams
    repetition_penalty: float
    eos_token_ids: tuple[int, ...]
    bad_word_ids: tuple[tuple[int, ...], ...]
    takes_prompt: tuple[bool, ...] = ()

    @property
    def end_token_ids(self) -> list[int]:
        """Every id that ends generation; held back until `min_tokens`."""
        return [*self.eos_token_ids, *self.params.stop_token_ids]

    @property
    def active(self) -> bool:
        """False where the logits are left as they are."""
        params = self.params
        return bool(
            params.allowed_token_ids
            or self.bad_word_ids
            or params.min_tokens
            or params.logit_bias
            or self.repetition_penalty != 1.0
            or params.presence_penalty
            or params.frequency_penalty
            or params.logits_processors
        )

    def apply(self, logits: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """Process one row.

        Args:
            logits: float32 [vocabulary]; may be changed in place.
            sequence: Whose next token the row chooses.

        Returns:
            float32 [vocabulary].

        Raises:
            RequestFailedError: A caller's processor raised or returned something else than a row of logits.
        """
        params = self.params
        if params.allowed_token_ids:
            allowed = _index(params.allowed_token_ids, logits.device)
            kept = logits[allowed]
            logits = logits.fill_(-torch.inf)
            logits[allowed] = kept
        if self.bad_word_ids:
            logits[self._bad_next_tokens(sequence)] = -torch.inf
        if sequence.num_generated < params.min_tokens:
            logits[self.end_token_ids] = -torch.inf
        if params.logit_bias:
            tokens = _index(list(params.logit_bias), logits.device)
            logits[tokens] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device)
        if self.repetition_penalty != 1.0:
            tokens = torch.from_numpy(np.unique(np.asarray(sequence.token_ids))).to(logits.device)
            scores = logits[tokens]
            logits[tokens] = torch.where(scores < 0, scores * self.repetition_penalty, scores / self.repetition_penalty)
        if (params.presence_penalty or params.frequency_penalty) and sequence.num_generated:
            unique, counts = np.unique(np.asarray(sequence.output_token_ids), return_counts=True)
            penalty = torch.from_numpy(params.frequency_penalty * counts + params.presence_penalty)
            logits[torch.from_numpy(unique).to(logits.device)] -= penalty.to(logits.device, logits.dtype)
        for processor, takes_prompt in zip(params.logits_processors or (), self.takes_prompt, strict=True):
            logits = _call_processor(processor, takes_prompt, sequence, logits)
        return logits

    def _bad_next_tokens(self, sequence: Sequence) -> list[int]:
        """Tokens that would complete a bad word now."""
        tokens = sequence.token_ids
        generated = sequence.num_generated
        return [
            word[-1]
            for word in self.bad_word_ids
            if len(word) - 1 <= generated and tuple(tokens[len(tokens) - len(word) + 1 :]) == word[:-1]
        ]


def _index(token_ids: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int64, device=device)


def takes_prompt(processor: LogitsProcessor) -> bool:
    """True where the function takes (prompt ids, output ids, logits) rather than (output ids, logits)."""
    try:
        parameters = inspect.signature(processor).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in parameters if one.kind in positional and one.default is inspect.Parameter.empty]
    return len(needed) >= 3


def _call_processor(
    processor: LogitsProcessor, with_prompt: bool, sequence: Sequence, logits: torch.Tensor
) -> torch.Tensor:
    output = sequence.output_token_ids
    prompt = sequence.token_ids[: sequence.prompt_length]
    try:
        result = processor(prompt, output, logits) if with_prompt else processor(output, logits)
    except BaseException as error:  # SystemExit too: it is the caller's code on the engine's thread
        raise RequestFailedError(f"logits_processors: {processor!r} raised {type(error).__name__}: {error}") from error
    if not isinstance(result, torch.Tensor) or result.shape != logits.shape:
        found = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
        raise RequestFailedError(
            f"logits_processors: {processor!r} returned {found}; return a tensor of shape {tuple(logits.shape)}"
        )
    return result.to(logits.dtype)
