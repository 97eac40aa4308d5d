"""FLOPs of a step, by hand for a tiny VLM; peaks by the names that torch gives cards."""

from collections.abc import Callable

import pytest
import torch
from helpers import ColourSource, composed
from torch import nn

from vlm_lab import build, schema
from vlm_lab.batch import Batch
from vlm_lab.data.loader import pack
from vlm_lab.data.process import Processor
from vlm_lab.model import adapt, freeze
from vlm_lab.model.flops import StepFlops, mfu_counter, passes, peak
from vlm_lab.model.vlm import VLM

WIDTH, PATCHES, MLP_RATIO = 16, 4, 4  # of helpers.tiny_vlm
D, F, LAYERS, KV, VOCABULARY = 32, 64, 2, 16, 400


@pytest.fixture
def batch(processor: Processor) -> Batch:
    row = pack([processor.example(ColourSource()[index]) for index in range(4)], processor)
    row.num_answers = int((row.targets != -100).sum())
    return row


def parts(batch: Batch) -> dict[str, float]:
    """Forward FLOPs of encoder (of one block and of its patch embedding), connector, LLM layers, attention, head."""
    views, tokens = len(batch.pixels["eye"]), batch.num_tokens
    squares = sum((end - start) ** 2 for start, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:], strict=False))
    block = 2 * PATCHES * (4 * WIDTH**2 + 2 * MLP_RATIO * WIDTH**2) + 4 * PATCHES**2 * WIDTH
    layer = 2 * (2 * D * D + 2 * D * KV + 3 * D * F)  # q and o, k and v, gated MLP
    return {
        "encoder": views * (2 * block + 2 * PATCHES * 3 * 8 * 8 * WIDTH),
        "connector": views * 2 * PATCHES * (WIDTH * D + D * D),
        "llm": tokens * LAYERS * layer,
        "attention": LAYERS * 2 * squares * D,
        "head": 2 * D * VOCABULARY * batch.num_answers,
    }


def trained(vlm: VLM, *paths: str) -> VLM:
    freeze.apply(vlm, freeze.resolve(vlm, {path: freeze.Rule(1e-3) for path in paths}))
    return vlm


def test_everything_trains(make_vlm: Callable[..., VLM], batch: Batch) -> None:
    """Three times the forward pass, but for the pixels' gradient, which nobody needs; within 1e-9."""
    vlm, forward = trained(make_vlm(), "encoder", "connector", "llm"), parts(batch)
    weights = 2 * (4 + 2 * MLP_RATIO) * WIDTH**2 + 3 * 8 * 8 * WIDTH
    factor = 3 - 3 * 8 * 8 * WIDTH / weights  # attention is counted with the maps around it
    expected = factor * forward["encoder"] + 3 * (sum(forward.values()) - forward["encoder"])
    assert StepFlops(vlm)(batch) == pytest.approx(expected, rel=1e-9)


def test_what_is_frozen_costs_less(make_vlm: Callable[..., VLM], batch: Batch) -> None:
    """Connector alone: the encoder runs forward only, the connector's first map gets no gradient of its input."""
    vlm, forward = trained(make_vlm(), "connector"), parts(batch)
    connector = forward["connector"] * (2 * WIDTH * D + 3 * D * D) / (WIDTH * D + D * D)
    expected = forward["encoder"] + connector + 2 * (forward["llm"] + forward["head"]) + 3 * forward["attention"]
    assert StepFlops(vlm)(batch) == pytest.approx(expected, rel=1e-9)


def test_adapters_count_themselves_and_let_gradients_pass(make_vlm: Callable[..., VLM], batch: Batch) -> None:
    vlm = make_vlm()
    table = freeze.resolve(vlm, {"connector": freeze.Rule(1e-3), "llm": freeze.Rule(1e-3, adapt="lora", rank=2)})
    trained(vlm, "connector")
    without = StepFlops(vlm)(batch)
    adapt.inject(vlm, table)
    freeze.apply(vlm, table)
    ranks = 2 * (2 * (D + D) + 2 * (D + KV) + 3 * (D + F))  # inputs and outputs of a layer's seven maps
    assert StepFlops(vlm)(batch) - without == pytest.approx(3 * 2 * ranks * LAYERS * batch.num_tokens, rel=1e-9)


def test_a_chain_passes_gradients_only_behind_what_trains() -> None:
    chain = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for parameter in chain.parameters():
        parameter.requires_grad_(False)
    assert passes(chain, False) == (1.0, False) and passes(chain, True) == (2.0, True)
    chain[1].weight.requires_grad_(True)
    assert passes(chain, False) == ((1 + 2 + 2) / 3, True)


@pytest.mark.parametrize("encoder", ["clip", "convnext", "dinov3", "eva02", "hf", "siglip2_naflex"])
@pytest.mark.parametrize("connector", ["sva", "cross_attention", "perceiver"])
def test_any_parts_can_be_counted(encoder: str, connector: str) -> None:
    """Without touching the model: more with the blocks inside the LLM than without."""
    windows = ["connector.windows=2"] if connector == "sva" else []
    config = schema.check(composed(f"encoder={encoder}", f"connector={connector}", *windows))
    vlm = trained(build.vlm(config), "connector")
    before = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    flops = StepFlops(vlm)
    assert flops.views[encoder] > 0 and flops.connector > 0
    assert (flops.blocks > 0) == (connector != "perceiver")
    assert all(torch.equal(before[name], tensor) for name, tensor in vlm.state_dict().items())


def test_experts_count_as_far_as_a_token_is_sent_to_them() -> None:
    vlm = trained(build.vlm(schema.check(composed("llm=mixtral"))), "connector")
    c = vlm.llm.config
    keys = c.hidden_size // c.num_attention_heads * c.num_key_value_heads
    layer = 2 * c.hidden_size * (c.hidden_size + keys) + c.num_experts_per_tok * 3 * c.hidden_size * c.intermediate_size
    assert c.num_experts_per_tok < c.num_local_experts
    assert StepFlops(vlm).token == pytest.approx(2 * 2 * c.num_hidden_layers * layer, rel=1e-9)


def test_peaks_are_the_dense_ones() -> None:
    assert peak("NVIDIA H100 80GB HBM3") == peak("NVIDIA H200") == pytest.approx(989.4e12)
    assert peak("NVIDIA H100 PCIe") == pytest.approx(756.5e12)
    assert peak("NVIDIA A100-SXM4-80GB") == pytest.approx(312e12) and peak("NVIDIA L4") == pytest.approx(121e12)
    assert peak("NVIDIA GeForce RTX 4090") == pytest.approx(165.2e12)
    assert peak("cpu") is None and peak("NVIDIA L40") is None
    assert mfu_counter(nn.Linear(2, 2), "NVIDIA H200", True) is None
