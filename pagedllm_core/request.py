"""A request (the group) and its sequences."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from pagedllm_core.decode.beam import BeamState
from pagedllm_core.decode.detokenize import Decode, Detokenizer
from pagedllm_core.decode.grammar import Grammar
from pagedllm_core.decode.guided import Guide
from pagedllm_core.decode.processors import LogitsRules
from pagedllm_core.kv.hashing import chain_hash
from pagedllm_core.kv.table import BlockTable
from pagedllm_core.outputs import Logprob, RequestMetrics
from pagedllm_core.params import Sampling, SamplingParams


class RequestState(enum.Enum):
    """Where a request is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """One line of tokens: the prompt and what was generated after it.

        token_ids    p p p p p g g g
        num_computed         ^            tokens left of it have their keys and values in the cache

    Each step lets `num_computed` catch up with `num_tokens`; a decode step is the case where one token is missing.
    Where steps overlap, the last `ahead` tokens are chosen on the device and not known here yet.
    """

    def __init__(self, index: int, token_ids: list[int], prompt_length: int, table: BlockTable, root: bytes) -> None:
        self.index = index
        self.token_ids = token_ids
        self.prompt_length = prompt_length
        self.table = table
        self.swapped: BlockTable | None = None  # its blocks in host memory, while it waits there
        self.num_computed = 0
        self.num_charged = 0  # tokens that its share was charged for
        self.ahead = 0
        self.cumulative_logprob = 0.0
        self.logprobs: list[dict[int, Logprob]] = []
        self.detokenizer: Detokenizer | None = None
        self.guide: Guide | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.num_delivered = 0  # generated tokens already handed out
        self.finish_delivered = False
        self._hashes = [root]  # _hashes[i] is the chain's value before block i

    @property
    def num_tokens(self) -> int:
        """Tokens so far, prompt included."""
        return len(self.token_ids) + self.ahead

    @property
    def num_generated(self) -> int:
        """Generated tokens that are known."""
        return len(self.token_ids) - self.prompt_length

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens (a copy)."""
        return self.token_ids[self.prompt_length :]

    @property
    def remaining(self) -> int:
        """Tokens whose keys and values are still to be computed."""
        return self.num_tokens - self.num_computed

    @property
    def finished(self) -> bool:
        """True once generation has stopped."""
        return self.finish_reason is not None

    def block_hash(self, index: int) -> bytes:
        """Chained hash of the sequence's full block number `index`."""
        size = self.table.block_size
        while len(self._hashes) <= index + 1:
            block = len(self._hashes) - 1
            self._hashes.append(chain_hash(self._hashes[-1], self.token_ids[block * size : (block + 1) * size]))
        return self._hashes[index + 1]

    def fork(self, index: int) -> Sequence:
        """A sequence with the same past, over the same blocks."""
        child = self._copy(index, self.table.fork())
        child.num_computed = self.num_computed
        child._hashes = self._hashes.copy()
        return child

    def detach(self) -> Sequence:
        """A sequence with the same past and no blocks: what a finished beam keeps."""
        return self._copy(self.index, self.table.empty())

    def _copy(self, index: int, table: BlockTable) -> Sequence:
        other = Sequence(index, self.token_ids.copy(), self.prompt_length, table, self._hashes[0])
        other.num_charged = self.num_charged
        other.cumulative_logprob = self.cumulative_logprob
        other.logprobs = self.logprobs.copy()
        other.num_delivered = self.num_delivered
        other.detokenizer = None if self.detokenizer is None else self.detokenizer.copy()
        other.guide = None if self.guide is None else self.guide.copy()
        return other

    def rewind(self) -> None:
        """Give all blocks back; the tokens stay, their keys and values are recomputed later."""
        self.table.release()
        if self.swapped is not None:
            self.swapped.release()
            self.swapped = None
        self.num_computed = 0


@dataclass(eq=False)
class Request:
    """What one caller asked for. A request with several sequences is scheduled and preempted as a whole.

    Attributes:
        request_id: Unique among the engine's unfinished requests.
        prompt: The prompt's text, or None where ids were given.
        prompt_token_ids: The prompt's ids.
        params: What the caller asked for.
        sampling: The same with the model's defaults filled in.
        rules: What it changes in the logits.
        decode: Its tokens to text, or None where the model has no tokenizer.
        decode_token: The same for a scored token, which is shown where it is a special one, too.
        root_hash: Start of its blocks' hash chain.
        max_tokens: Most tokens of each sequence, cut at the context limit.
        arrival_time: Engine clock, seconds.
        deadline: Engine clock, seconds, or None.
        priority: Lower is more urgent (policy "priority").
        share_key: Whose share it counts against (policy "fair").
        stream: Deliver what is new after each step, instead of everything at the end.
        sequences: One until the prompt is computed, then `width` of them.
        arrival: Order of submission; kept through preemption.
        state: Where it is in its life.
        started: True once it has taken part in a step.
        prompt_logprobs: Filled while the prompt is computed, where asked for.
        prompt_scored: True once they were handed out.
        beams: The state of its beam search, or None where it samples.
        grammar: What its output is held to, or None.
        metrics: Times and counts.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    sampling: Sampling
    rules: LogitsRules
    decode: Decode | None
    decode_token: Decode | None
    root_hash: bytes
    max_tokens: int
    arrival_time: float
    deadline: float | None = None
    priority: int = 0
    share_key: str | None = None
    stream: bool = True
    sequences: list[Sequence] = field(default_factory=list)
    arrival: int = 0
    state: RequestState = RequestState.WAITING
    started: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    prompt_scored: bool = False
    beams: BeamState[Sequence] | None = None
    grammar: Grammar | None = None
    metrics: RequestMetrics = field(default_factory=RequestMetrics)

    @property
    def width(self) -> int:
        """Sequences it has once its prompt is computed."""
        return self.params.width

    @property
    def active(self) -> list[Sequence]:
        """Sequences that still generate."""
        return [sequence for sequence in self.sequences if sequence.finish_reason is None]

    @property
    def swapped(self) -> bool:
        """True while its blocks are in host memory."""
        return any(sequence.swapped is not None for sequence in self.sequences)

    @property
    def ending(self) -> bool:
        """True where the tokens on their way from the device are its last ones."""
        return any(one.ahead and one.num_generated + one.ahead >= self.max_tokens for one in self.active)

    @property
    def forked(self) -> bool:
        """True once the prompt's sequence has become `width` of them (of beams there may be fewer)."""
        if self.beams is not None:
            return self.sequences[0].num_generated > 0
        return len(self.sequences) == self.width

    def undo_step(self) -> None:
        """Forget a step that was interrupted anywhere; what was rewound chooses the same tokens again."""
        if not self.forked:
            for child in self.sequences[1:]:
                child.rewind()
            del self.sequences[1:]
        for sequence in self.sequences:
            sequence.ahead = 0

    @property
    def seats(self) -> int:
        """Sequences it takes, or will take, in a step."""
        return len(self.active) if self.forked and self.beams is None else self.width
