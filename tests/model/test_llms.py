"""Every LLM of conf/llm: packing, padding and parity with stock transformers at toy width; counts at full size.

The independent reference is transformers' own eager attention on one sample at a time. Sliding windows are set to 4
tokens, shorter than most samples, and the vectors (norms, biases, sinks) are random, so that none is a no-op.
"""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import ROOT, composed, max_difference
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from vlm_lab.model.llms import build_llm

OPTIONS = sorted(path.stem for path in (ROOT / "conf" / "llm").glob("*.yaml"))
LENGTHS = [7, 7, 3, 11, 1, 11]
BOUNDS = [0, 7, 14, 17, 28, 29, 40]
GPT_OSS = {"head_dim": 32, "num_local_experts": 4, "sliding_window": 4}


def node(option: str, scale: str) -> dict[str, Any]:
    found: Any = OmegaConf.to_container(composed(f"llm={option}", f"scale={scale}").llm, resolve=True)
    return found


def toys() -> dict[str, tuple[str, dict[str, Any]]]:
    """{name: (family, shape)}: the toy of every option once, and gpt-oss for its attention sinks."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for option in OPTIONS:
        llm = node(option, "tiny")
        small = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.2}
        small |= {"sliding_window": 4} if "sliding_window" in llm["shape"] else {}
        small |= {"num_attention_heads": 4, "num_key_value_heads": min(llm["shape"]["num_key_value_heads"], 4)}
        toy = (llm["family"], {**llm["shape"], **small})
        if toy not in found.values():
            found[option] = toy
    shape = {**found["qwen2"][1], **GPT_OSS}
    return {**found, "gpt_oss": ("gpt_oss", shape)}


TOYS = toys()


@pytest.fixture(scope="module", params=TOYS)
def llm(request: pytest.FixtureRequest) -> PreTrainedModel:
    torch.manual_seed(0)
    family, shape = TOYS[request.param]
    model = build_llm(family, None, shape, None, "chatml", "").eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.3)
    return model


@pytest.fixture(scope="module")
def ids(llm: PreTrainedModel) -> Tensor:
    return torch.randint(1, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))


def stock(llm: PreTrainedModel, attention: str) -> PreTrainedModel:
    """transformers' own model with the same weights and its own attention."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(llm.config), attn_implementation=attention).eval()
    model.load_state_dict(llm.state_dict())
    return model


