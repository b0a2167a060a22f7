"""Guided decoding: the output is held to a JSON schema, a regular expression, a grammar or a choice.

llguidance says which tokens may come next. That alone does not make an output valid: `max_tokens` may cut it. So each
sequence carries a *closing*, tokens that would complete its output from where it is, and a token is taken only if a
closing that fits the budget after it is known:

    prompt | { "name" : " A n n | a " , "age" : 3 }
           output so far ^      ^ candidate and its closing, which llguidance is asked to confirm

The first token of the old closing is always such a token, so there is a way on at every step, and the length of the
closing of the empty output decides at submission whether the request can be served at all.
"""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_CLOSING = 4096  # tokens; a search for a closing gives up beyond
MAX_DETOUR = 64  # places where a search in the middle of an output may choose: all requests of a step wait for it
MAX_LOOK = 64  # bytes of a text that has to come, by which its first token is found
MAX_FAILURES = 2  # searches without a result, after which a sequence's other candidates are not searched in a step
# What a closing tries first where several things may come: the ends of what is open, then the shortest values.
_ENDS = """}],"01ntf[{ :@.aA-/TZ+\n\t"""
_CHARACTERS = _ENDS + "".join(chr(code) for code in range(32, 127) if chr(code) not in _ENDS)
_QUOTE = _CHARACTERS.index('"')
_FOLLOWING = tuple(character.encode() for character in ["", *string.ascii_letters, *string.digits, " ", "\n", "é"])


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer as llguidance sees it.

    Attributes:
        tokenizer: llguidance's.
        end_tokens: The ids that may end an output.
        characters: The tokens of `_CHARACTERS`, each as ids.
        single: The first of each.
        literals: The texts and single tokens that a grammar names: one of them may be the only end of a text.
    """

    tokenizer: LLTokenizer
    end_tokens: tuple[int, ...]
    characters: tuple[list[int], ...]
    single: npt.NDArray[np.int64]
    literals: tuple[list[int], ...] = ()
    _fragments: dict[bytes, tuple[int, ...]] = field(default_factory=dict, init=False)  # goes with its grammar

    @classmethod
    def of(cls, tokenizer: LLTokenizer, end_tokens: tuple[int, ...]) -> Vocabulary:
        """The vocabulary of a tokenizer with these end tokens, of which there is at least one."""
        characters = tuple(map(tokenizer.tokenize_str, _CHARACTERS))
        return cls(tokenizer, end_tokens, characters, np.array([ids[0] for ids in characters]))

    def ids_of(self, text: str) -> list[int]:
        """A text's tokens, none of them a special one, even where it looks like one."""
        ids = self.tokenizer.tokenize_str(text)
        if any(map(self.tokenizer.is_special_token, ids)):
            ids = [one for character in text for one in self.tokenizer.tokenize_str(character)]
        return ids

    def fragments(self, text: bytes) -> tuple[int, ...]:
        """Tokens that write a part of a text which has to come, but with which the tokenizer would not begin it.

        After `"due":` a string has to begin with ` "`, which may be part of a longer token, so llguidance forces none.
        A model that would rather write a number takes the token of the space alone, and is then in the middle of a
        token, where it has never been.

        Args:
            text: What has to come; what follows it is open.
        """
        text = text[:MAX_LOOK]
        if len(text) < 2 or text[-1:].isalnum():  # a word that goes on may be written with other tokens
            return ()
        if text not in self._fragments:
            begins = {self.tokenizer.tokenize_bytes(text + one)[0] for one in _FOLLOWING}
            longest = max(len(self.tokenizer.decode_bytes([token])) for token in begins)
            parts = (self.tokenizer.tokenize_bytes(text[:end]) for end in range(1, min(longest, len(text) + 1)))
            self._fragments[text] = tuple(ids[0] for ids in parts if len(ids) == 1 and ids[0] not in begins)
        return self._fragments[text]

    def completes(self, matcher: LLMatcher, tokens: list[int]) -> bool:
        """Whether `tokens` lead from the matcher's state to a complete output."""
        if not tokens:
            return bool(matcher.is_accepting())
        return bool(matcher.validate_tokens([*tokens, self.end_tokens[0]]) == len(tokens) + 1)

    def closing(self, matcher: LLMatcher, hint: Sequence[int] = (), limit: int = MAX_CLOSING) -> list[int] | None:
        """Tokens that complete the output, or None where none were found.

        Args:
            matcher: Where the output is; left as it is.
            hint: Tokens that completed it before; the search ends as soon as these do again.
            limit: Most places where the search has to choose.
        """
        # The same choice in the same place mostly gives the shorter output, but may go round in circles.
        found = self._close(matcher.deep_copy(), list(hint), limit // 4, varied=False)
        if found is None or limit == MAX_CLOSING:
            other = self._close(matcher.deep_copy(), list(hint), limit)
            found = min((one for one in (found, other) if one is not None), key=len, default=None)
        if found is None:
            return None
        shorter = self._as_written(found)
        return shorter if len(shorter) < len(found) and self.completes(matcher, shorter) else found

    def _as_written(self, tokens: list[int]) -> list[int]:
        """The same text in the tokens that the tokenizer would write it with; single tokens stay."""
        written: list[int] = []
        for single, run in itertools.groupby(tokens, self.tokenizer.is_special_token):
            ids = list(run)
            written += ids if single else self.tokenizer.tokenize_bytes(self.tokenizer.decode_bytes(ids))
        return written

    def _close(self, matcher: LLMatcher, known: list[int], limit: int, varied: bool = True) -> list[int] | None:
        """Drive a matcher to a complete output: what is forced, else the best end that may come."""
        path: list[int] = []
        visits: Counter[tuple[int, ...]] = Counter()
        while len(path) < MAX_CLOSING and visits.total() < limit and not matcher.is_error():
            if matcher.is_accepting():
                return path
            for begin in range(min(len(known), 3)):
                if self.completes(matcher, known[begin:]):
                    return path + known[begin:]
            tokens = matcher.compute_ff_tokens()
            # What the tokenizer makes a special token of, in a text that is meant as such, is written by characters.
            if not tokens or matcher.validate_tokens(tokens) < len(tokens):
                tokens = self._end(matcher, visits, bool(tokens), varied)
            if not tokens or not matcher.consume_tokens(tokens):
                return None
            path += tokens
        return None

    def _end(self, matcher: LLMatcher, visits: Counter[tuple[int, ...]], asking: bool, varied: bool) -> list[int]:
        """The text to try next: the best end that may come; `varied`, another one each time they come again."""
        may_come = self._may_come(matcher, asking)
        visits[may_come] += 1
        if not may_come:
            allowed = np.flatnonzero(_bits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)))
            return [int(allowed[-1])] if len(allowed) else []
        if self._is_text(may_come):
            for ids in (self.characters[_QUOTE], *self.literals):
                if matcher.validate_tokens(ids) < len(ids):
                    continue
                after = matcher.deep_copy()
                if after.consume_tokens(ids) and (after.is_accepting() or not self._is_text(self._may_come(after))):
                    return ids
        turn = visits[may_come] - 1 if varied else 0
        if varied:
            first, named = 0, list(self.literals)  # what has to come somewhere in a text may come now
            if not self._is_text(may_come):  # what no character of ours begins has to be tried, too
                first, named = 1, [ids for ids in named if self.tokenizer.decode_str(ids)[:1] not in _CHARACTERS]
            named = [ids for ids in named if matcher.validate_tokens(ids) == len(ids)]
            if first <= turn < first + len(named):
                return named[turn - first]
        return self.characters[may_come[turn % len(may_come)]]

    def _may_come(self, matcher: LLMatcher, asking: bool = False) -> tuple[int, ...]:
        """The numbers of the characters that may come next; one mask tells of all that are single tokens.

        Where a text is forced the mask holds the tokens that the tokenizer would write it with and no others, so that
        llguidance is to be asked for each (`asking`).
        """
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        bits = mask[self.single // 8] >> (self.single % 8) & 1
        return tuple(
            number
            for number, (bit, ids) in enumerate(zip(bits.tolist(), self.characters, strict=True))
            if (bit if len(ids) == 1 and not asking else matcher.validate_tokens(ids) == len(ids))
        )

    def _is_text(self, may_come: tuple[int, ...]) -> bool:
        """Within a text nearly everything may come."""
        return len(may_come) > len(self.characters) // 2


def _bit(token: int) -> np.int32:
    """The bit of a token in its word of a mask."""
    return np.int32(1 << token % 32 if token % 32 < 31 else -(1 << 31))


def _bits(mask: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    return np.unpackbits(mask, axis=-1, bitorder="little")


@dataclass
class Guide:
    """What one sequence may generate next, and how its output would be completed.

    Attributes:
        vocabulary: The tokenizer.
        matcher: The grammar after the tokens so far; None once it ran into its limits, and only the closing is left.
        closing: Tokens that complete the output.
        may_end: Whether an end token may be generated where the output is complete.
        forced: Tokens that come next, whatever the logits say.
        shortened: Whether a wanted token was refused because the budget left no room to complete the output after it.
    """

    vocabulary: Vocabulary
    matcher: LLMatcher | None
    closing: list[int]
    may_end: bool = True
    forced: list[int] = field(default_factory=list)
    shortened: bool = False
    _known: dict[int, list[int] | None] = field(default_factory=dict)  # closings after tokens that were looked at
    _failures: int = 0

    def copy(self) -> Guide:
        """The same state for a fork."""
        matcher = None if self.matcher is None else self.matcher.deep_copy()
        return Guide(self.vocabulary, matcher, self.closing, self.may_end, self.forced, self.shortened)

    @property
    def accepting(self) -> bool:
        """True where the output is complete as it is, though it may go on."""
        return not self.closing if self.matcher is None else bool(self.matcher.is_accepting())

    @property
    def finished(self) -> bool:
        """True where the output is complete and nothing but an end can follow."""
        return not self.closing if self.matcher is None else self.accepting and bool(self.matcher.is_stopped())

    @property
    def way_on(self) -> int:
        """A token that can be taken in any case: the closing's first, or an end."""
        return self.closing[0] if self.closing else self.vocabulary.end_tokens[0]

    def only(self) -> int | None:
        """The token that has to come next, where there is no choice."""
        if self.forced:
            return self.forced[0]
        return self.way_on if self.matcher is None or self.finished else None

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        """Set the bits of the tokens that may come, and no others; int32 [vocabulary / 32, rounded up]."""
        token = self.only()
        if token is None and self.matcher is not None:
            self.matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if self.matcher.is_error():
                self.matcher = None  # out of its limits: the closing is followed from now on
                token = self.way_on
            else:
                ends = () if self.may_end else self.vocabulary.end_tokens
                for unwanted in (*ends, *self.vocabulary.fragments(bytes(self.matcher.compute_ff_bytes()))):
                    words[unwanted // 32] &= ~_bit(unwanted)
        if token is not None:
            words.fill(0)
            words[token // 32] = _bit(token)

    def fits(self, token: int, room: int) -> bool:
        """Whether the output can still be completed with `room` tokens after `token`.

        Args:
            token: One that the grammar allows here.
            room: Tokens of the budget that are left once it is taken.
        """
        closing = self._after(token)
        return closing is not None and len(closing) <= room

    def refuse(self, token: int, room: int) -> None:
        """Note that a token which was wanted is not taken, as it does not `fit`."""
        closing = self._after(token)
        self.shortened = self.shortened or (closing is not None and len(closing) > room)

    def _after(self, token: int) -> list[int] | None:
        if token in self._known:
            return self._known[token]
        found = self._known[token] = self._closing_after(token)
        return found

    def _closing_after(self, token: int) -> list[int] | None:
        if token in self.vocabulary.end_tokens:
            return [] if self.may_end and self.accepting and self.matcher is not None else None
        if self.closing and token == self.closing[0]:
            return self.closing[1:]
        if self.matcher is None:
            return None
        # What closed before usually closes now, less its beginning where the token has brought that about.
        for begin in range(min(len(self.closing), 6) + 1):
            rest = self.closing[begin:]
            if self.vocabulary.completes(self.matcher, [token, *rest]):
                return rest
        after = self.matcher.deep_copy()
        if self._failures >= MAX_FAILURES or not after.consume_token(token):
            return None
        found = self.vocabulary.closing(after, self.closing, MAX_DETOUR)
        self._failures += found is None
        return found

    def advance(self, token: int) -> None:
        """Take a token that `fits` or that is `way_on`."""
        closing = self._after(token)
        self._known, self._failures = {}, 0
        self.forced = self.forced[1:] if self.forced and self.forced[0] == token else []
        self.closing = closing or []
        if self.matcher is None or token in self.vocabulary.end_tokens:
            return
        if closing is None or not self.matcher.consume_token(token) or self.matcher.is_error():
            self.matcher = None
        elif not self.forced and not self.finished:
            self.forced = self._forced()

    def _forced(self) -> list[int]:
        """The stretch of text that is forced from here, in the tokens that the tokenizer would write it with."""
        if self.matcher is None or not (tokens := list(self.matcher.compute_ff_tokens())):
            return []
        closing = self.closing
        if closing[: len(tokens)] == tokens:
            return tokens
        # The closing may write the same text in other tokens; it is renewed for the way that is taken.
        after = self.matcher.deep_copy()
        if not after.consume_tokens(tokens):
            return []
        rest = self.vocabulary.closing(after, closing, MAX_DETOUR)
        if rest is None or len(rest) + len(tokens) > len(closing):
            return []
        self.closing = tokens + rest
        return tokens


def mask_logits(logits: torch.Tensor, guides: Sequence[Guide | None]) -> torch.Tensor:
    """The logits with -inf where the grammars do not allow a token. In one pass: a vocabulary may have 150,000.

    Args:
        logits: float32 [rows, vocabulary]; left as they are.
        guides: One per row; None leaves the row as it is.

    Returns:
        float32 [rows, vocabulary]; a row may have nothing left where other rules forbid what the grammar allows.
    """
    width = logits.shape[1]
    words = np.full((len(guides), (width + 31) // 32), -1, dtype=np.int32)
    for row, guide in enumerate(guides):
        if guide is not None:
            guide.fill(words[row])
    allowed = _bits(words.view(np.uint8))[:, :width]
    return torch.where(torch.from_numpy(allowed).view(torch.bool).to(logits.device), logits, -torch.inf)


def force(row: torch.Tensor, token: int) -> None:
    """Leave one token of a row, in place, with its score where it has one."""
    score = row[token].item()
    row.fill_(-torch.inf)
    row[token] = score if score > -torch.inf else 0.0
