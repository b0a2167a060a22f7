"""What both LangChain models have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.utils import secret_from_env
from pydantic import Field, SecretStr

from langchain_pagedllm.errors import as_langchain_errors
from pagedllm_core.chat.adapter import Call
from pagedllm_core.chat.fields import AdapterFields
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.params import SamplingParams

# Arguments that LangChain or code written for other providers passes along; they ask for nothing here.
IGNORED_PER_CALL = frozenset({
    "stream", "ls_structured_output_format", "structured_output_format", "user",
    "api_key", "max_retries",
})  # fmt: skip


class PagedModel(AdapterFields):
    """Fields of the LangChain models."""

    streaming: bool = Field(False, description="Stream internally in `invoke` too.")
    max_retries: int = Field(0, description="Accepted for compatibility; nothing here is worth repeating.")
    api_key: SecretStr | None = Field(None, exclude=True, description="Accepted for compatibility; there is no API.")
    hf_token: SecretStr | None = Field(
        default_factory=secret_from_env("HF_TOKEN", default=None), description="Token for gated models."
    )

    @property
    def lc_secrets(self) -> dict[str, str]:
        """Fields that dumps replace by the name of an environment variable."""
        return {"hf_token": "HF_TOKEN"}

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Dumps hold the configuration; the engine stays out."""
        return True

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """What dumps hold; the configuration of an engine that was given, too."""
        return super().to_json() if self.engine is None else self._on_its_own().to_json()  # type: ignore[misc]

    def _hub_token(self) -> str | None:
        return None if self.hf_token is None else self.hf_token.get_secret_value()

    def get_token_ids(self, text: str) -> list[int]:
        """The model's own token ids of a text."""
        with as_langchain_errors():
            return self._token_ids(text)

    def get_num_tokens(self, text: str) -> int:
        """The number of the model's own tokens in a text."""
        return len(self.get_token_ids(text))

    def _call_params(self, stop: list[str] | None, given: Mapping[str, Any]) -> SamplingParams:
        given = self._by_own_names(given)
        return self._sampling(given if stop is None else {**given, "stop": stop})


def check_streamable(call: Call) -> None:
    """Refuse several replies in one stream.

    Raises:
        InvalidRequestError: `n` is more than 1.
    """
    if call.params.n > 1:
        raise InvalidRequestError(
            f"n={call.params.n}: a stream carries one reply; use invoke or generate, or n=1 (and best_of for beams)"
        )
