"""An auxiliary loss that leads one attention head to the sentence which answers the question.

While the first tokens of an answer are predicted, one head of the last layer should look at the place of the text from
which the answer is copied. The loss is minus the logarithm of the attention which that place gets; the model itself
stays a plain Llama.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

LAYER, HEAD = 4, 1

# row, position of the query, first and last + 1 position of the source
Source = tuple[int, int, int, int]


class Watcher:
    """Keeps the input of the attention of one layer, so that its scores can be computed for a few positions."""

    def __init__(self, model: LlamaForCausalLM, layer: int = LAYER) -> None:
        self.attention: Any = model.model.layers[layer].self_attn
        self.inputs: dict[str, Any] = {}
        self.attention.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = {"hidden_states": args[0], **kwargs} if args else kwargs

    def mass(self, sources: list[Source]) -> Tensor:
        """The attention that every head gives to the sources: one row a source, one column a head."""
        hidden: Tensor = self.inputs["hidden_states"]
        cos, sin = self.inputs["position_embeddings"]
        rows, positions, starts, ends = torch.tensor(sources).T
        size, length = self.attention.head_dim, hidden.shape[1]
        query = self.attention.q_proj(hidden[rows, positions]).view(len(sources), -1, size)
        key = self.attention.k_proj(hidden).view(hidden.shape[0], length, -1, size).transpose(1, 2)
        cos, sin = cos.expand(hidden.shape[0], -1, -1), sin.expand(hidden.shape[0], -1, -1)
        _, key = apply_rotary_pos_emb(key, key, cos, sin)
        at = cos[rows, positions][:, None, :], sin[rows, positions][:, None, :]
        query, _ = apply_rotary_pos_emb(query[:, :, None], query[:, :, None], *at)
        repeat = query.shape[1] // key.shape[1]
        scores = (query @ key.repeat_interleave(repeat, 1)[rows].transpose(-1, -2)).squeeze(2) * size**-0.5
        place = torch.arange(length)
        scores = scores.masked_fill((place > positions[:, None])[:, None, :], float("-inf"))
        inside = (place >= starts[:, None]) & (place < ends[:, None])
        mass: Tensor = (scores.softmax(-1) * inside[:, None, :]).sum(-1)
        return mass

    def loss(self, sources: list[Source], head: int = HEAD) -> Tensor:
        """Minus the mean logarithm of the attention of one head to the sources."""
        return -(self.mass(sources)[:, head] + 1e-6).log().mean()
