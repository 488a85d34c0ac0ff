"""Filters of captions: how long they are, of what, and in which language."""

from __future__ import annotations

import functools
import unicodedata
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nemo_image.datasets import ImageTextPairDataset
from nemo_image.errors import MissingDependencyError
from nemo_image.filters.captions import add_caption_columns, caption_column

CAPTION_LENGTH = "caption_length"
"""Characters (Unicode code points) of a caption, without white space at its ends (int32); 0 where there is none."""

CAPTION_WORDS = "caption_words"
"""Words of a caption, separated by white space (int32); 0 where there is none."""

CAPTION_ALPHANUMERIC = "caption_alphanumeric"
"""Share of a caption's characters that are letters, combining marks or digits, of any script (float32), 0 to 1."""

CAPTION_LANGUAGE = "caption_language"
"""ISO 639 code of a caption's language; ``"und"`` where there is no caption, ``"zxx"`` for what is no language."""

CAPTION_LANGUAGE_SCORE = "caption_language_score"
"""The detector's probability of that language (float32), 0 to 1."""

LENGTHS = {CAPTION_LENGTH: "int32", CAPTION_WORDS: "int32", CAPTION_ALPHANUMERIC: "float32"}
LANGUAGES = {CAPTION_LANGUAGE: "string", CAPTION_LANGUAGE_SCORE: "float32"}

READ_CHARACTERS = 2000
"""Of a longer caption, the language of so many first characters is told."""


class CaptionStats:
    """Adds the length of each caption, in characters and words, and its share of letters and digits.

    Adds ``caption_length``, ``caption_words`` (int32) and ``caption_alphanumeric`` (float32); a row without a caption
    counts as one with an empty caption: 0, 0 and 0. Words are what white space separates, so that a sentence in a
    script without spaces is one word.

    Parameters
    ----------
    caption_column : str, optional
        The column of captions; of a list of captions, the first counts. By default ``caption`` where there is such a
        column, else what the tars hold: each sample's ``.txt``, or the field ``caption`` of its JSON.
    """

    def __init__(self, caption_column: str | None = None) -> None:
        self.caption_column = caption_column

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return the dataset with the columns added, lazily.

        Raises
        ------
        MissingColumnError, ArgumentError
            If `caption_column` is not there, or holds no text.
        """
        column = caption_column(dataset, self.caption_column)
        return add_caption_columns(dataset, column, caption_lengths, LENGTHS, {"operator": "CaptionStats"})

    def __repr__(self) -> str:
        return f"CaptionStats(caption_column={self.caption_column!r})"


class CaptionLanguage:
    """Adds the language of each caption, as py3langid tells it.

    Adds ``caption_language`` (an ISO 639 code such as ``"en"``; ``"und"`` where there is no caption, ``"zxx"`` for
    what is no language) and ``caption_language_score`` (float32: the detector's probability). Short captions are hard
    to tell: ask for a score, as in ``caption_language == 'en' and caption_language_score > 0.5``.

    Parameters
    ----------
    caption_column : str, optional
        As for :class:`CaptionStats`.
    """

    def __init__(self, caption_column: str | None = None) -> None:
        self.caption_column = caption_column

    def __call__(self, dataset: ImageTextPairDataset) -> ImageTextPairDataset:
        """Return the dataset with the columns added, lazily.

        Raises
        ------
        MissingColumnError, ArgumentError
            If `caption_column` is not there, or holds no text.
        MissingDependencyError
            If py3langid is not installed.
        """
        column = caption_column(dataset, self.caption_column)
        made_by = {"operator": "CaptionLanguage", "model": f"py3langid {require_detector()}"}
        return add_caption_columns(dataset, column, caption_language, LANGUAGES, made_by)

    def __repr__(self) -> str:
        return f"CaptionLanguage(caption_column={self.caption_column!r})"


def caption_lengths(caption: str) -> tuple[int, int, float]:
    """Return a caption's characters, words, and share of letters and digits."""
    text = caption.strip()
    good = sum(map(_is_alphanumeric, text)) if not text.isalnum() else len(text)
    return len(text), len(text.split()), good / len(text) if text else 0.0


@functools.lru_cache(maxsize=2**16)
def _is_alphanumeric(character: str) -> bool:
    # Vowel signs and other marks belong to the letters of most scripts of India, and to decomposed accents.
    return character.isalnum() or unicodedata.category(character).startswith("M")


def caption_language(caption: str) -> tuple[str, float]:
    """Return the code of a caption's language, and its probability."""
    text = caption.strip()
    if not text:
        return "und", 0.0
    code, score = _detector().classify(text[:READ_CHARACTERS])
    return str(code), float(score)


def require_detector() -> str:
    """Return the version of the language detector.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    try:
        return version("py3langid")
    except PackageNotFoundError as error:
        raise MissingDependencyError(
            "the language of captions needs the package py3langid: pip install 'nemo-image[language]', or just 'pip "
            "install py3langid'"
        ) from error


@functools.cache
def _detector() -> Any:
    """Return the detector, loaded once a process; its model comes with the package."""
    require_detector()
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
