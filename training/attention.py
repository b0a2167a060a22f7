"""Auxiliary losses that teach single attention heads the steps of finding a sentence and copying it.

A causal model that answers with a sentence of the text has to know, at the beginning of the answer, how that sentence
starts, and then what comes next; a value of a JSON answer has to be found by its key. Heads are taught the way to it:

    layer 0   a token                    -> the token before it
    layer 1   a word of a text           -> the first token of its own sentence
    layer 1   a token of a value         -> the first token of the value
    layer 1   a key in a text            -> its value, where that stands before it
    layer 2   a word of the question     -> the same word in the sentence of the answer
    layer 2   a key of a JSON answer     -> the same key in the sentence of its value
    layer 2   a token of an answer       -> the token that follows it in the source
    layer 3   the beginning of an answer -> the question, or the key before a value
    layer 3   a value in a text          -> its key, where that stands before it
    layer 4   the beginning of an answer -> the sentence of the answer, or the value

The loss is minus the logarithm of the attention which the right place gets; the model itself stays a plain Llama.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv


class Kind(IntEnum):
    """What a head is taught."""

    PREVIOUS = 0
    START = 1
    MATCH = 2
    COPY = 3
    GATHER = 4
    POINT = 5
    BEGIN = 6
    OWNED = 7
    OWNER = 8


class Head(NamedTuple):
    """A taught head, and the weight of its loss."""

    kind: Kind
    layer: int
    index: int
    weight: float

    @property
    def name(self) -> str:
        """What the training curve calls it."""
        return f"{self.kind.name.lower()}_{self.layer}"


HEADS = (
    Head(Kind.PREVIOUS, 0, 0, 0.03),
    Head(Kind.START, 1, 0, 0.05),
    Head(Kind.MATCH, 2, 2, 0.15),
    Head(Kind.COPY, 2, 0, 0.15),
    Head(Kind.GATHER, 3, 0, 0.05),
    Head(Kind.POINT, 4, 1, 0.2),
    Head(Kind.BEGIN, 1, 2, 0.08),
    Head(Kind.OWNED, 1, 3, 0.05),
    Head(Kind.OWNER, 3, 2, 0.08),
)

# position of the query, first and last + 1 position of the place it should look at
Target = tuple[Kind, int, int, int]


CHUNK = 256  # queries at a time


def causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **rest: Any
) -> tuple[Tensor, None]:
    """Causal attention of padded rows by plain products, some queries at a time.

    On a processor with bfloat16 arithmetic this takes a third to six tenths of the time of torch's own attention,
    forwards and backwards. Padding stands on the right, where no query looks; `mask` is not needed.

    Args:
        module: The layer that asks.
        query: float [rows, heads, length, head size].
        key: float [rows, kv heads, length, head size], as is `value`.
        value: See `key`.
        mask: Unused.
        scaling: What the scores are multiplied with.
        rest: What transformers passes besides; unused.

    Returns:
        float [rows, length, heads, head size], and None for the weights.
    """
    groups = query.shape[1] // key.shape[1]
    query, key, value = query * scaling, repeat_kv(key, groups), repeat_kv(value, groups)
    parts = []
    for begin in range(0, query.shape[2], CHUNK):
        end = min(begin + CHUNK, query.shape[2])
        scores = query[:, :, begin:end] @ key[:, :, :end].transpose(-1, -2)
        later = torch.full((end - begin, end), -torch.inf, dtype=scores.dtype).triu(begin + 1)
        parts.append(torch.softmax(scores + later, dim=-1, dtype=scores.dtype) @ value[:, :, :end])
    return torch.cat(parts, dim=2).transpose(1, 2), None


AttentionInterface.register("training", causal_attention)


class Watcher:
    """Keeps the inputs of the attention of the taught layers, so that scores can be computed for a few positions."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.heads = HEADS
        self.attention: dict[int, Any] = {}
        self.inputs: dict[int, dict[str, Any]] = {}
        for layer in {head.layer for head in self.heads}:
            self.attention[layer] = model.model.layers[layer].self_attn
            self.attention[layer].register_forward_pre_hook(self._keep(layer), with_kwargs=True)

    def _keep(self, layer: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs[layer] = {"hidden_states": args[0], **kwargs} if args else kwargs

        return hook

    def log_mass(self, head: Head, targets: Tensor) -> Tensor:
        """The logarithm of the attention that a head gives to each target, float32 [targets].

        `targets` holds row, position of the query, first and last + 1 position of the place, int64 [targets, 4].
        """
        attention, index = self.attention[head.layer], head.index
        hidden: Tensor = self.inputs[head.layer]["hidden_states"]
        cos, sin = self.inputs[head.layer]["position_embeddings"]
        rows, positions, starts, ends = targets.T
        size, length = attention.head_dim, hidden.shape[1]
        group = index * attention.config.num_key_value_heads // attention.config.num_attention_heads
        query = hidden @ attention.q_proj.weight[index * size : (index + 1) * size].T
        key = hidden @ attention.k_proj.weight[group * size : (group + 1) * size].T
        query, key = apply_rotary_pos_emb(query[:, None], key[:, None], cos, sin)
        scores = (query[:, 0] @ key[:, 0].transpose(-1, -2))[rows, positions] * size**-0.5
        place = torch.arange(length)
        scores = scores.masked_fill(place > positions[:, None], float("-inf"))
        inside = (place >= starts[:, None]) & (place < ends[:, None])
        return scores.masked_fill(~inside, float("-inf")).logsumexp(-1) - scores.logsumexp(-1)

    def losses(self, targets: list[tuple[int, Target]]) -> dict[Head, Tensor]:
        """For each head whose kind occurs: minus the mean logarithm of the attention to its targets."""
        chosen = {kind: [(row, *place) for row, (found, *place) in targets if found == kind] for kind in Kind}
        return {
            head: -self.log_mass(head, torch.tensor(chosen[head.kind])).mean()
            for head in self.heads
            if chosen[head.kind]
        }
