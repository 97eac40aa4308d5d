"""Idefics2's connector against transformers' own, at tiny random weights, and at its published size."""

from collections.abc import Callable

import pytest
import torch
from transformers import Idefics2Config
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from vlm_lab.model.connectors.perceiver import Perceiver
from vlm_lab.model.features import FeatureMap

TINY = {"latents": 4, "depth": 2, "heads": 4, "head_dim": 8, "kv_heads": 2}


@pytest.fixture(scope="module")
def reference() -> Idefics2Connector:
    config = Idefics2Config(
        vision_config={"hidden_size": 20},
        text_config={"model_type": "mistral", "hidden_size": 32, "intermediate_size": 80},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
        },
    )
    torch.manual_seed(0)
    model = Idefics2Connector(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)  # norms too, which start as ones
    return model.eval()


def ours(reference: Idefics2Connector) -> Perceiver:
    connector = Perceiver({"siglip": 20}, 32, mlp_ratio=2.5, **TINY)
    weights = {k.replace("projection.", "projection.siglip."): v for k, v in reference.state_dict().items()}
    connector.load_state_dict(weights)
    return connector


@pytest.mark.parametrize("masked", [False, True])
def test_same_as_transformers(
    masked: bool, reference: Idefics2Connector, make_feature: Callable[..., FeatureMap]
) -> None:
    feature = make_feature((3, 5), 20, views=3, dtype=torch.float32)
    mask = torch.ones(3, 15, dtype=torch.bool)
    if masked:
        mask[1, 9:] = False
        mask[2, ::2] = False
        feature = feature._replace(mask=mask)
    with torch.no_grad():
        expected = reference(feature.tokens, mask)
        out = ours(reference)({"siglip": feature})
    assert (out - expected).abs().max() <= 1e-5


def test_padding_one_image_does_not_change_another(
    reference: Idefics2Connector, make_feature: Callable[..., FeatureMap]
) -> None:
    small, connector = make_feature((2, 3), 20, dtype=torch.float32), ours(reference)
    padded = FeatureMap(torch.cat([small.tokens, torch.full((2, 4, 20), 50.0)], 1), (2, 5), torch.arange(10)[None] < 6)
    padded = padded._replace(mask=padded.mask.expand(2, -1))
    torch.testing.assert_close(connector({"siglip": padded}), connector({"siglip": small}), rtol=1e-5, atol=1e-5)


def test_several_encoders_are_one_sequence(make_feature: Callable[..., FeatureMap]) -> None:
    """Two maps of one encoder's width, projected by equal weights, act as one longer map; a missing mask means real."""
    two, one = Perceiver({"a": 6, "b": 6}, 16, **TINY).double(), Perceiver({"a": 6}, 16, **TINY).double()
    one.load_state_dict({k: v for k, v in two.state_dict().items() if "projection.b" not in k})
    two.modality_projection["b"].load_state_dict(two.modality_projection["a"].state_dict())
    a, b = make_feature((2, 2), 6, seed=1), make_feature((1, 3), 6, seed=2)
    b = b._replace(mask=torch.tensor([[True, True, False]] * 2))
    mask = torch.cat([torch.ones(2, 4, dtype=torch.bool), b.mask], 1)
    joined = FeatureMap(torch.cat([a.tokens, b.tokens], 1), (1, 7), mask)
    torch.testing.assert_close(two({"b": b, "a": a}), one({"a": joined}))


def test_latents_start_apart(make_feature: Callable[..., FeatureMap]) -> None:
    """Equal latents (transformers' ones) would get equal gradients, and stay one token repeated."""
    out = Perceiver({"a": 6}, 16, **TINY).double()({"a": make_feature((2, 3), 6)})
    assert (out[:, :1] - out[:, 1:]).abs().amax(-1).min() > 0.1


def test_published_size() -> None:
    """idefics2-8b: SigLIP-SO400M into Mistral-7B."""
    with torch.device("meta"):
        connector = Perceiver({"siglip": 1152}, 4096)
    assert sum(p.numel() for p in connector.modality_projection.parameters()) == 91_750_400
    assert sum(p.numel() for p in connector.perceiver_resampler.parameters()) == 651_468_800
    assert connector.num_tokens({"siglip": (70, 70)}) == 64


def test_wrong_settings_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"connector.kv_heads = 3 does not divide connector.heads = 16"):
        Perceiver({"a": 6}, 16, kv_heads=3)
    with pytest.raises(ValueError, match=r"connector.latents = 0: at least 1"):
        Perceiver({"a": 6}, 16, latents=0)
