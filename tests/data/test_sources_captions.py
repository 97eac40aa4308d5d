"""Tar shards and parquet with two captions a picture: what a record is, every kind of damage, random access."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from vlm_lab.data.images import load_image
from vlm_lab.data.sample import BadRecord, Sample
from vlm_lab.data.sources import CaptionParquet, WebDataset


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def recaption(text: str) -> bytes:
    return json.dumps({"re_caption": text}).encode()


def colour(sample: Sample) -> tuple[int, ...]:
    pixel = load_image(sample.images[0], "", "").getpixel((0, 0))  # type: ignore[arg-type]
    assert isinstance(pixel, tuple)
    return pixel


def said(sample: Sample) -> object:
    return sample.messages[-1].content[0]


def test_shards_are_read_in_any_order(tmp_path: Path) -> None:
    shard(tmp_path / "s" / "0.tar", {"a.png": picture("red"), "a.txt": b"raw a", "a.json": recaption("A red thing.")})
    members = {"b.json": recaption("Blue."), "b.cls": b"7", "b.png": picture("blue"), "d/c.png": picture("lime")}
    shard(tmp_path / "s" / "1.tar", {**members, "d/c.txt": b"raw c"})
    source = WebDataset(str(tmp_path / "s"))
    assert len(source) == 3
    first, last, middle = source[0], source[2], source[1]
    assert [colour(sample) for sample in (first, middle, last)] == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]
    assert [(s.meta["raw"], s.meta["synthetic"]) for s in (first, middle, last)] == [
        ("raw a", "A red thing."), ("", "Blue."), ("raw c", "")
    ]  # fmt: skip
    assert [said(s) for s in (first, middle, last)] == ["A red thing.", "Blue.", "raw c"]
    assert last.id == "1.tar:d/c" and len({s.id for s in (first, middle, last)}) == 3
    with pytest.raises(IndexError):
        source[3]


def test_a_fingerprint_follows_the_content(tmp_path: Path) -> None:
    members = {"a.png": picture("red"), "a.txt": b"raw"}
    one = WebDataset(str(shard(tmp_path / "one.tar", members)))
    same, other = (WebDataset(str(tmp_path / "one.tar")), WebDataset(str(tmp_path / "one.tar"), synthetic=None))
    changed = WebDataset(str(shard(tmp_path / "more" / "one.tar", {**members, "a.txt": b"rw."})))
    assert one.fingerprint() == same.fingerprint()
    assert len({source.fingerprint() for source in (one, other, changed)}) == 3


def test_damaged_shards_and_records_are_named(tmp_path: Path) -> None:
    bad = {"a.png": picture("red"), "b.txt": b"no picture", "c.png": picture("red"), "c.json": b"{", "c.txt": b"x"}
    source = WebDataset(str(shard(tmp_path / "bad.tar", bad)))
    for index, reason in ((0, "has no caption"), (1, "has no picture"), (2, "`json` is not a JSON object")):
        with pytest.raises(BadRecord, match=reason):
            source[index]
    whole = shard(tmp_path / "cut" / "cut.tar", {f"{n}.png": picture("red") for n in range(3)} | {"0.txt": b"x"})
    whole.write_bytes(whole.read_bytes()[:3000])
    cut = WebDataset(str(whole))
    with pytest.raises(BadRecord, match=r"damaged from here on|ends .* bytes too early"):
        cut[len(cut) - 1]
    (tmp_path / "no.tar").write_bytes(b"no archive at all" * 100)
    with pytest.raises(ValueError, match="is not an uncompressed tar archive"):
        WebDataset(str(tmp_path / "no.tar"))
    with pytest.raises(ValueError, match="name where at least one caption is"):
        WebDataset(str(whole), raw=None, synthetic=None)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="is not a tar shard nor a folder that has some"):
        WebDataset(str(tmp_path / "none"))


def table(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_with_bytes_structs_and_alternatives(tmp_path: Path) -> None:
    pictures = [picture("red"), picture("blue")]
    plain = table(tmp_path / "a.parquet", image=pictures, raw_caption=["x", None], synthetic_caption=[None, "Y. Z."])
    source = CaptionParquet(str(plain))
    assert [said(source[i]) for i in (0, 1)] == ["x", "Y. Z."] and colour(source[1]) == (0, 0, 255)
    nested = [{"bytes": data, "path": "p"} for data in pictures]
    lists = table(tmp_path / "b.parquet", picture=nested, texts=[["one", "two"], ["three"]])
    source = CaptionParquet(str(lists), image="picture", raw="texts", synthetic=None)
    assert source[0].meta["raw"] == ["one", "two"] and said(source[1]) == "three"
    with pytest.raises(ValueError, match="has no column synthetic_caption"):
        CaptionParquet(str(lists), image="picture", raw="texts")
    empty = table(tmp_path / "c.parquet", image=[None, pictures[0]], raw_caption=["x", ""], synthetic_caption=["", ""])
    for index, reason in ((0, "`image` has no bytes"), (1, "has no caption")):
        with pytest.raises(BadRecord, match=reason):
            CaptionParquet(str(empty))[index]
