"""Captions cut before they are tokenized: the same tokens as without the cut."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_image.embedders import OpenClipImageEmbedder
from nemo_image.embedders.text import tokens as tokens_module
from nemo_image.embedders.text.tokens import CaptionTokenizer
from tests.embedders.open_clip_models import TINY, write_model

open_clip = pytest.importorskip("open_clip")

WORDS = ("photo", "of", "naïve", "São Paulo", "größer", "&amp;lt;", "猫", "—", "1234567", "it's", "<b>", "Ã©tÃ©", "🐈")


@pytest.fixture(scope="module")
def theirs() -> Any:
    return open_clip.get_tokenizer("ViT-B-32")


@pytest.fixture(scope="module")
def ours() -> CaptionTokenizer:
    return CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))


def text_of(kind: str, size: int) -> str:
    """Return about `size` characters, seeded."""
    rng = random.Random(kind)
    if kind == "words":
        return " ".join(rng.choice(WORDS) for _ in range(size // 5))
    if kind == "no spaces":
        return "".join(rng.choice(WORDS) for _ in range(size // 5))
    letters = {
        "one letter": "a",
        "letters": "abcdefghijklmnopqrstuvwxyz",
        "two letters": "ab",
        "base64": "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/",
        "chinese": "".join(map(chr, range(0x4E00, 0x5800))),
        "thai": "".join(map(chr, range(0x0E01, 0x0E2F))),
        "emoji": "😍🐈❤",
        "spaces": " \n\t  x",
        "digits": "0123456789",
    }[kind]
    return "".join(rng.choice(letters) for _ in range(size))


KINDS = ("words", "no spaces", "one letter", "letters", "two letters", "base64", "chinese", "thai", "emoji", "spaces")


@pytest.mark.parametrize("kind", [*KINDS, "digits"])
def test_a_cut_changes_no_token(kind: str, theirs: Any, ours: CaptionTokenizer) -> None:
    text = text_of(kind, 3000)
    assert torch.equal(ours([ours.clean(text)]), theirs([text]))
    if kind != "spaces":
        assert len(ours.cut(ours.clean(text))) < len(ours.clean(text))


@pytest.mark.parametrize("kind", ["letters", "two letters", "base64", "chinese", "no spaces"])
def test_a_cut_within_a_word_leaves_room(
    kind: str, theirs: Any, ours: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens_module, "CHARACTERS_A_TOKEN", 1)
    texts = [text_of(kind, 2000)[start:] for start in range(40)]
    assert torch.equal(ours([ours.clean(text) for text in texts]), theirs(texts))


def test_a_caption_is_cleaned_once(theirs: Any, ours: CaptionTokenizer) -> None:
    text = "<i> &" + "amp;" * 20 + "lt;"
    assert ours.clean(ours.clean(text)) != ours.clean(text)
    assert torch.equal(ours([ours.clean(text)]), theirs([text]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=400), st.sampled_from(WORDS)), max_size=12))
def test_any_text_has_the_same_tokens(parts: list[str]) -> None:
    text = " ".join(parts) + "".join(parts)
    theirs, ours = open_clip.tokenize, _shared()
    assert torch.equal(ours([ours.clean(text)]), theirs([text]))


def _shared() -> CaptionTokenizer:
    return CaptionTokenizer(open_clip.tokenizer._tokenizer)


@pytest.mark.parametrize("kind", ["words", "letters", "chinese"])
def test_the_pair_encoding_never_sees_a_long_caption(
    kind: str, ours: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    original = type(ours._tokenizer).bpe

    def bpe(self: Any, token: str) -> Any:
        seen.append(len(token))
        return original(self, token)

    monkeypatch.setattr(type(ours._tokenizer), "bpe", bpe)
    ours([ours.clean(text_of(kind, 100_000))])
    assert 0 < sum(seen) < 10_000  # bytes; the whole text has 100,000 and more


def test_a_cut_that_is_too_short_is_found(theirs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would find."""
    ours = CaptionTokenizer(open_clip.get_tokenizer("ViT-B-32"))
    monkeypatch.setattr(CaptionTokenizer, "cut", lambda self, text: text[:100])
    text = text_of("words", 3000)
    assert not torch.equal(ours([ours.clean(text)]), theirs([text]))


def test_words_are_not_remembered_for_ever(ours: CaptionTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "REMEMBERED_WORDS", 50)
    wanted = ours([ours.clean("the last one")])
    for start in range(0, 300, 10):
        ours([" ".join(f"w{'x' * number}" for number in range(start, start + 10))])
    assert len(ours._tokenizer.cache) < 100
    assert torch.equal(ours([ours.clean("the last one")]), wanted)


def test_a_tokenizer_of_transformers_from_a_folder(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="transformers makes the tokenizers of SigLIP and others")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([text_of("words", 2000)], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "tokenizer")
    name = write_model(tmp_path / "model", {**TINY, "text_cfg": {**TINY["text_cfg"], "vocab_size": 80}})  # type: ignore[dict-item]
    embedder = OpenClipImageEmbedder(name, tokenizer=str(tmp_path / "tokenizer"))
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path / "tokenizer"), context_length=24)
    ours = embedder.load().tokenizer
    for kind in ("words", "letters", "chinese", "base64"):
        text = text_of(kind, 3000)
        assert torch.equal(ours([ours.clean(text)]), theirs([text])), kind
    assert embedder.embed_text(["größer", text_of("words", 5000)]).shape == (2, 32)
