"""torch.compile by regions: every decoder layer of the LLM and every block of an encoder, each kind compiled once.

    compile_blocks(model)        before training; parameters, their names, and hooks on layers stay as they are

Attention over packed rows depends on where each row's samples begin, so it stays outside of the graphs: it gets the
boundaries in a box that the compiler does not look into, and rows of any length and number of samples use one graph.
Gradient checkpointing goes around the compiled layer. Not for ZeRO-3, which gathers weights by hooks inside the layers.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from vlm_lab.model.attention import packed_attention
from vlm_lab.model.freeze import blocks

NAME = "packed_uncompiled"
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")  # what says where samples begin
VARIANTS = 64  # graphs per layer class: several encoders share one, trained and frozen blocks differ


class Box:
    """Arguments that the compiler passes on without a guard on their values."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content


def compile_blocks(model: Any, backend: str = "inductor") -> None:
    """Compile, at their first call, the blocks below `encoder` and `llm` of the model of any stage."""
    torch._dynamo.config.recompile_limit = VARIANTS
    for name in ("encoder", "llm"):
        if hasattr(model, name):
            for path in blocks(model, name):
                compile_block(model.get_submodule(path), backend)
    if hasattr(model, "llm"):
        model.llm.config._attn_implementation = NAME
        model.llm.get_decoder().register_forward_pre_hook(boxed, with_kwargs=True)


def compile_block(block: Any, backend: str) -> None:
    """Have `block.forward` run compiled code; under transformers' gradient checkpointing it is what gets recomputed."""
    plain: Callable[..., Any] = inspect.unwrap(type(block).forward)  # without transformers' checkpointing
    call: Callable[..., Any] = torch.compile(plain, dynamic=True, backend=backend)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if getattr(block, "gradient_checkpointing", False) and block.training:
            return block._gradient_checkpointing_func(partial(call, block, **kwargs), *args)
        return call(block, *args, **kwargs)

    block.forward = forward


def boxed(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The decoder's arguments with a row's boundaries in a box, under the name of the first of them."""
    content = {name: kwargs[name] for name in BOUNDS if name in kwargs}
    kept = {name: value for name, value in kwargs.items() if name not in content}
    return args, {**kept, BOUNDS[0]: Box(content)} if content else kept


@torch.compiler.disable
def uncompiled_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """`packed_attention`, in a break between two graphs."""
    box = kwargs.pop(BOUNDS[0], None)
    bounds: dict[str, Any] = {} if box is None else box.content
    return packed_attention(module, query, key, value, attention_mask, **kwargs, **bounds)


AttentionInterface.register(NAME, uncompiled_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
