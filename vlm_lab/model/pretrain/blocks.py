"""The Transformer that text tower and caption decoder share: timm's pre-norm blocks with OpenVision's initial values.

It adds no positions, embeds nothing and has no norm at its end: its users do that.
"""

from functools import partial
from typing import Any

from timm.models.vision_transformer import Block
from torch import Tensor, nn

norm: Any = partial(nn.LayerNorm, eps=1e-6)
tanh_gelu: Any = partial(nn.GELU, approximate="tanh")


class Transformer(nn.Module):
    """`depth` pre-norm blocks of `width` channels, MLPs of `mlp` hidden ones, tanh-GELU: [B, L, width] to the same."""

    def __init__(self, width: int, depth: int, heads: int, mlp: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        layer = partial(Block, width, heads, mlp / width, qkv_bias=True, act_layer=tanh_gelu, norm_layer=norm)
        self.blocks = nn.ModuleList(layer() for _ in range(depth))
        for block in self.blocks:
            init_block(block, width, depth)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """`mask [L, L]` is True where a row may look at a column; None: everywhere."""
        for block in self.blocks:
            x = block(x, attn_mask=mask)  # [B, L, width]
        return x


def init_block(block: Any, width: int, depth: int) -> None:
    """Normal weights by width and depth, biases 0 (OpenVision's code; the same as CLIP's)."""
    into_residual = width**-0.5 * (2 * depth) ** -0.5
    stds = {block.attn.qkv: width**-0.5, block.attn.proj: into_residual}
    stds |= {block.mlp.fc1: (2 * width) ** -0.5, block.mlp.fc2: into_residual}
    for linear, std in stds.items():
        nn.init.normal_(linear.weight, std=std)
        nn.init.zeros_(linear.bias)
