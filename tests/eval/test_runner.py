"""Generation for evaluation: the three ways of showing images, records, untouched random state."""

from collections.abc import Callable
from pathlib import Path

import torch
from helpers import ColourSource

from vlm_lab.data.process import Processor
from vlm_lab.data.sample import ImageSlot, Message, Sample
from vlm_lab.eval.runner import predict, questions, show
from vlm_lab.model.vlm import VLM

SAMPLES = [ColourSource()[i] for i in range(12)]


def test_none_leaves_text_only() -> None:
    for sample in show(SAMPLES, "none"):
        assert sample.images == ()
        assert not any(isinstance(part, ImageSlot) for m in sample.messages for part in m.content)
    assert show(SAMPLES, "none")[0].messages[0].content[0] == "What colour is it?"  # no line break is left behind


def test_none_of_a_question_that_is_only_an_image() -> None:
    messages = (Message("user", (ImageSlot(0),)), Message("assistant", ("red",)))
    (sample,) = show([Sample("s", messages, (b"",))], "none")
    assert sample.messages[0].content == ("",)


def test_shuffled_gives_nobody_its_own_image() -> None:
    shuffled = show(SAMPLES, "shuffled")
    for before, after in zip(SAMPLES, shuffled, strict=True):
        assert after.messages == before.messages
        assert len(after.images) == len(before.images)
        assert not before.images or after.images is not before.images
    assert sorted(map(id, (s.images for s in SAMPLES if s.images))) == sorted(
        map(id, (s.images for s in shuffled if s.images))
    )


def test_predictions_do_not_depend_on_the_batch(make_vlm: Callable[..., VLM], processor: Processor) -> None:
    vlm = make_vlm()
    together = predict(vlm, processor, SAMPLES, batch=12, max_new_tokens=4)
    assert together == predict(vlm, processor, SAMPLES, batch=1, max_new_tokens=4)
    assert [record["id"] for record in together] == [sample.id for sample in SAMPLES]
    assert together[0]["target"] == "red"
    assert together[0]["question"] == "What colour is it?"


def test_an_unusable_image_is_an_error_not_a_gap(
    make_vlm: Callable[..., VLM], processor: Processor, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    messages = (Message("user", (ImageSlot(0), "what?")), Message("assistant", ("red",)))
    bad = Sample("bad", messages, (broken,), "toy", "colour", file="toy.json")
    records = predict(make_vlm(), processor, [SAMPLES[0], bad, SAMPLES[2]], batch=3, max_new_tokens=2)
    assert [("error" in record) for record in records] == [False, True, False]
    assert "toy.json: bad" in records[1]["error"]
    assert records[1]["prediction"] == ""


def test_evaluation_leaves_the_random_state_alone(make_vlm: Callable[..., VLM], processor: Processor) -> None:
    vlm = make_vlm()
    before = torch.get_rng_state()
    predict(vlm, processor, SAMPLES, batch=4, max_new_tokens=4)
    show(SAMPLES, "shuffled")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_limit_draws_the_same_questions_always() -> None:
    picked = [sample.id for sample in questions(ColourSource(), 5)]
    assert picked == [sample.id for sample in questions(ColourSource(), 5)]
    assert len(set(picked)) == 5
    assert len(questions(ColourSource(), None)) == len(ColourSource())