def packed(llm: PreTrainedModel, embeds: Tensor, **kwargs: Any) -> Tensor:
    """As VLM.forward calls it."""
    return llm(
        inputs_embeds=embeds,
        position_ids=positions(),
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.long),
        cu_seq_lens_q=BOUNDS,
        use_cache=False,
        **kwargs,
    ).logits


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest expected value where that is above 1."""
    return max_difference(found, expected) / max(1.0, float(expected.abs().max()))


def positions() -> Tensor:
    return torch.cat([torch.arange(length) for length in LENGTHS])[None]


def test_packed_equals_each_alone_in_stock_transformers(llm: PreTrainedModel, ids: Tensor) -> None:
    """Logits from embeddings in one row, and from ids one sample at a time through eager attention, within 1e-5.

    So are the logits of the answers alone, as the loss takes them, soft-capped where the family caps them.
    """
    reference, embeds = stock(llm, "eager"), llm.get_input_embeddings()(ids)
    with torch.no_grad():
        alone = [reference(input_ids=ids[:, start:end], use_cache=False).logits for start, end in pairwise(BOUNDS)]
        expected, logits = torch.cat(alone, dim=1), packed(llm, embeds)
        kept = packed(llm, embeds, logits_to_keep=torch.tensor([3, 8, 20]))
    assert expected.std() > 0.1
    assert relative(logits, expected) <= 1e-5
    assert relative(kept, logits[:, [3, 8, 20]]) <= 1e-5


def test_gradients_packed_equal_unpacked(llm: PreTrainedModel, ids: Tensor) -> None:
    """Of a cross-entropy per token, for every parameter, within 1e-5."""
    targets = ids.roll(-1, dims=1)

    def gradients(logits: list[Tensor]) -> dict[str, Tensor]:
        loss = torch.nn.functional.cross_entropy(torch.cat(logits, dim=1)[0], targets[0])
        llm.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in llm.named_parameters() if p.grad is not None}

    embed = llm.get_input_embeddings()
    together = gradients([packed(llm, embed(ids))])
    apart = gradients([llm(input_ids=ids[:, a:b], use_cache=False).logits for a, b in pairwise(BOUNDS)])
    assert together.keys() == apart.keys() == dict(llm.named_parameters()).keys()
    for name, gradient in together.items():
        assert relative(gradient, apart[name]) <= 1e-5, name


def test_nothing_leaks_between_samples(llm: PreTrainedModel, ids: Tensor) -> None:
    """Others' logits have exactly zero gradient to a sample, and do not move by a bit when it changes.

    Experts get their tokens from all samples in one matrix product, whose rounding depends on how many they are: there
    the logits may move by 1e-5.
    """
    embeds = llm.get_input_embeddings()(ids).detach().requires_grad_()
    own = slice(BOUNDS[3], BOUNDS[4])
    others = torch.ones(ids.shape[1], dtype=torch.bool)
    others[own] = False
    logits = packed(llm, embeds)
    (gradient,) = torch.autograd.grad(logits[:, others].square().sum(), embeds)
    assert not gradient[:, own].any()
    assert gradient[:, others].any(-1).all()
    changed = embeds.detach().clone()
    changed[:, own] = changed[:, own].flip(1) * 2
    moved = (packed(llm, changed) - logits).abs().amax(-1)[0]
    experts = getattr(llm.config, "num_local_experts", 0) > 0
    assert moved[others].max() <= (1e-5 * float(logits.detach().abs().max()) if experts else 0.0)
    assert moved[own].min() > 1e-3


def test_padded_generation_equals_one_by_one(llm: PreTrainedModel, ids: Tensor) -> None:
    """Greedy from embeddings; with prompts of 1 to 11 tokens, and windows that slide while tokens are added."""
    embeds = llm.get_input_embeddings()(ids).detach()
    prompts = [embeds[:, start:end] for start, end in pairwise(BOUNDS)]
    longest = max(LENGTHS)
    batch = torch.cat([torch.nn.functional.pad(p, (0, 0, longest - p.shape[1], 0)) for p in prompts])
    mask = torch.tensor([[0] * (longest - length) + [1] * length for length in LENGTHS])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": [96], "pad_token_id": 96}
    together = llm.generate(inputs_embeds=batch, attention_mask=mask, **options)
    for row, prompt in zip(together, prompts, strict=True):
        alone = llm.generate(inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2]), **options)[0]
        assert row[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_stock_attention_reads_the_position_ids(llm: PreTrainedModel, ids: Tensor, attention: str) -> None:
    """Without a mask, transformers' own backends find the samples by their position ids: the same row, within 1e-5."""
    if llm.config.model_type == "gpt_oss" or (attention == "sdpa" and not type(llm)._supports_sdpa):
        pytest.skip("transformers has no sdpa with soft-capping or sinks; its gpt-oss does not look at position ids")
    with torch.no_grad():
        logits = stock(llm, attention)(input_ids=ids, position_ids=positions(), use_cache=False).logits
        assert relative(logits, packed(llm, llm.get_input_embeddings()(ids))) <= 1e-5


@pytest.mark.parametrize("option", ["gemma", "gemma2", "gemma3"])
def test_gemma_scales_tokens_in_the_embedding_and_nothing_else(option: str) -> None:
    """So visual tokens, which enter beside the embedded text, are not scaled."""
    family, shape = TOYS[option]
    llm = build_llm(family, None, shape, None, "gemma", "")
    embedding = llm.get_input_embeddings()
    assert torch.equal(embedding(torch.tensor([5]))[0], embedding.weight[5] * torch.tensor(64**0.5))
    entered: list[Tensor] = []
    llm.model.layers[0].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    visual = torch.randn(1, 3, 64)
    llm(inputs_embeds=visual, use_cache=False)
    assert torch.equal(entered[0], visual)


