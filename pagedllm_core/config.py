"""What a user may say about an engine, validated once."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pagedllm_core.errors import InvalidRequestError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_bytes(value: int | str) -> int:
    """Read a size in bytes: an int, or a string such as "2GiB", "512 MB" or "1073741824".

    Raises:
        ValueError: The string is not a number with an optional unit.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ValueError(f'{value!r} is not a size; write bytes as an int, or a string such as "2GiB"')
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS:
        raise ValueError(f'{value!r} is not a size; write bytes as an int, or a string such as "2GiB"')
    return int(float(match[1]) * _UNITS[match[2].upper()])


def describe_validation_error(kind: str, error: ValidationError) -> str:
    """One line per problem of a pydantic error: field, value, and what is allowed."""
    lines = []
    for problem in error.errors(include_url=False, include_context=False):
        name = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        # A rule over several fields names them itself.
        named = not name or message.startswith(f"{name}=")
        lines.append(message if named else f"{name}={problem.get('input')!r:.120}: {message}")
    return f"{kind}: " + "; ".join(lines)


class ValidatedModel(BaseModel):
    """A frozen pydantic model whose validation error is an `InvalidRequestError` that names field and value."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, protected_namespaces=())

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise InvalidRequestError(describe_validation_error(type(self).__name__, error)) from None


class EngineConfig(ValidatedModel):
    """Everything that decides what an engine is. Two equal configurations share one engine in a process."""

    model: str = Field(description='"tiny" (the bundled model), a local folder, or a Hugging Face repository id.')
    tokenizer: str | None = Field(None, description="Folder or repository of the tokenizer; the model's own if None.")
    revision: str | None = Field(None, description="Branch, tag or commit, used for every file of the model.")
    trust_remote_code: bool = Field(False, description="Allow code in the model's folder to run.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and KV cache type; auto is the checkpoint's, float32 for float16 on a CPU."
    )
    device: str = Field("auto", description='"auto" (CUDA, else MPS, else CPU), "cpu", "cuda", "cuda:1", "mps".')
    load_format: Literal["auto", "safetensors", "dummy", "gguf"] = Field(
        "auto", description='"dummy" makes seeded random weights for a configuration.'
    )
    quantization: Literal["int8"] | None = Field(
        None, description='"int8" rounds linear layers at load (W8A8), where native code runs whole steps on a CPU.'
    )
    max_model_len: int | None = Field(None, ge=1, description="Context limit in tokens; the model's own if None.")
    block_size: int = Field(16, ge=1, le=256, description="Tokens in one KV block.")
    kv_cache_memory: int | None = Field(None, description='Bytes of the KV pool, or e.g. "2GiB"; wins over the next.')
    gpu_memory_utilization: float = Field(0.9, gt=0, le=1, description="Share of GPU memory the engine may use.")
    kv_cache_dtype: Literal["auto", "fp8"] = Field(
        "auto", description='Type of the KV cache: "auto": the model\'s; "fp8": 8 bits, on Ada or Hopper GPUs.'
    )
    swap_space: float | None = Field(
        None, ge=0, description="GiB of host memory for preempted requests; by default 4 beside a GPU, else 0."
    )
    max_num_seqs: int = Field(256, ge=1, description="Most sequences in one step.")
    max_num_batched_tokens: int = Field(2048, ge=1, description="Most tokens computed in one step.")
    scheduling_policy: Literal["fcfs", "priority", "fair"] = Field("fcfs", description="Order of the waiting requests.")
    enable_prefix_caching: bool = Field(True, description="Reuse KV blocks of equal prefixes across requests.")
    deterministic: bool = Field(False, description="Refuse a model whose results are not bit-equal whatever else runs.")
    generation_config: str = Field("auto", description='Sampling defaults: "auto" (the model\'s), "none", or a folder.')
    seed: int = Field(0, description="Seeds requests that give none, and dummy weights.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of the forward pass; torch's default if None.")
    enforce_eager: bool = Field(False, description="Never use CUDA graphs.")
    tensor_parallel_size: int = Field(1, ge=1, description="Only 1 for now.")
    max_n: int = Field(64, ge=1, description="Cap of `n` and `best_of`.")
    max_beam_width: int = Field(64, ge=1, description="Cap of the beam width.")
    max_logprobs: int = Field(20, ge=0, description="Cap of `logprobs` and `prompt_logprobs`.")
    max_stop_strings: int = Field(64, ge=0, description="Cap of the number of stop strings.")

    @classmethod
    def of(cls, config: EngineConfig | str | None, fields: dict[str, Any]) -> EngineConfig:
        """A configuration given whole, or by the model's name and further fields, or by fields alone.

        Raises:
            InvalidRequestError: A field cannot be served.
            TypeError: Both a whole configuration and fields are given.
        """
        if isinstance(config, EngineConfig):
            if fields:
                raise TypeError(f"give a config or its fields, not both: {', '.join(fields)}")
            return config
        return cls(**({} if config is None else {"model": config}), **fields)

    @field_validator("kv_cache_memory", mode="before")
    @classmethod
    def _parse_memory(cls, value: int | str | None) -> int | None:
        if value is None:
            return None
        size = parse_bytes(value)
        if size <= 0:
            raise ValueError(f"kv_cache_memory={value!r}: must be positive")
        return size

    @field_validator("dtype", mode="before")
    @classmethod
    def _dtype_name(cls, value: object) -> object:
        """The short names of vLLM, and torch's own types."""
        name = str(value).removeprefix("torch.")
        return {"half": "float16", "float": "float32"}.get(name, name)

    @field_validator("model")
    @classmethod
    def _model_given(cls, value: str) -> str:
        if not value.strip():
            raise ValueError('model=\'\': name a model, for example "tiny", a folder or "Qwen/Qwen2.5-0.5B-Instruct"')
        return value

    @model_validator(mode="after")
    def _features_exist(self) -> EngineConfig:
        missing = {
            "load_format": self.load_format == "gguf",
            "tensor_parallel_size": self.tensor_parallel_size != 1,
        }
        for name, is_missing in missing.items():
            if is_missing:
                raise ValueError(f"{name}={getattr(self, name)!r}: not supported yet; leave {name} at its default")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least max_num_seqs="
                f"{self.max_num_seqs}, so that every running sequence can take a token in each step"
            )
        return self
