"""Chat templates: golden strings, answers found by offsets, placeholders, stop ids, prompts that continue exactly."""

from pathlib import Path

import numpy as np
import pytest
from helpers import ColourSource
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from vlm_lab.batch import IGNORE, IMAGE_TOKEN
from vlm_lab.data.chat import Chat
from vlm_lab.data.sample import BadRecord, ImageSlot, Message, Sample
from vlm_lab.data.templates import TEMPLATES
from vlm_lab.data.tokenizer import load_tokenizer, trained_tokenizer

TURNS = (
    Message("user", ("Say red.",)),
    Message("assistant", ("red and blue",)),
    Message("user", ("Name a colour.",)),
    Message("assistant", ("green is one",)),
)
# Written by hand from what the families published (sources in vlm_lab/data/templates.py); answers in [[ ]].
GOLDEN = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nSay red.<|im_end|>\n"
    "<|im_start|>assistant\n[[red and blue<|im_end|>]]\n<|im_start|>user\nName a colour.<|im_end|>\n"
    "<|im_start|>assistant\n[[green is one<|im_end|>]]\n",
    "chatml_direct": "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nSay red.<|im_end|>"
    "<|im_start|>assistant\n[[red and blue<|im_end|>]]<|im_start|>user\nName a colour.<|im_end|>"
    "<|im_start|>assistant\n[[green is one<|im_end|>]]",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nSay red.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[red and blue<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>\n\nName a colour.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[green is one<|eot_id|>]]",
    "cambrian_llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>Be brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>Say red.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>[[red and blue<|eot_id|>]]"
    "<|start_header_id|>user<|end_header_id|>Name a colour.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>[[green is one<|eot_id|>]]",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nSay red. [/INST][[ red and blue </s>]]"
    "<s>[INST] Name a colour. [/INST][[ green is one </s>]]",
    "mistral": "<s>[INST] Be brief.\n\nSay red. [/INST][[ red and blue</s>]]"
    "[INST] Name a colour. [/INST][[ green is one</s>]]",
    "gemma": "<bos><start_of_turn>user\nBe brief.\n\nSay red.<end_of_turn>\n"
    "<start_of_turn>model\n[[red and blue<end_of_turn>]]\n<start_of_turn>user\nName a colour.<end_of_turn>\n"
    "<start_of_turn>model\n[[green is one<end_of_turn>]]\n",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nSay red.<|end|>\n<|assistant|>\n[[red and blue<|end|>]]\n"
    "<|user|>\nName a colour.<|end|>\n<|assistant|>\n[[green is one<|end|>]]\n",
    "vicuna": "<s>Be brief. USER: Say red. ASSISTANT:[[ red and blue</s>]]"
    "USER: Name a colour. ASSISTANT:[[ green is one</s>]]",
    "idefics2": "<s>System: Be brief.<end_of_utterance>\nUser: Say red.<end_of_utterance>\n"
    "Assistant:[[ red and blue<end_of_utterance>]]\nUser: Name a colour.<end_of_utterance>\n"
    "Assistant:[[ green is one<end_of_utterance>]]\n",
}
PLAIN = "[[red and blue\n]]"


