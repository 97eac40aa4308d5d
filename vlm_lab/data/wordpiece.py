"""Word pieces for the text tower of encoder pretraining: BERT's, or a small vocabulary made from the data's captions.

OpenVision's layout (its code): lower case; [PAD] 0, [bos] 1, [eos] 2 (both are unused entries of BERT's), and [CLS] as
the last token of a text. The language model's tokenizer is another one: data/tokenizer.py.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlm_lab.batch import IGNORE
from vlm_lab.data.sample import Source
from vlm_lab.data.tokenizer import kept, texts

PAD, BOS, EOS = 0, 1, 2
SPECIALS = ["[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]"]
VERSION = 2  # raise when the recipe of `train` changes


class Wordpiece:
    """Texts to ids. `cls` is the id of [CLS], `size` the number of ids in use."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.cls, self.size = tokenizer.token_to_id("[CLS]"), tokenizer.get_vocab_size()

    def words(self, text: str) -> list[int]:
        """Ids of the text alone."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, words: Sequence[int], length: int) -> np.ndarray:
        """[bos] words [eos], cut or padded to `length` - 1, then [CLS]: what the text tower reads, [length]."""
        ids = [BOS, *words[: length - 3], EOS]
        return np.array([*ids, *[PAD] * (length - 1 - len(ids)), self.cls])

    def target(self, words: Sequence[int], length: int) -> np.ndarray:
        """words [eos], what the caption decoder's queries are to say, IGNORE behind it, [length].

        As published: the caption with its [bos] is cut to `length` and shifted left by one, so the last place is empty.
        """
        ids = [*words[: length - 2], EOS]
        return np.array([*ids, *[IGNORE] * (length - len(ids))])

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(str(folder / "tokenizer.json"))

    def save_for_transformers(self, folder: Path) -> None:
        """As `AutoTokenizer` loads it. The layout of `text` is open_clip's `tokenizer_mode: clips`."""
        names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS}
        specials = {name: self.tokenizer.id_to_token(number) for name, number in names.items()}
        theirs = PreTrainedTokenizerFast(
            tokenizer_object=self.tokenizer, unk_token="[UNK]", cls_token="[CLS]", **specials
        )
        theirs.save_pretrained(folder)


def load_wordpiece(path: str) -> Wordpiece:
    """From a folder that `save_pretrained` wrote, or a BERT tokenizer of the hub (`bert-base-uncased`)."""
    file = Path(path) / "tokenizer.json"
    tokenizer = (
        Tokenizer.from_file(str(file)) if file.is_file() else AutoTokenizer.from_pretrained(path).backend_tokenizer
    )
    if tokenizer.token_to_id("[CLS]") is None or tokenizer.token_to_id("[PAD]") != PAD:
        raise ValueError(f"tokenizer {path}: no BERT vocabulary, it needs [CLS] and [PAD] = {PAD}")
    return Wordpiece(tokenizer)


def trained_wordpiece(sources: Iterable[Source], vocab: int, cache: Path) -> Wordpiece:
    """At most `vocab` word pieces of the sources' own text; cached under the text's fingerprint."""
    sources = list(sources)
    recipe = f"{VERSION} {vocab} " + " ".join(source.fingerprint() for source in sources)
    make = lambda: train((text for source in sources for text in texts(source)), vocab)  # noqa: E731
    return load_wordpiece(str(kept(cache / "wordpieces", recipe, make)))


def train(lines: Iterable[str], vocab: int) -> Wordpiece:
    """The most frequent words, and single characters for what is left: the library's own trainer is not repeatable."""
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for line in lines for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(line)))
    letters = sorted({letter for word in counts for letter in word})
    frequent = sorted(counts, key=lambda word: (-counts[word], word))
    pieces = [*SPECIALS, *letters, *(f"##{letter}" for letter in letters), *(w for w in frequent if len(w) > 1)]
    ids = {piece: number for number, piece in enumerate(pieces[:vocab])}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    return Wordpiece(tokenizer)
