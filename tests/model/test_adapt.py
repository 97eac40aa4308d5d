"""Low-rank adapters: which maps are adapted, what trains, and that merging them leaves a plain, equal model."""

import pytest
import torch
from helpers import max_difference, tiny_vlm
from torch import Tensor, nn

from vlm_lab.model import adapt, freeze
from vlm_lab.model.freeze import Rule, Table
from vlm_lab.model.neftune import noise
from vlm_lab.model.vlm import VLM


def adapted(table: Table) -> tuple[VLM, Table]:
    torch.manual_seed(0)
    vlm = tiny_vlm()
    table = freeze.resolve(vlm, table)
    adapt.inject(vlm, table)
    freeze.apply(vlm, table)
    return vlm.eval(), table


def stir(vlm: VLM) -> None:
    """Adapters as after training: none of their weights is at its start."""
    with torch.no_grad():
        for name, parameter in vlm.named_parameters():
            if freeze.is_adapter(name):
                parameter.add_(0.1 * torch.randn_like(parameter))


def outputs(vlm: VLM) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    ids, pixels = torch.randint(0, 400, (1, 12)), torch.randint(0, 255, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        return vlm.llm(input_ids=ids).logits, vlm.encoder["eye"](pixels).tokens


@pytest.mark.parametrize("kind", ["lora", "dora", "qlora"])
def test_a_merged_model_equals_the_adapted_one(kind: str) -> None:
    """Within 1e-5; its state dict has the names and shapes of a model that was never adapted."""
    vlm, _ = adapted({"llm": Rule(1e-3, kind, rank=4, alpha=8), "encoder": Rule(1e-3, "lora", last=1, rank=2, alpha=4)})
    stir(vlm)
    before = outputs(vlm)
    adapt.merge(vlm)
    after, untouched = outputs(vlm), outputs(tiny_vlm().eval())
    assert max(map(max_difference, before, after)) < 1e-5
    assert min(map(max_difference, before, untouched)) > 1e-2
    shapes = {name: tensor.shape for name, tensor in tiny_vlm().state_dict().items()}
    assert {name: tensor.shape for name, tensor in vlm.state_dict().items()} == shapes


def test_adapters_start_at_zero_and_only_they_train() -> None:
    torch.manual_seed(0)
    plain = tiny_vlm()
    vlm, table = adapted({"llm": Rule(1e-3, "lora", rank=4), "llm.model.embed_tokens": Rule(1e-4)})
    assert torch.equal(outputs(vlm)[0], outputs(plain.eval())[0])
    trained = {name for name, p in vlm.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in vlm.named_parameters() if freeze.trains(name, table)}
    adapters = {name for name in trained if freeze.is_adapter(name)}
    assert trained - adapters == {"llm.model.embed_tokens.weight"}
    assert len(adapters) == 2 * 7 * 2  # A and B, of q k v o gate up down, in two layers
    assert not any("lm_head" in name for name in adapters)


def test_two_ranks_in_one_model() -> None:
    first, second = Rule(1e-3, "lora", rank=2), Rule(1e-3, "dora", rank=4)
    vlm, _ = adapted({"llm": first, "llm.model.layers.1": second})
    layers = vlm.llm.model.layers
    assert layers[0].mlp.up_proj.lora_A["default"].weight.shape == (2, 32)
    assert layers[1].mlp.up_proj.lora_A["default"].weight.shape == (4, 32)
    assert "default" in layers[1].mlp.up_proj.lora_magnitude_vector
    assert not layers[0].mlp.up_proj.lora_magnitude_vector


def test_a_path_without_linear_maps_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.llm\.model\.norm\.adapt = lora: no linear map"):
        adapted({"llm.model.norm": Rule(1e-3, "lora")})


def test_attention_that_would_bypass_an_adapter_is_left_alone() -> None:
    """nn.MultiheadAttention reads its output map's weight itself: adapting it would train nothing."""
    vlm = tiny_vlm()
    vlm.connector.attention = nn.MultiheadAttention(32, 4)
    names = adapt.linear_maps(vlm, "connector", {"connector": Rule(1e-3, "lora")})
    assert names == ["connector.project.0", "connector.project.2"]


def test_neftune_noise_is_scaled_by_each_samples_own_length() -> None:
    """Amplitude alpha / sqrt(L * D), reached within 10 % by the largest of many draws; mean about 0."""
    embeds, starts = torch.zeros(1, 120, 64), [0, 20, 120]
    drawn = noise(embeds, starts, 5.0)[0]
    for part, length in ((drawn[:20], 20), (drawn[20:], 100)):
        amplitude = 5.0 / (length * 64) ** 0.5
        assert 0.9 * amplitude < part.abs().max() <= amplitude
        assert abs(part.mean()) < 0.1 * amplitude
