"""Optimizers by their name in a stage: `make_optimizer(stage, groups, model)`.

adamw; adamw8bit, paged_adamw8bit, lion8bit (bitsandbytes: states in 8 bits); muon (torch's, for the matrices between
the layers, AdamW for everything else). ZeRO takes adamw only (`schema.check_sharding`): Muon needs all of a matrix.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from vlm_lab.stages import Stage

Groups = list[dict[str, Any]]


def make_optimizer(stage: Stage, groups: Groups, model: nn.Module) -> Optimizer:
    """The stage's optimizer over `groups` of the model's parameters. Lion (Chen et al. 2023) has its paper's betas."""
    if stage.optimizer == "adamw":
        return AdamW(groups, betas=(0.9, stage.beta2), fused=True)
    if stage.optimizer == "muon":
        return MuonWithAdamW(groups, hidden_matrices(model), stage.beta2)
    from bitsandbytes import optim

    if stage.optimizer == "lion8bit":
        return optim.Lion8bit(groups, betas=(0.9, 0.99))
    kind = optim.AdamW8bit if stage.optimizer == "adamw8bit" else optim.PagedAdamW8bit
    return kind(groups, betas=(0.9, stage.beta2))


def hidden_matrices(model: nn.Module) -> set[int]:
    """ids of the weights of linear maps from activations to activations: no embedding, no LLM output head.

    Other heads over a vocabulary are a subclass of `nn.Linear`.
    """
    llm = getattr(model, "llm", None)
    head = None if llm is None else llm.get_output_embeddings()
    return {id(m.weight) for m in model.modules() if type(m) is nn.Linear and m is not head}


class MuonWithAdamW(Optimizer):
    """Muon for the parameters in `matrices`, AdamW for the others, at the same rates (Moonlight, arXiv 2502.16982).

    Muon's steps are scaled by 0.2 * sqrt(longer side), which gives them the size of AdamW's, so a stage's rates serve
    both. One optimizer to Lightning, schedules and checkpoints: groups and states are those of torch's two.
    """

    def __init__(self, groups: Groups, matrices: set[int], beta2: float) -> None:
        hidden, others = parts(groups, matrices, True), parts(groups, matrices, False)
        self.inner: list[Optimizer] = []
        if hidden:
            self.inner.append(StackedMuon(hidden, adjust_lr_fn="match_rms_adamw"))
        if others:
            self.inner.append(AdamW(others, betas=(0.9, beta2), fused=True))
        super().__init__([group for each in self.inner for group in each.param_groups], {})
        self.share()

    def share(self) -> None:
        """Let torch's two work on this one's groups and states."""
        for each in self.inner:
            each.state = self.state
            each.param_groups = [g for g in self.param_groups if ("ns_steps" in g) == isinstance(each, Muon)]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for each in self.inner:
            each.step()
        return loss


class StackedMuon(Muon):
    """torch's Muon, with small matrices of one shape side by side: the same steps in half the time on a CPU.

    A toy has dozens of matrices, and torch orthogonalises one at a time. As it is used above and not otherwise: with
    Nesterov's momentum, and rates that match AdamW's.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, params, grads, momenta)
            for p, grad, momentum in zip(params, grads, momenta, strict=True):
                momentum.lerp_(grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
            for chunk in alike(params):
                nesterov = [grads[i].lerp(momenta[i], group["momentum"]) for i in chunk]
                steps = orthogonal(torch.stack(nesterov), group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = group["lr"] * 0.2 * max(steps.shape[1:]) ** 0.5
                for i, step in zip(chunk, steps, strict=True):
                    params[i].add_(step, alpha=-rate)


def alike(matrices: Sequence[Tensor], most: int = 1 << 22) -> Iterator[list[int]]:
    """Indices of the matrices, those of one shape together, at most `most` elements (or one matrix) at a time."""
    shapes: dict[torch.Size, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        shapes[matrix.shape].append(index)
    for shape, found in shapes.items():
        count = max(1, most // shape.numel())
        yield from (found[i : i + count] for i in range(0, len(found), count))


def orthogonal(stack: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """[n, rows, columns] -> the nearly orthogonal matrices of torch's Muon: Newton-Schulz iterations in bf16."""
    a, b, c = coefficients
    tall = stack.shape[1] > stack.shape[2]
    x = (stack.mT if tall else stack).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def parts(groups: Groups, matrices: set[int], inside: bool) -> Groups:
    """The groups with those of their parameters that are, or are not, in `matrices`; none is empty."""
    chosen = [{**group, "params": [p for p in group["params"] if (id(p) in matrices) == inside]} for group in groups]
    return [group for group in chosen if group["params"]]
