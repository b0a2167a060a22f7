"""Log-probabilities of chosen and most likely tokens, under the model's own distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from pagedllm_core.decode.detokenize import Decode
from pagedllm_core.outputs import Logprob

if TYPE_CHECKING:
    from pagedllm_core.request import Request


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Scores of one token per row, with the row's most likely tokens.

    Attributes:
        tokens: The chosen token of each row.
        chosen: Its log-probability.
        ranks: Its rank, from 1.
        top_tokens: Per row, the most likely tokens, best first.
        top: Their log-probabilities.
    """

    tokens: list[int]
    chosen: list[float]
    ranks: list[int]
    top_tokens: list[list[int]]
    top: list[list[float]]

    def entry(self, row: int, count: int, decode: Decode | None) -> dict[int, Logprob]:
        """The row's dictionary: the chosen token first, then the `count` most likely ones."""
        found = {self.tokens[row]: (self.chosen[row], self.ranks[row])}
        for place in range(min(count, len(self.top_tokens[row]))):
            found.setdefault(self.top_tokens[row][place], (self.top[row][place], place + 1))
        return {
            token: Logprob(logprob, rank, decode([token]) if decode else "") for token, (logprob, rank) in found.items()
        }


def score_tokens(logits: torch.Tensor, tokens: torch.Tensor, counts: list[int | None]) -> ScoredTokens | None:
    """Score one token per row.

    Args:
        logits: float32 [rows, vocabulary], raw.
        tokens: int64 [rows].
        counts: Most likely tokens wanted per row; None where the row needs no scores.

    Returns:
        Scores of all rows, or None where no row needs any.
    """
    wanted = [count for count in counts if count is not None]
    if not wanted:
        return None
    total = logits.logsumexp(dim=-1)
    chosen = logits.gather(1, tokens[:, None]).squeeze(1)
    ranks = (logits > chosen[:, None]).sum(dim=-1) + 1
    top = logits.topk(min(max(wanted), logits.shape[-1]), dim=-1)
    return ScoredTokens(
        tokens.tolist(),
        (chosen - total).tolist(),
        ranks.tolist(),
        top.indices.tolist(),
        (top.values - total[:, None]).tolist(),
    )


def num_logprobs(request: Request) -> int | None:
    """Top log-probabilities wanted per generated token; 0 where only the chosen one's is needed, None without any."""
    params = request.params
    if params.logprobs is not None:
        return params.logprobs
    return 0 if params.best_of is not None and not params.use_beam_search else None
