"""The blocking facade: vLLM's offline API over one engine."""

from __future__ import annotations

import logging
import queue
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pagedllm_core.async_engine import AsyncEngine
from pagedllm_core.errors import InvalidRequestError
from pagedllm_core.intake import Prompt, checked_params
from pagedllm_core.metrics import EngineStats
from pagedllm_core.outputs import RequestOutput
from pagedllm_core.params import SamplingParams

if TYPE_CHECKING:
    from pagedllm_core.request import Request

logger = logging.getLogger(__name__)
Message = Mapping[str, Any]


class LLM:
    """A model to call from a script or a notebook. Every prompt of a call is in one batch.

    Args:
        model: "tiny" (the bundled model), a local folder, or a Hugging Face repository id.
        **fields: Other fields of `EngineConfig`.
    """

    def __init__(self, model: str, **fields: Any) -> None:
        self.engine = AsyncEngine(model=model, **fields)

    def generate(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete prompts; results come in input order. Under the policy "fair", each call has a share of its own.

        Args:
            prompts: One prompt (text, token ids, or a dictionary of either) or a list of them.
            sampling_params: One for all, or a list as long as the prompts.
            use_tqdm: Show progress.

        Raises:
            InvalidRequestError: A prompt or parameter cannot be served; none of the prompts was started.
        """
        batch = _as_batch(prompts)
        params = _as_list(sampling_params, len(batch))
        options = {"share_key": uuid.uuid4().hex, "stream": False}
        requests = [self.engine.prepare(prompt, one, **options) for prompt, one in zip(batch, params, strict=True)]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        tools: list[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template.

        Args:
            messages: One conversation (a list of `{"role": ..., "content": ...}`) or a list of them.
            sampling_params: One for all, or a list as long as the conversations.
            tools: JSON schemas of functions the model may call.
            chat_template: A Jinja template, or a file that holds one, in place of the model's.
            chat_template_kwargs: Further variables for the template.
            add_generation_prompt: End with the start of an assistant's turn.
            continue_final_message: Go on with the last message, which must be the assistant's.
            use_tqdm: Show progress.

        Raises:
            InvalidRequestError: The model has no chat template (give `chat_template=`), or it does not take these
                messages.
        """
        from pagedllm_core.chat.template import ChatTemplate

        template = ChatTemplate(self.engine.tokenizer, chat_template)
        conversations: list[Any] = [messages] if not messages or isinstance(messages[0], Mapping) else list(messages)
        prompts: list[Prompt] = []
        if tools and not template.shows_tools(tools):
            logger.warning("tools: the chat template does not show them, so the model does not see them")
        for conversation in conversations:
            text = template.render(
                conversation,
                tools=tools,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **(chat_template_kwargs or {}),
            )
            prompts.append({"prompt": text, "prompt_token_ids": template.encode(text, self.engine.max_model_len)})
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Yield what is new as it is generated, `finished=True` on the last. Closing it frees the blocks."""
        yield from self.engine.submit(prompt, sampling_params)

    def beam_search(
        self,
        prompts: Prompt | list[Prompt],
        sampling_params: SamplingParams | list[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """`generate` with `use_beam_search=True`: the best `n` sequences of each prompt, best first."""

        def searching(params: SamplingParams | None) -> SamplingParams:
            given = checked_params(params).model_dump(exclude_unset=True)
            return SamplingParams(**{**given, "use_beam_search": True})

        given = sampling_params
        params = [searching(one) for one in given] if isinstance(given, list) else searching(given)
        return self.generate(prompts, params, use_tqdm=use_tqdm)

    def stats(self) -> EngineStats:
        """Counters of the engine and its KV pool."""
        return self.engine.stats()

    def get_tokenizer(self) -> Any:
        """The model's transformers tokenizer."""
        return self.engine.tokenizer

    def close(self) -> None:
        """Free the model's memory. May be called twice."""
        self.engine.close()

    def __enter__(self) -> LLM:
        """Return the model."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the model."""
        self.close()

    def _run(self, requests: list[Request], use_tqdm: bool) -> list[RequestOutput]:
        done: queue.SimpleQueue[int] = queue.SimpleQueue()
        handles = [self.engine.enqueue(request) for request in requests]
        for number, handle in enumerate(handles):
            handle.add_done_callback(lambda number=number: done.put(number))  # type: ignore[misc]
        results: dict[int, RequestOutput] = {}
        try:
            with _progress(len(handles), use_tqdm) as bar:
                started, tokens = time.monotonic(), 0
                for _ in handles:
                    number = done.get()
                    results[number] = handles[number].result()
                    tokens += results[number].metrics.output_tokens
                    bar.set_postfix_str(f"{tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s", refresh=False)
                    bar.update()
        finally:
            for handle in handles:  # an error or Ctrl-C ends the whole call
                if not handle.finished:
                    handle.cancel()
        return [results[number] for number in range(len(handles))]


def _progress(total: int, use_tqdm: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, desc="Generating", unit="request", disable=not use_tqdm, dynamic_ncols=True)


def _as_batch(prompts: Prompt | list[Prompt]) -> list[Prompt]:
    """One prompt becomes a list of one; a list of ints is one tokenized prompt."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, list):
        raise InvalidRequestError(f"prompts={prompts!r:.80}: must be a prompt or a list of prompts")
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    return prompts  # type: ignore[return-value]


def _as_list(params: SamplingParams | list[SamplingParams] | None, count: int) -> list[SamplingParams | None]:
    if not isinstance(params, list):
        return [params] * count
    if len(params) != count:
        raise InvalidRequestError(f"sampling_params: {len(params)} given for {count} prompts; give one, or one each")
    return list(params)
