"""The incremental detokenizer against decoding everything at once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pagedllm_core.decode.detokenize import Detokenizer

TEXTS = [
    "plain words, and more",
    "naïve café — “quotes”",
    "日本語のテキスト、混ぜる",
    "🙂🙃👩‍👩‍👧 family",
    "a\n\nb\t c",
    "\ufffd odd \ufffd",
]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Every byte is a token: every character of more than one byte is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def pieces(
    tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), include: bool = False
) -> tuple[list[str], str]:
    """Stream ids one by one; the pieces handed out, and the final text."""
    detokenizer = Detokenizer(tokenizer.decode, [5, 6, 7], stop, include)
    out = []
    stopped = False
    for token in ids:
        if detokenizer.append([token]) is not None:
            stopped = True
            break
        out.append(detokenizer.take(finished=False))
    if not stopped:
        detokenizer.finish()
    out.append(detokenizer.take(finished=True))
    return out, detokenizer.text


@pytest.mark.parametrize("text", TEXTS)
def test_stream_equals_text(byte_tokenizer: Tokenizer, text: str) -> None:
    out, final = pieces(byte_tokenizer, byte_tokenizer.encode(text).ids)
    assert "".join(out) == final == text
    assert not any("\ufffd" in piece for piece in out if "\ufffd" not in text)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 255), max_size=60))
def test_random_bytes_equal_decoding_at_once(ids: list[int]) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    out, final = pieces(tokenizer, ids)
    assert "".join(out) == final == tokenizer.decode(ids)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stop", ["STOP", "é!", "🙂", "\n\n"])
def test_stop_split_at_every_offset(byte_tokenizer: Tokenizer, stop: str, include: bool) -> None:
    for offset in range(20):
        text = "x" * offset + "S" + stop + " and what follows"
        out, final = pieces(byte_tokenizer, byte_tokenizer.encode(text).ids, (stop, "never"), include)
        wanted = "x" * offset + "S" + (stop if include else "")
        assert "".join(out) == final == wanted


def test_possible_stop_strings_are_held_back(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer.decode, [1], ("END",))
    seen = ""
    for token in byte_tokenizer.encode("an ENtrance").ids:
        assert detokenizer.append([token]) is None
        seen += detokenizer.take(finished=False)
        assert not seen.endswith(("E", "EN"))
    assert seen == "an ENtrance"


def test_the_earliest_of_several_stops_wins(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer.decode, [1], ("three", "two"))
    assert detokenizer.append(byte_tokenizer.encode("one two three").ids) == "two"
    assert detokenizer.text == "one "


def test_stop_strings_count_only_after_the_minimum(byte_tokenizer: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_tokenizer.decode, [1], ("ab",))
    assert detokenizer.append(byte_tokenizer.encode("ab a").ids, check_stop=False) is None
    assert detokenizer.append(byte_tokenizer.encode("b rest").ids) == "ab"
    assert detokenizer.text == "ab "


def test_ids_without_a_token_decode_to_nothing(byte_tokenizer: Tokenizer) -> None:
    ids = byte_tokenizer.encode("abc").ids
    out, final = pieces(byte_tokenizer, [ids[0], 99_999, *ids[1:], 99_999])
    assert "".join(out) == final == "abc"


def test_a_space_after_a_skipped_token_is_kept() -> None:
    """SentencePiece-like decoders strip the first space of what they decode."""
    words = ["<s>", "\u2581Hello", "\u2581world", "<0xC3>", "<0xA9>", "<x>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<x>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "<x>"])
    ids = [1, 5, 2, 3, 4, 5, 5, 1, 2]
    detokenizer = Detokenizer(tokenizer.decode, [1, 2])
    out = ""
    for token in ids:
        detokenizer.append([token])
        out += detokenizer.take(finished=False)
    detokenizer.finish()
    assert out + detokenizer.take(finished=True) == detokenizer.text == " Hello world\u00e9 Hello world"


def test_many_tokens_at_once_equal_one_by_one(byte_tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    ids = byte_tokenizer.encode("".join(TEXTS) * 3).ids
    detokenizer = Detokenizer(byte_tokenizer.decode, [1])
    while ids:
        count = generator.randint(1, 7)
        detokenizer.append(ids[:count])
        ids = ids[count:]
    detokenizer.finish()
    assert detokenizer.text == "".join(TEXTS) * 3
