"""Which questions of a conversation are asked, in which order: drawn for training, so that none is tied to a place."""

import itertools
from dataclasses import replace

import numpy as np

from vlm_lab.data.sample import ImageSlot, Message, Sample


def shuffled_turns(sample: Sample, rng: np.random.Generator, most: int | None = None) -> Sample:
    """`most` (None: all) of the question-answer pairs in random order; the images that opened the first question open
    the new first one.

    A conversation with images in a later turn, or with text before its first image, stays as it is; so does a document.
    """
    system = [m for m in sample.messages if m.role == "system"]
    users, answers = ([m for m in sample.messages if m.role == role] for role in ("user", "assistant"))
    if not users:
        return sample
    opening = list(itertools.takewhile(lambda part: isinstance(part, ImageSlot), users[0].content))
    slots = [part for user in users for part in user.content if isinstance(part, ImageSlot)]
    if len(slots) != len(opening):
        return sample
    questions = ["".join(map(str, user.content[len(opening) if n == 0 else 0 :])) for n, user in enumerate(users)]
    lead = "\n" if opening and questions[0].startswith("\n") else ""
    questions[0] = questions[0].removeprefix(lead)
    turns: list[Message] = []
    for place, old in enumerate(rng.permutation(len(users))[:most]):
        content = (*opening, lead + questions[old]) if place == 0 else (questions[old],)
        turns += [Message("user", content), answers[old]]
    return replace(sample, messages=(*system, *turns))
