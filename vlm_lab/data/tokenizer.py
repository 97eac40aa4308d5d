"""Tokenizers: a pretrained one from the hub or a folder, or a small one trained on the data's own text and cached.

The small one is a byte-level BPE (nothing is ever out of vocabulary) that splits numbers into digits. Its cache key is
the text's fingerprint, so two runs on the same data share it.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_lab.data.sample import BadRecord, Source
from vlm_lab.data.templates import TEMPLATES, Template

TEXTS = 2000  # records per source that the vocabulary is made from
VERSION = 1  # raise when the recipe below changes


def load_tokenizer(path: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """A saved tokenizer; the special tokens of `template` that it lacks are added at the end of its vocabulary."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    if not tokenizer.is_fast:
        raise ValueError(f"llm.tokenizer = {path}: only fast tokenizers are supported (answers are found by offsets)")
    if template in TEMPLATES:
        missing = [token for token in TEMPLATES[template].specials if token not in tokenizer.get_vocab()]
        tokenizer.add_tokens(missing, special_tokens=True)
    return tokenizer


def trained_tokenizer(
    sources: Iterable[Source], template: str, vocab_size: int, cache: Path
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` entries from the first TEXTS records of each source."""
    sources = list(sources)
    recipe = f"{VERSION} {template} {vocab_size} " + " ".join(source.fingerprint() for source in sources)
    make = lambda: train(sources, TEMPLATES[template], vocab_size)  # noqa: E731
    return load_tokenizer(str(kept(cache / "tokenizers", recipe, make)))


def kept(cache: Path, recipe: str, make: Callable[[], Any]) -> Path:
    """The folder below `cache` of what `recipe` stands for; made and saved, by one process, if it is not there."""
    folder = cache / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(f".{os.getpid()}")
            make().save_pretrained(partial)
            partial.rename(folder)
    return folder


def train(sources: list[Source], template: Template, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", *template.specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.chain.from_iterable(map(texts, sources)), trainer)
    ends = {"eos_token": template.stop} if template.stop in template.specials else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", **ends)


def texts(source: Source) -> Iterator[str]:
    for index in range(min(TEXTS, len(source))):
        try:
            sample = source[index]
        except BadRecord:  # the loader counts and reports it
            continue
        for message in sample.messages:
            yield from (part for part in message.content if isinstance(part, str))
