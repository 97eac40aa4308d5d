"""Blocks inside the LLM: packed == alone, several images, text only, checkpointing, generation, prefill only."""

from collections.abc import Callable

import pytest
import torch
from helpers import SHAPE, ColourSource, max_difference
from test_vlm import gradients, rows
from torch import Tensor, nn

from vlm_lab.batch import IGNORE, Batch, Block, Layout
from vlm_lab.data.loader import pack
from vlm_lab.data.process import Eye, Processor
from vlm_lab.data.tiling import AnyRes, Squash, Unpad
from vlm_lab.eval.runner import pad_left
from vlm_lab.model.connectors import DeepConnector
from vlm_lab.model.connectors.cross_attention import CrossAttention
from vlm_lab.model.connectors.sva import SVA
from vlm_lab.model.encoders import TimmEncoder
from vlm_lab.model.features import FeatureMap
from vlm_lab.model.inside import inside
from vlm_lab.model.llms import build_llm
from vlm_lab.model.seen import Seen
from vlm_lab.model.vlm import VLM

DEEP = {**SHAPE, "num_hidden_layers": 3}
SVA_TINY = {"side": 2, "hidden": 16, "heads": 2, "depth": 1, "stride": 1, "windows": 2}
CA_TINY = {"interval": 1, "heads": 2, "mlp_ratio": 2.0}
PERCEIVER = {"latents": 3, "depth": 1, "heads": 2, "head_dim": 8, "kv_heads": 1, "mlp_ratio": 1.0}
BUILDS: dict[str, Callable[[], DeepConnector]] = {
    "sva": lambda: SVA({"eye": 16}, 32, **SVA_TINY),
    "cross_attention": lambda: CrossAttention({"eye": 16}, 32, perceiver=PERCEIVER, **CA_TINY),
    "cross_attention_patches": lambda: CrossAttention({"eye": 16}, 32, perceiver=None, **CA_TINY),
}


@pytest.fixture(params=BUILDS)
def vlm(request: pytest.FixtureRequest) -> VLM:
    """SigLIP 32 px / patch 8 (4 x 4 patches), blocks in the layers of a small LLM; gates open, so that they act."""
    torch.manual_seed(0)
    eye = TimmEncoder("vit_base_patch16_siglip_224", None, -1, image_size=32, patch_size=8, width=16, depth=2, heads=2)
    model = VLM({"eye": eye}, BUILDS[request.param](), build_llm("qwen2", None, DEEP, None, "chatml", ""))
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            nn.init.constant_(parameter, 0.7)
    return model


@pytest.fixture
def process(processor: Processor, vlm: VLM) -> Processor:
    grid = vlm.connector.grid({"eye": (4, 4)})
    return Processor(processor.chat, Squash(), {"eye": Eye(32, (0.5, 0.5, 0.5))}, grid, max_tokens=200)


def test_packed_equals_unpacked(vlm: VLM, process: Processor) -> None:
    """Samples with one image, two, and none in one row: loss and every gradient per answer within 1e-5 in fp32."""
    packed, single = rows(process)
    answers = int(packed.targets.ne(IGNORE).sum())
    assert abs(vlm(packed).item() - sum(vlm(row).item() for row in single)) / answers <= 1e-5
    together, apart = gradients(vlm, [packed]), gradients(vlm, single)
    assert together.keys() == apart.keys() == dict(vlm.named_parameters()).keys()
    assert max(max_difference(together[n], apart[n]) for n in together) / answers <= 1e-5
    assert all(gradient.abs().max() > 0 for name, gradient in together.items() if "llm_blocks" in name)


def test_padding_that_is_cut_off(process: Processor) -> None:
    """SVA on padded squares: masked keys, dropped queries, newlines; packed == unpacked."""
    torch.manual_seed(0)
    eye = TimmEncoder("vit_base_patch16_siglip_224", None, -1, image_size=32, patch_size=8, width=16, depth=2, heads=2)
    sva = SVA({"eye": 16}, 32, side=4, hidden=16, heads=2, depth=1, stride=1, windows=2)
    vlm = VLM({"eye": eye}, sva, build_llm("qwen2", None, DEEP, None, "chatml", ""), newline=True)
    unpad = Processor(process.chat, Unpad(), process.eyes, (4, 4), 200)
    packed, single = rows(unpad)
    assert {layout.num_tokens for layout in packed.layouts} == {2 * 5}  # 20 x 12 pixels: 2 of 4 rows are kept
    answers = int(packed.targets.ne(IGNORE).sum())
    together, apart = gradients(vlm, [packed]), gradients(vlm, single)
    assert together.keys() == dict(vlm.named_parameters()).keys()
    assert max(max_difference(together[n], apart[n]) for n in together) / answers <= 1e-5


def test_a_text_only_row_has_every_parameter_in_its_graph(vlm: VLM, process: Processor) -> None:
    text = pack([process.example(ColourSource()[2])], process)
    assert not text.layouts
    assert gradients(vlm, [text]).keys() == dict(vlm.named_parameters()).keys()
    plain = vlm.llm(inputs_embeds=vlm.embed(text), position_ids=text.position_ids).logits
    expected = torch.nn.functional.cross_entropy(plain[0], text.targets[0], ignore_index=IGNORE, reduction="sum")
    assert vlm(text).item() == pytest.approx(expected.item(), rel=1e-5)  # blocks leave it as it is


