"""Several pictures, videos and documents of the made-up world: fair, balanced, true, and fit for processing."""

import hashlib
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from vlm_lab.batch import IGNORE, IMAGE_TOKEN
from vlm_lab.data.chat import Chat
from vlm_lab.data.loader import pack
from vlm_lab.data.process import Processor
from vlm_lab.data.sample import ImageSlot, Message, Sample, Video, document
from vlm_lab.data.scenes import SceneCaptions, SceneComparisons, SceneDocuments, SceneQuestions, SceneVideos
from vlm_lab.data.scenes.clips import FRAMES, clip
from vlm_lab.data.scenes.comparisons import ORDINALS, compare
from vlm_lab.data.scenes.compose import compose
from vlm_lab.data.scenes.draw import render
from vlm_lab.data.scenes.vocabulary import COLORS, SHAPES, plural
from vlm_lab.data.scenes.world import Scene, Shape
from vlm_lab.data.tiling import AnyResMax, Eye, Squash
from vlm_lab.data.tokenizer import trained_tokenizer
from vlm_lab.data.turns import shuffled_turns
from vlm_lab.eval.runner import show

KINDS = {SceneComparisons: compare, SceneVideos: clip}
SINGULAR = {plural(shape): shape for shape in SHAPES}


def said(sample: Sample) -> str:
    return "".join(part for message in sample.messages for part in message.content if isinstance(part, str))


def answer_of(sample: Sample) -> str:
    """In words, also where a letter is asked for."""
    (answer,) = sample.messages[-1].content
    return sample.meta["choices"]["ABCD".index(answer)] if "choices" in sample.meta else answer


@cache
def records(kind: type, split: str, count: int) -> list[Sample]:
    source = kind(split, count)
    return [source[index] for index in range(count)]


# What is true, worked out from what the pictures hold and the wording alone: nothing here is shared with the makers.


def looks(scene: Scene) -> set[tuple[str, str]]:
    return {(shape.color, shape.shape) for shape in scene.shapes}


def axis(question: str) -> int:
    return 0 if re.search(r"\bcolor\b", question) else 1


def only(places: Sequence[bool]) -> str:
    assert sum(places) == 1
    return ORDINALS[list(places).index(True)]


def which_image(scenes: Sequence[Scene], question: str) -> str:
    color, shape = re.search(r"a (\w+) (\w+)\?", question).groups()
    return only([(color, shape) in looks(scene) for scene in scenes])


def same_look(scenes: Sequence[Scene], question: str) -> str:
    (first,), (second,) = map(looks, scenes)
    return "yes" if first[axis(question)] == second[axis(question)] else "no"


def count_in_all(scenes: Sequence[Scene], question: str) -> str:
    noun = re.search(r"how many (\w+)", question, re.IGNORECASE).group(1)
    shapes = [shape for scene in scenes for shape in scene.shapes]
    assert all(scene.shapes for scene in scenes)
    return str(sum(noun in (shape.color, plural(shape.shape)) for shape in shapes))


def what_changed(scenes: Sequence[Scene], question: str) -> str:
    assert scenes[0].size == scenes[1].size and scenes[0].background == scenes[1].background
    (old, new), *others = [pair for pair in zip(*(scene.shapes for scene in scenes), strict=True) if pair[0] != pair[1]]
    assert not others
    reach = 0.1 * min(scenes[0].size)
    changed = {
        "color": old.color != new.color,
        "shape": old.shape != new.shape,
        "size": max(old.r, new.r) >= 1.5 * min(old.r, new.r),
        "place": abs(old.x - new.x) + abs(old.y - new.y) > reach,
    }
    (what,) = [name for name, is_so in changed.items() if is_so]
    return what


def only_in(scenes: Sequence[Scene], question: str) -> str:
    here = 0 if "first" in question else 1
    ((color, _),) = looks(scenes[here]) - looks(scenes[1 - here])
    assert len({shape.color for shape in scenes[here].shapes}) == len(scenes[here].shapes)
    return color


