"""Tokenizer, chat template and dialogue rendering of the model `tiny`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = [END_OF_TEXT, START, END]
MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
VOCABULARY = 2048
_WORDS = 1010  # merges without a leading space; the rest of the vocabulary are their variants with one
_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\s"
_PATTERN_NO_SPACE = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+|\n+|\s"

TOOLS_HEAD = "You can call these functions:\n<tools>"
TOOLS_TAIL = (
    "\n</tools>\nTo call one, answer with:\n<tool_call>\n"
    '{"name": <function name>, "arguments": <arguments as JSON>}\n</tool_call>'
)

CHAT_TEMPLATE = """{%- macro text(content) -%}
{%- if content is string -%}{{- content -}}
{%- elif content is iterable -%}
{%- for part in content -%}{%- if part is string -%}{{- part -}}
{%- elif part.text is defined -%}{{- part.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set first = 0 -%}
{%- if messages and messages[0].role == 'system' -%}{%- set first = 1 -%}{%- endif -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if first -%}{{- text(messages[0].content) + '\\n\\n' -}}{%- endif -%}
{{- HEAD -}}
{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
{{- TAIL + '<|im_end|>\\n' -}}
{%- elif first -%}
{{- '<|im_start|>system\\n' + text(messages[0].content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages[first:] -%}
{%- if message.role == 'tool' -%}
{{- '<|im_start|>user\\n<tool_response>\\n' + text(message.content) + '\\n</tool_response><|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content -%}{{- text(message.content) -}}{%- endif -%}
{%- if message.tool_calls -%}
{%- for item in message.tool_calls -%}
{%- set call = item.function if item.function is defined else item -%}
{%- if message.content or not loop.first -%}{{- '\\n' -}}{%- endif -%}
{{- '<tool_call>\\n{"name": ' -}}{{- call.name | tojson -}}{{- ', "arguments": ' -}}
{%- if call.arguments is string -%}{{- call.arguments -}}{%- else -%}{{- call.arguments | tojson -}}{%- endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
""".replace("HEAD", repr(TOOLS_HEAD)).replace("TAIL", repr(TOOLS_TAIL))

Message = dict[str, Any]


def _byte_level(pattern: str) -> pre_tokenizers.Sequence:
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE in which a word is cut in the same places with and without a leading space.

    The merges are learnt on words without spaces; the most frequent word beginnings then get a variant with the
    space as their last merge. Copying ` Anna` into `"Anna"` is so a matter of the first token alone.
    """
    base = Tokenizer(models.BPE())
    base.pre_tokenizer = _byte_level(_PATTERN_NO_SPACE)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + _WORDS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    base.train_from_iterator(texts, trainer)
    state = json.loads(base.to_str())["model"]
    vocabulary: dict[str, int] = state["vocab"]
    merges = [tuple(pair) for pair in state["merges"]]
    space = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(" ")[0][0]
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    counts: Counter[str] = Counter()
    for text in texts:
        for piece, _ in split.pre_tokenize_str(text):
            if piece[0] == " " and len(piece) > 1:
                counts[base.encode(piece[1:]).tokens[0]] += 1
    room = VOCABULARY - len(SPECIAL) - len(MARKERS) - len(vocabulary)
    for token, _ in counts.most_common(room):
        vocabulary[space + token] = len(vocabulary)
        merges.append((space, token))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = _byte_level(_PATTERN)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The number of a token that the vocabulary holds."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise KeyError(token)
    return number


def dumps(value: Any) -> str:
    """JSON as the chat template writes it."""
    return json.dumps(value, ensure_ascii=False)


def _assistant(message: Message) -> str:
    text = str(message.get("content") or "")
    for item in message.get("tool_calls") or []:
        call = item.get("function", item)
        arguments = call["arguments"] if isinstance(call["arguments"], str) else dumps(call["arguments"])
        text += "\n" if text else ""
        text += f'<tool_call>\n{{"name": {dumps(call["name"])}, "arguments": {arguments}}}\n</tool_call>'
    return text


def segments(messages: list[Message], tools: list[Any] | None = None) -> Iterable[tuple[str, bool]]:
    """The rendered dialogue in pieces, each with whether the assistant writes it; equals the chat template."""
    rest = list(messages)
    system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else None
    if tools:
        listing = "".join("\n" + dumps(tool) for tool in tools)
        system = (f"{system}\n\n" if system is not None else "") + TOOLS_HEAD + listing + TOOLS_TAIL
    if system is not None:
        yield f"{START}system\n{system}{END}\n", False
    for message in rest:
        if message["role"] == "assistant":
            yield f"{START}assistant\n", False
            yield _assistant(message) + END, True
            yield "\n", False
        elif message["role"] == "tool":
            yield f"{START}user\n<tool_response>\n{message['content']}\n</tool_response>{END}\n", False
        else:
            yield f"{START}{message['role']}\n{message['content']}{END}\n", False
