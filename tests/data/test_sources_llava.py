"""LLaVA JSON: where images end up, what every bad record's message says, and which files are refused at once."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_lab.data.images import load_image
from vlm_lab.data.sample import BadRecord, ImageSlot, Sample, Source, Video
from vlm_lab.data.sources import LlavaJson

FIRST, SECOND = ImageSlot(0), ImageSlot(1)


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[turn % 2], "value": value} for turn, value in enumerate(values)]


def contents(sample: Sample) -> list[tuple[Any, ...]]:
    return [message.content for message in sample.messages]


def refusal(source: Source, index: int = 0) -> BadRecord:
    with pytest.raises(BadRecord) as caught:
        source[index]
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with two images, and one beside it that is none of its business."""
    folder = tmp_path / "data"
    folder.mkdir()
    for path in (folder / "a.png", folder / "b.png", tmp_path / "secret.png"):
        Image.new("RGB", (6, 4), "red").save(path)
    return folder


def write(root: Path, records: list[Any], name: str = "train.jsonl") -> LlavaJson:
    path = root / name
    if name.endswith("l"):
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        path.write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8", errors="surrogatepass")
    return LlavaJson(str(path))


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_llava_records(root: Path, name: str) -> None:
    one = {"id": "s1", "image": "a.png", "source": "coco", "conversations": talk("<image>\nWie viele \u00fc?", "Drei.")}
    none = {"id": 7, "conversations": talk("Hi", "Hello", "Bye", "Ciao"), "model": "x", "choices": ["A", "B"]}
    source = write(root, [one, none], name)
    assert len(source) == 2
    assert contents(source[0]) == [(FIRST, "\nWie viele \u00fc?"), ("Drei.",)]
    assert [message.role for message in source[1].messages] == ["user", "assistant"] * 2
    assert (source[0].id, source[0].source, source[0].group, source[0].meta) == ("s1", "coco", "coco", {})
    assert (source[1].id, source[1].images, source[1].source) == ("7", (), "")
    assert source[1].meta == {"model": "x", "choices": ["A", "B"]}
    assert load_image(source[0].images[0], "", "").size == (6, 4)
    with pytest.raises(IndexError):
        source[2]


def test_llava_interleaved_images_keep_their_places(root: Path) -> None:
    conversation = talk("First: <image> Second: <image>\nSame?", "No.", "And this: <image>", "Yes.")
    sample = write(root, [{"image": ["a.png", "b.png", "a.png"], "conversations": conversation}])[0]
    assert contents(sample)[0] == ("First: ", FIRST, " Second: ", SECOND, "\nSame?")
    assert contents(sample)[2] == (ImageSlot(2), "\nAnd this:")  # alone in its turn: moved to the front
    assert [path.name for path in sample.images] == ["a.png", "b.png", "a.png"]
    assert sample.id == "1"


@pytest.mark.parametrize(
    "question, content",
    [
        ("What?\n<image>", (FIRST, "\nWhat?")),
        ("See <image> here", (FIRST, "\nSee  here")),  # as LLaVA-NeXT: the mark is cut out, both spaces stay
        ("<image>", (FIRST,)),
        ("\n<image>", (FIRST,)),
        ("What?", (FIRST, "\nWhat?")),  # no mark at all
    ],
)
def test_llava_one_image_goes_to_the_front(root: Path, question: str, content: tuple[Any, ...]) -> None:
    assert contents(write(root, [{"image": "a.png", "conversations": talk(question, "X")}])[0])[0] == content


def test_llava_unmarked_images_go_before_the_first_question(root: Path) -> None:
    conversation = [{"from": "system", "value": "Be brief."}, *talk("Q1", "A1", "Q2", "A2")]
    sample = write(root, [{"image": ["a.png", "b.png"], "conversations": conversation}])[0]
    assert contents(sample) == [("Be brief.",), (FIRST, SECOND, "\nQ1"), ("A1",), ("Q2",), ("A2",)]


@pytest.mark.parametrize("image", [None, "", "None", "nan", []])
def test_llava_no_image(root: Path, image: object) -> None:
    assert write(root, [{"image": image, "conversations": talk("Q", "A")}])[0].images == ()


@pytest.mark.parametrize("mark", ["<image>", "<video>"])
def test_llava_video(root: Path, mark: str) -> None:
    (root / "film.mp4").write_bytes(b"decoded when it is asked for")
    sample = write(root, [{"video": "film.mp4", "conversations": talk(f"{mark}\nQ", "A")}])[0]
    assert sample.images == (Video(root.resolve() / "film.mp4"),)
    assert contents(sample) == [(FIRST, "\nQ"), ("A",)]