def odd_one(scenes: Sequence[Scene], question: str) -> str:
    values = [next(iter(looks(scene)))[axis(question)] for scene in scenes]
    assert len({next(iter(looks(scene)))[1 - axis(question)] for scene in scenes}) == 1
    return only([values.count(value) == 1 for value in values])


def most_objects(scenes: Sequence[Scene], question: str) -> str:
    counts = [len(scene.shapes) for scene in scenes]
    best, *others = sorted(counts, reverse="most" in question)
    assert all(abs(other - best) >= 2 for other in others)
    return only([count == best for count in counts])


def direction(scenes: Sequence[Scene], question: str) -> str:
    first, last = (named(scene, question) for scene in (scenes[0], scenes[-1]))
    right, down = last.x - first.x, last.y - first.y
    assert (right == 0) != (down == 0) and abs(right + down) >= 0.15 * min(scenes[0].size)
    return ("right" if right > 0 else "left") if right else ("down" if down > 0 else "up")


def growth(scenes: Sequence[Scene], question: str) -> str:
    first, last = (named(scene, question).r for scene in (scenes[0], scenes[-1]))
    assert max(first, last) >= 2 * min(first, last)
    return "grow" if last > first else "shrink"


def named(scene: Scene, question: str) -> Shape:
    (shape,) = [shape for shape in scene.shapes if f"{shape.color} {shape.shape}" in question]
    return shape


def arrivals(scenes: Sequence[Scene]) -> list[str]:
    """Colors in the order in which they come; no two come together."""
    seen: list[str] = []
    for scene in scenes:
        new = [shape.color for shape in scene.shapes if shape.color not in seen]
        assert len(new) <= 1
        seen += new
    return seen


def appears(scenes: Sequence[Scene], question: str) -> str:
    return arrivals(scenes)[0 if "first" in question else -1]


def order(scenes: Sequence[Scene], question: str) -> str:
    return ", ".join(arrivals(scenes))


def how_many(scenes: Sequence[Scene], question: str) -> str:
    return str(len(set().union(*map(looks, scenes))))


def true_answer(template: str, scenes: Sequence[Scene], question: str) -> str:
    return globals()[template](scenes, question)


@pytest.mark.parametrize("kind", KINDS)
def test_every_answer_is_true(kind: type) -> None:
    for index, sample in enumerate(records(kind, "val", 1050)):
        question = said(sample).partition("\n A.")[0].rpartition("image: ")[2]
        scenes = KINDS[kind](0, "val", index).scenes
        assert true_answer(sample.meta["template"], scenes, question) == answer_of(sample), (index, question)


def test_four_evenly_spaced_frames_are_enough() -> None:
    for index, sample in enumerate(records(SceneVideos, "val", 1050)):
        scenes = clip(0, "val", index).scenes
        four = [scenes[place] for place in np.linspace(0, len(scenes) - 1, 4).astype(int)]
        assert true_answer(sample.meta["template"], four, said(sample)) == answer_of(sample), index


@pytest.mark.parametrize("kind", KINDS)
def test_a_blind_model_is_at_chance(kind: type) -> None:
    """The best guess from the wording, learnt on 4200 records; per kind of question, 3.5 standard deviations."""
    by_text, by_template = defaultdict(Counter), defaultdict(Counter)
    key = lambda sample: re.sub("|".join(map(re.escape, sorted({*COLORS, *SHAPES}))), "*", said_by_user(sample))  # noqa: E731
    for sample in records(kind, "train", 4200):
        by_text[key(sample)][sample.messages[-1].content] += 1
        by_template[sample.meta["template"]][sample.messages[-1].content] += 1
    right, chances = Counter(), defaultdict(list)
    for sample in records(kind, "val", 2100):
        template = sample.meta["template"]
        guess = (by_text.get(key(sample)) or by_template[template]).most_common(1)[0][0]
        right[template] += guess == sample.messages[-1].content
        chances[template].append(sample.meta["chance"])
    for template, each in chances.items():
        deviation = np.sqrt(sum(chance * (1 - chance) for chance in each))
        assert right[template] <= sum(each) + 3.5 * deviation, (template, right[template], sum(each))
    assert set(chances) == set(kind.wordings)


