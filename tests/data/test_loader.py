"""The loader: shares of ranks, parts of a step, resume from one integer, bad records."""

import numpy as np
import pytest
import torch
from helpers import ColourSource

from vlm_lab.batch import IGNORE, Batch
from vlm_lab.data.loader import Loader, Records
from vlm_lab.data.mixture import Mixture
from vlm_lab.data.process import Processor
from vlm_lab.data.sample import BadRecord, ImageSlot, Message, Sample
from vlm_lab.data.turns import shuffled_turns


def loader(processor: Processor, source: object | None = None, **options: int) -> Loader:
    source = source or ColourSource()
    records = Records([source], Mixture([len(source)], [1.0], 0), processor)
    return Loader(records, **{"steps": 5, "batch": 8, "micro_batch": 4, **options})


def same(a: Batch, b: Batch) -> bool:
    return a.ids == b.ids and torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixels["eye"], b.pixels["eye"])


def test_a_step_is_batch_samples_in_parts(processor: Processor) -> None:
    rows = list(loader(processor))
    assert len(rows) == len(loader(processor)) == 10
    assert [row.part for row in rows] == [0, 1] * 5
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert len(first.ids) + len(second.ids) == 8
        answers = sum(int(row.targets.ne(IGNORE).sum()) for row in (first, second))
        assert first.num_answers == second.num_answers == answers


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_world_size_draws_the_same_samples(processor: Processor, world: int) -> None:
    expected = [sorted(row.ids) for row in loader(processor, micro_batch=8)]
    shares = [list(loader(processor, micro_batch=8 // world, rank=r, world=world)) for r in range(world)]
    together = [sorted(i for share in shares for i in share[step].ids) for step in range(5)]
    assert together == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 4, 9])
def test_resume_continues_exactly(processor: Processor, workers: int, stop: int) -> None:
    whole = list(loader(processor, workers=workers))
    first = loader(processor, workers=workers)
    for _, _row in zip(range(stop), first, strict=False):
        pass
    state = first.state_dict()
    assert state == {"steps": stop // 2}
    second = loader(processor, workers=2 - workers)
    second.load_state_dict(state)
    assert len(second) == len(whole)
    rest = list(second)
    assert len(rest) == len(whole) - 2 * state["steps"]
    assert all(same(a, b) for a, b in zip(rest, whole[2 * state["steps"] :], strict=True))
    assert len(list(second)) == len(whole)  # the resumed start counts once


class Broken(ColourSource):
    """Every other record is bad."""

    def __getitem__(self, index: int) -> Sample:
        if index % 2:
            raise BadRecord("toy.json", f"record {index}", "is odd")
        return super().__getitem__(index)


def test_bad_records_travel_with_the_batch(processor: Processor) -> None:
    rows = list(loader(processor, Broken(), steps=3))
    bad = [b for row in rows for b in row.bad]
    assert sum(len(row.ids) for row in rows) + len(bad) == 24
    assert len(bad) == 12
    assert str(bad[0]).startswith("toy.json: record")


class AllBroken(ColourSource):
    def __getitem__(self, index: int) -> Sample:
        raise BadRecord("toy.json", f"record {index}", "is bad")


def test_a_row_of_bad_records_still_is_a_row(processor: Processor, make_vlm) -> None:
    row = next(iter(loader(processor, AllBroken())))
    assert (row.ids, row.num_answers, len(row.bad)) == ([], 0, 4)
    loss = make_vlm()(row)
    loss.backward()
    assert loss.item() == 0


def test_long_samples_are_cut_after_the_images(processor: Processor) -> None:
    sample = ColourSource()[0]
    full = processor.example(sample)
    short = Processor(processor.chat, processor.tiling, processor.eyes, processor.grid, len(full.ids) - 1)
    cut = short.example(sample)
    assert len(cut.ids) == len(full.ids) - 1
    assert np.array_equal(cut.targets[:-1], full.targets[:-2])
    none = Processor(processor.chat, processor.tiling, processor.eyes, processor.grid, 5)
    with pytest.raises(BadRecord, match=r"needs \d+ tokens, max_tokens is 5"):
        none.example(sample)


def conversation(*contents: tuple) -> Sample:
    turns = [(Message("user", content), Message("assistant", (f"a{i}",))) for i, content in enumerate(contents)]
    return Sample("s", tuple(message for turn in turns for message in turn), (b"", b""))


def test_shuffled_turns_keep_pairs_and_the_images_in_front() -> None:
    sample = conversation((ImageSlot(0), ImageSlot(1), "\nq0"), ("q1",), ("q2",))
    orders = set()
    for seed in range(40):
        users, answers = (shuffled_turns(sample, np.random.default_rng(seed)).messages[k::2] for k in (0, 1))
        assert users[0].content[:2] == (ImageSlot(0), ImageSlot(1))
        questions = [str(user.content[-1]).removeprefix("\n") for user in users]
        assert str(users[0].content[-1]).startswith("\n")
        assert [a.content[0][1:] for a in answers] == [q[1:] for q in questions]
        orders.add(tuple(questions))
    assert len(orders) == 6


def test_some_turns_are_drawn_anew() -> None:
    """With `most`, so many different questions at a time, behind the images, with their answers; in the end all."""
    sample = conversation((ImageSlot(0), "\nq0"), ("q1",), ("q2",))
    seen = set()
    for seed in range(40):
        first, one, *rest = shuffled_turns(sample, np.random.default_rng(seed), 2).messages
        assert len(rest) == 2
        assert first.content[0] == ImageSlot(0)
        assert str(first.content[1])[2:] == str(one.content[0])[1:] != str(rest[1].content[0])[1:]
        seen.add(first.content[1])
    assert seen == {"\nq0", "\nq1", "\nq2"}
    assert len(shuffled_turns(sample, np.random.default_rng(0), 99).messages) == 6


def test_interleaved_conversations_are_not_shuffled() -> None:
    for sample in (conversation(("q0",), (ImageSlot(0), "q1")), conversation(("look: ", ImageSlot(0)), ("q1",))):
        assert all(shuffled_turns(sample, np.random.default_rng(seed)) is sample for seed in range(5))
