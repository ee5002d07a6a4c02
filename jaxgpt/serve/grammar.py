"""What an answer may be, as a mask over tokens for each step (by llguidance).

Axes of this file: W words of 32 bits.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import llguidance
import llguidance.numpy
import numpy as np

from jaxgpt.data.tokenizer import Tokenizer
from jaxgpt.serve.fields import Refused

FORM = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MOST_FORCED = 16_384  # bytes that a grammar may leave no choice about at its beginning
SLOWEST = 1.0  # seconds of work for one mask, after which an answer is given up: all others wait
LAST = 128  # tokens of an answer's room in which JSON is closed, and at most a quarter of the room


class Grammars:
    """Makes grammars for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, stop_ids: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._stop_ids = sorted(stop_ids) or [tokenizer.eos_id]

    def of_schema(self, schema: Mapping[str, Any], param: str) -> str:
        """The grammar of JSON that a schema describes.

        Raises:
            Refused: no schema that can be obeyed wholly.
        """
        try:
            grammar = llguidance.LLMatcher.grammar_from_json_schema({**schema, "x-guidance": FORM})
        except ValueError as error:
            raise Refused(f"{param}: {error}", param) from None
        self.matcher(grammar, param)
        return grammar

    def matcher(self, grammar: str, param: str) -> "Callable[[int], Matcher]":
        """Follows answers through a grammar, each from its beginning; made for the tokens that
        one has room for.

        Raises:
            Refused: the grammar cannot be read.
        """
        matcher = llguidance.LLMatcher(self.engine, grammar, log_level=0)
        if matcher.is_error():
            message = " ".join(matcher.get_error().split())
            raise Refused(f"{param}: {message[:300]}", param)
        if len(matcher.deep_copy().compute_ff_bytes()) > MOST_FORCED:
            raise Refused(f"{param}: no text satisfies it: it contains itself without end", param)
        return lambda most: Matcher(matcher.deep_copy(), most, self.closing)

    @cached_property
    def engine(self) -> llguidance.LLTokenizer:
        """The vocabulary as llguidance knows it."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "tokenizer.json"
            self._tokenizer.save(path)
            return llguidance.LLTokenizer(path.read_text(), self._vocab_size, self._stop_ids)

    @cached_property
    def closing(self) -> list[np.ndarray]:
        """Bits of the tokens that end an answer: stop tokens, else quotes, else brackets.

        In this order, since a string may hold brackets. Where a quote opens one, the next ends it.
        """
        stops = np.isin(np.arange(self._vocab_size), self._stop_ids)
        texts = [self._tokenizer.decode_bytes([token]) for token in range(self._vocab_size)]
        quotes = np.array([text == b'"' for text in texts])
        brackets = np.array([bool(text) and not text.strip(b"}]") for text in texts])
        return [_packed(stops), _packed(quotes), _packed(brackets)]


class Matcher:
    """Follows one answer through its grammar. Where room runs out, JSON is brought to an end."""

    def __init__(
        self, matcher: llguidance.LLMatcher, most: int, closing: Sequence[np.ndarray]
    ) -> None:
        self._matcher, self._left, self._closing = matcher, most, closing
        self._last = min(LAST, most // 4)

    def fill(self, allowed_W: np.ndarray) -> None:
        """See engine.Grammar."""
        began = time.thread_time()
        llguidance.numpy.fill_next_token_bitmask(self._matcher, allowed_W[None])
        if time.thread_time() - began > SLOWEST:
            raise RuntimeError("the grammar of an answer took too long")
        if self._left <= self._last:
            for closing_W in self._closing:
                if (allowed_W & closing_W).any():
                    allowed_W &= closing_W
                    return

    def take(self, token: int) -> bool:
        """See engine.Grammar."""
        self._left -= 1
        return not self._matcher.consume_token(token) or self._matcher.is_stopped()


def calls(
    grammars: Grammars, functions: Sequence[Mapping[str, Any]], style: Any, several: bool
) -> str:
    """The grammar of one or more calls in the template's form."""
    rules, names = [], []
    quoted = lambda text: json.dumps(text, ensure_ascii=False)
    for place, function in enumerate(functions):
        schema = json.dumps({**function["parameters"], "x-guidance": FORM})
        grammars.of_schema(function["parameters"], f"tools[{place}].function.parameters")
        rules.append(
            f"call_{place}: {quoted(function['name'] + style.middle)} arguments_{place}\n"
            f"arguments_{place}: %json {schema}"
        )
        names.append(f"call_{place}")
    more = f" ({quoted(style.between)} call)*" if several else ""
    begin, end = quoted(style.begin), quoted(style.end)
    start = f"start: {begin} call{more} {end}\ncall: {' | '.join(names)}"
    return llguidance.LLMatcher.grammar_from_lark("\n".join([start, *rules]))


def _packed(chosen_V: np.ndarray) -> np.ndarray:
    filled = np.concatenate([chosen_V, np.zeros(-len(chosen_V) % 32, bool)])
    return np.packbits(filled, bitorder="little").view(np.int32)
