"""The Cauldron's parquet: conversations, random access in memory and on disk, bad rows named, bad files refused."""

import os
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlm_lab.data.sample import BadRecord, ImageSlot, Sample, Source
from vlm_lab.data.sources import Cauldron, parquet_rows

FIRST, SECOND = ImageSlot(0), ImageSlot(1)
PNG = b"\x89PNG one"
SCHEMA = pa.schema(
    {
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "texts": pa.list_(pa.struct({"user": pa.string(), "assistant": pa.string(), "source": pa.string()})),
    }
)


def contents(sample: Sample) -> list[tuple[Any, ...]]:
    return [message.content for message in sample.messages]


def refusal(source: Source, index: int = 0) -> BadRecord:
    with pytest.raises(BadRecord) as caught:
        source[index]
    assert "\n" not in str(caught.value)
    return caught.value


def row(*turns: tuple[Any, Any, Any], images: Any = (PNG,)) -> dict[str, Any]:
    images = images if images is None else [image and {"bytes": image, "path": None} for image in images]
    return {
        "images": images,
        "texts": [dict(zip(("user", "assistant", "source"), turn, strict=True)) for turn in turns],
    }


def parquet(path: Path, rows: list[dict[str, Any]], row_group_size: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, row_group_size=row_group_size)
    return path


HUMAN, MADE = ("Q1", "A1", "nlvr"), ("Q2", "A2", "nlvr_scene")


def test_cauldron_rows_become_conversations(tmp_path: Path) -> None:
    parquet(tmp_path / "x.parquet", [row(HUMAN, MADE, MADE), row(MADE, images=(PNG, b"two")), row(HUMAN, images=())])
    source = Cauldron(str(tmp_path))
    assert contents(source[0]) == [(FIRST, "\nQ1"), ("A1",), ("Q2",), ("A2",), ("Q2",), ("A2",)]
    assert (source[0].id, source[0].source, source[0].group) == ("x.parquet:0", "nlvr+nlvr_scene", "nlvr+nlvr_scene")
    assert source[0].meta == {"turn_sources": ["nlvr", "nlvr_scene", "nlvr_scene"]}
    assert contents(source[1])[0] == (FIRST, SECOND, "\nQ2") and source[1].images == (PNG, b"two")
    assert source[1].source == "nlvr_scene"
    assert contents(source[2]) == [("Q1",), ("A1",)]


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [row((f"Q{number}", "A", "s"), images=(b"%d" % number,)) for number in range(start, start + count)]


@pytest.mark.parametrize("on_disk", [False, True])
def test_cauldron_random_access_over_files_and_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_disk: bool
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(parquet_rows, "IN_MEMORY", 0 if on_disk else 10**9)
    parquet(tmp_path / "d" / "1.parquet", numbered(150), row_group_size=7)
    parquet(tmp_path / "d" / "sub" / "2.parquet", numbered(70, 150), row_group_size=1000)
    source = Cauldron(str(tmp_path / "d"))
    assert len(source) == 220
    for index in (219, 0, 63, 64, 149, 150, 213, 7):
        assert (source[index].images, contents(source[index])[0]) == ((b"%d" % index,), (FIRST, f"\nQ{index}"))
    assert source[151].id == "sub/2.parquet:1"
    assert len(list(cache.rglob("*"))) == (4 if on_disk else 0)  # two folders, two files, no scratch left behind
    assert pickle.loads(pickle.dumps(source))[200] == source[200] and len(pickle.dumps(source)) < 2000
    with pytest.raises(IndexError):
        source[220]


def test_cauldron_disk_copy_follows_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(parquet_rows, "IN_MEMORY", 0)
    path = parquet(tmp_path / "x.parquet", numbered(3))
    assert contents(Cauldron(str(path))[0])[0] == (FIRST, "\nQ0")
    parquet(path, numbered(3, 5))
    assert contents(Cauldron(str(path))[0])[0] == (FIRST, "\nQ5")