@pytest.fixture(params=sorted(TEMPLATES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def any_chat(name: str, cache: Path) -> Chat:
    return Chat(trained_tokenizer([ColourSource()], name, 400, cache), name, "Be brief.")


def turns(chat: Chat) -> tuple[Message, ...]:
    return TURNS[:2] if chat.template.caption else TURNS


def golden(name: str) -> str:
    return GOLDEN.get(name, PLAIN)


def test_every_template_is_written_out() -> None:
    assert {*GOLDEN, "plain"} == set(TEMPLATES)


def test_ids_are_those_of_the_golden_string(name: str, any_chat: Chat) -> None:
    text = golden(name).replace("[[", "").replace("]]", "")
    expected = any_chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert any_chat.encode(Sample("s", turns(any_chat)), []).ids.tolist() == expected
    assert any_chat.tokenizer.decode(expected) == text


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_targets_are_the_answers_and_their_stop_text(name: str, any_chat: Chat) -> None:
    encoded = any_chat.encode(Sample("s", TURNS), [])
    answers = [part.split("]]")[0] for part in GOLDEN[name].split("[[")[1:]]
    assert any_chat.tokenizer.decode(encoded.targets[encoded.targets != IGNORE]) == "".join(answers)
    shifted = np.flatnonzero(encoded.targets != IGNORE)
    assert (encoded.ids[shifted + 1] == encoded.targets[shifted]).all()


def test_stop_ids(name: str, any_chat: Chat) -> None:
    """The last token of an answer is the first stop id; the tokenizer's own end of text stops too."""
    encoded = any_chat.encode(Sample("s", turns(any_chat)), [])
    assert encoded.targets[encoded.targets != IGNORE][-1] == any_chat.stop[0]
    assert any_chat.tokenizer.decode(any_chat.stop) == TEMPLATES[name].stop
    other = PreTrainedTokenizerFast(tokenizer_object=any_chat.tokenizer.backend_tokenizer, eos_token="<pad>")
    assert Chat(other, name).stop == [any_chat.stop[0], other.eos_token_id]


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


def shown(chat: Chat, *content: str | ImageSlot) -> str:
    """A user turn and its answer as text, an image of one token as #."""
    images = sum(isinstance(part, ImageSlot) for part in content)
    ids = chat.encode(Sample("s", (Message("user", content), Message("assistant", ("red",)))), [1] * images).ids
    return "".join("#" if i == IMAGE_TOKEN else chat.tokenizer.decode([i]) for i in ids)


def test_idefics2_has_no_space_before_an_image(cache: Path) -> None:
    chat = Chat(trained_tokenizer([ColourSource()], "idefics2", 400, cache), "idefics2")
    end, fake = "<end_of_utterance>\n", "<fake_token_around_image>"
    answer = f"{end}Assistant: red{end}"
    assert shown(chat, ImageSlot(0), "What?") == f"<s>User:#What?{answer}"
    assert shown(chat, fake, ImageSlot(0), fake, "What?") == f"<s>User:{fake}#{fake}What?{answer}"
    assert shown(chat, "Look ", ImageSlot(0)) == f"<s>User: Look #{answer}"


def test_llama2_puts_the_system_prompt_before_the_image(cache: Path) -> None:
    chat = Chat(trained_tokenizer([ColourSource()], "llama2", 400, cache), "llama2", "Be brief.")
    expected = "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n#\nWhat? [/INST] red </s>"
    assert shown(chat, ImageSlot(0), "\nWhat?") == expected


def test_plain_keeps_images_and_captions(cache: Path) -> None:
    """LLaVA's first stage; a tokenizer that begins texts with a token of its own does so here."""
    tokenizer = trained_tokenizer([ColourSource()], "vicuna", 400, cache)
    chat = Chat(tokenizer, "plain", "Be brief.")
    assert shown(chat, ImageSlot(0), "\nDescribe it.") == "#red\n"
    encoded = chat.encode(
        Sample("s", (Message("user", (ImageSlot(0), "\nWhat?")), Message("assistant", ("red",)))), [2]
    )
    assert chat.tokenizer.decode(encoded.targets[encoded.targets != IGNORE]) == "red\n"
    tokenizer.bos_token = "<s>"
    assert shown(Chat(tokenizer, "plain"), ImageSlot(0), "\nDescribe it.") == "<s>#red\n"
    with pytest.raises(BadRecord, match="several questions"):
        chat.encode(Sample("s", TURNS), [])


def sentencepiece(*specials: str) -> PreTrainedTokenizerFast:
    """Llama's kind of tokenizer in small: a space before every piece of text, no token for the line break alone."""
    vocab = {token: i for i, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581"])}
    backend = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_tokens(list(specials), special_tokens=True)
    return tokenizer


@pytest.mark.parametrize("template", ["vicuna", "llama2", "mistral", "idefics2", "phi3", "plain"])
def test_sentencepiece_tokenizers(template: str) -> None:
    """Answers, stop ids and prompts also hold where every piece of text gets a leading space."""
    chat = Chat(sentencepiece(*TEMPLATES[template].specials), template)
    sample = Sample("s", (Message("user", (ImageSlot(0), "\nWhat?")), Message("assistant", ("red",))))
    prompt, encoded = chat.prompt(sample, [3]), chat.encode(sample, [3])
    learnt = encoded.targets[encoded.targets != IGNORE]
    assert chat.tokenizer.decode(learnt).split(TEMPLATES[template].stop)[0].strip() == "red"
    assert learnt[-1] == chat.stop[0] and len(chat.stop) == 1
    assert encoded.ids[: len(prompt)].tolist() == prompt.tolist()
    assert encoded.targets[len(prompt) - 1] != IGNORE and (encoded.targets[: len(prompt) - 1] == IGNORE).all()


def test_unknown_template(chat: Chat) -> None:
    with pytest.raises(ValueError, match=r"llm\.chat = nope: no such chat template"):
        Chat(chat.tokenizer, "nope")


def test_missing_special_tokens_are_named_or_added(chat: Chat, tmp_path: Path) -> None:
    chat.tokenizer.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match=r"chat template phi3 needs <\|system\|>, <\|user\|>, .* tokenizer lacks"):
        Chat(tokenizer, "phi3")
    wider = load_tokenizer(str(tmp_path), "phi3")
    added = [wider.convert_tokens_to_ids(token) for token in TEMPLATES["phi3"].specials]
    assert added == list(range(len(tokenizer), len(tokenizer) + 4))
    assert shown(Chat(wider, "phi3"), "Hi") == "<|user|>\nHi<|end|>\n<|assistant|>\nred<|end|>\n"
