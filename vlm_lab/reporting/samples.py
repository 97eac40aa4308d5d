"""Questions on which arms disagree most, with the picture and every arm's answer, for a person to look at."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from vlm_lab import build, schema
from vlm_lab.data.images import load_image
from vlm_lab.data.sample import BadRecord, Sample, Video
from vlm_lab.reporting.study import Run, Study

COUNT, SEARCHED, SIDE = 8, 400, 256  # samples shown, questions considered, pixels of a thumbnail's longer side
Node = dict[str, Any]


def samples(study: Study) -> list[Node]:
    """{question, target, image (PNG as base64, or None), answers: {arm: (text, right)}} of `COUNT` questions."""
    first = {arm: study.of(arm)[0] for arm in study.arms}
    points = np.stack([run.measured("real")[:SEARCHED] for run in first.values()])
    chosen = sorted(np.argsort(-points.std(0), kind="stable")[:COUNT].tolist())
    pictures = thumbnails(study.runs[0], chosen)
    return [describe(first, index, pictures.get(index), points[:, index]) for index in chosen]


def describe(runs: dict[str, Run], index: int, picture: str | None, points: np.ndarray) -> Node:
    records = {arm: run.records["real"][index] for arm, run in runs.items()}
    record = next(iter(records.values()))
    answers = {arm: (r["prediction"], bool(p)) for (arm, r), p in zip(records.items(), points, strict=True)}
    kept = {key: record[key] for key in ("id", "group", "question", "target")}
    return {**kept, "image": picture, "answers": answers}


def thumbnails(run: Run, chosen: list[int]) -> dict[int, str]:
    """Pictures by question number; none if the data is not where it was, or the run's settings are of another day."""
    wanted = {(run.records["real"][i]["task"], run.records["real"][i]["id"]): i for i in chosen}
    out: dict[int, str] = {}
    try:
        sources = build.tasks(schema.load(run.folder / "config.yaml"))
    except (OSError, ValueError):
        return out
    for task, source in sources.items():
        for number in range(len(source)):
            if len(out) == len(wanted):
                return out
            try:
                sample = source[number]
            except BadRecord:
                continue
            if (task, sample.id) in wanted and (picture := thumbnail(sample)) is not None:
                out[wanted[task, sample.id]] = picture
    return out


def thumbnail(sample: Sample) -> str | None:
    pictures = [ref for ref in sample.images if not isinstance(ref, Video)]
    if not pictures:
        return None
    image = load_image(pictures[0], sample.where, sample.id)
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()
