"""The door: from what a caller said to a `Request`, or a typed error before anything is allocated.

Runs on the caller's thread or on the engine's intake thread, never on the thread that steps; it reads the model's
constants only.
"""

from __future__ import annotations

import functools
import itertools
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import numpy as np

from pagedllm_core.config import EngineConfig
from pagedllm_core.decode.beam import BeamRule, BeamState
from pagedllm_core.decode.detokenize import Decode
from pagedllm_core.decode.grammar import Grammar, GrammarCompiler
from pagedllm_core.decode.processors import LogitsRules, takes_prompt
from pagedllm_core.errors import CapacityError, ContextLengthError, InvalidRequestError, check_unicode
from pagedllm_core.kv.hashing import root_hash
from pagedllm_core.model.interface import Runner
from pagedllm_core.params import GREEDY_COPIES, Sampling, SamplingParams
from pagedllm_core.request import Request, Sequence

_CHARACTERS_OF_A_TOKEN = 4  # about
_LONGEST_TIMEOUT = 1e9  # seconds

Prompt: TypeAlias = str | list[int] | Mapping[str, Any]


class Intake:
    """Makes requests for one engine.

    Args:
        config: The engine's configuration (caps, seed).
        runner: The loaded model.
        clock: The engine's clock, in seconds.
    """

    def __init__(self, config: EngineConfig, runner: Runner, clock: Callable[[], float]) -> None:
        self._config = config
        self._runner = runner
        self._clock = clock
        self._numbers = itertools.count()
        self.grammars = GrammarCompiler(runner.tokenizer, runner.vocab_size, tuple(runner.eos_token_ids))
        if runner.tokenizer is not None:
            runner.tokenizer("")  # the first call settles its truncation, which must not happen on two threads at once

    def prepare(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        share_key: str | None = None,
        timeout: float | None = None,
        stream: bool = True,
    ) -> Request:
        """Tokenize, fill in defaults and validate.

        Args:
            prompt: Text, token ids, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            params: Sampling parameters; vLLM's defaults if None.
            request_id: A random one if None.
            priority: Lower is more urgent, under the policy "priority".
            share_key: Whose share it counts against, under the policy "fair"; all without one share one.
            timeout: Seconds until the request fails with `RequestTimeoutError`.
            stream: Deliver what is new after each step, rather than everything at the end.

        Raises:
            InvalidRequestError: A field cannot be served; the message names it.
            ContextLengthError: The prompt, with the smallest output that `guided` allows, exceeds the context limit.
            CapacityError: The prompt can never fit the KV pool.
        """
        arrival_time = self._clock()
        params = checked_params(params)
        text, token_ids = self._tokens(prompt)
        self._check_params(params)
        self._check_prompt(token_ids, params)
        number = next(self._numbers)
        sampling = Sampling.resolve(params, self._runner.generation_defaults, _default_seed(self._config.seed, number))
        if sampling.temperature == 0 and params.width > 1 and not params.use_beam_search:
            raise InvalidRequestError(f"n={params.n}, best_of={params.best_of}: {GREEDY_COPIES}")
        limit = self._limit(len(token_ids), params)
        rules = self._rules(params, sampling)
        private = None if self._config.enable_prefix_caching else f"request {number}"
        return Request(
            request_id=checked_id(request_id),
            prompt=text,
            prompt_token_ids=token_ids,
            params=params,
            sampling=sampling,
            rules=rules,
            decode=self._decoder(params.skip_special_tokens),
            decode_token=self._decoder(skip_special_tokens=False),
            root_hash=self._root_hash(params.cache_salt, private),
            max_tokens=limit,
            arrival_time=arrival_time,
            deadline=None if timeout is None else arrival_time + _checked_timeout(timeout),
            priority=_checked_priority(priority),
            share_key=_checked_share_key(share_key),
            stream=stream and params.best_of is None and not params.use_beam_search,
            beams=_beam_state(params, len(set(rules.end_token_ids)), limit) if params.use_beam_search else None,
            grammar=self._grammar(params, len(token_ids), limit),
            prompt_logprobs=None if params.prompt_logprobs is None else [],
        )

    def _grammar(self, params: SamplingParams, prompt_tokens: int, limit: int) -> Grammar | None:
        """The compiled grammar, if its smallest output fits the budget."""
        if params.guided is None:
            return None
        grammar = self.grammars.compile(params.guided)
        needed = len(grammar.closing)
        if prompt_tokens + needed > self._runner.max_model_len:
            raise ContextLengthError(prompt_tokens, self._runner.max_model_len, needed)
        if needed > limit:
            raise InvalidRequestError(
                f"guided: the smallest output that satisfies it takes {needed} tokens, but max_tokens and "
                f"the KV pool leave {limit}; raise max_tokens, or shorten the prompt or the schema"
            )
        return grammar

    def _limit(self, prompt_tokens: int, params: SamplingParams) -> int:
        """The most tokens that each sequence may generate."""
        room = self._runner.max_model_len - prompt_tokens
        limit = max(1, room if params.max_tokens is None else min(params.max_tokens, room))
        return limit if params.guided is None else min(limit, self._pool_room(prompt_tokens, params.width))

    def _pool_room(self, prompt_tokens: int, width: int) -> int:
        """Tokens that each sequence can generate with the pool to itself; a guided output may not be cut there."""
        size = self._config.block_size
        blocks = self._runner.num_blocks - prompt_tokens // size
        return max(1, blocks // width * size - prompt_tokens % size)

    def _root_hash(self, salt: str | None, private: str | None) -> bytes:
        check_unicode("cache_salt", salt or "")
        return root_hash(self._runner.model_name, salt, private)

    def _tokens(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, Mapping):
            if prompt.get("multi_modal_data"):
                raise InvalidRequestError("prompt['multi_modal_data']: the model reads text only; leave it out")
            if "prompt_token_ids" in prompt:
                text = prompt.get("prompt")
                return text if isinstance(text, str) else None, _checked_ids(prompt["prompt_token_ids"])
            if not isinstance(prompt.get("prompt"), str):
                raise InvalidRequestError(
                    f"prompt={str(prompt)!r:.80}: a dictionary needs 'prompt' (text) or 'prompt_token_ids' (ids)"
                )
            prompt = prompt["prompt"]
        if isinstance(prompt, str):
            return prompt, self._encode(prompt)
        return None, _checked_ids(prompt)

    def _encode(self, text: str) -> list[int]:
        tokenizer = self._runner.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                "prompt: the model has no tokenizer, so text cannot be read; give prompt_token_ids, or set tokenizer="
            )
        check_unicode("prompt", text)
        refuse_endless(text, tokenizer, self._runner.max_model_len)
        ids: list[int] = tokenizer(text)["input_ids"]
        return ids

    def _check_prompt(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise InvalidRequestError("prompt: is empty; give at least one token")
        self._check_ids("prompt_token_ids", token_ids)
        if len(token_ids) > self._runner.max_model_len:
            raise ContextLengthError(len(token_ids), self._runner.max_model_len)
        size, total = self._config.block_size, self._runner.num_blocks
        needed = -(-len(token_ids) // size)
        if params.width > 1 and params.max_tokens != 1:
            needed = len(token_ids) // size + params.width
        if needed > total:
            raise CapacityError(
                f"prompt: {len(token_ids)} tokens with n={params.width} need {needed} KV blocks of {size} tokens, but "
                f"the pool has {total}; raise kv_cache_memory, or shorten the prompt or lower n"
            )

    def _check_params(self, params: SamplingParams) -> None:
        config = self._config
        cap_name, cap = ("max_beam_width", config.max_beam_width) if params.use_beam_search else ("max_n", config.max_n)
        _check_cap("n", params.n, cap_name, cap)
        _check_cap("best_of", params.best_of or 1, cap_name, cap)
        _check_cap("n" if params.best_of is None else "best_of", params.width, "max_num_seqs", config.max_num_seqs)
        _check_cap("logprobs", params.logprobs or 0, "max_logprobs", config.max_logprobs)
        _check_cap("prompt_logprobs", params.prompt_logprobs or 0, "max_logprobs", config.max_logprobs)
        _check_cap("stop: number of strings", len(params.stop), "max_stop_strings", config.max_stop_strings)
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        if self._runner.tokenizer is None:
            for name in ("stop", "bad_words"):
                if getattr(params, name):
                    raise InvalidRequestError(f"{name}: the model has no tokenizer; set tokenizer= or leave it out")

    def _check_ids(self, field: str, token_ids: Iterable[int]) -> None:
        """Every id field goes through here; the limit is the logits' width, not the tokenizer's length."""
        try:
            ids = np.fromiter(token_ids, dtype=np.int64)
        except OverflowError:
            raise InvalidRequestError(f"{field}: an id does not fit 64 bits, so it is in no vocabulary") from None
        wrong = ids[(ids < 0) | (ids >= self._runner.vocab_size)]
        if len(wrong):
            raise InvalidRequestError(
                f"{field}: token id {wrong[0]} is outside 0 .. {self._runner.vocab_size - 1}, the model's vocabulary"
            )

    def _rules(self, params: SamplingParams, sampling: Sampling) -> LogitsRules:
        words: list[tuple[int, ...]] = []
        for word in params.bad_words or ():
            check_unicode("bad_words", word)
            # A word may begin a text or follow a space, and its tokens differ between the two.
            for form in (word.lstrip(), " " + word.lstrip()):
                ids = tuple(self._runner.tokenizer(form, add_special_tokens=False)["input_ids"])
                if ids and ids not in words:
                    words.append(ids)
        eos = () if params.ignore_eos else tuple(self._runner.eos_token_ids)
        with_prompt = tuple(takes_prompt(processor) for processor in params.logits_processors or ())
        return LogitsRules(params, sampling.repetition_penalty, eos, tuple(words), with_prompt)

    def _decoder(self, skip_special_tokens: bool) -> Decode | None:
        tokenizer = self._runner.tokenizer
        if tokenizer is None:
            return None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            return functools.partial(backend.decode, skip_special_tokens=skip_special_tokens)
        return functools.partial(
            tokenizer.decode, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )


def refuse_endless(text: str, tokenizer: Any, limit: int) -> None:
    """Refuse, by its beginning, a text of many times the context; to tokenize all of it would keep others waiting.

    Raises:
        ContextLengthError: Its beginning has more than twice `limit` tokens.
    """
    size, found = _CHARACTERS_OF_A_TOKEN * limit, 0
    for begin in range(0, len(text) if len(text) > 4 * size else 0, size):
        found += len(tokenizer(text[begin : begin + size], add_special_tokens=False)["input_ids"])
        if found > 2 * limit:
            raise ContextLengthError(found, limit)


def checked_params(params: SamplingParams | None) -> SamplingParams:
    """The given parameters, or vLLM's defaults for None.

    Raises:
        InvalidRequestError: They are something else.
    """
    if params is None:
        return SamplingParams()
    if not isinstance(params, SamplingParams):
        raise InvalidRequestError(f"sampling_params={params!r:.80}: must be a SamplingParams")
    return params


def _checked_ids(value: Any) -> list[int]:
    if not isinstance(value, list) or any(type(token) is not int for token in value):
        raise InvalidRequestError(
            f"prompt={value!r:.80}: must be a str, a list of int token ids, {{'prompt': str}} or "
            "{'prompt_token_ids': list of int}"
        )
    return list(value)


def checked_id(request_id: str | None) -> str:
    """A request's id; a new one where None was given.

    Raises:
        InvalidRequestError: It is no text.
    """
    if request_id is None:
        return uuid.uuid4().hex
    if not isinstance(request_id, str) or not request_id:
        raise InvalidRequestError(f"request_id={request_id!r}: must be a non-empty str")
    return request_id


def _checked_priority(priority: int) -> int:
    if type(priority) is not int:
        raise InvalidRequestError(f"priority={priority!r}: must be an int; lower is more urgent")
    return priority


def _checked_share_key(share_key: str | None) -> str | None:
    if share_key is not None and not isinstance(share_key, str):
        raise InvalidRequestError(f"share_key={share_key!r:.80}: must be a str or None")
    return share_key


def _checked_timeout(timeout: float) -> float:
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= _LONGEST_TIMEOUT:
        raise InvalidRequestError(
            f"timeout={timeout!r:.80}: must be a positive number of seconds, or None for no limit"
        )
    return float(timeout)


def _check_cap(field: str, value: int, cap_name: str, cap: int) -> None:
    if value > cap:
        raise InvalidRequestError(f"{field}={value}: exceeds {cap_name}={cap} of the engine's configuration")


def _beam_state(params: SamplingParams, num_end_tokens: int, max_tokens: int) -> BeamState[Sequence]:
    return BeamState(BeamRule(params.width, params.length_penalty, params.early_stopping, num_end_tokens, max_tokens))


def _default_seed(engine_seed: int, number: int) -> int:
    """A request that gives no seed gets one from the engine's seed and its number, so that a run can be repeated."""
    return (engine_seed * 0x9E3779B97F4A7C15 + (number + 1) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
