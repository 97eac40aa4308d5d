"""Gradient checkpointing: activations are computed again in the backward pass, block by block, instead of kept."""

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer


def checkpoint_activations(vlm: Any, reentrant: bool) -> None:
    """Switch it on in the LLM and in every timm encoder that offers it.

    `reentrant`: PyTorch's older implementation, which ZeRO-3 needs (with the newer one, shards that were released
    between the passes fail the check of saved shapes).
    """
    vlm.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for encoder in vlm.encoder.modules():
        if hasattr(encoder, "set_grad_checkpointing"):
            encoder.set_grad_checkpointing(True)


def keep_checkpointing(model: nn.Module) -> None:
    """A frozen LLM is in evaluation mode, where transformers does not checkpoint, but its activations are still needed.

    The layers alone are told otherwise, not what is inside; those with a dropout of their own are left as they are.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and not hasattr(module, "dropout"):
            module.training = True
