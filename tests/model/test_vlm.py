"""The VLM: packed rows equal separate samples, nothing leaks between them, batched generation equals one by one."""

import copy
from collections.abc import Callable

import pytest
import torch
from helpers import ColourSource, max_difference
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from vlm_lab.batch import IGNORE, Batch
from vlm_lab.data.loader import pack
from vlm_lab.data.process import Processor
from vlm_lab.eval.runner import pad_left
from vlm_lab.model.vlm import VLM

LLMS = ["qwen2", "llama"]


def rows(processor: Processor, count: int = 8) -> tuple[Batch, list[Batch]]:
    examples = [processor.example(ColourSource()[i]) for i in range(count)]
    return pack(examples, processor), [pack([example], processor) for example in examples]


def gradients(vlm: VLM, batches: list[Batch]) -> dict[str, torch.Tensor]:
    vlm.zero_grad()
    for batch in batches:
        vlm(batch).backward()
    return {name: p.grad.clone() for name, p in vlm.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("llm", LLMS)
def test_packed_equals_unpacked(make_vlm: Callable[..., VLM], processor: Processor, llm: str) -> None:
    """Loss and every gradient, per answer token, within 1e-5 in fp32."""
    vlm, (packed, single) = make_vlm(llm), rows(processor)
    answers = int(packed.targets.ne(IGNORE).sum())
    assert answers == sum(int(row.targets.ne(IGNORE).sum()) for row in single)
    difference = vlm(packed) - sum(vlm(row) for row in single)
    assert abs(difference.item()) / answers <= 1e-5
    together, apart = gradients(vlm, [packed]), gradients(vlm, single)
    assert together.keys() == apart.keys() == dict(vlm.named_parameters()).keys()
    assert max(max_difference(together[n], apart[n]) for n in together) / answers <= 1e-5


@pytest.mark.parametrize("llm", LLMS)
def test_loss_is_that_of_stock_transformers(make_vlm: Callable[..., VLM], processor: Processor, llm: str) -> None:
    """One sample at a time through transformers' own sdpa and its own loss: the same sum within 1e-4."""
    vlm, (packed, single) = make_vlm(llm), rows(processor)
    stock = AutoModelForCausalLM.from_config(copy.deepcopy(vlm.llm.config), attn_implementation="eager")
    stock.load_state_dict(vlm.llm.state_dict())
    total = 0.0
    for row in single:
        logits = stock(inputs_embeds=vlm.embed(row)).logits
        total += F.cross_entropy(logits[0], row.targets[0], ignore_index=IGNORE, reduction="sum").item()
    assert vlm(packed).item() == pytest.approx(total, rel=1e-5)


def test_a_sample_never_moves_anothers_logits(make_vlm: Callable[..., VLM], processor: Processor) -> None:
    """Changing one sample's text and image leaves the hidden states of all others bit-identical."""
    vlm, (row, _) = make_vlm(), rows(processor)
    changed = row.to("cpu")
    changed.input_ids = row.input_ids.clone()
    start, end = row.cu_seqlens[2], row.cu_seqlens[3]  # the third sample is text only
    changed.input_ids[0, start:end] = 7
    changed.pixels = {"eye": row.pixels["eye"].clone()}
    changed.pixels["eye"][0] = 255 - row.pixels["eye"][0]  # the first sample's image
    before, after = (hidden(vlm, batch) for batch in (row, changed))
    same = (before == after).all(-1)[0]
    others = torch.ones_like(same)
    others[start:end] = False
    others[: row.cu_seqlens[1]] = False
    assert same[others].all()
    assert not same[~others].all()


def hidden(vlm: VLM, batch: Batch) -> torch.Tensor:
    return vlm.llm.model(
        inputs_embeds=vlm.embed(batch),
        position_ids=batch.position_ids,
        attention_mask=batch.input_ids.new_zeros(1, 1, 1, 1),
        cu_seq_lens_q=batch.cu_seqlens,
    ).last_hidden_state


def test_text_only_row_reaches_the_encoder_with_zero_gradient(
    make_vlm: Callable[..., VLM], processor: Processor
) -> None:
    vlm, text = make_vlm(), pack([processor.example(ColourSource()[2])], processor)
    found = gradients(vlm, [text])
    assert all(not found[name].any() for name in found if name.startswith(("encoder", "connector")))
    assert found["llm.model.layers.0.mlp.up_proj.weight"].any()


def test_placeholder_and_view_counts_must_agree(make_vlm: Callable[..., VLM], processor: Processor) -> None:
    row = rows(processor)[0]
    row.pixels = {"eye": row.pixels["eye"][:-1]}
    with pytest.raises(ValueError, match=r"\d+ views laid out but \d+ encoded"):
        make_vlm()(row)


@pytest.mark.parametrize("llm", LLMS)
def test_batched_generation_equals_one_by_one(make_vlm: Callable[..., VLM], processor: Processor, llm: str) -> None:
    """Greedy, left-padded prompts of different lengths, with one, two and no images."""
    vlm = make_vlm(llm).eval()
    examples = [processor.prompt(ColourSource()[i]) for i in range(9)]
    stop = processor.chat.stop
    batched = vlm.generate(pad_left(examples, processor), 8, stop)
    for row, example in zip(batched, examples, strict=True):
        alone = vlm.generate(pad_left([example], processor), 8, stop)[0]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_cached_generation_equals_recomputing_every_step(make_vlm: Callable[..., VLM], processor: Processor) -> None:
    vlm, example = make_vlm().eval(), processor.prompt(ColourSource()[0])
    prompt = pad_left([example], processor)
    generated = vlm.generate(prompt, 6, processor.chat.stop)[0]
    embeds = vlm.embed(prompt)
    for token in generated:
        best = vlm.llm(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()
        assert best == token
        embeds = torch.cat([embeds, vlm.llm.get_input_embeddings()(best)[None, None]], dim=1)
