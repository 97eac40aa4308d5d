"""Chat: a conversation to token ids, with the answer tokens marked and image placeholders laid out.

The templates are data (vlm_lab/data/templates.py). Text between two images is tokenized in one piece, so the ids are
those that the tokenizer gives for the whole string; which of them belong to an answer is read from the tokens'
character offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from vlm_lab.batch import IGNORE, IMAGE_TOKEN
from vlm_lab.data.sample import BadRecord, ImageSlot, Message, Sample
from vlm_lab.data.templates import TEMPLATES

Part = str | ImageSlot


@dataclass
class Encoded:
    """`ids` [L] with placeholders; `targets` [L], already shifted: the next token where it is an answer's."""

    ids: np.ndarray
    targets: np.ndarray


class Chat:
    """Renders conversations for one tokenizer. `system` is the default system prompt; empty means none.

    `stop` lists the ids that end an answer: the template's, and the tokenizer's own end of text where that is another.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, system: str = "") -> None:
        if template not in TEMPLATES:
            raise ValueError(f"llm.chat = {template}: no such chat template; there are {', '.join(TEMPLATES)}")
        self.tokenizer, self.template, self.system = tokenizer, TEMPLATES[template], system
        if missing := [token for token in self.template.specials if token not in tokenizer.get_vocab()]:
            raise ValueError(
                f"chat template {template} needs {', '.join(missing)}, which the tokenizer lacks: set llm.chat to it"
            )
        stop = self.tokenize_text([(self.template.stop, False)])[0][-1:].tolist()
        self.stop = [*stop, *({tokenizer.eos_token_id} - {None, *stop})]

    def encode(self, sample: Sample, image_tokens: Sequence[int]) -> Encoded:
        """The whole conversation, answers as targets. `image_tokens[i]` is the number of placeholders of image i.

        Raises BadRecord if the template is for captions and there is more than one exchange.
        """
        if self.template.caption and sum(message.role == "user" for message in sample.messages) > 1:
            reason = "several questions, but this stage's chat template learns the caption of an image"
            raise BadRecord(sample.where, sample.id, reason)
        ids, answers = self.tokenize(self.pieces(sample.messages), image_tokens)
        targets = np.full_like(ids, IGNORE)
        targets[:-1] = np.where(answers[1:], ids[1:], IGNORE)
        return Encoded(ids, targets)

    def prompt(self, sample: Sample, image_tokens: Sequence[int]) -> np.ndarray:
        """Everything up to where the assistant's answer to the last user turn begins."""
        turns = [m for m in sample.messages if m.role != "assistant" or m is not sample.messages[-1]]
        opening = [(self.template.assistant[0].rstrip(" "), False)]
        return self.tokenize([*self.pieces(turns), *opening], image_tokens)[0]

    def pieces(self, messages: Sequence[Message]) -> list[tuple[str, bool] | ImageSlot]:
        """(text, is it to be learnt?) and image slots, in order. An answer ends with the template's stop text."""
        start = self.tokenizer.bos_token or "" if self.template.start is None else self.template.start
        out: list[tuple[str, bool] | ImageSlot] = [(start, False)]
        if messages[0].role == "document":  # nobody speaks: all of its text is learnt, up to the end of text
            out += [part if isinstance(part, ImageSlot) else (part, True) for part in messages[0].content]
            return [*out, (self.tokenizer.eos_token or self.template.stop, True)]
        for message in self.arranged(messages):
            before, after = getattr(self.template, message.role)
            answer = message.role == "assistant"
            if self.template.tight and self.begins_with_image(message):
                before = before.rstrip(" ")
            cut = after.index(self.template.stop) + len(self.template.stop) if answer else 0  # learnt up to there
            lead = len(before.rstrip(" ")) if answer else len(before)  # the space before an answer belongs to it
            out += [(before[:lead], False), (before[lead:], answer)]
            out += [part if isinstance(part, ImageSlot) else (part, answer) for part in message.content]
            out += [(after[:cut], answer), (after[cut:], False)]
        return out

    def arranged(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The turns as the template wants them: with the system prompt in its place, or images and captions alone."""
        if self.template.caption:
            turns = [message for message in messages if message.role != "system"]
            return [m if m.role == "assistant" else replace(m, content=slots(m.content)) for m in turns]
        if self.system and messages[0].role != "system":
            messages = [Message("system", (self.system,)), *messages]
        if not self.template.nested or messages[0].role != "system":
            return messages
        (before, after), (system, first, *rest) = self.template.system, messages
        return [replace(first, content=(before, *system.content, after, *first.content)), *rest]

    def begins_with_image(self, message: Message) -> bool:
        """Whether an image comes first, special tokens that mark it aside."""
        first = next((part for part in message.content if part not in self.template.specials), "")
        return isinstance(first, ImageSlot)

    def tokenize(
        self, pieces: Sequence[tuple[str, bool] | ImageSlot], image_tokens: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and which of them are answers. Text between images is tokenized in one piece."""
        ids, answers, run = [], [], []
        for piece in [*pieces, None]:
            if isinstance(piece, tuple):
                run.append(piece)
                continue
            text_ids, text_answers = self.tokenize_text(run)
            run = []
            ids.append(text_ids)
            answers.append(text_answers)
            if piece is not None:
                ids.append(np.full(image_tokens[piece.index], IMAGE_TOKEN))
                answers.append(np.zeros(image_tokens[piece.index], dtype=bool))
        return np.concatenate(ids), np.concatenate(answers)

    def tokenize_text(self, run: Sequence[tuple[str, bool]]) -> tuple[np.ndarray, np.ndarray]:
        learnt = np.repeat([answer for _, answer in run], [len(text) for text, _ in run])  # per character
        text = "".join(text for text, _ in run)
        if not text:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=bool)
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        starts = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
        return np.array(encoding.ids, dtype=np.int64), learnt[np.minimum(starts, len(learnt) - 1)]


def slots(content: Sequence[Part]) -> tuple[Part, ...]:
    return tuple(part for part in content if isinstance(part, ImageSlot))
