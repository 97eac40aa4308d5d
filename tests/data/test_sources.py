"""The views that wrap any source: hold-outs never overlap, single turns keep what they need, caps spread evenly."""

import pickle
from typing import Any

import pytest
from helpers import ColourSource, composed

from vlm_lab import build, schema
from vlm_lab.data.sample import BadRecord, ImageSlot, Message, Sample
from vlm_lab.data.sources import Capped, Holdout, SingleTurn

A, B, C = ImageSlot(0), ImageSlot(1), ImageSlot(2)


class Listed:
    """A source of given records; None is one that cannot be used."""

    def __init__(self, *samples: Sample | None) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        if self.samples[index] is None:
            raise BadRecord("listed", f"record {index}", "is None")
        return self.samples[index]

    def fingerprint(self) -> str:
        return str(len(self))


FORTY = Listed(*(Sample(str(number), ()) for number in range(40)))


def talk(*contents: tuple[str | ImageSlot, ...], **fields: Any) -> Sample:
    messages = (Message(("user", "assistant")[turn % 2], content) for turn, content in enumerate(contents))
    return Sample("s", tuple(messages), **fields)


def contents(sample: Sample) -> list[tuple[str | ImageSlot, ...]]:
    return [message.content for message in sample.messages]


@pytest.mark.parametrize("count, seed", [(1, 0), (7, 1), (39, 2)])
def test_holdout_splits_without_overlap(count: int, seed: int) -> None:
    train, held = (Holdout(FORTY, part, count, seed) for part in ("train", "eval"))
    assert (len(train), len(held)) == (40 - count, count)
    kept = [train[index].id for index in range(40 - count)]
    out = [held[index].id for index in range(count)]
    assert sorted(kept + out, key=int) == [str(number) for number in range(40)]
    again = pickle.loads(pickle.dumps(held))
    assert [again[index].id for index in range(count)] == out
    with pytest.raises(IndexError):
        train[40 - count]


def test_holdout_stays_the_same_from_version_to_version() -> None:
    held = Holdout(FORTY, "eval", 5)
    assert [held[index].id for index in range(5)] == ["2", "16", "24", "26", "32"]


def test_holdout_depends_on_seed_and_count() -> None:
    choices = [Holdout(FORTY, "eval", count, seed) for count, seed in ((5, 0), (5, 1), (6, 0))]
    choices.append(Holdout(FORTY, "train", 5))
    assert len({tuple(choice[index].id for index in range(5)) for choice in choices}) == 4
    assert len({choice.fingerprint() for choice in choices}) == 4


def test_holdout_refuses_to_leave_nothing() -> None:
    for count in (0, 40):
        with pytest.raises(ValueError, match=f"data.holdout = {count} must be between 1 and 39: the source has 40"):
            Holdout(FORTY, "eval", count)
    with pytest.raises(ValueError, match="the parts train and eval, not test"):
        Holdout(FORTY, "test", 5)


def test_single_turns() -> None:
    meta = {"turn_sources": ["human", "made"], "model": "x"}
    two = talk(
        (A, "\nQ1"), ("A1",), ("Q2",), ("A2",), images=(b"a",), source="human+made", group="human+made", meta=meta
    )
    source = SingleTurn(Listed(two, None, talk(("Q3",), ("A3",), group="text")))
    assert len(source) == 4
    assert [contents(source[index]) for index in (0, 1, 3)] == [
        [(A, "\nQ1"), ("A1",)],
        [(A, "\nQ2"), ("A2",)],
        [("Q3",), ("A3",)],
    ]
    assert [source[index].id for index in (0, 1, 3)] == ["s#0", "s#1", "s#0"]
    assert [source[index].group for index in (0, 1, 3)] == ["human", "made", "text"]
    assert source[1].images == (b"a",) and source[1].meta == {"turn_sources": ["made"], "model": "x"}
    with pytest.raises(BadRecord, match="listed: record 1: is None"):
        source[2]
    with pytest.raises(IndexError):
        source[4]
    assert contents(pickle.loads(pickle.dumps(source))[1]) == contents(source[1])
    assert source.fingerprint() != source.source.fingerprint()


def test_single_turn_shows_the_images_of_the_conversation_so_far() -> None:
    turns = (A, "Q1"), ("A1",), (B, " or ", C, "?"), ("A2",), ("Q3",), ("A3",)
    talked = talk(*turns, images=(b"a", b"b", b"c"))
    system = Message("system", ("S",))
    source = SingleTurn(Listed(Sample("s", (system, *talked.messages), talked.images)))
    assert [source[index].messages[0] for index in range(3)] == [system] * 3
    assert [contents(source[index])[1] for index in range(3)] == [
        (A, "Q1"),
        (A, B, " or ", C, "?"),
        (A, B, C, "\nQ3"),
    ]
    assert [source[index].images for index in range(3)] == [(b"a",), (b"a", b"b", b"c"), (b"a", b"b", b"c")]


def test_single_turn_numbers_images_anew() -> None:
    source = SingleTurn(Listed(talk((C, A), ("A1",), (B, "Q2"), ("A2",), images=(b"a", b"b", b"c"))))
    assert (contents(source[0])[0], source[0].images) == ((A, B), (b"c", b"a"))
    assert (contents(source[1])[0], source[1].images) == ((A, B, C, "Q2"), (b"c", b"a", b"b"))


@pytest.mark.parametrize(("cap", "picked"), [(4, [0, 2, 5, 7]), (10, list(range(10))), (99, list(range(10)))])
def test_a_cap_keeps_records_from_everywhere(cap: int, picked: list[int]) -> None:
    source = ColourSource(10)
    capped = Capped(source, cap)
    assert [capped[index].id for index in range(len(capped))] == [f"c{index}" for index in picked]
    assert capped.fingerprint() != Capped(source, cap + 1).fingerprint()
    with pytest.raises(IndexError):
        capped[len(picked)]


def test_a_mixture_without_weights_draws_in_proportion_to_what_the_cap_leaves() -> None:
    config = schema.check(
        composed("data=scenes_groups", "stages.instruct.mixture=groups", "++stages.instruct.cap=3000")
    )
    used, mixed = build.mixture(config, config.stages["instruct"])
    sizes = {"text": 3000, "general": 3000, "knowledge": 2500, "ocr_chart": 3000, "vision_centric": 900}
    assert dict(zip(config.data.mixtures["groups"], map(len, used), strict=True)) == sizes
    assert mixed.weights.tolist() == pytest.approx([size / sum(sizes.values()) for size in sizes.values()])
    assert build.steps(config.stages["instruct"].model_copy(update={"steps": None, "epochs": 2.0}), used) == 1550
