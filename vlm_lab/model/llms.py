"""Causal language models from transformers: random at any shape, or pretrained from the hub or a local folder."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vlm_lab.model import attention


def build_llm(
    family: str, weights: str | None, shape: dict[str, Any], tokenizer: str | None, chat: str, system: str
) -> PreTrainedModel:
    """The language model of the YAML. `tokenizer`, `chat` and `system` are the data side's (data/chat.py).

    Raises ValueError if a checkpoint's shape is not the one that the YAML promises (plans are made from the YAML).
    """
    if weights is None:
        config = AutoConfig.for_model(family, **shape)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    llm = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation=attention.NAME)
    for key, value in shape.items():
        if (found := getattr(llm.config, key, value)) != value:
            raise ValueError(f"llm.shape.{key} = {value}, but the checkpoint {weights} has {found}")
    return llm
