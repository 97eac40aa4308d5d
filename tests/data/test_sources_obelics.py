"""OBELICS' parquet: documents in reading order, runs of long ones, bad documents named, bad files refused."""

import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm_lab.data.sample import BadRecord, ImageSlot, Message
from vlm_lab.data.sources import Obelics

PNG = b"\x89PNG one"
IMAGES = {
    "struct": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    "binary": pa.binary(),
    "string": pa.string(),
}
Unit = str | bytes | Path


def image_value(unit: Unit, kind: str) -> Any:
    if kind == "struct":
        return {
            "bytes": unit if isinstance(unit, bytes) else None,
            "path": str(unit) if isinstance(unit, Path) else None,
        }
    return str(unit) if kind == "string" else unit


def row(*units: Unit, kind: str = "struct") -> dict[str, Any]:
    """Texts are str, images are bytes or Path."""
    return {
        "images": [None if isinstance(unit, str) else image_value(unit, kind) for unit in units],
        "texts": [unit if isinstance(unit, str) else None for unit in units],
        "metadata": "[]",
    }


def parquet(path: Path, rows: list[dict[str, Any]], kind: str = "struct") -> Path:
    schema = pa.schema({"images": pa.list_(IMAGES[kind]), "texts": pa.list_(pa.string()), "metadata": pa.string()})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=3)
    return path


@pytest.mark.parametrize("kind", IMAGES)
def test_a_document_is_one_message_in_reading_order(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    image: Unit = Path("a.png") if kind == "string" else PNG
    parquet(tmp_path / "x.parquet", [row("A.", "B.", image, "C.", image, image, "D.", kind=kind)], kind)
    (sample,) = [Obelics(str(tmp_path))[0]]
    content = ("A.\n\nB.", ImageSlot(0), "C.", ImageSlot(1), ImageSlot(2), "D.")
    assert sample.messages == (Message("document", content),)
    assert sample.images == ((tmp_path / "a.png").resolve() if kind == "string" else PNG,) * 3
    assert (sample.id, sample.source, sample.file) == ("x.parquet:0", "obelics", str(tmp_path))


def test_short_documents_are_left_out(tmp_path: Path) -> None:
    five, four = [row(*(letter for letter in "ABCDE"[:count])) for count in (5, 4)]
    parquet(tmp_path / "1.parquet", [four, five, four, four])
    parquet(tmp_path / "2.parquet", [four, four, four, four, five])
    source = Obelics(str(tmp_path))
    assert [source[index].id for index in range(len(source))] == ["1.parquet:1", "2.parquet:4"]
    with pytest.raises(IndexError):
        source[2]
    parquet(tmp_path / "2.parquet", [four])
    with pytest.raises(ValueError, match="has no document of at least 5 units"):
        Obelics(str(tmp_path / "2.parquet"))


def test_long_documents_are_cut_into_runs(tmp_path: Path) -> None:
    """17 units in runs of 5: three records, each five neighbours with the images that are among them."""
    units = [f"t{number}" if number % 3 else b"%d" % number for number in range(17)]
    parquet(tmp_path / "x.parquet", [row(*units), row(*"ABCDEF")])
    source = Obelics(str(tmp_path), max_units=5)
    assert [source[index].id for index in range(len(source))] == [
        f"x.parquet:{run}" for run in ("0#0", "0#1", "0#2", "1#0")
    ]
    whole = [(unit, index) for index, unit in enumerate(units)]
    for index in range(3):
        (message,) = source[index].messages
        parts = [p for part in message.content for p in (part.split("\n\n") if isinstance(part, str) else [part])]
        said = [source[index].images[part.index] if isinstance(part, ImageSlot) else part for part in parts]
        start = units.index(said[0])
        assert said == [unit for unit, _ in whole[start : start + 5]]
    assert source[1] == pickle.loads(pickle.dumps(source))[1] == Obelics(str(tmp_path), max_units=5)[1]
    assert [Obelics(str(tmp_path), max_units=5, seed=seed)[0].messages for seed in range(20)] != [
        source[0].messages
    ] * 20


def test_runs_start_at_an_image_three_times_as_often(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", [row(b"0", "t1", "t2", b"3", "t4", "t5", "t6")] * 3000)
    starts = Counter(
        source[index].messages[0].content[0]
        for source in [Obelics(str(tmp_path), max_units=5)]
        for index in range(3000)
    )
    at_image = starts[ImageSlot(0)] / 3000
    assert abs(at_image - 3 / 5) < 0.04  # starts 0 to 2: one image and two texts
    assert sum(text.startswith("t1") for text in starts if isinstance(text, str)) == 1


WEB = {"bytes": None, "path": "https://example.org/a.jpg"}
BAD = {
    "url": ({"images": [WEB, *[None] * 4], "texts": [None, *"ABCD"]}, "is on the web; fetch it"),
    "outside": (row("A", "B", "C", "D", Path("../a.png")), "lies outside data.root"),
    "missing": (row("A", "B", "C", "D", Path("gone.png")), "is not in data.root"),
    "both": ({"images": [{"bytes": PNG}] + [None] * 4, "texts": ["A"] * 5}, "unit 1 has both an image and a text"),
    "neither": ({"images": [None] * 5, "texts": ["A", None, "B", "C", "D"]}, "unit 2 has neither an image nor a text"),
    "lengths": ({"images": [None] * 4, "texts": ["A"] * 5}, "has 4 `images` for 5 `texts`"),
    "no texts": ({"images": [None] * 5, "texts": None}, "has no `texts`"),
    "no images": ({"images": None, "texts": ["A"] * 5}, "has no `images`"),
    "surrogate path": (row("A", "B", "C", "D", Path("x" * 300)), "cannot be used"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_documents_are_named(tmp_path: Path, case: str) -> None:
    bad, reason = BAD[case]
    path = parquet(tmp_path / "x.parquet", [row(*"ABCDE"), row(*"AB"), bad, row(*"ABCDE")])
    source = Obelics(str(tmp_path))
    with pytest.raises(BadRecord) as caught:
        source[1]
    assert (caught.value.where, caught.value.record) == (str(path), "row 2") and reason in caught.value.reason
    assert "\n" not in str(caught.value)
    assert source[2].messages == source[0].messages


def test_wrong_files_and_settings_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for table, complaint in (
        ({"images": [[None]], "text": [["A"]]}, "column `images` is"),
        ({"images": [["a"]], "text": [["A"]]}, "has no column `texts` but ['images', 'text']"),
        ({"images": [["a"]], "texts": [[1]]}, "column `texts` is list<element: int64>"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(ValueError, match=r"^data\.path: ") as caught:
            Obelics(str(path))
        assert complaint in str(caught.value) and "expected are" in str(caught.value)
    parquet(path, [row(*"ABCDE")])
    with pytest.raises(ValueError, match="max_units = 4: a record has at least 5 units"):
        Obelics(str(path), max_units=4)


def test_fingerprint(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", [row(*"ABCDEFGHIJK")])
    (tmp_path / "images").mkdir()
    prints = [
        Obelics(str(path), **arguments).fingerprint()
        for arguments in ({}, {"max_units": 5}, {"max_units": 5, "seed": 1})
    ]
    prints.append(Obelics(str(path), root=str(tmp_path / "images")).fingerprint())
    assert Obelics(str(tmp_path)).fingerprint() == prints[0]
    parquet(path, [row(*"ABCDEFGHIJX")])
    assert len({*prints, Obelics(str(path)).fingerprint()}) == 5
