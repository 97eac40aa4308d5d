"""Blocks inside the language model: connectors that look at the image again between its layers.

While the LLM runs under `inside`, each block of the connector is called on the hidden states that enter or leave its
layer. Forward hooks that live for one pass carry this: no language model is patched, gradient checkpointing (which
wraps the layer below its hooks) recomputes the layer alone, and generation calls them at every step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from vlm_lab.model.connectors import DeepConnector
from vlm_lab.model.seen import Seen


@contextmanager
def inside(llm: Any, connector: nn.Module, seen: Seen) -> Iterator[None]:
    """Run the blocks of `connector` within `llm` while the context lasts; nothing happens for connectors without."""
    handles = []
    if isinstance(connector, DeepConnector):
        layers = decoder_layers(llm)
        for index, block in connector.layer_blocks(len(layers)).items():
            call = partial(connector.inside, block, seen=seen)
            handles.append(hook(layers[index], connector.site, call))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook(layer: nn.Module, site: str, call: Any) -> Any:
    """Have `call` replace the hidden states [B, L, D] that enter (`input`) or leave (`output`) a decoder layer."""
    if site == "input":
        return layer.register_forward_pre_hook(lambda _, args: (call(args[0]), *args[1:]))
    return layer.register_forward_hook(lambda _, args, out: call(out))


def decoder_layers(llm: Any) -> nn.ModuleList:
    """The decoder layers of any causal language model of transformers."""
    return llm.get_decoder().layers
