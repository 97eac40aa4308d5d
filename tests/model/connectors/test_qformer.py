"""The Q-Former against transformers' Blip2QFormerModel (queries only), at tiny random weights, and at BLIP-2's size."""

from collections.abc import Callable

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from vlm_lab.model.connectors.qformer import QFormer
from vlm_lab.model.features import FeatureMap

NAMES = [  # transformers' name of a part -> ours, applied in order
    ("encoder.layer.", "layers."),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("attention.output.LayerNorm", "attention_norm"),
    ("intermediate_query.dense", "mlp.0"),
    ("output_query.dense", "mlp.2"),
    ("output_query.LayerNorm", "mlp_norm"),
    ("layernorm", "norm"),
]


@pytest.fixture(scope="module")
def reference() -> Blip2QFormerModel:
    config = Blip2QFormerConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24, encoder_hidden_size=10
    )
    torch.manual_seed(0)
    model = Blip2QFormerModel(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5)
    return model.eval()


def renamed(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {}
    for name, value in state.items():
        ours = name
        for old, new in NAMES:
            ours = ours.replace(old, new)
        out[ours] = value
    return out


@pytest.mark.parametrize("masked", [False, True])
def test_same_as_transformers(
    masked: bool, reference: Blip2QFormerModel, make_feature: Callable[..., FeatureMap]
) -> None:
    connector = QFormer({"a": 10}, 16, queries=5, hidden=16, depth=3, heads=4, mlp_hidden=24)
    missing, unexpected = connector.load_state_dict(renamed(reference.state_dict()), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"queries", "ln_vision", "project"}
    connector.project = torch.nn.Identity()
    feature = make_feature((2, 4), 10, views=3, dtype=torch.float32)
    feature = feature._replace(mask=torch.arange(8)[None] < torch.tensor([[8], [5], [1]]) if masked else None)
    with torch.no_grad():
        expected = reference(
            query_embeds=connector.queries.expand(3, -1, -1),
            encoder_hidden_states=connector.ln_vision(feature.tokens),
            encoder_attention_mask=feature.mask,
        ).last_hidden_state
        assert (connector({"a": feature}) - expected).abs().max() <= 1e-5


def test_as_many_parameters_as_blip2() -> None:
    """BLIP-2 with ViT-g: transformers' queries-only model, plus 32 queries, ln_vision and the projection."""
    with torch.device("meta"):
        connector, reference = QFormer({"vit_g": 1408}, 2560), Blip2QFormerModel(Blip2QFormerConfig())
    extra = 32 * 768 + 2 * 1408 + 768 * 2560 + 2560
    assert sum(p.numel() for p in connector.parameters()) == sum(p.numel() for p in reference.parameters()) + extra


def test_wrong_settings_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"connector.heads = 5 does not divide connector.hidden = 768"):
        QFormer({"a": 10}, 16, heads=5)
    with pytest.raises(ValueError, match=r"connector.cross_every = 0: at least 1"):
        QFormer({"a": 10}, 16, cross_every=0)
