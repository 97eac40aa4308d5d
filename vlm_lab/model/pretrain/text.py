"""The text tower: a bidirectional Transformer over word pieces, read at its last token.

OpenVision's (arXiv 2505.04601 and its code): learned positions, no mask for padding, [CLS] as the last token. It is
thrown away after pretraining. It knows ids only: data/wordpiece.py makes them.
"""

import torch
from torch import Tensor, nn

from vlm_lab.model.pretrain.blocks import Transformer, norm


class TextTower(nn.Module):
    """`ids [B, T] -> (features [B, out_dim], states [B, T - 1, width])`, T <= `length`, [CLS] the last of the T.

    Features are not normalised. States are those of the tokens before [CLS], before the final norm: what the caption
    decoder reads. Shorter texts keep [CLS] at the last position of the table, so that one table serves every length.
    """

    def __init__(
        self, width: int, depth: int, heads: int, mlp: int, out_dim: int, vocab: int = 32000, length: int = 80
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        self.transformer = Transformer(width, depth, heads, mlp)
        self.norm = norm(width)
        self.proj = nn.Linear(width, out_dim, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)
        nn.init.normal_(self.proj.weight, std=0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        length, table = ids.shape[1], self.positions
        if length > len(table):
            raise ValueError(f"a text of {length} tokens, but the text tower has {len(table)} positions")
        positions = torch.cat([table[: length - 1], table[-1:]])
        x = self.transformer(self.embedding(ids) + positions)  # [B, T, width]
        return self.proj(self.norm(x[:, -1])), x[:, :-1]
