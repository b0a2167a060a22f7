"""A model's profile, as LangChain's middleware reads it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pagedllm_core.chat.profile import local_profile

if TYPE_CHECKING:
    from langchain_core.language_models.model_profile import ModelProfile


def model_profile(
    model: str, revision: str | None, max_model_len: int | None, max_tokens: int | None
) -> ModelProfile | None:
    """What is known of a model from the files on this machine; None where there are none."""
    found = local_profile(model, revision)
    if found is None:
        return None
    limit = max_model_len or found.max_model_len
    return {
        "max_input_tokens": limit,
        "max_output_tokens": min(limit, max_tokens or limit),
        "text_inputs": True,
        "text_outputs": True,
        "image_inputs": False,
        "audio_inputs": False,
        "video_inputs": False,
        "tool_calling": found.has_template,
        "tool_choice": found.has_template,
        "tool_call_streaming": found.has_template,
        "structured_output": found.has_template,
        "reasoning_output": found.reasons,
        "temperature": True,
    }
