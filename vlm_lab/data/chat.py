"""Chat templates: a conversation to token ids, with the answer tokens marked and image placeholders laid out.

A template is data: the text before and after each role's turn. Text between two images is tokenized in one piece, so
the ids are those that the tokenizer gives for the whole string; which of them belong to an answer is read from the
tokens' character offsets.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from vlm_lab.batch import IGNORE, IMAGE_TOKEN
from vlm_lab.data.sample import ImageSlot, Message, Sample


@dataclass(frozen=True)
class Template:
    """`start` opens a conversation; each role is (before, after); `stop` is the text that ends an answer."""

    start: str
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    stop: str
    specials: tuple[str, ...]


TEMPLATES = {
    "chatml": Template(
        start="",
        system=("<|im_start|>system\n", "<|im_end|>\n"),
        user=("<|im_start|>user\n", "<|im_end|>\n"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
        stop="<|im_end|>",
        specials=("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Template(
        start="<|begin_of_text|>",
        system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
        stop="<|eot_id|>",
        specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "vicuna": Template(
        start="<s>",
        system=("", " "),
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
        stop="</s>",
        specials=("<s>", "</s>"),
    ),
}


@dataclass
class Encoded:
    """`ids` [L] with placeholders; `targets` [L], already shifted: the next token where it is an answer's."""

    ids: np.ndarray
    targets: np.ndarray


class Chat:
    """Renders conversations for one tokenizer. `system` is the default system prompt; empty means none."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str, system: str = "") -> None:
        if template not in TEMPLATES:
            raise ValueError(f"llm.chat = {template}: no such chat template; there are {', '.join(TEMPLATES)}")
        self.tokenizer, self.template, self.system = tokenizer, TEMPLATES[template], system
        self.stop: list[Any] = [tokenizer.convert_tokens_to_ids(self.template.stop)]

    def encode(self, sample: Sample, image_tokens: Sequence[int]) -> Encoded:
        """The whole conversation, answers as targets. `image_tokens[i]` is the number of placeholders of image i."""
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
        template = self.template
        out: list[tuple[str, bool] | ImageSlot] = [(template.start, False)]
        if self.system and messages[0].role != "system":
            messages = [Message("system", (self.system,)), *messages]
        for message in messages:
            before, after = getattr(template, message.role)
            answer = message.role == "assistant"
            cut = len(template.stop) if answer else 0  # the stop text is learnt, what follows it is not
            lead = len(before.rstrip(" ")) if answer else len(before)  # the space before an answer belongs to it
            out += [(before[:lead], False), (before[lead:], answer)]
            out += [part if isinstance(part, ImageSlot) else (part, answer) for part in message.content]
            out += [(after[:cut], answer), (after[cut:], False)]
        return out

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
