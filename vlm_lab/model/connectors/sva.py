"""Cambrian-1's Spatial Vision Aggregator (SVA): queries on a grid look at their own window of every encoder's map.

Source: arXiv 2406.16860 section 4 and cambrian `vision_sampler.py` (`VisionCrossAttentionLayer`), `cambrian_arch.py`.
Where they differ the code is followed: 16 heads, LayerNorm before every projection, an MLP and an outer residual per
block, and the first encoder's mean as global context. Masks differ from the code: padding never has influence (the
code averages it into the context, and lets a query attend to it where one encoder's whole window is padding).

The same block aggregates again inside the LLM, on the hidden states of the visual tokens, once per prompt and never at
decode steps. The newline column and cropping belong to the tiling; a tiling that rescales tokens has no cells to go by.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from vlm_lab.model.connectors import DeepConnector, Grid
from vlm_lab.model.connectors.attention import attend, normed_linear
from vlm_lab.model.connectors.checks import at_least, divides
from vlm_lab.model.connectors.mlp import projection
from vlm_lab.model.connectors.spatial import cut_windows, mean, resize, window_mask
from vlm_lab.model.features import FeatureMap
from vlm_lab.model.seen import Seen


class SVA(DeepConnector):
    """side x side tokens out. `groups` G and `depth` D as in the paper; in-LLM blocks always have D = G = 1.

    `windows` m: a map is resized to (m * side)^2 and each query sees m x m of it. One number for all encoders, or
    encoder -> m, where those not listed have 1 and names not in use are ignored (one YAML for every set of encoders).
    With a single encoder and m = 1 each query has one key: nothing to choose, and queries and keys get no gradient.
    `blocks`: at most so many in-LLM blocks, after layers `start`, `start + stride`, ...; 0 is "connector only".
    """

    multi = True
    on_cells = True  # its blocks inside the LLM need every token on its cell
    site: Literal["input", "output"] = "output"

    def __init__(
        self,
        dims: dict[str, int],
        out_dim: int,
        *,
        side: int = 24,
        hidden: int = 1024,
        heads: int = 16,
        depth: int = 3,
        groups: int = 1,
        windows: int | dict[str, int] = 1,
        start: int = 0,
        stride: int = 3,
        blocks: int = 10,
    ) -> None:
        super().__init__(dims, out_dim)
        at_least(1, side=side, depth=depth, groups=groups, stride=stride)
        at_least(0, start=start, blocks=blocks)
        divides("heads", heads, hidden, "connector.hidden")
        self.side, self.hidden, self.heads = side, hidden, heads
        self.windows = {name: windows if isinstance(windows, int) else windows.get(name, 1) for name in dims}
        at_least(1, **{f"windows.{name}": m for name, m in self.windows.items()})
        self.start, self.stride, self.max_blocks = start, stride, blocks
        self.project_in = nn.ModuleDict(
            {name: nn.Sequential(*projection(dim, hidden, 2), nn.LayerNorm(hidden)) for name, dim in dims.items()}
        )
        self.queries = nn.Parameter(torch.randn(groups, hidden) * hidden**-0.5)
        self.samplers = nn.ModuleList(
            [nn.ModuleList([self._block(hidden) for _ in range(depth)]) for _ in range(groups)]
        )
        self.project_out = projection(groups * hidden, out_dim, 2)
        self.llm_blocks = nn.ModuleDict()

    def _block(self, dim: int) -> "SVABlock":
        return SVABlock(dim, self.windows, self.hidden, self.heads)

    def layer_blocks(self, num_layers: int) -> dict[int, nn.Module]:
        """Layer index -> block, to be run on the output of that decoder layer: block(hidden, memory).

        The first call makes the blocks, since only the VLM knows its LLM's depth: call it before loading weights.
        """
        last = num_layers - 1  # no block behind it: nothing reads the hidden states of visual tokens that leave it
        if self.start >= last and self.max_blocks:
            raise ValueError(f"connector.start = {self.start}: the LLM's {num_layers} layers allow 0 to {last - 1}")
        layers = range(self.start, last, self.stride)[: self.max_blocks]
        for layer in layers:
            if str(layer) not in self.llm_blocks:
                self.llm_blocks[str(layer)] = self._block(self.out_dim)
        return {layer: self.llm_blocks[str(layer)] for layer in layers}

    def grid(self, grids: dict[str, Grid]) -> Grid:
        return self.side, self.side

    def memory(self, features: dict[str, FeatureMap]) -> dict[str, FeatureMap]:
        """Every map at m * side and `hidden` wide: what all blocks, before and inside the LLM, attend to."""
        maps = {}
        for name, m in self.windows.items():
            feature = resize(features[name], (m * self.side, m * self.side))
            maps[name] = FeatureMap(self.project_in[name](feature.tokens), feature.grid, feature.mask)
        return maps

    def tokens(self, memory: dict[str, FeatureMap]) -> Tensor:
        """The part before the LLM, on projected maps: [V, side * side, out_dim]."""
        views = len(next(iter(memory.values())).tokens)
        groups = []
        for query, sampler in zip(self.queries, self.samplers, strict=True):
            x = query.expand(views, self.side**2, -1)  # one vector for all cells: [V, T, hidden]
            for block in sampler.children():
                x = block(x, memory)
            groups.append(x)
        return self.project_out(torch.cat(groups, dim=-1))

    def inside(self, block: nn.Module, hidden: Tensor, seen: Seen) -> Tensor:
        """The hidden states on each view's cells are gathered, aggregated and put back; newlines stay as they are."""
        if hidden.shape[:2] != seen.image.shape:
            return hidden  # a decode step
        views, count = seen.tokens.shape[:2]
        kept = seen.cells >= 0
        there = seen.image.flatten().nonzero()[:, 0][kept]  # positions that hold a cell's token
        cells, flat = seen.cells[kept], hidden.flatten(0, 1)  # flat [B*L, D]
        grid = flat.new_zeros(views * count, flat.shape[1]).index_copy(0, cells, flat[there])
        out = block(grid.view(views, count, -1), seen.memory).flatten(0, 1)  # [V*T, D]
        flat = flat.index_copy(0, there, out[cells].to(flat.dtype)) + 0 * out.sum()  # in the graph without images, too
        return flat.view_as(hidden)


