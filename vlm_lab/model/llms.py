"""Causal language models from transformers: random at any shape, or pretrained from the hub or a local folder.

Gemma scales its token embeddings inside the embedding module, so visual tokens enter unscaled, as transformers'
PaliGemma and Gemma 3 do it. A mixture of experts (Mixtral) trains without its router's load-balancing loss: the loss
here is the answers' cross-entropy alone.
"""

from itertools import pairwise
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from vlm_lab.model import attention

FREE = {"initializer_range", "max_position_embeddings"}  # of a shape: they change nothing in a loaded model
LAYERS = {"full_attention", "sliding_attention"}  # the kinds that model/attention.py keeps within samples


def build_llm(
    family: str | None,
    weights: str | None,
    shape: dict[str, Any] | None,
    tokenizer: str | None,
    chat: str,
    system: str,
) -> PreTrainedModel:
    """The language model of the YAML. `tokenizer`, `chat` and `system` are the data side's (data/chat.py).

    `family` is transformers' model_type and `shape` arguments of its config class; null takes the checkpoint's. A
    `vocab_size` beyond the checkpoint's adds rows to its embeddings (for the new tokens of a chat template).
    Raises ValueError if a checkpoint's shape is not the one that the YAML promises (plans are made from the YAML), or
    if the model does not keep the samples of a packed row apart.
    """
    if weights is None:
        if family is None or shape is None:
            raise ValueError("llm.weights = null needs llm.family and llm.shape: random weights of which model?")
        config = AutoConfig.for_model(family, **shape)
        llm: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    else:
        shape = shape or {}
        llm = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32, attn_implementation=attention.NAME)
        check_shape(llm.config, weights, family or llm.config.model_type, shape)
        if (rows := shape.get("vocab_size", 0)) > llm.get_input_embeddings().weight.shape[0]:
            llm.resize_token_embeddings(rows)
    check_packing(llm)
    return llm


def check_shape(found: PretrainedConfig, weights: str, family: str, shape: dict[str, Any]) -> None:
    """Raise ValueError for the first setting in which the checkpoint differs from family and shape."""
    if found.model_type != family:
        raise ValueError(f"llm.family = {family}, but the checkpoint {weights} is of the family {found.model_type}")
    promised = AutoConfig.for_model(family, **shape)
    keys = [*shape, "rope_parameters"] if "rope_theta" in shape else list(shape)
    for key in (key for key in keys if key not in FREE):
        want: Any = getattr(promised, key, None)
        have: Any = getattr(found, key, None)
        if want != have and not (key == "vocab_size" and want > have):
            raise ValueError(f"llm.shape.{key} = {want}, but the checkpoint {weights} has {have}")


@torch.no_grad()
def check_packing(llm: PreTrainedModel) -> None:
    """Raise ValueError unless two samples in one row get the logits that each gets alone (ten tokens are run)."""
    device, name = next(llm.parameters()).device, type(llm).__name__
    if not llm._supports_attention_backend:
        raise ValueError(f"llm: {name} has an attention of its own, which would mix the samples of a row")
    if foreign := set(getattr(llm.config, "layer_types", None) or ()) - LAYERS:
        raise ValueError(f"llm: {name} has {', '.join(sorted(foreign))} layers, which would mix the samples of a row")
    if device.type == "meta":
        return
    training, model = llm.training, llm.eval()
    ids, bounds = torch.arange(1, 11, device=device)[None], [0, 6, 10]
    alone = [model(input_ids=ids[:, start:end], use_cache=False).logits for start, end in pairwise(bounds)]
    packed = model(
        inputs_embeds=model.get_input_embeddings()(ids),
        position_ids=torch.tensor([[*range(6), *range(4)]], device=device),
        attention_mask=ids.new_zeros(1, 1, 1, 1),
        cu_seq_lens_q=bounds,
        use_cache=False,
    ).logits
    llm.train(training)
    expected = torch.cat(alone, dim=1)
    if not torch.allclose(packed, expected, rtol=0, atol=1e-4 * float(expected.abs().max())):
        raise ValueError(f"llm: {name} mixes the samples of a packed row, or has attention that no row can express")
