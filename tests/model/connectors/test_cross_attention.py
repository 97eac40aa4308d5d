"""Gated cross-attention against the formula token by token, against transformers' Idefics, and its invariants."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from vlm_lab.model.connectors import attention
from vlm_lab.model.connectors.cross_attention import CrossAttention, GatedCrossAttention
from vlm_lab.model.features import FeatureMap

DIM, HEADS, MLP = 8, 2, 12


@pytest.fixture
def block() -> GatedCrossAttention:
    module = GatedCrossAttention(DIM, HEADS, MLP)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64) * 0.7
    return module


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of 4 text and 5 visual tokens; token 0 of sample 0 and all of sample 1 see nothing."""
    mask = torch.rand(2, 4, 5) > 0.4
    mask[0, 1:, 0], mask[0, 0], mask[1] = True, False, False
    return torch.randn(2, 4, DIM, dtype=torch.float64), torch.randn(2, 5, DIM, dtype=torch.float64), mask


def rms_norm(x: Tensor, layer: nn.RMSNorm) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * layer.weight


def one_token(block: GatedCrossAttention, x: Tensor, seen: list[Tensor]) -> Tensor:
    if not seen:
        return x
    attn, d, heads = block.cross_attn, DIM // HEADS, []
    q = attn.q_proj.weight @ rms_norm(x, block.input_layernorm)
    for head in range(HEADS):
        at = slice(head * d, (head + 1) * d)
        weights = torch.stack([(q[at] @ (attn.k_proj.weight @ f)[at]) / d**0.5 for f in seen]).exp()
        values = [(attn.v_proj.weight @ f)[at] for f in seen]
        heads.append(sum(w * v for w, v in zip(weights, values, strict=True)) / weights.sum())
    x = x + block.alpha_cross_attn.tanh() * (attn.o_proj.weight @ torch.cat(heads))
    normed = rms_norm(x, block.post_attention_layernorm)
    gate = block.mlp.gate_proj.weight @ normed
    dense = block.mlp.down_proj.weight @ (gate / (1 + (-gate).exp()) * (block.mlp.up_proj.weight @ normed))
    return x + block.alpha_dense.tanh() * dense


def test_formula(block: GatedCrossAttention, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, visual, mask = batch
    out = block(hidden, visual, mask)
    for b in range(2):
        for n in range(4):
            seen = [f for f, visible in zip(visual[b], mask[b, n], strict=True) if visible]
            torch.testing.assert_close(out[b, n], one_token(block, hidden[b, n], seen), rtol=1e-6, atol=1e-9)


def test_text_that_sees_nothing_is_unchanged(block: GatedCrossAttention, batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, visual, mask = batch
    visual.requires_grad_()
    out = block(hidden, visual, mask)
    assert torch.equal(out[1], hidden[1]) and torch.equal(out[0, 0], hidden[0, 0])
    assert not torch.isclose(out[0, 1:], hidden[0, 1:]).all(-1).any()
    out.sum().backward()
    assert visual.grad.isfinite().all() and (visual.grad[1] == 0).all()
    assert torch.equal(block(hidden, visual[:, :0], mask[..., :0]), hidden)


def test_a_new_block_leaves_hidden_states_as_they_are(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, visual, mask = batch
    block = GatedCrossAttention(DIM, HEADS, MLP).double()
    out = block(hidden, visual, mask)
    assert torch.equal(out, hidden)
    out.pow(2).sum().backward()  # the gates move first, then the rest
    assert block.alpha_cross_attn.grad.abs() > 0 and block.alpha_dense.grad.abs() > 0


def test_open_gates_pass_gradients_to_every_parameter(
    block: GatedCrossAttention, batch: tuple[Tensor, Tensor, Tensor]
) -> None:
    block(*batch).pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in block.parameters())


def test_same_as_idefics_where_text_sees_an_image() -> None:
    config = IdeficsConfig(hidden_size=DIM, intermediate_size=MLP, num_attention_heads=HEADS, dropout=0.0)
    config.vision_config.embed_dim = DIM
    config._attn_implementation = "eager"
    reference, block = IdeficsGatedCrossAttentionLayer(config, layer_idx=0), GatedCrossAttention(DIM, HEADS, MLP)
    for parameter in reference.parameters():
        parameter.data.normal_(std=0.5)
    block.load_state_dict(reference.state_dict())
    hidden, visual, mask = torch.randn(2, 4, DIM), torch.randn(2, 5, DIM), torch.rand(2, 4, 5) > 0.5
    mask[..., 2] = True
    bias = torch.zeros(2, 1, 4, 5).masked_fill(~mask[:, None], torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = reference(hidden, None, visual, bias, torch.ones(2, 4))
        assert (block(hidden, visual, mask) - expected).abs().max() <= 1e-5


def test_blocks_sit_before_every_kth_layer() -> None:
    with torch.device("meta"):
        connector = CrossAttention({"siglip": 1152}, 4096)
        blocks = connector.layer_blocks(32)
    assert list(blocks) == [0, 4, 8, 12, 16, 20, 24, 28] and connector.layer_blocks(32)[4] is blocks[4]
    assert connector.num_tokens({"siglip": (27, 27)}) == 1  # the placeholder
    # queries and output 2 x 4096^2, keys and values the same, MLP 3 x 4096 x 14336, two norms, two gates
    assert sum(p.numel() for p in blocks[0].parameters()) == 4 * 4096**2 + 3 * 4096 * 14336 + 2 * 4096 + 2


def test_without_perceiver_every_patch_is_a_visual_token(make_feature: Callable[..., FeatureMap]) -> None:
    connector = CrossAttention({"a": 5}, DIM, heads=HEADS, perceiver=None).double()
    features = {"a": make_feature((2, 3), 5, mask=torch.tensor([[True] * 4 + [False] * 2] * 2))}
    memory = connector.memory(features)
    assert memory.tokens.shape == (2, 6, DIM) and memory.mask is features["a"].mask
    assert connector.tokens(memory).shape == (2, 1, DIM)
    resampled = CrossAttention({"a": 5}, DIM, heads=HEADS, perceiver={"latents": 3, "heads": 2, "kv_heads": 1}).double()
    assert resampled.memory(features).tokens.shape == (2, 3, DIM) and resampled.memory(features).mask is None


def test_large_batches_are_split_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, mask = torch.randn(7, 1, 6), torch.randn(7, 3, 6), torch.rand(7, 1, 3) > 0.3
    whole = attention.attend(q, k, k, 2), attention.attend(q, k, k, 2, mask)
    monkeypatch.setattr(attention, "CUDA_BATCH", 3)
    torch.testing.assert_close((attention.attend(q, k, k, 2), attention.attend(q, k, k, 2, mask)), whole)


def test_wrong_settings_name_the_field() -> None:
    with pytest.raises(ValueError, match=r"connector.heads = 32 does not divide the LLM's width = 100"):
        CrossAttention({"a": 5}, 100)
    with pytest.raises(ValueError, match=r"connector.interval = 0: at least 1"):
        CrossAttention({"a": 5}, 64, interval=0)
