"""Pictures with captions to tensors: sentences, cuts, dropped tokens, crops; the same for the same draw."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ColourSource
from PIL import Image

from vlm_lab.batch import IGNORE
from vlm_lab.data.augment import augment, inception_crop
from vlm_lab.data.mixture import Mixture
from vlm_lab.data.pretrain import CaptionProcessor, PairLoader, PairRecords, captions, shortened
from vlm_lab.data.sample import BadRecord, Message, Sample
from vlm_lab.data.scenes import ScenePairs
from vlm_lab.data.wordpiece import Wordpiece, train, trained_wordpiece


@pytest.fixture(scope="module")
def words() -> Wordpiece:
    return train(["a red star on the left", "a blue heart on the right", "photo"] * 5, 200)


def sample(raw: object, synthetic: str) -> Sample:
    said = (Message("user", ("?",)), Message("assistant", ("an answer",)))
    return Sample("s", said, (), "x", "x", {"raw": raw, "synthetic": synthetic})


def test_texts_end_with_cls_and_targets_with_eos(words: Wordpiece) -> None:
    ids = words.words("A RED star")
    assert len(ids) == 3 and words.text(ids, 8).tolist() == [1, *ids, 2, 0, 0, words.cls]
    assert words.text(ids * 3, 8).tolist() == [1, *(ids * 3)[:5], 2, words.cls]
    assert words.target(ids, 6).tolist() == [*ids, 2, IGNORE, IGNORE]
    assert words.target(ids * 3, 6).tolist() == [*(ids * 3)[:4], 2, IGNORE]


def test_word_pieces_are_the_same_whenever_they_are_made(words: Wordpiece) -> None:
    again = train(["photo", "a blue heart on the right", "a red star on the left"] * 5, 200)
    assert again.tokenizer.get_vocab() == words.tokenizer.get_vocab()
    assert len(words.words("star")) == 1 and len(words.words("tsar")) == 4  # an unknown word is spelt


def test_word_pieces_are_made_once(tmp_path: Path) -> None:
    first, second = (trained_wordpiece([ScenePairs("train", 20)], 300, tmp_path) for _ in range(2))
    assert first.words("red star top left") == second.words("red star top left")
    assert len(list((tmp_path / "wordpieces").glob("*/tokenizer.json"))) == 1


def test_which_captions_are_used() -> None:
    rng = np.random.default_rng(0)
    sentences = {captions(sample("raw", "One. Two! "), rng)[1] for _ in range(20)}
    assert sentences == {"One", "Two"}
    assert captions(sample("raw", ""), rng) == ("raw", "raw", "raw")
    assert captions(sample("", "One."), rng) == ("One", "One", "One.")
    assert {captions(sample(["x", "y"], "One."), rng)[0] for _ in range(20)} == {"x", "y"}
    with pytest.raises(BadRecord, match="has no caption"):
        captions(sample("", ""), rng)


@pytest.mark.parametrize("how", ["truncate", "random", "block"])
def test_what_is_left_of_a_long_text(how: str) -> None:
    rng, text = np.random.default_rng(0), list(range(10))
    for _ in range(20):
        left = list(shortened(text, 4, how, rng))  # type: ignore[arg-type]
        assert len(left) == 4 and left == sorted(left)
        assert how != "truncate" or left == [0, 1, 2, 3]
        assert how != "block" or left == list(range(left[0], left[0] + 4))
    assert list(shortened(text, 10, how, rng)) == text  # type: ignore[arg-type]


def loader(words: Wordpiece, workers: int = 0, rank: int = 0, world: int = 1, **views: object) -> PairLoader:
    process = CaptionProcessor(words, 32, 16, length=12, queries=10, **views)  # type: ignore[arg-type]
    records = PairRecords([ScenePairs("train", 20)], Mixture([20], [1.0], 0), process)
    return PairLoader(records, 4, 6, rank, world, workers)


def test_shares_of_the_patches(words: Wordpiece) -> None:
    batch = next(iter(loader(words, keep=0.5, read=0.25)))
    assert batch.kept is not None and batch.read is not None
    assert batch.kept.shape == (6, 8) and batch.read.shape == (6, 2)
    assert (batch.kept.diff(dim=1) > 0).all() and batch.kept.max() < 16 and batch.read.max() < 8
    assert len({tuple(row) for row in batch.kept.tolist()}) > 1
    whole = next(iter(loader(words)))
    assert whole.kept is None and whole.read is None and whole.again is None
    with pytest.raises(ValueError, match="keep = 0 is a share"):
        loader(words, keep=0)


def test_a_draw_is_the_same_in_any_process_and_after_a_pause(words: Wordpiece) -> None:
    views = {"keep": 0.5, "crop": 0.4, "jitter": 0.4, "twice": True}
    steps = list(loader(words, **views))
    resumed = loader(words, **views)
    resumed.load_state_dict({"steps": 2})
    later = list(resumed)
    assert len(steps) == 4 and [batch.ids for batch in later] == [batch.ids for batch in steps[2:]]
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(steps[2:], later, strict=True))
    assert all(torch.equal(a.again, b.again) for a, b in zip(steps[2:], later, strict=True))
    assert all((a.again != a.pixels).flatten(1).any(1).all() for a in steps)  # another view of every picture
    halves = [next(iter(loader(words, rank=rank, world=2, **views))) for rank in (0, 1)]
    assert torch.equal(torch.stack([halves[0].pixels, halves[1].pixels], 1).flatten(0, 1), steps[0].pixels)
    assert torch.equal(torch.stack([halves[0].kept, halves[1].kept], 1).flatten(0, 1), steps[0].kept)


def test_bad_records_leave_an_invalid_pair(words: Wordpiece) -> None:
    """Of the coloured squares every third record has no image."""
    process = CaptionProcessor(words, 16, 4, length=8, queries=6, twice=True)
    (batch,) = PairLoader(PairRecords([ColourSource(6)], Mixture([6], [1.0], 0), process), 1, 6)
    assert batch.valid.sum() == 4 and len(batch.bad) == 2 and "has no image" in str(batch.bad[0])
    assert (batch.targets[~batch.valid] == IGNORE).all() and batch.pixels.shape == batch.again.shape == (6, 3, 16, 16)


def test_crops_stay_inside_and_are_large_enough() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = inception_crop((60, 40), 0.4, rng)
        assert 0 <= left < right <= 60 and 0 <= top < bottom <= 40
        assert (right - left) * (bottom - top) >= 0.4 * 2400 - 1e-6
        whole = (left, top, right, bottom) == (0, 0, 60, 40)  # where no crop fits
        assert whole or 3 / 4 - 1e-6 <= (right - left) / (bottom - top) <= 4 / 3 + 1e-6
    image = Image.new("RGB", (60, 40), "red")
    plain = augment(image, 16, 1.0, 0.0, rng)
    assert plain.size == (16, 16) and plain.getpixel((3, 3)) == (255, 0, 0)
    assert len({augment(image, 4, 1.0, 1.0, rng).getpixel((0, 0)) for _ in range(20)}) > 10