def test_llava_root(root: Path, tmp_path: Path) -> None:
    write(tmp_path, [{"image": "a.png", "conversations": talk("Q", "A")}])
    source = LlavaJson(str(tmp_path / "train.jsonl"), root=str(root))
    assert source[0].images == (root.resolve() / "a.png",)


def test_llava_byte_order_mark_blank_lines_and_windows_line_ends(root: Path) -> None:
    record = json.dumps({"image": "a.png", "conversations": talk("Q", "A")})
    for name, body in (
        ("a.jsonl", f"\ufeff{record}\r\n\r\n{record}\r\n"),
        ("a.json", f"\ufeff [ {record} ,\r\n{record}]\r\n"),
    ):
        (root / name).write_bytes(body.encode())
        source = LlavaJson(str(root / name))
        assert len(source) == 2 and contents(source[0]) == contents(source[1]) == [(FIRST, "\nQ"), ("A",)]


GOOD = talk("Q", "A")
BAD_RECORDS = {
    "outside": ({"image": "../secret.png", "conversations": GOOD}, "../secret.png lies outside data.root"),
    "missing": ({"image": "c.png", "conversations": GOOD}, "image c.png is not in data.root"),
    "folder": ({"image": ".", "conversations": GOOD}, "image . is not in data.root"),
    "null in path": ({"image": "a\0.png", "conversations": GOOD}, "cannot be used: embedded null"),
    "long path": ({"image": "a" * 5000, "conversations": GOOD}, "cannot be used: "),
    "image type": ({"image": 3, "conversations": GOOD}, "`image` is int, not text"),
    "image item": ({"image": ["a.png", None], "conversations": GOOD}, "`image` is null"),
    "missing video": ({"video": "a.mp4", "conversations": GOOD}, "video a.mp4 is not in data.root"),
    "video outside": ({"video": "../secret.png", "conversations": GOOD}, "video ../secret.png lies outside data.root"),
    "video marks": ({"video": "a.png", "conversations": talk("<video><video>", "A")}, "has 2 <image> mark(s) for 1"),
    "source type": ({"source": ["x"], "conversations": GOOD}, "`source` is list, not text"),
    "no object": (["Q", "A"], "is list, not an object"),
    "no conversations": ({"text": "Q"}, "has no `conversations`"),
    "conversations type": ({"conversations": "Q"}, "`conversations` is not a list"),
    "no turns": ({"conversations": []}, "ends without an answer"),
    "only system": ({"conversations": [{"from": "system", "value": "S"}]}, "ends without an answer"),
    "no from": ({"conversations": [{"value": "Q"}]}, "turn 1 is not an object with `from` and `value`"),
    "no value": ({"conversations": [*talk("Q"), {"from": "gpt"}]}, "turn 2 is not an object with `from` and `value`"),
    "turn type": ({"conversations": ["Q", "A"]}, "turn 1 is not an object"),
    "value type": ({"conversations": talk("Q", 3)}, "turn 2 `value` is int, not text"),
    "value null": ({"conversations": talk(None, "A")}, "turn 1 `value` is null"),
    "unknown role": ({"conversations": [{"from": "bot", "value": "A"}]}, "turn 1 is from 'bot'"),
    "answer first": ({"conversations": talk("Q", "A")[::-1]}, "turn 1 is from gpt, expected human"),
    "two questions": ({"conversations": talk("Q", "A")[:1] * 2}, "turn 2 is from human, expected gpt"),
    "late system": (
        {"conversations": [*GOOD, {"from": "system", "value": "S"}]},
        "turn 3 is from system, expected human",
    ),
    "no last answer": ({"conversations": talk("Q", "A", "Q")}, "ends without an answer"),
    "empty answer": ({"conversations": talk("Q", " \n")}, "turn 2 `value` is an empty answer"),
    "empty question": ({"conversations": talk("", "A")}, "turn 1 is empty"),
    "surrogate": ({"conversations": talk("\ud800", "A")}, "turn 1 `value` has half of a surrogate pair"),
    "mark in answer": (
        {"image": "a.png", "conversations": talk("Q", "<image>")},
        "turn 2 has an <image> mark in a gpt turn",
    ),
    "more marks": (
        {"image": "a.png", "conversations": talk("<image><image>", "A")},
        "2 <image> mark(s) for 1 image(s)",
    ),
    "marks, no image": ({"conversations": talk("<image>", "A")}, "1 <image> mark(s) for 0 image(s)"),
    "fewer marks": (
        {"image": ["a.png", "b.png"], "conversations": talk("<image>Q", "A")},
        "1 <image> mark(s) for 2 image(s)",
    ),
}


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
@pytest.mark.parametrize("case", BAD_RECORDS)
def test_llava_bad_record(root: Path, case: str, name: str) -> None:
    record, reason = BAD_RECORDS[case]
    bad = record | {"id": "r2"} if isinstance(record, dict) else record
    source = write(root, [{"conversations": GOOD}, json.loads(json.dumps(bad)), {"conversations": GOOD}], name)
    error = refusal(source, 1)
    assert error.where == str(root / name)
    assert error.record == ("line 2" if name == "train.jsonl" else "record 2") + (
        " (id r2)" if bad is not record else ""
    )
    assert reason in error.reason
    assert contents(source[2]) == contents(source[0])  # the neighbours are unharmed