def test_cauldron_turn_sources(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", [row(HUMAN, MADE), row(MADE), row(MADE, HUMAN), row()])
    source = Cauldron(str(path), turn_sources=["nlvr"])
    assert [source[index].id for index in range(2)] == ["x.parquet:0", "x.parquet:2"]
    assert contents(source[1]) == [(FIRST, "\nQ1"), ("A1",)] and source[1].source == "nlvr"
    assert len(source) == 3 and refusal(source, 2).record == "row 3"  # broken is not the same as not wanted
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    with pytest.raises(ValueError, match=r"data.turn_sources = \['nvlr'\].*there are \['nlvr', 'nlvr_scene'\]"):
        Cauldron(str(path), turn_sources=["nvlr"])


BAD_ROWS = {
    "no turns": (row(), "has no turns in `texts`"),
    "null texts": ({"images": [], "texts": None}, "has no turns in `texts`"),
    "null turn": ({"images": [], "texts": [None]}, "turn 1 `user` is null"),
    "null images": (row(HUMAN, images=None), "has no `images`"),
    "null image": (row(HUMAN, images=(PNG, None)), "image 2 has no `bytes`"),
    "path only": (
        {"images": [{"bytes": None, "path": "a.png"}], "texts": row(HUMAN)["texts"]},
        "image 1 has no `bytes`",
    ),
    "null user": (row(HUMAN, (None, "A", "s")), "turn 2 `user` is null"),
    "null answer": (row(("Q", None, "s")), "turn 1 `assistant` is null"),
    "empty answer": (row(HUMAN, ("Q", " ", "s")), "turn 2 `assistant` is an empty answer"),
    "empty question": (row(("", "A", "s"), images=()), "neither an image nor a question"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_cauldron_bad_row(tmp_path: Path, case: str) -> None:
    bad, reason = BAD_ROWS[case]
    parquet(tmp_path / "1.parquet", [row(HUMAN)] * 4)
    path = parquet(tmp_path / "2.parquet", [row(HUMAN), bad, row(HUMAN)])
    source = Cauldron(str(tmp_path))
    error = refusal(source, 5)
    assert (error.where, error.record) == (str(path), "row 1") and reason in error.reason
    assert contents(source[6]) == contents(source[0])


def test_cauldron_null_source_is_no_source(tmp_path: Path) -> None:
    source = Cauldron(str(parquet(tmp_path / "x.parquet", [row(("Q", "A", None), HUMAN)])))
    assert (source[0].source, source[0].meta) == ("nlvr", {"turn_sources": ["", "nlvr"]})


def test_cauldron_damaged_pages_are_bad_records(tmp_path: Path) -> None:
    path = parquet(tmp_path / "x.parquet", numbered(100), row_group_size=100)
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(data)
    error = refusal(Cauldron(str(path)))
    assert error.where == str(path) and "cannot be read as parquet" in error.reason


def test_cauldron_wrong_schema_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    for table, complaint in (
        ({"image": [b"x"], "texts": [[]]}, "has no column `images` but ['image', 'texts']"),
        ({"images": [b"x"], "texts": [[]]}, "column `images` has no ['bytes'], it is binary"),
        ({"images": [[{"bytes": b"x"}]], "texts": [[{"user": "Q"}]]}, "column `texts` has no ['assistant', 'source']"),
    ):
        pq.write_table(pa.table(table), path)
        with pytest.raises(ValueError, match=r"^data\.path: ") as caught:
            Cauldron(str(tmp_path))
        assert complaint in str(caught.value) and str(path) in str(caught.value) and "expected are" in str(caught.value)


def test_cauldron_path_that_cannot_be_used(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ValueError, match=f"^data.path = {path} is not a parquet file nor a folder"):
            Cauldron(str(path))
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=f"^data.path: {tmp_path}/x.parquet is not readable parquet"):
        Cauldron(str(tmp_path))
    parquet(tmp_path / "x.parquet", [])
    with pytest.raises(ValueError, match="has no rows"):
        Cauldron(str(tmp_path))


@pytest.mark.parametrize("sampled", [False, True])
def test_cauldron_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool) -> None:
    monkeypatch.setattr(parquet_rows, "HASHED_WHOLE", 0 if sampled else 10**9)
    path = parquet(tmp_path / "x.parquet", [row(HUMAN, MADE)])
    before = Cauldron(str(path)).fingerprint()
    os.utime(path, (0, 0))
    assert Cauldron(str(tmp_path)).fingerprint() == before
    assert Cauldron(str(path), turn_sources=["nlvr"]).fingerprint() != before
    parquet(path, [row(HUMAN, ("Q2", "A3", "nlvr_scene"))])
    assert Cauldron(str(path)).fingerprint() != before
