"""PagedLLM's errors, as LangChain's own classes as well: middleware and fallbacks look for those."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.exceptions import (
    ContextOverflowError,
    ModelAPIError,
    ModelError,
    ModelInvalidRequestError,
    ModelNotFoundError,
    ModelTimeoutError,
)

from pagedllm_core.errors import (
    CapacityError,
    ContextLengthError,
    EngineClosedError,
    InvalidRequestError,
    ModelLoadError,
    PagedLLMError,
    RequestFailedError,
    RequestTimeoutError,
    UnsupportedModelError,
)

# The first that fits counts.
_THEIRS: list[tuple[type[PagedLLMError], type[ModelError]]] = [
    (ContextLengthError, ContextOverflowError),
    (RequestTimeoutError, ModelTimeoutError),
    (UnsupportedModelError, ModelInvalidRequestError),
    (ModelLoadError, ModelNotFoundError),
    (CapacityError, ModelInvalidRequestError),
    (InvalidRequestError, ModelInvalidRequestError),
    (RequestFailedError, ModelAPIError),
    (EngineClosedError, ModelAPIError),
]


@contextmanager
def as_langchain_errors() -> Iterator[None]:
    """Raise PagedLLM's errors as what LangChain calls them; they stay instances of their own classes."""
    try:
        yield
    except ModelError:
        raise
    except PagedLLMError as error:
        theirs = next((their for own, their in _THEIRS if isinstance(error, own)), None)
        if theirs is None:
            raise
        converted = _rebuild(type(error), theirs, error.args, error.__dict__)
        raise converted.with_traceback(error.__traceback__) from error


_BOTH: dict[tuple[type[PagedLLMError], type[ModelError]], type[PagedLLMError]] = {}


def _both(own: type[PagedLLMError], theirs: type[ModelError]) -> type[PagedLLMError]:
    if (own, theirs) not in _BOTH:
        _BOTH[own, theirs] = type(own.__name__, (own, theirs), {"__doc__": own.__doc__, "__reduce__": _reduce})
    return _BOTH[own, theirs]


def _reduce(error: PagedLLMError) -> tuple[Any, ...]:
    own, theirs = type(error).__bases__
    return _rebuild, (own, theirs, error.args, error.__dict__)


def _rebuild(
    own: type[PagedLLMError], theirs: type[ModelError], arguments: tuple[Any, ...], state: dict[str, Any]
) -> PagedLLMError:
    both = _both(own, theirs)
    error = both.__new__(both)
    error.args = arguments
    error.__dict__.update(state)
    return error