def said_by_user(sample: Sample) -> str:
    return "".join(part if isinstance(part, str) else "<image>" for part in sample.messages[0].content)


def test_clips_hold_no_answer_in_a_bag_of_frames() -> None:
    """Played backwards, a clip of this kind has the opposite answer, and is as likely: both starts occur alike."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}
    answers = Counter()
    for index, sample in enumerate(records(SceneVideos, "val", 1050)):
        if (template := sample.meta["template"]) in ("direction", "growth"):
            scenes = clip(0, "val", index).scenes
            assert true_answer(template, scenes[::-1], said(sample)) == opposite[answer_of(sample)]
            answers[answer_of(sample)] += 1
    assert all(abs(answers[a] - answers[b]) < 50 for a, b in opposite.items()), answers


def test_the_order_of_appearance_is_not_that_of_the_question() -> None:
    ranks = Counter()
    for sample in records(SceneVideos, "train", 4200):
        if sample.meta["template"] == "order":
            question = said_by_user(sample).partition("\n")[0]
            places = [question.index(color) for color in answer_of(sample).split(", ")]
            ranks[tuple(np.argsort(places))] += 1
    assert len(ranks) == 6 and max(ranks.values()) < 140 + 3.5 * 11, ranks  # of 840; one standard deviation is 11


def test_nothing_leaves_the_picture_or_overlaps() -> None:
    puzzles = [make(0, "train", index) for make in KINDS.values() for index in range(700)]
    for scene in (scene for puzzle in puzzles for scene in puzzle.scenes):
        for number, shape in enumerate(scene.shapes):
            assert shape.r - 1 <= shape.x <= scene.size[0] - shape.r + 1
            assert shape.r - 1 <= shape.y <= scene.size[1] - shape.r + 1
            others = scene.shapes[number + 1 :]
            assert all(max(abs(shape.x - o.x), abs(shape.y - o.y)) >= 0.95 * (shape.r + o.r) for o in others)


@pytest.mark.parametrize("kind", [SceneComparisons, SceneVideos, SceneDocuments])
def test_a_record_depends_only_on_its_own_index(kind: type, tmp_path: Path) -> None:
    small, large, cached = kind("train", 6), kind("train", 60), kind("train", 6, cache=str(tmp_path))
    for index in range(6):
        assert small[index] == large[index] and small[index].messages == cached[index].messages
        assert [p.tobytes() for p in pictures(small[index])] == [p.tobytes() for p in pictures(cached[index])]
    assert small[3] != kind("train", 6, seed=1)[3] and small[3] != kind("val", 6)[3]
    assert len(list(tmp_path.glob("*.rgb"))) == 1
    assert pickle.loads(pickle.dumps(cached))[2] == cached[2] and len(pickle.dumps(cached)) < 1000
    with pytest.raises(IndexError, match="6 of a source of 6"):
        small[6]
    with pytest.raises(ValueError, match="split='test'"):
        kind("test", 6)


def pictures(sample: Sample) -> list:
    drawn = [ref.content if isinstance(ref, Video) else (ref,) for ref in sample.images]
    return [picture.draw() for refs in drawn for picture in refs]


def test_fingerprints_follow_the_records_and_not_the_cache() -> None:
    kinds = (SceneComparisons, SceneVideos, SceneDocuments)
    sources = [
        kind(*arguments) for kind in kinds for arguments in (("train", 9), ("val", 9), ("train", 8), ("train", 9, 1))
    ]
    sources.append(SceneDocuments("train", 9, pictures=3))
    assert len({source.fingerprint() for source in sources}) == 13
    assert all(kind("train", 9, cache="/nowhere").fingerprint() == kind("train", 9).fingerprint() for kind in kinds)


def test_golden_texts() -> None:
    """If this fails, records changed: raise WORLD_VERSION and put the new hash here."""
    sources = [SceneComparisons("val", 70), SceneVideos("val", 50), SceneDocuments("val", 30)]
    lines = [said(source[index]) for source in sources for index in range(len(source))]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == "722b69c32ce4733c"


def test_documents_are_true() -> None:
    links = Counter()
    for index in range(200):
        sample = SceneDocuments("val", 200)[index]
        places = range(6 * index, 6 * index + len(sample.images))
        scenes = [compose(0, "val", place) for place in places]
        assert [image.index for image in sample.images] == list(places)
        (message,) = sample.messages
        assert [part.index for part in message.content if isinstance(part, ImageSlot)] == list(range(len(scenes)))
        assert said(sample).count(f" {len(scenes)} pictures") == 2
        links += check_links(message, scenes)
        assert says_what_is_there(said(sample), scenes)
    assert min(links.values()) > 20 and len(links) == 6, links


def number_of_things(scene: Scene) -> int:
    return len(scene.signs + scene.shapes) or len(scene.chart.bars)


def check_links(message: Message, scenes: Sequence[Scene]) -> Counter:
    """Sentences that compare the picture before, or hold for all of them."""
    links, shown = Counter(), 0
    for part in message.content:
        if isinstance(part, ImageSlot):
            shown += 1
            continue
        paragraphs = part.split("\n\n")
        for paragraph in paragraphs:
            if found := re.fullmatch(r"It shows (.*) the (.*) picture\.", paragraph):
                more = number_of_things(scenes[shown - 1]) - number_of_things(scenes[number(found[2])])
                word = "more" if more > 0 else "fewer"
                assert found[1] == (
                    f"{abs(more)} thing{'s' * (abs(more) > 1)} {word} than" if more else "as many things as"
                )
                links[word if more else "as many"] += 1
            elif found := re.fullmatch(r"Its background is (.*) as in the (.*) picture\.", paragraph):
                same = scenes[shown - 1].background == scenes[number(found[2])].background
                assert found[1] == ("the same" if same else "not the same")
                links[found[1]] += 1
            elif found := re.fullmatch(r"The \d+ pictures show (\d+) things in all\.", paragraph):
                assert int(found[1]) == sum(map(number_of_things, scenes))
                links["all"] += 1
    return links


def number(name: str) -> int:
    return ORDINALS.index(name) if name in ORDINALS else int(name.removeprefix("number ")) - 1


def says_what_is_there(text: str, scenes: Sequence[Scene]) -> bool:
    return all(
        shape.color in text and shape.shape in text and all(sign.text in text for sign in scene.signs)
        for scene in scenes
        for shape in scene.shapes
    )


@pytest.fixture(scope="module")
def own_chat(cache: Path) -> Chat:
    sources = [
        kind("train", 60) for kind in (SceneCaptions, SceneQuestions, SceneComparisons, SceneVideos, SceneDocuments)
    ]
    return Chat(trained_tokenizer(sources, "chatml", 600, cache), "chatml", system="Be brief.")


EYES = {"eye": Eye(32, (0.5, 0.5, 0.5))}


def test_they_are_processed_and_packed_with_others(own_chat: Chat) -> None:
    """AnyResMax: a picture of several is one view and a newline; a video four frames of a quarter of the tokens."""
    process = Processor(own_chat, AnyResMax(3, 4, 4), EYES, (4, 4), 2000)
    kinds = (SceneQuestions, SceneComparisons, SceneVideos, SceneDocuments)
    samples = [kind("train", 20)[index] for kind in kinds for index in range(8)]
    examples = [process.example(sample) for sample in samples]
    for sample, example in zip(samples, examples, strict=True):
        assert (example.ids == IMAGE_TOKEN).sum() == sum(layout.num_tokens for layout in example.layouts)
        assert len(example.views["eye"]) == sum(layout.views for layout in example.layouts)
        if isinstance(sample.images[0], Video):
            assert [(layout.views, layout.num_tokens) for layout in example.layouts] == [(4, 4 * 4 + 1)]
        elif len(sample.images) > 1:
            assert {(layout.views, layout.num_tokens) for layout in example.layouts} == {(1, 17)}
    row = pack(examples, process)
    assert row.input_ids.shape[1] == row.cu_seqlens[-1] and row.pixels["eye"].shape[1:] == (3, 32, 32)
    assert len(row.pixels["eye"]) == sum(layout.views for layout in row.layouts)
    squashing = Processor(own_chat, Squash(), EYES, (4, 4), 2000)
    for sample in samples[8:16]:
        assert len(squashing.prompt(sample).views["eye"]) == len(sample.images)


def test_a_video_shows_its_evenly_spaced_frames(own_chat: Chat) -> None:
    process = Processor(own_chat, AnyResMax(3, 4, 3), EYES, (4, 4), 2000)
    index = next(i for i in range(20) if len(clip(0, "val", i).scenes) == FRAMES)
    sample = SceneVideos("val", 20)[index]
    frames = [render(scene).resize((32, 32), 3) for scene in clip(0, "val", index).scenes]
    shown = process.example(sample).views["eye"]
    assert [view.tobytes() for view in shown] == [frames[place].tobytes() for place in (0, 3, 7)]


def test_all_text_of_a_document_is_learnt(own_chat: Chat) -> None:
    sample = SceneDocuments("train", 5)[2]
    encoded = own_chat.encode(sample, [3] * len(sample.images))
    words = encoded.ids != IMAGE_TOKEN
    learnt = np.append(encoded.targets[:-1] == encoded.ids[1:], True)
    assert (learnt[:-1] == words[1:]).all()  # every text token but the first is some position's target
    decoded = own_chat.tokenizer.decode(encoded.ids[words])
    assert decoded == said(sample) + "<|im_end|>"  # no role, no system prompt


def test_a_document_that_is_too_long_is_cut_before_an_image_that_does_not_fit(own_chat: Chat) -> None:
    sample = Sample(
        "d",
        (document(["one two", ImageSlot(0), "three", ImageSlot(1), "four"]),),
        SceneDocuments("train", 5)[2].images[:2],
    )
    whole = Processor(own_chat, Squash(), EYES, (4, 4), 2000).example(sample)
    places = np.flatnonzero(whole.ids == IMAGE_TOKEN)
    for length in range(3, len(whole.ids)):
        short = Processor(own_chat, Squash(), EYES, (4, 4), length)
        if length <= places[0] + 1 and (places[0] < 2):
            continue
        example = short.example(sample)
        images = [end < length for end in (places[15], places[31])]
        expected = length if images == [length > places[0], length > places[16]] else places[16 * sum(images)]
        assert len(example.ids) == expected and example.ids.tolist() == whole.ids[:expected].tolist()
        assert len(example.views["eye"]) == len(example.layouts) == sum(images)
        assert example.targets[-1] == IGNORE and (example.targets[:-1] == whole.targets[: expected - 1]).all()


def test_turns_of_a_document_stay() -> None:
    sample = SceneDocuments("train", 5)[2]
    assert shuffled_turns(sample, np.random.default_rng(0)) is sample


def test_evaluation_shows_nothing_or_another_video(own_chat: Chat) -> None:
    process = Processor(own_chat, AnyResMax(3, 4, 4), EYES, (4, 4), 2000)
    kinds = (SceneQuestions, SceneComparisons, SceneVideos)
    samples = [
        kind("val", 40, **extra)[index]
        for kind, extra in zip(kinds, ({"turns": 1}, {}, {}), strict=True)
        for index in range(12)
    ]
    for sample, blind, other in zip(samples, show(samples, "none"), show(samples, "shuffled"), strict=True):
        assert not blind.images and not process.prompt(blind).layouts
        assert other.images != sample.images and other.messages == sample.messages
        assert [isinstance(ref, Video) for ref in other.images] == [isinstance(ref, Video) for ref in sample.images]
        assert process.prompt(other).layouts
