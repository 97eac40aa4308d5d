"""Blocks inside the language model: connectors that look at the image again between its layers.

While the LLM runs under `inside`, each block of the connector is called on the hidden states that enter or leave its
layer. Forward hooks that live for one pass carry this: no language model is patched, gradient checkpointing (which
wraps the layer below its hooks) recomputes the layer alone, and generation calls them at every step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_lab.batch import Batch, Grid, Layout, Prompts
from vlm_lab.model.arrange import arrange
from vlm_lab.model.connectors import DeepConnector


@dataclass
class Seen:
    """What one pass of the LLM can look at.

    `tokens [V, T, D]` on `grid` are the visual tokens before they are arranged, `memory` is what the connector's blocks
    attend to. `image [B, L]` is True at placeholders; `sample [B, L]` numbers the samples of all rows.
    """

    tokens: Tensor
    grid: Grid
    memory: Any
    image: Tensor
    sample: Tensor
    layouts: Sequence[Layout]

    @cached_property
    def cells(self) -> Tensor:
        """For every placeholder in reading order, the index v * T + t of the visual token on it; -1 for a newline."""
        views, count = self.tokens.shape[:2]
        if not self.layouts:
            return torch.zeros(0, dtype=torch.long, device=self.tokens.device)
        numbers = torch.arange(views * count, dtype=torch.float64, device=self.tokens.device)
        newline = numbers.new_full((1, 1), -1)
        return arrange(numbers.view(views, count, 1), self.grid, self.layouts, newline)[:, 0].long()

    @cached_property
    def visible(self) -> Tensor:
        """[B, L, V]: whether a position sees a view, which is in its sample and does not begin after it."""
        order = torch.arange(self.image.numel(), device=self.image.device).view_as(self.image)  # [B, L]
        views, count = self.tokens.shape[:2]
        kept = self.cells >= 0
        place = order.new_full((views,), order.numel())  # of each view's first token; past the end if it has none
        place = place.scatter_reduce(0, self.cells[kept] // count, order[self.image][kept], "amin")
        sample = torch.cat([self.sample.flatten(), self.sample.new_full((1,), -1)])[place]  # [V]
        return (self.sample[..., None] == sample) & (order[..., None] >= place)


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


def sample_numbers(batch: Batch | Prompts) -> Tensor:
    """Which sample each position [B, L] belongs to: by `cu_seqlens` in a packed row, else by row."""
    ids = batch.input_ids
    if isinstance(batch, Prompts):
        return torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    starts = torch.tensor(batch.cu_seqlens[1:-1], device=ids.device)
    return torch.bucketize(torch.arange(ids.shape[1], device=ids.device), starts, right=True)[None]
