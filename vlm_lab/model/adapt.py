"""Low-rank adapters through peft: LoRA, DoRA, and QLoRA on NF4 weights. Put in before a stage, merged after it.

Only linear maps are adapted, never the LLM's output head. `merge` leaves the model as it was built, with the adapted
weights in place, so that whatever a stage writes is plain.
"""

import logging
from typing import Any, cast

import torch
from torch import nn

from vlm_lab.model.freeze import Rule, Table, is_adapter, path_of

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a missing kernel that nothing here calls


def inject(vlm: Any, table: Table) -> None:
    """Wrap the linear maps of every adapted path of a resolved `table`. ValueError for a path that has none."""
    targets: dict[Rule, list[str]] = {}
    for path, rule in table.items():
        if rule is not None and rule.adapt != "full":
            names = linear_maps(vlm, path, table)
            if not names:
                raise ValueError(f"train.{path}.adapt = {rule.adapt}: no linear map below this path")
            targets.setdefault(rule, []).extend(names)
    if targets:
        wrap(vlm, targets)


def wrap(vlm: Any, targets: dict[Rule, list[str]]) -> None:
    """Put adapters around the linear maps named for each rule."""
    from peft import LoraConfig, inject_adapter_in_model  # late: most runs need neither it nor bitsandbytes

    for rule, names in targets.items():
        if rule.adapt == "qlora":
            quantize(vlm, names)
        dora, alpha = rule.adapt == "dora", cast(int, rule.alpha)  # a fraction is fine, whatever peft's type says
        config = LoraConfig(
            r=rule.rank, lora_alpha=alpha, lora_dropout=rule.dropout, use_dora=dora, target_modules=names
        )
        inject_adapter_in_model(config, vlm)
        del vlm.peft_config  # else the next rule's adapters are taken for a second set on the same maps


def linear_maps(vlm: Any, path: str, table: Table) -> list[str]:
    """Names of the linear maps that `path` governs.

    Subclasses are left out: `nn.MultiheadAttention` reads the weight of its own and would bypass an adapter.
    """
    head = vlm.llm.get_output_embeddings()
    return [
        name
        for name, module in vlm.named_modules()
        if type(module) is nn.Linear and module is not head and path_of(name, table) == path
    ]


def quantize(model: Any, names: list[str]) -> None:
    """Replace linear maps by 4-bit ones (NF4, Dettmers et al. 2023, arXiv 2305.14314)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    model.is_loaded_in_4bit = True  # what peft goes by when it chooses the layer's class
    for name in names:
        plain: Any = model.get_submodule(name)
        small = Linear4bit(plain.in_features, plain.out_features, plain.bias is not None, quant_type="nf4")
        small.weight = Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=small)
        small.bias = plain.bias
        small.support_avx512bf16_for_cpu = False  # would repack the weights, with rounding, at the first inference
        replace_module(model, name, small.to(plain.weight.device))  # moving it is what quantizes


def merge(model: nn.Module) -> None:
    """Fold every adapter into the weights of its linear map. No-op for a model without adapters."""
    if not any(is_adapter(name) for name, _ in model.named_parameters()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    wrapped = [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    for name, module in wrapped:
        replace_module(model, name, merged(module))


@torch.no_grad()
def merged(layer: Any) -> nn.Module:
    """The linear map that computes what the adapted `layer` does."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    base: Any = layer.get_base_layer()
    if not isinstance(base, Linear4bit):
        layer.merge(safe_merge=True)
        return base
    delta = layer.get_delta_weight("default")
    plain: Any = nn.Linear(base.in_features, base.out_features, base.bias is not None, dtype=delta.dtype)
    weight: Any = base.weight  # Params4bit
    plain.weight.copy_(dequantize_4bit(weight.data, weight.quant_state) + delta)
    if base.bias is not None:
        plain.bias.copy_(base.bias)
    return plain


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
