"""FLOPs that a training step asks for, and what a card could do at most: the two halves of MFU.

Counted from shapes, a multiply-add as two: linear maps and convolutions with their gradients where training needs them
(of the weight if it trains, of the input if something before it trains), and attention between tokens that see each
other. Encoders and connector are counted on the meta device by torch's FlopCounterMode, one view of each, the language
model by its own tokens. Recomputed activations (gradient checkpointing) do not count; norms, softmax, the routers of
experts, the optimizer and the savings of sliding windows are left out.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vlm_lab.batch import Batch
from vlm_lab.model.connectors import DeepConnector
from vlm_lab.model.inside import decoder_layers

# Dense bf16 or fp16 TFLOP/s with fp32 sums, of NVIDIA's data sheets (which print twice as much, "with sparsity").
# By the words in a device's name, the first that fits.
PEAKS = {
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.1,
    "L4": 121.0,
    "A10": 125.0,
    "4090": 165.2,
    "V100": 125.0,
}


def peak(device: str) -> float | None:
    """FLOP/s in half precision of a card by its name, as torch gives it; None for one that is not in the table."""
    words = set(re.split(r"[^A-Za-z0-9]+", device))
    return next((1e12 * rate for name, rate in PEAKS.items() if set(name.split()) <= words), None)


def mfu_counter(model: Any, device: str, half: bool) -> "tuple[StepFlops, float] | None":
    """(FLOPs of a row, FLOP/s of the card), for a VLM that trains in half precision on a card of the table."""
    rate = peak(device) if half and hasattr(model, "connector") else None
    return None if rate is None else (StepFlops(model), rate)


class StepFlops:
    """`StepFlops(vlm)(batch)`: forward and backward FLOPs of one packed row, for what `requires_grad` is at the time.

    Views of another size than the encoder's own are taken in proportion to their area.
    """

    def __init__(self, vlm: Any) -> None:
        self.views, upstream, features = {}, False, {}
        for name, encoder in vlm.encoder.items():
            pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8, device="meta")
            forward, features[name] = counted(encoder, pixels)
            times, flows = passes(encoder, False)
            self.views[name] = forward * times / encoder.image_size**2
            upstream |= flows
        times, upstream = passes(vlm.connector, upstream)
        self.connector = counted(vlm.connector, features)[0] * times
        self.blocks, self.on_images = inner_blocks(vlm)
        head = vlm.llm.get_output_embeddings()
        self.token, self.head = 0.0, 0.0
        for module, size, times in maps(vlm.llm, upstream):
            cost = 2.0 * size * times
            self.head, self.token = (cost, self.token) if module is head else (self.head, self.token + cost)
        upstream |= any(p.requires_grad for p in vlm.llm.parameters())
        self.square = 2.0 * attention_width(vlm.llm) * (3 if upstream else 1)  # half of L x L, two products

    def __call__(self, batch: Batch) -> float:
        pixels = {name: p.shape[0] * p.shape[2] * p.shape[3] for name, p in batch.pixels.items()}
        seen = sum(cost * pixels[name] for name, cost in self.views.items())
        seen += self.connector * len(next(iter(batch.pixels.values())))
        visual = sum(layout.num_tokens for layout in batch.layouts)
        seen += self.blocks * (visual if self.on_images else batch.num_tokens)
        squares = sum((end - start) ** 2 for start, end in pairwise(batch.cu_seqlens))
        answers = batch.num_answers / batch.parts
        return seen + self.token * batch.num_tokens + self.square * squares + self.head * answers


def counted(module: nn.Module, *inputs: Any) -> tuple[float, Any]:
    """(FLOPs of a forward pass, its result), by shapes alone: `inputs` are on the meta device."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    empty = {name: torch.empty(shape(t), dtype=t.dtype, device="meta") for name, t in tensors}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        result = functional_call(module, empty, inputs)
    return float(counter.get_total_flops()), result


def shape(tensor: Tensor) -> tuple[int, ...]:
    """That of the whole tensor, also where ZeRO-3 left a shard of it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def passes(module: nn.Module, upstream: bool) -> tuple[float, bool]:
    """(FLOPs forward and backward over forward alone, whether gradients pass through what comes after `module`).

    `upstream`: whether something before the module trains, so that it has to pass gradients on.
    """
    costs = [(size, size * times) for _, size, times in maps(module, upstream)]
    forward, total = (sum(column) for column in zip(*costs, strict=True)) if costs else (0.0, 0.0)
    return total / (forward or 1.0), upstream or any(p.requires_grad for p in module.parameters())


def maps(model: nn.Module, upstream: bool) -> Iterator[tuple[nn.Module, float, int]]:
    """(module, weights that one token meets, products with them in a step: 1 to 3), in the model's order."""
    for module, size in matrices(model):
        trains = any(p.requires_grad for p in module.parameters(recurse=False))
        yield module, size, 1 + upstream + trains
        upstream |= trains


def matrices(model: nn.Module) -> Iterator[tuple[nn.Module, float]]:
    """(module, weights that one token meets) in the model's order; embeddings and norms have none, but may train."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            yield module, module.in_features * module.out_features  # of 4-bit maps, too
        elif own := list(module.parameters(recurse=False)):
            size = sum(met(p, module, getattr(model, "config", None)) for p in own)
            if size or not list(module.children()):  # a container's own tokens and positions enter somewhere inside it
                yield module, size


def met(weight: Tensor, module: nn.Module, config: Any) -> float:
    """Elements of a convolution's weight, or of those experts in a stack [experts, ., .] that a token is sent to."""
    size = torch.Size(shape(weight))
    if isinstance(module, nn.Conv2d):
        return size.numel() if len(size) == 4 else 0.0  # not the bias
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return size.numel() / experts * config.num_experts_per_tok if len(size) == 3 and size[0] == experts else 0.0


def inner_blocks(vlm: Any) -> tuple[float, bool]:
    """(FLOPs per position of the connector's blocks inside the LLM, whether they work on images' positions alone)."""
    if not isinstance(vlm.connector, DeepConnector):
        return 0.0, True
    blocks = vlm.connector.layer_blocks(len(decoder_layers(vlm.llm))).values()
    costs = (2.0 * size * times for block in blocks for _, size, times in maps(block, True))
    return sum(costs), vlm.connector.site == "output"


def attention_width(llm: Any) -> int:
    """Channels of all heads of all layers."""
    config = llm.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers * config.num_attention_heads * head
