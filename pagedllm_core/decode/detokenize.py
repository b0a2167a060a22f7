"""Token ids to text, a step at a time: partial characters and possible stop strings are held back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what an incomplete UTF-8 sequence decodes to
CONTEXT_TOKENS = 5  # prompt tokens decoded along, because a tokenizer may treat the very first token differently
LONGEST_CHARACTER = 4  # bytes, so at most this many trailing replacement characters can still become a character

Decode = Callable[[list[int]], str]


class Detokenizer:
    """Decodes one sequence incrementally, so that the pieces add up to the text decoded at once.

        ids      c c c c c | a b c | d e        c: context from the prompt
                         start   read           decode(ids[start:]) minus decode(ids[start:read]) is what is new

    A trailing replacement character may be half of one that the next token completes, so it waits.

    Args:
        decode: Ids to text, with or without special tokens.
        prompt_token_ids: The prompt; only its tail is kept.
        stop: Strings that end generation.
        include_stop: Keep the stop string in the text.

    Attributes:
        text: Everything decoded so far, less what waits for the rest of a character.
        num_tokens: Tokens appended so far.
    """

    def __init__(
        self,
        decode: Decode,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop: bool = False,
    ) -> None:
        self._decode = decode
        self._ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._read = len(self._ids)
        self._window_text = decode(self._ids)  # text of the ids before `_read`
        self._emitted = 0  # characters after `_window_text` that are part of `text` already
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._search_from = 0
        self._delivered = 0
        self.num_tokens = 0
        self.text = ""

    def copy(self) -> Detokenizer:
        """A detokenizer in the same state, for a fork of the sequence."""
        other = copy.copy(self)
        other._ids = self._ids.copy()
        return other

    def append(self, token_ids: Sequence[int], check_stop: bool = True) -> str | None:
        """Add tokens; returns the stop string that the text now ends in (the text is cut there), or None.

        Args:
            token_ids: New tokens, in order.
            check_stop: False while stop strings are still to be ignored (`min_tokens`).
        """
        self._ids.extend(token_ids)
        self.num_tokens += len(token_ids)
        whole = self._decode(self._ids)
        new = whole[len(self._window_text) :]
        open_end = min(len(new) - len(new.rstrip(REPLACEMENT)), LONGEST_CHARACTER)
        stable = new[: len(new) - open_end]
        self._extend(stable)
        if new and len(stable) == len(new):  # tokens without text make no context: some decoders strip a first space
            self._move_window()
        return self._find_stop(check_stop)

    def finish(self) -> None:
        """Generation ended without a stop string: what was held back as incomplete is text now."""
        self._extend(self._decode(self._ids)[len(self._window_text) :])

    def take(self, finished: bool) -> str:
        """Text that was not taken before; holds back what may turn out to begin a stop string."""
        end = len(self.text) if finished else len(self.text) - self._held_back()
        piece = self.text[self._delivered : end]
        self._delivered = max(self._delivered, end)
        return piece

    def _extend(self, stable: str) -> None:
        if len(stable) > self._emitted:
            self.text += stable[self._emitted :]
            self._emitted = len(stable)

    def _move_window(self) -> None:
        """Everything decoded so far is final: keep only the last tokens as context."""
        self._ids = self._ids[min(self._read, len(self._ids) - 1) :]
        self._read = len(self._ids)
        self._window_text = self._decode(self._ids)
        self._emitted = 0

    def _find_stop(self, check_stop: bool) -> str | None:
        if not self._stop:
            return None
        if not check_stop:
            self._search_from = len(self.text)
            return None
        found = [(index, stop) for stop in self._stop if (index := self._first_end(stop)) is not None]
        self._search_from = len(self.text)
        if not found:
            return None
        end, stop = min(found, key=lambda item: (item[0], -len(item[1])))
        self.text = self.text[: end if self._include_stop else end - len(stop)]
        return stop

    def _first_end(self, stop: str) -> int | None:
        """Where the first occurrence that ends in unsearched text ends, or None."""
        index = self.text.find(stop, max(0, self._search_from + 1 - len(stop)))
        return None if index < 0 else index + len(stop)

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self.text)), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
