"""Chat templates: ids of the whole string, answers found by offsets, placeholders, prompts that continue exactly."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ColourSource

from vlm_lab.batch import IGNORE, IMAGE_TOKEN
from vlm_lab.data.chat import TEMPLATES, Chat
from vlm_lab.data.sample import ImageSlot, Message, Sample
from vlm_lab.data.tokenizer import trained_tokenizer

JINJA = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "llama3": "<|begin_of_text|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}",
    "vicuna": "<s>{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} "
    "{% elif m.role == 'assistant' %}ASSISTANT: {{ m.content }}</s>{% else %}{{ m.content }} {% endif %}{% endfor %}",
}
TURNS = (
    Message("user", ("Say red.",)),
    Message("assistant", ("red and blue",)),
    Message("user", ("Name a colour.",)),
    Message("assistant", ("green is one",)),
)


@pytest.fixture(params=sorted(TEMPLATES))
def any_chat(request: pytest.FixtureRequest, cache: Path) -> Chat:
    return Chat(trained_tokenizer([ColourSource()], request.param, 400, cache), request.param, "Be brief.")


def test_ids_equal_the_published_jinja_template(any_chat: Chat) -> None:
    name = next(name for name, template in TEMPLATES.items() if template is any_chat.template)
    messages = [{"role": "system", "content": "Be brief."}]
    messages += [{"role": m.role, "content": m.content[0]} for m in TURNS]
    expected = any_chat.tokenizer.apply_chat_template(messages, chat_template=JINJA[name], return_dict=False)
    assert any_chat.encode(Sample("s", TURNS), []).ids.tolist() == expected


def test_targets_are_the_answers_and_their_stop_text(any_chat: Chat) -> None:
    encoded = any_chat.encode(Sample("s", TURNS), [])
    learnt = any_chat.tokenizer.decode(encoded.targets[encoded.targets != IGNORE])
    stop = any_chat.template.stop
    assert learnt.replace(" ", "") == f"redandblue{stop}greenisone{stop}"
    shifted = np.flatnonzero(encoded.targets != IGNORE)
    assert (encoded.ids[shifted + 1] == encoded.targets[shifted]).all()


def test_prompt_is_a_prefix_and_the_answer_follows(any_chat: Chat) -> None:
    sample = Sample("s", (Message("user", (ImageSlot(0), "\nWhat colour is it?")), Message("assistant", ("red",))))
    prompt, encoded = any_chat.prompt(sample, [3]), any_chat.encode(sample, [3])
    assert encoded.ids[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.targets[len(prompt) - 1] == encoded.ids[len(prompt)]  # the first answer token
    assert (encoded.targets[: len(prompt) - 1] == IGNORE).all()


def test_placeholders_stand_where_the_images_are(chat: Chat) -> None:
    content = ("First ", ImageSlot(0), " second ", ImageSlot(1), " which colours?")
    ids = chat.encode(Sample("s", (Message("user", content), Message("assistant", ("red",)))), [2, 3]).ids
    image = ids == IMAGE_TOKEN
    assert image.sum() == 5
    runs = np.flatnonzero(np.diff(image.astype(int)))
    assert len(runs) == 4  # two separate runs
    assert chat.tokenizer.decode(ids[~image]).count("second") == 1


def test_unknown_template(chat: Chat) -> None:
    with pytest.raises(ValueError, match=r"llm\.chat = nope: no such chat template"):
        Chat(chat.tokenizer, "nope")