def test_llava_absolute_path_and_symlink_out_of_the_root(root: Path, tmp_path: Path) -> None:
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "inside.png").symlink_to(root / "a.png")
    names = [str(tmp_path / "secret.png"), "link.png", "inside.png", str(root / "a.png")]
    source = write(root, [{"image": name, "conversations": GOOD} for name in names])
    assert all("lies outside data.root" in refusal(source, index).reason for index in (0, 1))
    assert source[2].images == source[3].images == (root.resolve() / "a.png",)


def test_llava_malformed_line_is_a_bad_record(root: Path) -> None:
    (root / "x.jsonl").write_bytes(b'{"conversations": [\n\n{"id": "\xff"}\n')
    source = LlavaJson(str(root / "x.jsonl"))
    assert [refusal(source, index).record for index in range(2)] == ["line 1", "line 3"]
    assert all("is not valid JSON" in refusal(source, index).reason for index in range(2))


@pytest.mark.parametrize(
    "name, body, complaint",
    [
        ("a.json", None, "is not a .json or .jsonl file"),
        ("a.txt", "[]", "is not a .json or .jsonl file"),
        ("a.json", "", "has no records"),
        ("a.json", " [ ] ", "has no records"),
        ("a.jsonl", "\n \n", "has no records"),
        ("a.json", '{"id": 1}', "is not a JSON list; a file with one record a line is named .jsonl"),
        ("a.json", "hello", "is not a JSON list"),
        ("a.json", '[{"id": 1}, {"id": ', "is not valid JSON: item 2"),
        ("a.json", '[{"id": 1},]', "is not valid JSON: item 2"),
        ("a.json", '[{"id": 1}', "the list should end here"),
        ("a.json", '[{"id": 1}] [{"id": 2}]', "the list should end here"),
        ("a.json", "[" * 100_000, "is not valid JSON: item 1"),
    ],
)
def test_llava_file_that_cannot_be_used(root: Path, name: str, body: str | None, complaint: str) -> None:
    if body is not None:
        (root / name).write_text(body)
    with pytest.raises(ValueError, match=r"^data\.path = ") as caught:
        LlavaJson(str(root / name))
    assert complaint in str(caught.value) and str(root / name) in str(caught.value) and "\n" not in str(caught.value)


def test_llava_root_that_is_not_there(root: Path) -> None:
    write(root, [{"conversations": GOOD}])
    with pytest.raises(ValueError, match=r"data\.root = /nowhere is not a folder"):
        LlavaJson(str(root / "train.jsonl"), root="/nowhere")


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_llava_pickles_small(root: Path, name: str) -> None:
    source = write(root, [{"conversations": talk("Q" * 1000, "A")}] * 200, name)
    before = source[199]
    pickled = pickle.dumps(source)
    assert len(pickled) < 10_000 and pickle.loads(pickled)[199] == before


def test_llava_fingerprint_is_of_the_content(root: Path, tmp_path: Path) -> None:
    source = write(root, [{"conversations": talk("Q", "A")}])
    before = source.fingerprint()
    os.utime(root / "train.jsonl", (0, 0))
    assert source.fingerprint() == LlavaJson(str(root / "train.jsonl"), str(root)).fingerprint() == before
    assert LlavaJson(str(root / "train.jsonl"), str(tmp_path)).fingerprint() != before
    assert write(root, [{"conversations": talk("Q", "B")}]).fingerprint() != before