# Numbers of parameters as the hub counts them in the safetensors files (`safetensors.total` of the model's page).
# Cross-checks: Gemma 2 report, table 1 (590,118,912 + 2,024,517,888); Mixtral report (47B, 13B active); Qwen2.5 model
# card (7.61B); Yi report (34B); Llama 2 report (6.7B, 13.0B); facts of LLaVA-OneVision (Qwen2-0.5B 494,032,768).
PUBLISHED = {
    "gemma": 2_506_172_416,
    "gemma2": 2_614_341_888,
    "gemma3": 999_885_952,
    "hf": 1_484_916_736,
    "llama": 8_030_261_248,
    "llama1": 6_738_415_616,
    "llama2": 6_738_415_616,
    "mistral": 7_241_732_096,
    "mixtral": 46_702_792_704,
    "phi3": 3_821_079_552,
    "qwen2": 7_615_616_512,
    "qwen2_0_5b": 494_032_768,
    "qwen2_5": 7_615_616_512,
    "qwen2_72b": 72_706_203_648,
    "qwen3": 4_022_468_096,
    "smollm2": 134_515_008,
    "vicuna": 6_738_415_616,
    "vicuna_13b": 13_015_864_320,
    "yi": 34_388_917_248,
}


@pytest.mark.parametrize("option", OPTIONS)
def test_full_size_has_the_published_number_of_parameters(option: str) -> None:
    """On the meta device, without network; exactly."""
    llm = node(option, "full")
    with torch.device("meta"):
        model = build_llm(llm["family"], None, llm["shape"], None, llm["chat"], "")
    assert model.num_parameters() == PUBLISHED[option]


@pytest.fixture
def saved(tmp_path: Any) -> tuple[str, dict[str, Any]]:
    """A small checkpoint on disk, and the shape that it has."""
    family, shape = TOYS["qwen2"]
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape)).save_pretrained(tmp_path)
    return str(tmp_path), shape


def test_a_checkpoint_must_have_the_shape_of_the_yaml(saved: tuple[str, dict[str, Any]]) -> None:
    folder, shape = saved
    build_llm("qwen2", folder, {**shape, "initializer_range": 0.5}, None, "chatml", "")
    for key, value in {"num_hidden_layers": 9, "rms_norm_eps": 0.5, "vocab_size": 50}.items():
        with pytest.raises(ValueError, match=rf"llm\.shape\.{key} = {value}, but the checkpoint .* has {shape[key]}"):
            build_llm("qwen2", folder, {**shape, key: value}, None, "chatml", "")
    with pytest.raises(ValueError, match=r"llm\.shape\.rope_parameters"):
        build_llm("qwen2", folder, {**shape, "rope_theta": 5.0}, None, "chatml", "")
    with pytest.raises(ValueError, match=r"llm\.family = llama, but the checkpoint"):
        build_llm("llama", folder, shape, None, "chatml", "")


def test_any_checkpoint_without_a_shape(saved: tuple[str, dict[str, Any]]) -> None:
    llm = build_llm(None, saved[0], None, None, "chatml", "")
    assert llm.config.vocab_size == 97 and llm.config._attn_implementation == "packed"


def test_a_larger_vocabulary_adds_rows(saved: tuple[str, dict[str, Any]]) -> None:
    """As Idefics2 adds three tokens to Mistral's; the old rows stay."""
    folder, shape = saved
    old, new = (build_llm("qwen2", folder, {**shape, "vocab_size": n}, None, "chatml", "") for n in (97, 100))
    assert new.get_input_embeddings().weight.shape[0] == new.config.vocab_size == 100
    assert torch.equal(new.get_input_embeddings().weight[:97], old.get_input_embeddings().weight)


REFUSED = {
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.5},  # ALiBi: no position ids
    "lfm2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "full_attn_idxs": [1],
    },  # convolutions
    "llama4_text": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},  # attention in chunks
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_mix_the_samples_of_a_row_are_refused(family: str) -> None:
    shape = {"vocab_size": 97, "pad_token_id": 0, **REFUSED[family]}
    with pytest.raises(ValueError, match="mix"), torch.device("meta" if family == "llama4_text" else "cpu"):
        build_llm(family, None, shape, None, "chatml", "")


def test_random_weights_need_a_family_and_a_shape() -> None:
    with pytest.raises(ValueError, match=r"llm\.weights = null needs llm\.family and llm\.shape"):
        build_llm(None, None, None, None, "chatml", "")
