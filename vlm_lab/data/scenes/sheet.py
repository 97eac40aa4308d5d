"""A contact sheet of the made-up world: pictures with captions, questions and answers.

    python -m vlm_lab.data.scenes.sheet OUT.png [--rows 4] [--split val] [--seed 0]

For people who want to judge whether the questions are fair and the text is legible. It shows the first scenes of a
split as they are, at twice their size, then one comparison and one video of every kind, and two documents; nothing is
selected. Videos are shown frame by frame.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

from vlm_lab.data.sample import ImageRef, ImageSlot, Sample, Video
from vlm_lab.data.scenes.compose import compose
from vlm_lab.data.scenes.draw import load_font, render
from vlm_lab.data.scenes.multi import SceneComparisons, SceneDocuments, SceneVideos
from vlm_lab.data.scenes.questions import GROUPS, ask
from vlm_lab.data.scenes.source import SceneCaptions
from vlm_lab.data.scenes.world import SPLITS, stream

PAPER = (236, 236, 240)  # no background of the world, so that a picture's edge shows
COLUMNS, TEXT_WIDTH, MARGIN, LINE, PX = 2, 440, 14, 17, 13
WIDTH = 400 + 2 * MARGIN + TEXT_WIDTH  # of a cell
INKS = {"caption": (20, 20, 20), "alt text": (130, 90, 20)} | dict(
    zip(GROUPS, ((20, 80, 190), (90, 90, 90), (150, 30, 120), (10, 120, 50)), strict=True)
)


def cell(seed: int, split: str, index: int) -> Image.Image:
    """One scene at twice its size beside everything that is said about it."""
    scene = compose(seed, split, index)
    picture = render(scene)
    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    lines = [
        (kind, line) for kind, text in _texts(seed, split, index) for line in _wrapped(f"[{kind}] {text}", TEXT_WIDTH)
    ]
    height = max(picture.height, LINE * len(lines)) + MARGIN
    page = Image.new("RGB", (WIDTH, height), PAPER)
    page.paste(picture, (400 - picture.width, 0))
    pen = ImageDraw.Draw(page)
    for row, (kind, line) in enumerate(lines):
        pen.text((400 + MARGIN, LINE * row), line, INKS[kind], load_font("DejaVuSans", PX))
    return page


def _texts(seed: int, split: str, index: int) -> Iterator[tuple[str, str]]:
    """(kind, text): both captions, then the turns that `SceneQuestions` has for this record."""
    for name, kind in (("caption", "long"), ("alt text", "alt")):
        yield name, str(SceneCaptions(split, index + 1, seed, kind)[index].messages[-1].content[0])
    for question in ask(compose(seed, split, index), GROUPS, 6, stream(seed, split, index, "question")):
        yield question.group, question.prompt.replace("\n", " / ") + f" -> {question.answer}"


def strip(sample: Sample) -> Image.Image:
    """A record of several pictures: they stand side by side, what is said about them is below."""
    pictures = [picture for ref in sample.images for picture in _pictures(ref)]
    scale = min(1.5, (WIDTH - MARGIN * len(pictures)) / sum(picture.width for picture in pictures))
    pictures = [each.resize((int(scale * each.width), int(scale * each.height))) for each in pictures]
    lines = list(_wrapped(f"[{sample.group}] {_told(sample)}", WIDTH - MARGIN))
    top = max(picture.height for picture in pictures) + 4
    page = Image.new("RGB", (WIDTH, top + LINE * len(lines) + MARGIN), PAPER)
    left = 0
    for picture in pictures:
        page.paste(picture, (left, 0))
        left += picture.width + MARGIN
    pen = ImageDraw.Draw(page)
    for row, line in enumerate(lines):
        pen.text((0, top + LINE * row), line, INKS["caption"], load_font("DejaVuSans", PX))
    return page


def _pictures(ref: ImageRef | Video) -> list[Image.Image]:
    refs = ref.content if isinstance(ref, Video) else ref
    assert not isinstance(refs, bytes | Path)  # the world has no files
    return [each.draw() for each in refs] if isinstance(refs, tuple) else [refs.draw()]


def _told(sample: Sample) -> str:
    parts = (part for message in sample.messages for part in (*message.content, "->"))
    words = " ".join(f"<{part.index + 1}>" if isinstance(part, ImageSlot) else part for part in parts)
    return words.removesuffix("->").replace("\n", " / ")


def _wrapped(text: str, width: int) -> Iterator[str]:
    font, line = load_font("DejaVuSans", PX), ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if font.getlength(longer) > width:
            yield line
            longer = word
        line = longer
    yield line


def sheet(rows: int, split: str, seed: int) -> Image.Image:
    cells = [cell(seed, split, index) for index in range(rows * COLUMNS)]
    for kind, count in ((SceneComparisons, len(SceneComparisons.wordings)), (SceneVideos, 5), (SceneDocuments, 2)):
        source = kind(split, count, seed)
        cells += [strip(source[index]) for index in range(count)]
    bands = [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]
    heights = [max(cell.height for cell in band) + MARGIN for band in bands]
    page = Image.new("RGB", (COLUMNS * (cells[0].width + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    top = MARGIN
    for band, height in zip(bands, heights, strict=True):
        for column, each in enumerate(band):
            page.paste(each, (MARGIN + column * (each.width + MARGIN), top))
        top += height
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--split", choices=SPLITS, default="val")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sheet(args.rows, args.split, args.seed).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
