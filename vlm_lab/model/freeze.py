"""What trains, and at which rate: the only code that touches `requires_grad`.

A stage's table maps module paths to peak learning rates; the longest path that is a prefix of a parameter's name wins;
a parameter without one, or with null, is frozen. Frozen modules also stay in evaluation mode (no dropout, no batch
statistics).
"""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

Table = dict[str, float | None]


@dataclass
class Row:
    """One line of the trainability table: `params` parameters below `module`, trained at `lr` (None = frozen)."""

    module: str
    params: int
    lr: float | None

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def apply(model: nn.Module, table: Table) -> None:
    """Set `requires_grad` of every parameter from `table`. ValueError for a path that names no parameter."""
    names = [name for name, _ in model.named_parameters()]
    for path in table:
        if not any(below(name, path) for name in names):
            raise ValueError(f"train.{path}: the model has no parameter below this path")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(rate(name, table) is not None)


def rate(name: str, table: Table) -> float | None:
    """The peak learning rate of the parameter `name`; None = frozen."""
    paths = [path for path in table if below(name, path)]
    return table[max(paths, key=len)] if paths else None


def below(name: str, path: str) -> bool:
    return name == path or name.startswith(f"{path}.")


def train_mode(model: nn.Module) -> None:
    """Training mode where something trains, evaluation mode in modules that are frozen throughout."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def param_groups(model: nn.Module, table: Table, weight_decay: float) -> list[dict[str, object]]:
    """Optimizer groups of the trained parameters: one per rate, without decay for biases, norms and other vectors."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate(name, table) or 0.0, decay), []).append(parameter)
    return [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]


def trainability(model: nn.Module, table: Table) -> list[Row]:
    """Rows for the parts of the model and for every path of the table, as declared; tied weights count once."""
    rows: dict[str, Row] = {}
    for name, parameter in model.named_parameters():
        paths = [path for path in table if below(name, path)]
        head = name.split(".")
        module = max(paths, key=len) if paths else ".".join(head[: 2 if head[0] == "encoder" else 1])
        row = rows.setdefault(module, Row(module, 0, rate(name, table)))
        row.params += parameter.numel()
    return list(rows.values())


def digests(model: nn.Module) -> dict[str, str]:
    """A short hash of every parameter and buffer: bit-identical tensors have equal hashes."""
    return {name: digest(tensor) for name, tensor in model.state_dict().items()}


def digest(tensor: Tensor) -> str:
    raw: Any = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(raw, digest_size=8).hexdigest()
