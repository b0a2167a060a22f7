"""The fields that every framework's model class has, and the way from them to an engine and to sampling parameters."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from pagedllm_core.chat.adapter import EngineSource, sampling_params, shared_engine
from pagedllm_core.config import EngineConfig
from pagedllm_core.errors import InvalidRequestError, check_unicode
from pagedllm_core.params import SamplingParams

if TYPE_CHECKING:
    from pagedllm_core.async_engine import AsyncEngine

ENGINE_FIELDS = (
    "revision", "trust_remote_code", "dtype", "device", "max_model_len", "max_num_seqs", "kv_cache_memory",
    "enable_prefix_caching",
)  # fmt: skip
SAMPLING_FIELDS = tuple(name for name in SamplingParams.model_fields if name != "logprobs")


class AdapterFields(BaseModel):
    """What a framework's model class takes. A sampling field left at None takes the model's own default.

    A subclass names it before its framework's base class.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())

    aliases: ClassVar[Mapping[str, str]] = {
        "model_name": "model",
        "stop_sequences": "stop",
        "max_new_tokens": "max_tokens",
        "max_completion_tokens": "max_tokens",
    }
    """Other names that code written for other providers uses."""

    model: str = Field("tiny", description='"tiny" (the bundled model), a local folder, or a Hugging Face repository.')

    temperature: float | None = Field(None, strict=True, description="0 is greedy.")
    top_p: float | None = Field(None, strict=True, description="Nucleus sampling.")
    top_k: int | None = Field(None, strict=True, description="Most likely tokens kept; 0 or -1: all.")
    min_p: float | None = Field(None, strict=True, description="Least probability relative to the most likely token.")
    max_tokens: int | None = Field(
        None, strict=True, description="Most tokens to generate; None: up to the context limit."
    )
    min_tokens: int | None = Field(None, strict=True, description="No end and no stop before this many tokens.")
    stop: list[str] | str | None = Field(None, description="Strings that end generation.")
    stop_token_ids: list[int] | None = Field(None, description="Token ids that end generation.")
    ignore_eos: bool | None = Field(None, description="Go on after the model's end tokens.")
    seed: int | None = Field(None, strict=True, description="Same request and seed: same tokens.")
    n: int = Field(1, strict=True, description="Replies per call.")
    best_of: int | None = Field(None, strict=True, description="Replies to generate; the best `n` come back.")
    use_beam_search: bool | None = Field(None, description="Beam search instead of sampling.")
    length_penalty: float | None = Field(None, strict=True, description="Beams: exponent of the length in the score.")
    repetition_penalty: float | None = Field(None, strict=True, description="Over prompt and output; 1.0 is off.")
    presence_penalty: float | None = Field(
        None, strict=True, description="Subtracted once for each token of the output."
    )
    frequency_penalty: float | None = Field(
        None, strict=True, description="Subtracted for each occurrence in the output."
    )
    logit_bias: dict[int, float] | None = Field(None, description="Added to the logits of these token ids.")
    guided: dict[str, Any] | None = Field(None, description="What replies are held to: the fields of `GuidedParams`.")
    logprobs: bool | None = Field(None, description="Return log-probabilities of the generated tokens.")
    top_logprobs: int | None = Field(None, strict=True, description="Return those of this many alternatives as well.")

    chat_template: str | None = Field(None, description="A Jinja template, or a file of one, in place of the model's.")
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict, description="Further template variables.")
    reasoning: bool | None = Field(None, description="Ask the template for reasoning, or for none; None: its default.")
    tool_parser: str | None = Field(
        None, description='Format of tool calls: "hermes", "llama3_json", "mistral", "mistral_v11", "granite", "json".'
    )
    reasoning_parser: str | None = Field(None, description='Format of reasoning: "think", "magistral".')
    parallel_tool_calls: bool | None = Field(
        None, description="Several calls in one reply; None: unless one is forced."
    )
    timeout: float | None = Field(None, strict=True, description="Seconds until a call fails and its memory is freed.")

    engine: Any = Field(None, exclude=True, repr=False, description="An `AsyncEngine` to use instead of a shared one.")
    revision: str | None = Field(None, description="Branch, tag or commit of the model.")
    trust_remote_code: bool | None = Field(None, description="Allow code in the model's folder to run.")
    dtype: str | None = Field(None, description='Weights\' type: "auto", "float32", "bfloat16", "float16".')
    device: str | None = Field(None, description='"auto", "cpu", "cuda", "cuda:1", "mps".')
    max_model_len: int | None = Field(None, strict=True, description="Context limit in tokens.")
    max_num_seqs: int | None = Field(None, strict=True, description="Most sequences in one step.")
    kv_cache_memory: int | str | None = Field(None, description='Bytes of the KV pool, or e.g. "2GiB".')
    enable_prefix_caching: bool | None = Field(None, description="Reuse equal prefixes across calls.")
    keep_alive: float | None = Field(
        None,
        gt=0,
        strict=True,
        description="Seconds that the engine stays loaded without work; None: until it is closed.",
    )
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="Further fields of `EngineConfig`.")
    _told: set[str] = PrivateAttr(default_factory=set)  # unknown arguments that the caller was warned of

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        values = cls._by_own_names(values)
        config = getattr(values.get("engine"), "config", None)
        if isinstance(config, EngineConfig) and values.get("model") is None:
            values["model"] = config.model
        known = set(cls.model_fields) | {field.alias for field in cls.model_fields.values()}
        if unknown := sorted(set(values) - known - {"class_name"}):
            further = [name for name in unknown if name in EngineConfig.model_fields]
            hint = f"; give {', '.join(further)} in engine_kwargs" if further else ""
            warnings.warn(f"{cls.__name__}: unknown field {', '.join(unknown)} is ignored{hint}", stacklevel=2)
        return values

    @classmethod
    def _by_own_names(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        return {cls.aliases.get(name, name): value for name, value in given.items()}

    @field_validator("engine")
    @classmethod
    def _is_engine(cls, engine: Any) -> Any:
        if engine is not None and not isinstance(getattr(engine, "config", None), EngineConfig):
            raise InvalidRequestError(f"engine={engine!r:.80}: must be an AsyncEngine, as get_engine(...) returns")
        return engine

    def engine_config(self, model: str | None = None) -> EngineConfig:
        """The configuration of the engine that serves this model (or `model` instead of it).

        Raises:
            InvalidRequestError: A field cannot be served.
        """
        fields = {name: value for name in ENGINE_FIELDS if (value := getattr(self, name)) is not None}
        fields = {**self.engine_kwargs, **fields}
        if model not in (None, self.model):  # these say which files of the own model
            fields = {name: value for name, value in fields.items() if name not in ("revision", "tokenizer")}
        return EngineConfig(**{**fields, "model": model or self.model})

    def _source(self, model: str | None = None) -> EngineSource:
        if self.engine is not None and model in (None, self.model):
            return EngineSource(self.engine.config, self.engine)
        return shared_engine(self.engine_config(model), self._hub_token(), self.keep_alive)

    def _source_of(self, given: Mapping[str, Any]) -> EngineSource:
        """The source of what one call gives: of its `model`, or the own one."""
        return self._source(self._by_own_names(given).get("model"))

    def _has_template(self, engine: AsyncEngine) -> bool:
        """Whether conversations can be put into a prompt; a given template is read for it."""
        from pagedllm_core.chat.template import ChatTemplate

        own = getattr(engine.tokenizer, "chat_template", None)
        return (
            bool(own)
            if self.chat_template is None
            else bool(ChatTemplate(engine.tokenizer, self.chat_template).source())
        )

    def _context_limit(self) -> int | None:
        """The context in tokens that was asked for, or that the given engine has; None: the model's own."""
        if self.engine is not None:
            return int(self.engine.max_model_len)
        return self.max_model_len or self.engine_kwargs.get("max_model_len")

    def _token_ids(self, text: str) -> list[int]:
        check_unicode("text", text)
        ids: list[int] = self._source().get().tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def close(self) -> None:
        """Free the engine, if it is loaded; who else uses it gets `EngineClosedError`, and later calls load anew."""
        engine = self._source().current()
        if engine is not None:
            engine.close()

    async def aclose(self) -> None:
        """`close` without blocking the event loop."""
        engine = self._source().current()
        if engine is not None:
            await engine.aclose()

    def __enter__(self) -> Self:
        """Return the model."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the engine."""
        self.close()

    async def __aenter__(self) -> Self:
        """Return the model."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Close the engine."""
        await self.aclose()

    def _hub_token(self) -> str | None:
        return None

    def _sampling(self, given: Mapping[str, Any]) -> SamplingParams:
        """The fields' values, and over them what one call gives."""
        fields = {name: getattr(self, name) for name in SAMPLING_FIELDS if hasattr(self, name)}
        fields.update({name: given[name] for name in SAMPLING_FIELDS if name in given})
        wanted = {name: given.get(name, getattr(self, name)) for name in ("logprobs", "top_logprobs")}
        if type(wanted["logprobs"]) is int:  # as in SamplingParams
            wanted["top_logprobs"] = wanted["top_logprobs"] or wanted["logprobs"]
        if wanted["logprobs"] or wanted["top_logprobs"] or type(wanted["logprobs"]) is int:
            fields["logprobs"] = wanted["top_logprobs"] or 0
        return sampling_params(fields)

    def _template_kwargs(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Variables of the template: the fields', and over them what one call gives."""
        reasoning = given.get("reasoning", self.reasoning)
        switch = {} if reasoning is None else {"enable_thinking": bool(reasoning), "thinking": bool(reasoning)}
        return {**switch, **self.chat_template_kwargs, **(given.get("chat_template_kwargs") or {})}

    def _warn_unknown_arguments(self, given: Mapping[str, Any], further: Collection[str]) -> None:
        known = {*SAMPLING_FIELDS, *further, "model", "timeout", "share_key", "logprobs", "top_logprobs"}
        if unknown := sorted(set(self._by_own_names(given)) - known - self._told):
            self._told.update(unknown)
            warnings.warn(f"{type(self).__name__}: unknown argument {', '.join(unknown)} is ignored", stacklevel=4)

    def _identity(self) -> dict[str, Any]:
        """Every field that has a bearing on the output."""
        own = (
            "model",
            "logprobs",
            "top_logprobs",
            "chat_template",
            "chat_template_kwargs",
            "engine_kwargs",
            "reasoning",
            "tool_parser",
            "reasoning_parser",
            "parallel_tool_calls",
        )
        names = (*own, *ENGINE_FIELDS, *SAMPLING_FIELDS)
        found = {name: value for name in names if (value := getattr(self, name, None)) is not None}
        return found if self.engine is None else {**found, "engine": self.engine.config.model_dump_json()}

    @model_serializer(mode="wrap")
    def _with_engine(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Dumps carry the configuration of an injected engine, as pickles do."""
        return dict(dump(self._on_its_own()))

    def _on_its_own(self) -> Self:
        """A copy that names what it needs of an injected engine, in place of the engine."""
        if self.engine is None:
            return self
        config = self.engine.config.model_dump()
        update = {**dict.fromkeys(ENGINE_FIELDS), "engine": None, "model": config.pop("model")}
        return self.model_copy(update={**update, "engine_kwargs": config})

    def __getstate__(self) -> dict[Any, Any]:
        """Pickles carry the configuration, of an injected engine too."""
        # Of a copy: a framework's base class may take things out of the very dictionary it is asked for.
        state: dict[Any, Any] = super(AdapterFields, self._on_its_own().model_copy()).__getstate__()
        return state