def test_gradient_checkpointing_changes_nothing(vlm: VLM, process: Processor) -> None:
    packed, _ = rows(process)
    vlm.train()
    plain = gradients(vlm, [packed])
    vlm.llm.activation_checkpointing_enable()
    checkpointed = gradients(vlm, [packed])
    assert max(max_difference(plain[n], checkpointed[n]) for n in plain) == 0


def greedy(vlm: VLM, prompt: Tensor, batch: Batch, steps: int) -> list[int]:
    """Without a cache: the whole row again for every token."""
    out: list[int] = []
    for _ in range(steps):
        ids = torch.cat([prompt, torch.tensor([out], dtype=torch.long)], dim=1)
        row = batch.to("cpu")
        row.input_ids, row.cu_seqlens = ids, [0, ids.shape[1]]
        row.position_ids = torch.arange(ids.shape[1])[None]
        seen = vlm.see(row)
        with inside(vlm.llm, vlm.connector, seen):
            logits = vlm.llm(inputs_embeds=vlm.splice(row, seen), position_ids=row.position_ids).logits
        out.append(int(logits[0, -1].argmax()))
    return out


def test_generation_equals_greedy_search_without_a_cache(vlm: VLM, process: Processor) -> None:
    """Batched and left-padded, prompts with one image, two and none; stop tokens are out of the vocabulary's reach."""
    prompts = [process.prompt(ColourSource()[i]) for i in range(6)]
    with torch.no_grad():
        together = vlm.generate(pad_left(prompts, process), 6, stop=[10_000])
        for row, prompt in zip(together, prompts, strict=True):
            assert row.tolist() == greedy(vlm, torch.from_numpy(prompt.ids)[None], pack([prompt], process), 6)


def test_the_blocks_act_and_leave_no_hook(vlm: VLM, process: Processor) -> None:
    packed, _ = rows(process)
    before = vlm(packed).item()
    for block in vlm.connector.layer_blocks(3).values():
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
    assert abs(vlm(packed).item() - before) > 1e-4
    layers = vlm.llm.get_decoder().layers
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_sva_never_runs_at_decode_steps(process: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    eye = TimmEncoder("vit_base_patch16_siglip_224", None, -1, image_size=32, patch_size=8, width=16, depth=2, heads=2)
    vlm = VLM({"eye": eye}, BUILDS["sva"](), build_llm("qwen2", None, DEEP, None, "chatml", ""))
    calls = []
    for block in vlm.connector.layer_blocks(3).values():
        block.register_forward_hook(lambda *_: calls.append(1))
    prompts = Processor(process.chat, Squash(), process.eyes, (2, 2), 200)
    vlm.generate(pad_left([prompts.prompt(ColourSource()[0])], prompts), 5, stop=[10_000])
    assert len(calls) == 2  # one per layer, for the prompt alone


def test_sva_updates_the_cells_that_were_kept_and_no_newline() -> None:
    """A wide image on 2 x 2 tiles: margins cut off, a newline per row; every kept cell gets its own block output."""
    tiling, rng = AnyRes([(2, 2)]), torch.manual_seed(0)
    sva = SVA({"eye": 8}, 6, side=4, hidden=8, heads=2, depth=1, stride=1).double()
    block = sva.layer_blocks(2)[0].double()
    process = Processor(None, tiling, {"eye": Eye(32, (0.5,) * 3)}, (4, 4), 100)  # type: ignore[arg-type]
    layout = tiling.layouts([(100, 50)], process.view)[0]
    views, length = layout.views, layout.num_tokens
    memory = {"eye": FeatureMap(torch.randn(views, 16, 8, generator=rng, dtype=torch.float64), (4, 4))}
    image = torch.zeros(1, length + 3, dtype=torch.bool)
    image[0, 2:-1] = True
    seen = Seen(torch.zeros(views, 16, 6), (4, 4), memory, image, image.long() * 0, [layout])
    hidden = torch.randn(1, length + 3, 6, dtype=torch.float64)
    out = sva.inside(block, hidden, seen)
    changed = (out != hidden).any(-1)[0]
    assert not changed[:2].any() and not changed[-1]
    assert int(changed.sum()) == int((seen.cells >= 0).sum()) == 16 + 4 * 8  # base view, then 4 of 8 rows of 8 cells
    for position in (2, 2 + 16, 2 + 16 + 9 + 5):  # first of the base view; of the tiles; second row, sixth column
        cell = int(seen.cells[position - 2])
        alone = torch.zeros(views * 16, 6, dtype=torch.float64)
        alone[cell] = hidden[0, position]
        expected = block(alone.view(views, 16, 6), memory).flatten(0, 1)[cell]
        torch.testing.assert_close(out[0, position], expected, rtol=1e-12, atol=1e-12)


def test_a_token_sees_the_views_before_it_in_its_own_sample() -> None:
    """Two samples in one row: t i t i t | i t, one view each."""
    image = torch.tensor([[0, 1, 0, 1, 0, 1, 0]]).bool()
    one = Layout((Block((1, 1), (0, 0), (1, 1), (1, 1)),))
    seen = Seen(torch.zeros(3, 1, 4), (1, 1), None, image, torch.tensor([[0, 0, 0, 0, 0, 1, 1]]), [one] * 3)
    expected = [[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert seen.visible[0].long().tolist() == expected
