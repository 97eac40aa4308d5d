"""Generation for evaluation: questions in, prediction records out. Scoring is a separate, pure step (eval/metrics.py).

Greedy, so no random number is drawn and a training run's generator is left as it was.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from vlm_lab.batch import Prompts
from vlm_lab.data.loader import stack_views, view_sizes
from vlm_lab.data.process import Example, Processor
from vlm_lab.data.sample import BadRecord, Drawn, ImageRef, ImageSlot, Sample, Source, Video
from vlm_lab.eval.metrics import Record
from vlm_lab.model.vlm import VLM

MODES = ("real", "none", "shuffled")


def predict(vlm: VLM, processor: Processor, samples: Sequence[Sample], batch: int, max_new_tokens: int) -> list[Record]:
    """One record per sample whose images can be used, in order; the others get an empty prediction and an `error`."""
    vlm.eval()
    records, device = [], next(vlm.parameters()).device
    for chunk in chunks(samples, batch):
        examples = [attempt(processor, sample) for sample in chunk]
        good = [e for e in examples if isinstance(e, Example)]
        answers = iter(generate(vlm, processor, good, max_new_tokens, device))
        for sample, example in zip(chunk, examples, strict=True):
            failed = isinstance(example, BadRecord)
            records.append(record_of(sample, "" if failed else next(answers), str(example) if failed else None))
    return records


def generate(
    vlm: VLM, processor: Processor, examples: Sequence[Example], max_new_tokens: int, device: torch.device
) -> list[str]:
    if not examples:
        return []
    prompts = pad_left(examples, processor).to(device)
    stop = processor.chat.stop
    ids = vlm.generate(prompts, max_new_tokens, stop).tolist()
    ids = [row[: min((row.index(token) for token in stop if token in row), default=len(row))] for row in ids]
    return [text.strip() for text in processor.chat.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def pad_left(examples: Sequence[Example], processor: Processor) -> Prompts:
    """Prompts of different lengths in one batch, their last tokens aligned."""
    longest = max(len(e.ids) for e in examples)
    ids = np.zeros((len(examples), longest), dtype=np.int64)
    mask = np.zeros((len(examples), longest), dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, longest - len(example.ids) :] = example.ids
        mask[row, longest - len(example.ids) :] = 1
    layouts = [layout for example in examples for layout in example.layouts]
    pixels, sizes = stack_views(examples, processor), view_sizes(examples, processor)
    return Prompts(torch.from_numpy(ids), torch.from_numpy(mask), pixels, layouts, sizes)


def show(samples: Sequence[Sample], mode: str) -> list[Sample]:
    """The samples with their own images (`real`), without any (`none`), or with another sample's (`shuffled`)."""
    if mode == "none":
        return [without_images(sample) for sample in samples]
    if mode == "shuffled":
        return shuffled(samples)
    return list(samples)


def without_images(sample: Sample) -> Sample:
    """Text only: the slots go, and so does the line break that a leading image leaves behind."""
    messages = []
    for message in sample.messages:
        text = "".join(part for part in message.content if not isinstance(part, ImageSlot))
        messages.append(replace(message, content=(text.removeprefix("\n"),)))
    return replace(sample, messages=tuple(messages), images=())


def shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """Each gets the images (or videos) of the one half a list further on with as many of them: nobody keeps its own."""
    alike: dict[tuple[bool, ...], list[int]] = {}
    for index, sample in enumerate(samples):
        alike.setdefault(tuple(isinstance(ref, Video) for ref in sample.images), []).append(index)
    out = list(samples)
    for indices in alike.values():
        for place, index in enumerate(indices):
            other = indices[(place + max(1, len(indices) // 2)) % len(indices)]
            out[index] = replace(samples[index], images=samples[other].images)
    return out


def attempt(processor: Processor, sample: Sample) -> Example | BadRecord:
    try:
        return processor.prompt(sample)
    except BadRecord as bad:
        return bad


def record_of(sample: Sample, prediction: str, error: str | None) -> Record:
    question, answer = sample.messages[-2], sample.messages[-1]
    text = "".join(part for part in question.content if isinstance(part, str)).strip()
    record = {
        "id": sample.id,
        "group": sample.group or sample.source,
        "image": image_key(sample),
        "question": text,
        "target": "".join(map(str, answer.content)),
        "prediction": prediction,
        "choices": sample.meta.get("choices"),
    }
    return record if error is None else {**record, "error": error}


def image_key(sample: Sample) -> str:
    """Names what the question is about: statistics treat questions with the same key as one cluster."""
    names = [named(ref.content if isinstance(ref, Video) else ref) for ref in sample.images]
    return "+".join(filter(None, names)) or sample.id.rpartition("#")[0] or sample.id  # "<record>#<turn>": SingleTurn


def named(ref: ImageRef | tuple[Drawn, ...]) -> str | None:
    """A file's path, or a digest of its bytes; None for what is drawn, which its record alone names."""
    if isinstance(ref, bytes):
        return hashlib.sha256(ref).hexdigest()[:16]
    return str(ref) if isinstance(ref, Path) else None


def questions(source: Source, limit: int | None) -> list[Sample]:
    """All records, or `limit` of them drawn without replacement, always the same ones."""
    count = len(source) if limit is None else min(limit, len(source))
    return [source[index] for index in sorted(random.Random(0).sample(range(len(source)), count))]


def chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
