"""What trains, and how: the only code that touches `requires_grad`.

A stage's table maps module paths to rules; the longest path that is a prefix of a parameter's name wins; a parameter
without one, or with None, is frozen. Frozen modules also stay in evaluation mode (no dropout, no stochastic depth, no
batch statistics). Low-rank adapters are put in by `adapt.py`; this file only knows them by their names.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer


@dataclass(frozen=True)
class Rule:
    """How everything below one module path trains.

    `lr` is the peak rate, `warmup` the fraction of the stage's steps until it is reached. `adapt` is full, lora, dora
    or qlora; the latter three train adapters of `rank`, scaled by alpha / rank, on frozen linear maps. `last`: only
    the last n blocks (`resolve` spells them out).
    """

    lr: float
    adapt: str = "full"
    last: int | None = None
    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    weight_decay: float = 0.0
    warmup: float = 0.0


Table = dict[str, Rule | None]


@dataclass
class Row:
    """One line of the trainability table: of the `params` parameters below `module`, `trained` train at `lr`."""

    module: str
    params: int
    trained: int
    lr: float | None  # None = frozen
    adapt: str | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def resolve(model: nn.Module, table: Table) -> Table:
    """`table` with every `last: n` spelt out as the paths of those blocks; paths that are given win over them.

    A path of tied weights (`llm.lm_head` where it is the embedding) is left out if the weights' own path says the same.
    ValueError if it does not, for a path that names no parameter, or that has fewer blocks than asked for.
    """
    names = [name for name, _ in model.named_parameters()]
    given: Table = {}
    spelt: Table = {}
    for path, rule in table.items():
        if not any(below(name, path) for name in names):
            check_tied(model, path, table)
            continue
        if rule is None or rule.last is None:
            given[path] = rule
            continue
        spelt[path] = None
        for tower in towers(model, path):
            spelt |= dict.fromkeys(last_blocks(model, tower, rule.last), replace(rule, last=None))
    return {**spelt, **given}


def check_tied(model: nn.Module, path: str, table: Table) -> None:
    """ValueError unless everything below `path` is tied to parameters that train by an equal rule."""
    own = {id(parameter): name for name, parameter in model.named_parameters()}
    everything = model.named_parameters(remove_duplicate=False)
    twins = {own[id(parameter)] for name, parameter in everything if below(name, path)}
    if not twins:
        raise ValueError(f"train.{path}: the model has no parameter below this path")
    for twin in sorted(twins):
        if rule_of(twin, table) != table[path]:
            raise ValueError(f"train.{path}: these weights are tied to {twin}, give both the same rate")


def towers(model: nn.Module, path: str) -> list[str]:
    """`encoder` stands for every encoder, each with blocks of its own; any other path for itself."""
    module = model.get_submodule(path)
    return [f"{path}.{name}" for name in module] if isinstance(module, nn.ModuleDict) else [path]


def last_blocks(model: nn.Module, path: str, count: int) -> list[str]:
    """Paths of the last `count` blocks below `path`."""
    found = blocks(model, path)
    if len(found) < count:
        raise ValueError(f"train.{path}.last = {count}, but there are {len(found)} blocks below this path")
    return found[-count:]


def blocks(model: nn.Module, path: str) -> list[str]:
    """Paths of the outermost blocks below `path`: the entries of lists named `blocks` (timm), `layers` or `layer`."""
    found: list[str] = []
    for name, _ in model.get_submodule(path).named_modules(prefix=path):
        above, _, index = name.rpartition(".")
        listed = index.isdigit() and above.rpartition(".")[2] in ("blocks", "layers", "layer")
        if listed and not any(below(name, block) for block in found):
            found.append(name)
    return found


def apply(model: nn.Module, table: Table) -> None:
    """Set `requires_grad` of every parameter from a resolved `table`."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains(name, table))


def rule_of(name: str, table: Table) -> Rule | None:
    """The rule of the parameter or module `name`; None = frozen."""
    path = path_of(name, table)
    return None if path is None else table[path]


def path_of(name: str, table: Iterable[str]) -> str | None:
    """The longest of the table's paths that `name` lies below."""
    return max((path for path in table if below(name, path)), key=len, default=None)


def trains(name: str, table: Table) -> bool:
    """Whether the parameter `name` is trained: itself, or as part of an adapter."""
    rule = rule_of(name, table)
    return rule is not None and (rule.adapt == "full" or is_adapter(name))


def is_adapter(name: str) -> bool:
    return ".lora_" in name  # peft's names: lora_A, lora_B, and DoRA's lora_magnitude_vector


def below(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def train_mode(model: nn.Module) -> None:
    """Training mode where something trains, evaluation mode in modules that are frozen throughout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def param_groups(model: nn.Module, table: Table) -> list[dict[str, Any]]:
    """Optimizer groups of what trains: one per rate, decay and warmup; vectors (biases, norms) never decay."""
    groups: dict[tuple[float, float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        rule = rule_of(name, table)
        if rule is not None and trains(name, table):
            decay = rule.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rule.lr, decay, rule.warmup), []).append(parameter)
    return [{"params": p, "lr": lr, "weight_decay": decay, "warmup": w} for (lr, decay, w), p in groups.items()]


def trainability(model: nn.Module, table: Table) -> list[Row]:
    """Rows for the parts of the model and for every path of the table, as declared; tied weights count once."""
    rows: dict[str, Row] = {}
    for name, parameter in model.named_parameters():
        head = name.split(".")
        module = path_of(name, table) or ".".join(head[: 2 if head[0] == "encoder" else 1])
        rule = rule_of(name, table)
        row = rows.setdefault(module, Row(module, 0, 0, rule.lr if rule else None, rule.adapt if rule else None))
        row.params += parameter.numel()
        row.trained += parameter.numel() if trains(name, table) else 0
    return list(rows.values())


def differences(model: nn.Module, table: Table, optimized: Sequence[nn.Parameter]) -> dict[str, list[str]]:
    """Names in which `requires_grad`, and the optimizer, differ from the table; both empty if all is as declared."""
    named = dict(model.named_parameters())
    held = {id(parameter) for parameter in optimized}
    declared = {name for name in named if trains(name, table)}
    requires = {name for name, parameter in named.items() if parameter.requires_grad}
    optimizer = {name for name, parameter in named.items() if id(parameter) in held}
    return {"requires_grad": sorted(requires ^ declared), "the optimizer": sorted(optimizer ^ declared)}


def digest(tensor: Tensor) -> str:
    """A short hash: bit-identical tensors have equal ones."""
    raw: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()


def awake(model: nn.Module) -> list[str]:
    """Names of modules in training mode inside modules that are frozen throughout.

    A decoder layer under gradient checkpointing is told that it trains, what is inside it is not (checkpointing.py).
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            inside = module.named_modules(prefix=name)
            found |= {n for n, m in inside if m.training and not isinstance(m, GradientCheckpointingLayer)}
    return sorted(found)
