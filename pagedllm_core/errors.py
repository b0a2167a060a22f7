"""Every error PagedLLM raises on purpose.

Each message names the field, the value it had, and what to do about it. All derive from `PagedLLMError`; where Python
has a built-in error of the same meaning, ours derives from that too, so that `except ValueError` keeps working.
"""

NO_TOKEN = (
    "no token could be chosen: the logits hold NaN or infinity, or allowed_token_ids, bad_words, min_tokens, "
    "logit_bias and logits_processors together exclude every token"
)

_MEMORY_IS_SHORT = ("out of memory", "can't allocate memory", "not enough memory", "cublas_status_alloc_failed")


class PagedLLMError(Exception):
    """Root of every error PagedLLM raises on purpose."""


class InvalidRequestError(PagedLLMError, ValueError):
    """A prompt, a sampling parameter or a configuration field has a value that cannot be served."""


class ContextLengthError(InvalidRequestError):
    """The prompt is longer than the model's context, or leaves too little of it.

    Args:
        prompt_length: Number of tokens in the prompt; of one many times too long, in its beginning.
        limit: The engine's `max_model_len` in tokens.
        needed: The fewest tokens that an output takes which `guided` allows; 0 without it.
    """

    def __init__(self, prompt_length: int, limit: int, needed: int = 0) -> None:
        self.prompt_length = prompt_length
        self.limit = limit
        self.needed = needed
        output = f" and at least {needed} of output, as guided asks for them," if needed else ""
        super().__init__(
            f"prompt: {prompt_length} tokens{output} exceed the context limit of {limit} tokens (max_model_len); "
            "shorten the prompt or choose a model with a longer context"
        )

    def __reduce__(self) -> tuple[type["ContextLengthError"], tuple[int, int, int]]:
        """Pickle by the counts, so that the error crosses process boundaries."""
        return type(self), (self.prompt_length, self.limit, self.needed)


class CapacityError(PagedLLMError):
    """The request can never fit the KV block pool, however long it waits."""


class ModelLoadError(PagedLLMError):
    """The model's files are missing, unreadable or in a format that is not loaded."""


class UnsupportedModelError(ModelLoadError):
    """The model's architecture cannot be served exactly, so it is refused rather than served wrongly."""


class RequestTimeoutError(PagedLLMError, TimeoutError):
    """The request did not finish within its `timeout`; its blocks have been freed."""


class RequestFailedError(PagedLLMError):
    """The request failed while it ran; other requests are not affected."""


class EngineClosedError(PagedLLMError):
    """The engine was closed, before or while the request ran."""


def check_unicode(field: str, text: str) -> None:
    """Refuse a text that no tokenizer can read.

    Raises:
        InvalidRequestError: It holds half of a character (a lone surrogate).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(f"{field}: is not valid Unicode ({error}); remove lone surrogates") from None


def is_out_of_memory(error: BaseException | None) -> bool:
    """True where an error says that memory is short; what lies under torch says so in a RuntimeError's text."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MEMORY_IS_SHORT)


def as_failure(request_id: str, error: Exception) -> PagedLLMError:
    """What the owner of a failed request gets: the error itself if it is typed, else one that names it.

    Tracebacks are dropped: their frames hold logits and activations, which whoever keeps the error must not keep.
    """
    if error.__cause__ is not None:
        error.__cause__ = error.__cause__.with_traceback(None)
    error = error.with_traceback(None)
    if isinstance(error, PagedLLMError):
        return error
    advice = "; lower max_num_batched_tokens, max_num_seqs or kv_cache_memory" if is_out_of_memory(error) else ""
    failure = RequestFailedError(f"request {request_id!r} failed: {type(error).__name__}: {error}{advice}")
    failure.__cause__ = error
    return failure
