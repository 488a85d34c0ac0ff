"""Captions to tokens, as open_clip's own tokenizers make them, but at a cost that does not grow with the caption.

A tokenizer looks at the whole caption and then keeps the first tokens. open_clip's byte pair encoding takes time
quadratic in the length of a word, and remembers every word that it has seen.
"""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

CHARACTERS_A_TOKEN = 8
"""Characters of a caption for each token of the context that are tried first; English has about four."""

SPARE_TOKENS = 32
"""Tokens behind the context that a caption must still have where it was cut within a word."""

REMEMBERED_WORDS = 100_000
"""Words whose tokens are kept; open_clip's tokenizer alone would keep all, for as long as the process lives."""

_CHECKED = ("a photo of a cat", "Ein Bär, 3 Äpfel & 10 €!", "一只猫 кот 🐈", "naïve café — x" * 40)


class CaptionTokenizer:
    """Makes the tokens that open_clip's tokenizer makes. Threads can share one.

    Parameters
    ----------
    tokenizer : callable
        What ``open_clip.get_tokenizer`` returns.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._clean: Callable[[str], str] = tokenizer.clean_fn
        self._tokenizer = copy.copy(tokenizer)
        self._tokenizer.clean_fn = _as_it_is  # cleaning twice may change a text again
        self._encode: Callable[[str], list[int]] | None = getattr(tokenizer, "encode", None)
        if self._encode is not None:
            self._tokenizer.cache = dict(tokenizer.cache)
            self._encode = self._tokenizer.encode
            self._first_words = dict(tokenizer.cache)
        self._lock = threading.Lock()
        self.context_length = int(tokenizer.context_length)

    def clean(self, text: str) -> str:
        """Return a caption as it is tokenized; empty where it has nothing to say."""
        return self._clean(text)

    def __call__(self, cleaned: Sequence[str]) -> Any:
        """Return the tokens of cleaned captions, int64 [n, context length]."""
        with self._lock:
            self._forget()
            return self._tokenizer([self.cut(text) for text in cleaned])

    def cut(self, cleaned: str) -> str:
        """Return the beginning of a cleaned caption that has the same first tokens as the whole."""
        if getattr(self._tokenizer, "reduction_fn", None) is not None:
            return cleaned  # it picks its tokens from all over the text
        size = CHARACTERS_A_TOKEN * self.context_length
        while size < len(cleaned):
            head = cleaned[:size]
            words, space, _ = head.rpartition(" ")
            # Tokens never reach over a space, so a cut there changes none. A word without end needs some more.
            if len(words) >= size // 2 and space:
                head, enough = words, self.context_length
            else:
                enough = self.context_length + SPARE_TOKENS
            if self._count(head) >= enough:
                return head
            size *= 2
        return cleaned

    def _count(self, text: str) -> int:
        if self._encode is not None:
            return len(self._encode(text))
        return len(self._tokenizer.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _forget(self) -> None:
        if self._encode is not None and len(self._tokenizer.cache) > REMEMBERED_WORDS:
            self._tokenizer.cache = dict(self._first_words)

    def identity(self) -> str:
        """Return a hash of the tokens of a few texts: equal where the tokenizers are."""
        tokens = self([self.clean(text) for text in _CHECKED])
        return hashlib.sha256(repr((self.context_length, tokens.tolist())).encode()).hexdigest()


def _as_it_is(text: str) -> str:
    return text
