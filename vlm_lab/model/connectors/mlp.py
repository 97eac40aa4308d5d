"""Per-token projections: `linear` (LLaVA) and `mlp` (LLaVA-1.5: Linear, GELU, Linear; `layers` generalises to n).

One output token per patch. Source: LLaVA `multimodal_projector/builder.py`, `mlp{n}x_gelu`.
"""

from torch import Tensor, nn

from vlm_lab.model.connectors import Connector
from vlm_lab.model.features import FeatureMap


def projection(in_dim: int, out_dim: int, layers: int) -> nn.Sequential:
    """`layers` linear maps with exact GELU between them; the hidden width is `out_dim`."""
    if layers < 1:
        raise ValueError(f"connector.layers = {layers}: at least 1 is needed")
    stack: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
    for _ in range(layers - 1):
        stack += [nn.GELU(), nn.Linear(out_dim, out_dim)]
    return nn.Sequential(*stack)


class MLP(Connector):
    """`layers` = 1 is the linear projection, 2 the MLP of LLaVA-1.5."""

    per_patch = True

    def __init__(self, dims: dict[str, int], out_dim: int, layers: int = 2) -> None:
        super().__init__(dims, out_dim)
        (in_dim,) = dims.values()
        self.project = projection(in_dim, out_dim, layers)

    def forward(self, features: dict[str, FeatureMap]) -> Tensor:
        (feature,) = features.values()
        return self.project(feature.tokens)
