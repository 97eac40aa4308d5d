"""Text tower, caption decoder, pooling and token dropping: what the published architecture says about each."""

import pytest
import torch
from helpers import max_difference
from pretrain_parts import small_batch, small_encoder, small_model
from torch import nn

from vlm_lab.batch import IGNORE
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.encoders.openvision import sincos_positions
from vlm_lab.model.features import FeatureMap
from vlm_lab.model.pretrain.decoder import CaptionDecoder
from vlm_lab.model.pretrain.kept import encode, take
from vlm_lab.model.pretrain.resolution import at_resolution
from vlm_lab.model.pretrain.text import TextTower

PUBLISHED = {  # width, depth, heads, mlp, shared dimension -> millions of parameters (vocabulary 32000, 80 positions)
    "tiny": ((192, 12, 3, 768, 192), 11.5),
    "small": ((384, 12, 6, 1536, 384), 33.8),
    "base": ((512, 12, 8, 2048, 512), 54.5),
    "large": ((768, 12, 12, 3072, 768), 110.3),
    "so400m": ((1152, 27, 16, 4304, 1152), 449.8),
    "huge": ((1024, 24, 16, 4096, 1024), 336.2),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_text_towers_have_the_published_parameter_counts(size: str) -> None:
    shape, millions = PUBLISHED[size]
    with torch.device("meta"):
        tower = TextTower(*shape)
    assert round(sum(p.numel() for p in tower.parameters()) / 1e6, 1) == millions


def test_text_tower_looks_both_ways_and_reads_its_last_token() -> None:
    torch.manual_seed(0)
    tower, ids = TextTower(16, 2, 2, 32, 8, vocab=30, length=6), torch.tensor([[1, 7, 8, 2, 0, 4]])
    features, states = tower(ids)
    assert features.shape == (1, 8) and states.shape == (1, 5, 16)
    other = ids.clone()
    other[0, 4] = 9  # a padding token: no mask hides it, as published
    assert max_difference(tower(other)[0], features) > 1e-4
    assert max_difference(tower(other)[1][:, 0], states[:, 0]) > 1e-4
    x = tower.transformer(tower.embedding(ids) + tower.positions)
    assert max_difference(tower.proj(tower.norm(x[:, 5])), features) <= 1e-6
    assert max_difference(x[:, :5], states) <= 1e-6


def test_short_texts_keep_cls_at_its_position() -> None:
    tower = TextTower(16, 1, 2, 32, 8, vocab=30, length=6)
    tower(torch.tensor([[1, 2, 4]]))[0].sum().backward()
    assert tower.positions.grad is not None
    assert tower.positions.grad.abs().sum(1).gt(0).tolist() == [True, True, False, False, False, True]
    with pytest.raises(ValueError, match="a text of 7 tokens, but the text tower has 6 positions"):
        tower(torch.zeros(1, 7, dtype=torch.long))


def decoder() -> tuple[CaptionDecoder, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    made = CaptionDecoder(16, 24, 24, 2, 2, 48, vocab=40, queries=5)
    return made, torch.randn(2, 9, 16), torch.randn(2, 5, 24)


def test_queries_cannot_influence_the_prefix() -> None:
    made, image, text = decoder()
    states = []
    made.transformer.register_forward_hook(lambda module, args, out: states.append(out))
    hidden = made(image, text)
    assert hidden.shape == (2, 5, 24) and states[0].shape == (2, 14 + 5, 24)
    states[0][:, :14].sum().backward(retain_graph=True)
    assert made.queries.grad is not None and not made.queries.grad.any()
    hidden.sum().backward()
    assert made.queries.grad.abs().sum(1).gt(0).all()


def test_query_i_depends_on_earlier_queries_and_the_whole_prefix_only() -> None:
    made, image, text = decoder()
    image.requires_grad_()
    text.requires_grad_()
    made(image, text)[:, 2].sum().backward()
    assert made.queries.grad is not None
    assert made.queries.grad.abs().sum(1).gt(0).tolist() == [True, True, True, False, False]
    assert image.grad is not None and image.grad.abs().sum(-1).gt(0).all()
    assert text.grad is not None and text.grad.abs().sum(-1).gt(0).all()


def test_pooled_output_is_the_mean_of_the_patches_without_the_class_token() -> None:
    model, pixels = small_model(), small_batch().pixels
    raw: list[torch.Tensor] = []
    vit = model.encoder["eye"].model
    vit.blocks[-1].register_forward_hook(lambda module, args, out: raw.append(out))
    features = model.image_features(pixels)
    head = model.towers.image
    assert raw[0].shape == (8, 1 + 16, 16)
    expected = head.proj(nn.functional.layer_norm(raw[0][:, 1:].mean(1), (16,), head.norm.weight, head.norm.bias, 1e-6))
    assert max_difference(features, nn.functional.normalize(expected, dim=-1)) <= 1e-6
    assert max_difference(features.norm(dim=-1), torch.ones(8)) <= 1e-6


def test_sincos_table_is_fixed() -> None:
    model = small_model()
    positions = model.encoder["eye"].model.pos_embed
    assert max_difference(positions[0], sincos_positions((4, 4), 16)) == 0
    assert not [name for name, _ in model.named_parameters() if "pos_embed" in name]
    assert not [name for name in model.state_dict() if "pos_embed" in name]


def test_low_resolution_weights_serve_a_higher_resolution() -> None:
    """Sine-cosine positions are those of the new grid, learned ones are resampled; the rest is taken over."""
    low, high = small_model(), small_model(small_encoder(side=48))
    high.load_state_dict(at_resolution(low.state_dict(), high))
    assert high.encoder["eye"].model.pos_embed.shape == (1, 36, 16)
    assert high(small_batch(48)).total.isfinite()
    siglip = "vit_base_patch16_siglip_224"
    low, high = small_model(small_encoder(-1, siglip)), small_model(small_encoder(-1, siglip, side=64))
    ramp = torch.linspace(0, 1, 4)[:, None].expand(4, 4).reshape(1, 16, 1).expand(1, 16, 16)
    low.encoder["eye"].model.pos_embed.data.copy_(ramp)
    high.load_state_dict(at_resolution(low.state_dict(), high))
    found = high.encoder["eye"].model.pos_embed[0, :, 0].reshape(8, 8)
    assert (found[1:] > found[:-1]).all() and max_difference(found, found[:, :1].expand(8, 8)) <= 1e-6
    for name, value in low.state_dict().items():
        assert "pos_embed" in name or max_difference(high.state_dict()[name], value) == 0


def test_dropped_patches_do_not_enter_the_encoder() -> None:
    encoder, pixels = small_encoder(), small_batch().pixels
    kept = torch.stack([torch.arange(0, 16, 2)] * 8)
    whole, found = encode(encoder, pixels), encode(encoder, pixels, kept)
    assert found.shape == (8, 8, 16) and max_difference(found, take(whole, kept)) > 1e-3
    grey = pixels.clone().view(8, 3, 4, 8, 4, 8)
    grey[:, :, :, :, 1::2] = 128  # odd columns of patches, that is the odd patches
    assert max_difference(encode(encoder, grey.view_as(pixels), kept), found) <= 1e-6
    everything = torch.arange(16).expand(8, 16)
    assert max_difference(encode(encoder, pixels, everything), whole) <= 1e-6
    assert not encoder.model.blocks[0]._forward_pre_hooks  # the encoder is as it was


def test_only_transformers_can_drop_patches() -> None:
    convnext = TimmEncoder("convnext_atto", None, -1, options={"depths": [1, 1, 1, 1], "dims": [8, 8, 8, 8]})
    with pytest.raises(ValueError, match="only a timm Vision Transformer with one output layer can drop image tokens"):
        encode(convnext, torch.zeros(1, 3, 224, 224, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.long))


def test_losses_are_those_that_the_towers_say() -> None:
    batch = small_batch()
    openvision = small_model()(batch)
    expected = openvision.contrastive + 2 * openvision.caption
    assert max_difference(openvision.total, expected) <= 1e-5
    clip = small_model(synthetic=False, caption=0)
    assert clip(batch).caption is None and clip.towers.decoder is None
    second = small_model(synthetic=True, caption=0)
    second.load_state_dict(clip.state_dict())
    batch.synthetic = batch.raw
    assert max_difference(second(batch).total, clip(batch).total) <= 1e-5  # half and half of the same
    smol = small_model(contrastive=None, caption=1.0)
    assert smol.towers.text is None and smol.towers.image is None
    batch.read = torch.zeros(8, 1, dtype=torch.long)
    found = smol(batch)
    assert max_difference(found.total, found.caption) == 0
    with pytest.raises(ValueError, match="no contrastive part"):
        smol.image_features(batch.pixels)
    with pytest.raises(ValueError, match="leave nothing to learn"):
        small_model(contrastive=None, caption=0)


def test_the_decoder_reads_the_chosen_tokens_alone() -> None:
    """OpenVision 2: the gradient of the caption loss at the encoder's output is zero where the decoder did not look."""
    model, batch = small_model(contrastive=None), small_batch()
    batch.read = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i))[:6] for i in range(8)])
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: object, out: FeatureMap) -> None:
        out.tokens.retain_grad()
        seen.append(out.tokens)

    model.encoder["eye"].register_forward_hook(keep)
    model(batch).total.backward()
    touched = seen[0].grad.abs().sum(-1).gt(0)
    expected = torch.zeros(8, 16, dtype=torch.bool).scatter(1, batch.read, True)
    expected[(batch.targets == IGNORE).all(1)] = False
    assert (touched == expected).all()