class SVABlock(nn.Module):
    """One aggregation: every token attends to its windows of all maps, and is updated by a residual MLP.

    Tokens do not see each other, so a caller that has dropped padded cells may put anything in their place.
    """

    def __init__(self, dim: int, windows: dict[str, int], hidden: int, heads: int) -> None:
        super().__init__()
        self.windows, self.heads = windows, heads
        self.context = nn.Linear(hidden, hidden, bias=False)
        self.reduce = nn.Linear(dim + hidden, hidden, bias=False)
        self.positions = nn.ParameterDict({k: torch.randn(m * m, hidden) for k, m in windows.items() if m > 1})
        self.query = normed_linear(hidden, hidden, bias=False)
        self.key = nn.ModuleDict({name: normed_linear(hidden, hidden, bias=False) for name in windows})
        self.value = nn.ModuleDict({name: normed_linear(hidden, hidden, bias=False) for name in windows})
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.norm = nn.LayerNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))

    def forward(self, x: Tensor, maps: dict[str, FeatureMap]) -> Tensor:
        """x [V, T, dim] on the T = H*W cells, maps from `SVA.memory` -> [V, T, dim]."""
        first = next(iter(self.windows))
        context = self.context(mean(maps[first]))[:, None].expand(-1, x.shape[1], -1)  # [V, T, hidden]
        u = self.reduce(torch.cat([x, context], dim=-1))  # [V, T, hidden]
        u = self.norm(u + self._aggregate(u, maps))
        return x + self.mlp(u)

    def _aggregate(self, u: Tensor, maps: dict[str, FeatureMap]) -> Tensor:
        v, t, hidden = u.shape
        keys, values, masks = [], [], []
        for name, m in self.windows.items():
            feature = maps[name]
            cells = feature.grid[0] // m, feature.grid[1] // m
            assert cells[0] * cells[1] == t, f"{t} tokens, but {name} has {cells[0]} x {cells[1]} windows"
            window = cut_windows(feature.tokens, feature.grid, cells)  # [V*T, m*m, hidden]
            window = window + self.positions[name] if m > 1 else window
            keys.append(self.key[name](window))
            values.append(self.value[name](window))
            masks.append(window_mask(feature, cells))
        masked = any(maps[name].mask is not None for name in self.windows)
        mask = torch.cat(masks, dim=1)[:, None] if masked else None  # [V*T, 1, K], K = sum of m*m
        q = self.query(u).reshape(v * t, 1, hidden)
        found = attend(q, torch.cat(keys, dim=1), torch.cat(values, dim=1), self.heads, mask)  # [V*T, 1, hidden]
        return self.out(found).reshape(v, t, hidden)
