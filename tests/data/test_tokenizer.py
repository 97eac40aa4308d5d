"""The tokenizer trained on the data's own text: cached by what it saw, lossless, numbers as digits."""

from pathlib import Path

import pytest
from helpers import ColourSource

from vlm_lab.data.tokenizer import load_tokenizer, trained_tokenizer


def test_nothing_is_out_of_vocabulary(cache: Path) -> None:
    tokenizer = trained_tokenizer([ColourSource()], "chatml", 400, cache)
    text = "What colour? 1234 - ça, 日本, <|im_start|>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.tokenize("2048") == list("2048")
    assert len(tokenizer) <= 400
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id) == "<|im_end|>"


def test_the_cache_follows_the_text_and_the_recipe(tmp_path: Path) -> None:
    make = lambda size, template="chatml", vocab=400: trained_tokenizer([ColourSource(size)], template, vocab, tmp_path)  # noqa: E731
    first = make(24)
    folders = lambda: {path.name for path in (tmp_path / "tokenizers").iterdir() if path.is_dir()}  # noqa: E731
    assert len(folders()) == 1
    assert make(24).get_vocab() == first.get_vocab()
    assert len(folders()) == 1
    make(12), make(24, "llama3"), make(24, vocab=300)
    assert len(folders()) == 4


def test_only_fast_tokenizers(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="no-such-tokenizer"):
        load_tokenizer(str(tmp_path / "no-such-tokenizer"))
