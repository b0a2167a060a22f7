"""The bundled model with the tags of newer Mistral models as its added tokens, and a template as strict as theirs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pagedllm_core

BUNDLED = Path(pagedllm_core.__file__).parent / "bundled" / "tiny"
TAGS = {
    "<tool_call>": "[TOOL_CALLS]",
    "</tool_call>": "[ARGS]",
    "<tool_response>": "[TOOL_RESULTS]",
    "</tool_response>": "[/TOOL_RESULTS]",
    "<think>": "[CALL_ID]",
}

V13 = """{%- if tools %}{{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}
        {%- endfor %}
        {{- '<|im_end|>' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}
    {%- else %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- endif %}
{%- endfor %}"""
_STRICT = """{%- if (call.id or '') | length != 9 %}{{ raise_exception('An id has 9 characters.') }}{% endif %}
            {{- '[TOOL_CALLS]' + call.function.name + '[CALL_ID]' + call.id + '[ARGS]' }}
            {{- call.function.arguments | tojson }}"""
V11 = V13.replace(
    "{{- '[TOOL_CALLS]' + call.function.name + '[ARGS]' + call.function.arguments | tojson }}", _STRICT
).replace("'[TOOL_RESULTS]' + message.content", "'[TOOL_RESULTS]' + message.tool_call_id + message.content")
"""Calls stand there with an id, and one of another length than theirs is refused."""


def mistral_like(folder: Path, template: str = V13) -> Path:
    """The bundled model's files with these tags in them, in a folder of their own."""
    shutil.copytree(BUNDLED, folder, dirs_exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] or token["content"] in TAGS
        token["content"] = TAGS.get(token["content"], token["content"])
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {TAGS.get(text, text): number for text, number in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder
