"""`save`: a VLM as a checkpoint folder that stock transformers loads. `start_from`: a VLM with the weights of one."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from vlm_lab.convert.families import FAKE, by_model_type, by_tiling
from vlm_lab.convert.names import to_ours, to_theirs
from vlm_lab.convert.processors import extended, processor
from vlm_lab.data.chat import Chat
from vlm_lab.model.vlm import VLM


def save(vlm: VLM, tiling: Any, chat: Chat, folder: Path) -> list[str]:
    """Write weights, configuration, tokenizer and processor; returns what could not be written, in words.

    Placeholders need rows of their own in the embedding where the tokenizer fills it: their mean, so that a placeholder
    is never the likeliest next token. ValueError if no class of transformers is this composition.
    """
    family = by_tiling(tiling)
    tokenizer, ids = extended(chat, family)
    rows = vlm.llm.get_input_embeddings().num_embeddings
    vocabulary = max(rows, *(index + 1 for index in ids))
    config: Any = family.config(vlm, tiling, ids, vocabulary)
    with torch.device("meta"):
        model: Any = family.model_class(config)
    weights = {name: grown(name, tensor, vocabulary) for name, tensor in vlm.state_dict().items()}
    model.load_state_dict(to_theirs(weights, model.state_dict(), family.rules, family.name), assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=chat.stop, pad_token_id=chat.stop[0])
    model.save_pretrained(folder)
    if (found := processor(family, vlm, tiling, chat, tokenizer)) is None:
        tokenizer.save_pretrained(folder)
        return [f"no processor: it writes the token {FAKE} around images, here stands the text {tiling.marker!r}"]
    found.save_pretrained(folder)
    return []


def grown(name: str, tensor: Tensor, vocabulary: int) -> Tensor:
    """The embedding and the output head with as many rows as there are tokens; other weights as they are."""
    if name not in ("llm.model.embed_tokens.weight", "llm.lm_head.weight"):
        return tensor
    return torch.cat([tensor, tensor.mean(dim=0, keepdim=True).expand(vocabulary - len(tensor), -1)])


def start_from(vlm: VLM, source: str) -> None:
    """Load a checkpoint of transformers (hub id or folder) into `vlm`. ValueError if its shape is another one."""
    config = AutoConfig.from_pretrained(source)
    family = by_model_type(source, config.model_type)
    family.agree(vlm, config)
    dtype = next(vlm.parameters()).dtype
    load: Any = family.model_class.from_pretrained
    model, info = load(source, dtype=dtype, output_loading_info=True)
    theirs = {name: tensor for name, tensor in model.state_dict().items() if name not in info["missing_keys"]}
    vlm.load_state_dict(to_ours(theirs, vlm.state_dict(), family.rules, family.name))
