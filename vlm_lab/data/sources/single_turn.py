"""Makes every question of a multi-turn record a record of its own, as evaluation wants it.

Made for evaluation sets: building it reads every record of the source once, to count questions (no image is decoded).
Earlier turns are left out, their images are not: a question may be about any image shown before it.
"""

from dataclasses import replace

import numpy as np

from vlm_lab.data.sample import BadRecord, ImageSlot, Message, Sample, Source
from vlm_lab.data.sources.common import Content, check_index, digest, images_first

Turn = tuple[Message, Message]


class SingleTurn:
    """Ids are "<id>#<turn>", turns from 0. A record that `source` refuses stays one record that is refused."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._ends = np.cumsum([_num_turns(source, index) for index in range(len(source))])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Sample:
        check_index(index, len(self))
        record = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[record - 1]) if record else 0
        return _single(self.source[record], index - start)

    def fingerprint(self) -> str:
        return digest("single_turn", self.source.fingerprint())


def _num_turns(source: Source, index: int) -> int:
    try:
        return len(_turns(source[index]))
    except BadRecord:  # not skipped: it stays in the index and is reported when it is asked for
        return 1


def _turns(sample: Sample) -> list[Turn]:
    talk = [message for message in sample.messages if message.role != "system"]
    return list(zip(talk[::2], talk[1::2], strict=True))


def _single(sample: Sample, turn: int) -> Sample:
    turns = _turns(sample)
    question, answer = turns[turn]
    own = _slots(question.content)
    earlier = dict.fromkeys(slot for user, _ in turns[:turn] for slot in _slots(user.content) if slot not in own)
    content, images = _renumbered(images_first(earlier, question.content), sample)
    system = tuple(message for message in sample.messages if message.role == "system")
    group, meta = sample.group, sample.meta
    if "turn_sources" in meta:
        group = meta["turn_sources"][turn]
        meta = meta | {"turn_sources": [group]}
    messages = (*system, replace(question, content=content), answer)
    return replace(sample, id=f"{sample.id}#{turn}", messages=messages, images=images, group=group, meta=meta)


def _slots(content: Content) -> list[ImageSlot]:
    return [part for part in content if isinstance(part, ImageSlot)]


def _renumbered(content: Content, sample: Sample) -> tuple[Content, tuple]:
    """`content` and the images that it shows, in its order: images of later turns are left out."""
    new = {slot.index: number for number, slot in enumerate(dict.fromkeys(_slots(content)))}
    parts = tuple(ImageSlot(new[part.index]) if isinstance(part, ImageSlot) else part for part in content)
    return parts, tuple(sample.images[index] for index in new)
