"""What a user may say about one request, validated where it is built."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from pagedllm_core.config import ValidatedModel

LogitsProcessor = Callable[..., Any]
"""`f(output_token_ids, logits)` or `f(prompt_token_ids, output_token_ids, logits)`.

`logits` is a float32 tensor of shape [vocabulary]; the function returns a tensor of the same shape (it may be the
same one, changed in place).
"""


GREEDY_COPIES = "with temperature=0 every sequence would be the same; set a temperature above 0, or n=1"


warnings.filterwarnings("ignore", message='Field name "json" in "GuidedParams" shadows', category=UserWarning)


class GuidedParams(ValidatedModel):
    """What the output must conform to; exactly one of the four."""

    json: str | dict[str, Any] | None = Field(  # type: ignore[assignment]
        None, description="A JSON schema, or a pydantic model, which stands for its own."
    )
    regex: str | None = Field(None, description="A regular expression.")
    grammar: str | None = Field(None, description="A context-free grammar, in Lark's or in GBNF's notation.")
    choice: list[str] | None = Field(None, min_length=1, description="One of these strings.")

    @field_validator("json", mode="before")
    @classmethod
    def _schema_of_model(cls, value: Any) -> Any:
        return value.model_json_schema() if isinstance(value, type) and issubclass(value, BaseModel) else value

    @model_validator(mode="after")
    def _exactly_one(self) -> GuidedParams:
        given = [name for name in ("json", "regex", "grammar", "choice") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of json, regex, grammar, choice (given: {', '.join(given) or 'none'})")
        return self


class SamplingParams(ValidatedModel):
    """How one request is sampled. Names, meanings and defaults follow vLLM's.

    A sampling field that is left out takes the value of the model's generation configuration where that has one, else
    the neutral value (1.0 or off).
    """

    n: int = Field(1, ge=1, strict=True, description="Number of sequences to return.")
    best_of: int | None = Field(None, ge=1, strict=True, description="Sequences to generate; the best `n` come back.")
    use_beam_search: bool = Field(False, description="Beam search instead of sampling.")
    length_penalty: float = Field(1.0, ge=-100, le=100, description="Beams: exponent of the length in the final score.")
    early_stopping: bool | Literal["never"] = Field(False, description="Beams: when to stop.")
    temperature: float | None = Field(None, ge=0, description="0 is greedy; default 1.0 or the model's.")
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling; default 1.0 or the model's.")
    top_k: int | None = Field(None, ge=-1, strict=True, description="Most likely tokens kept; 0 or -1: all.")
    min_p: float | None = Field(None, ge=0, le=1, description="Least probability relative to the most likely token.")
    repetition_penalty: float | None = Field(None, gt=0, description="Over prompt and output; 1.0 is off.")
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted once for each token of the output.")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="Subtracted for each occurrence in the output.")
    logit_bias: dict[int, float] | None = Field(None, description="Added to the logits of these token ids.")
    allowed_token_ids: list[int] | None = Field(None, description="Only these ids may be generated.")
    bad_words: list[str] | None = Field(None, description="Words that may not be generated.")
    stop: list[str] = Field(default_factory=list, description="A string or list of strings that end generation.")
    stop_token_ids: list[int] = Field(default_factory=list, description="Token ids that end generation.")
    include_stop_str_in_output: bool = Field(False, description="Keep the stop string in the text.")
    ignore_eos: bool = Field(False, description="Go on after the model's end tokens.")
    min_tokens: int = Field(0, ge=0, strict=True, description="No end and no stop before this many tokens.")
    max_tokens: int | None = Field(16, ge=1, strict=True, description="None: up to the context limit.")
    seed: int | None = Field(None, strict=True, description="Same request and seed: same tokens.")
    logprobs: int | None = Field(None, ge=0, strict=True, description="Top log-probabilities per token.")
    prompt_logprobs: int | None = Field(None, ge=0, strict=True, description="Likewise for the prompt's tokens.")
    skip_special_tokens: bool = Field(True, description="Leave special tokens out of the text.")
    logits_processors: list[LogitsProcessor] | None = Field(None, description="Functions over the logits.")
    guided: GuidedParams | None = Field(None, description="Constrain the output.")
    cache_salt: str | None = Field(None, description="Share prefix-cache blocks only under the same salt.")

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_list(cls, value: Any) -> Any:
        if value is None:
            return []
        return [value] if isinstance(value, str) else value

    @field_validator("stop_token_ids", mode="before")
    @classmethod
    def _stop_ids_list(cls, value: Any) -> Any:
        return [] if value is None else value

    @field_validator("stop", "bad_words")
    @classmethod
    def _no_empty_string(cls, value: list[str] | None) -> list[str] | None:
        if value is not None and any(not text for text in value):
            raise ValueError("holds an empty string, which would match everywhere; remove it")
        return value

    @field_validator("allowed_token_ids")
    @classmethod
    def _not_empty(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and not value:
            raise ValueError("is empty, so no token could be generated; list at least one id or leave it out")
        return value

    @field_validator(
        "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
        "length_penalty", mode="before",
    )  # fmt: skip
    @classmethod
    def _finite_number(cls, value: Any) -> Any:
        if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError("must be a finite number")
        return value

    @field_validator("logit_bias")
    @classmethod
    def _finite_bias(cls, value: dict[int, float] | None) -> dict[int, float] | None:
        for token, bias in (value or {}).items():
            if math.isnan(bias) or bias == math.inf:
                raise ValueError(f"token {token} has bias {bias}; use a finite number or -inf")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> SamplingParams:
        if self.temperature == 0 and self.width > 1 and not self.use_beam_search:
            raise ValueError(f"n={self.n}, best_of={self.best_of}: {GREEDY_COPIES}")
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of={self.best_of}: must be at least n={self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens={self.min_tokens}: must not exceed max_tokens={self.max_tokens}")
        if self.use_beam_search:
            self._check_beams()
        if self.guided is not None and self.guided.grammar is None and (self.stop or self.stop_token_ids):
            stop = self.stop or self.stop_token_ids
            raise ValueError(f"stop={stop}: would cut a guided output, which ends by itself; leave stop out")
        return self

    def _check_beams(self) -> None:
        """Beams are deterministic, so what only sampling knows is refused by name."""
        if self.temperature not in (None, 0, 1):
            raise ValueError(
                f"temperature={self.temperature}: beam search does not sample; leave it out, or use 0 or 1"
            )
        for name in ("top_p", "top_k", "min_p", "seed"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}={getattr(self, name)}: beam search does not sample; leave {name} out")

    @property
    def width(self) -> int:
        """Sequences that are generated: `best_of`, or `n` where it is not given."""
        return self.n if self.best_of is None else self.best_of


@dataclass(frozen=True, slots=True)
class Sampling:
    """The sampling fields with the model's defaults filled in. `top_k` 0 is off; `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    seed: int

    @classmethod
    def resolve(cls, params: SamplingParams, defaults: Mapping[str, Any], seed: int) -> Sampling:
        """Fill what `params` leaves out from the model's generation configuration, else with the neutral value.

        Args:
            params: The caller's parameters.
            defaults: The model's generation configuration; `do_sample: False` means temperature 0.
            seed: Used where the caller gives none.
        """

        def pick(name: str, neutral: float) -> float:
            given = getattr(params, name)
            if given is None:
                given = defaults.get(name)
            return neutral if given is None else given

        if params.use_beam_search:
            defaults = {}  # sampling defaults of a model say nothing about beams
        temperature = pick("temperature", 1.0)
        if params.temperature is None and defaults.get("do_sample") is False:
            temperature = 0.0
        return cls(
            temperature=temperature,
            top_p=pick("top_p", 1.0),
            top_k=max(0, int(pick("top_k", 0))),
            min_p=pick("min_p", 0.0),
            repetition_penalty=pick("repetition_penalty", 1.0),
            seed=(seed if params.seed is None else params.seed) & 0xFFFFFFFFFFFFFFFF,
        )
