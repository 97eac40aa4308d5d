"""Chat templates as data: the text before and after each role's turn, as the families published it.

`vlm_lab/data/chat.py` renders them. A template is chosen by `llm.chat`, or for one stage by `stages.<name>.chat`. Every
one is written out as a golden string in tests/data/test_chat.py.
"""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Template:
    """`start` opens a conversation (None = with the tokenizer's own token for that, if it has one); each role is
    (before, after); `stop` is the text that ends an answer; `specials` are single tokens, added where they are missing.

    `nested`: the system prompt stands inside the first user turn. `tight`: no space between a role and an image.
    `caption`: what the user says is left out, only its images stay (LLaVA's first stage).
    """

    start: str | None
    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    stop: str
    specials: tuple[str, ...]
    nested: bool = False
    tight: bool = False
    caption: bool = False


CHATML = Template(  # Qwen2, Qwen2.5, Qwen3 without thinking, SmolLM2, Nous-Hermes-2-Yi: their tokenizer_config.json
    start="",
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>\n"),
    stop="<|im_end|>",
    specials=("<|im_start|>", "<|im_end|>"),
)

LLAMA3 = Template(  # Meta's llama3 repository, ChatFormat
    start="<|begin_of_text|>",
    system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant=("<|start_header_id|>assistant<|end_header_id|>\n\n", "<|eot_id|>"),
    stop="<|eot_id|>",
    specials=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

TEMPLATES = {
    "chatml": CHATML,
    # LLaVA's chatml_direct, used with Yi-34B by LLaVA-1.6, Mini-Gemini and Cambrian-1: no line break between turns
    "chatml_direct": replace(
        CHATML,
        system=("<|im_start|>system\n", "<|im_end|>"),
        user=("<|im_start|>user\n", "<|im_end|>"),
        assistant=("<|im_start|>assistant\n", "<|im_end|>"),
    ),
    "llama3": LLAMA3,
    "cambrian_llama3": replace(  # Cambrian-1's llama_v3: no line breaks after the header
        LLAMA3,
        system=("<|start_header_id|>system<|end_header_id|>", "<|eot_id|>"),
        user=("<|start_header_id|>user<|end_header_id|>", "<|eot_id|>"),
        assistant=("<|start_header_id|>assistant<|end_header_id|>", "<|eot_id|>"),
    ),
    "llama2": Template(  # Meta's llama repository, chat_completion: every exchange begins and ends a sequence
        start="",
        system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
        user=("<s>[INST] ", " [/INST]"),
        assistant=(" ", " </s>"),
        stop="</s>",
        specials=("<s>", "</s>"),
        nested=True,
    ),
    "mistral": Template(  # mistral-common's V1 tokenizer (Mistral-7B-Instruct-v0.1 and v0.2, Mixtral-8x7B-Instruct)
        start="<s>",
        system=("", "\n\n"),
        user=("[INST] ", " [/INST]"),
        assistant=(" ", "</s>"),
        stop="</s>",
        specials=("<s>", "</s>"),
        nested=True,
    ),
    "gemma": Template(  # Gemma's formatting page; the system prompt as Gemma 3's chat template places it
        start="<bos>",
        system=("", "\n\n"),
        user=("<start_of_turn>user\n", "<end_of_turn>\n"),
        assistant=("<start_of_turn>model\n", "<end_of_turn>\n"),
        stop="<end_of_turn>",
        specials=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        nested=True,
    ),
    "phi3": Template(  # Phi-3-mini's model card
        start="",
        system=("<|system|>\n", "<|end|>\n"),
        user=("<|user|>\n", "<|end|>\n"),
        assistant=("<|assistant|>\n", "<|end|>\n"),
        stop="<|end|>",
        specials=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "vicuna": Template(  # FastChat's and LLaVA's v1
        start="<s>",
        system=("", " "),
        user=("USER: ", " "),
        assistant=("ASSISTANT: ", "</s>"),
        stop="</s>",
        specials=("<s>", "</s>"),
    ),
    "idefics2": Template(  # the processor of HuggingFaceM4/idefics2-8b; its new tokens in the order of their ids
        start="<s>",
        system=("System: ", "<end_of_utterance>\n"),
        user=("User: ", "<end_of_utterance>\n"),
        assistant=("Assistant: ", "<end_of_utterance>\n"),
        stop="<end_of_utterance>",
        specials=("<s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"),
        tight=True,
    ),
    "plain": Template(  # LLaVA's first stage: an image and its caption, which ends with a line break
        start=None,
        system=("", ""),
        user=("", ""),
        assistant=("", "\n"),
        stop="\n",
        specials=(),
        caption=True,
    ),
}
