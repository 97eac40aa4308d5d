"""The caption decoder: learnable queries that write a caption after reading the image and, if there is one, a text.

OpenVision's (arXiv 2505.04601, its code with `fusion_style=concat`). The queries carry no caption tokens, so the
caption is not teacher-forced: query i says which token stands at place i. It is thrown away after pretraining.
"""

import torch
from torch import Tensor, nn

from vlm_lab.model.pretrain.blocks import Transformer, norm


class VocabularyHead(nn.Linear):
    """From activations to words: told apart from hidden layers, which Muon trains (`vlm_lab/optimizers.py`)."""


class CaptionDecoder(nn.Module):
    """`image [B, N, image_dim]` and `text [B, T, text_dim]` are the prefix of `queries` query tokens.

    The prefix looks at all of itself and never at a query; a query looks at all of the prefix and at earlier queries.
    `text_dim=None`: the image alone (OpenVision 2).
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int | None,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        vocab: int = 32000,
        queries: int = 128,
    ) -> None:
        super().__init__()
        self.from_image = nn.Linear(image_dim, width, bias=False)
        self.from_text = None if text_dim is None else nn.Linear(text_dim, width, bias=False)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.transformer = Transformer(width, depth, heads, mlp)
        self.norm = norm(width)
        self.out = VocabularyHead(width, vocab, bias=False)
        nn.init.normal_(self.out.weight, std=width**-0.5)

    def forward(self, image: Tensor, text: Tensor | None) -> Tensor:
        """Hidden states of the queries, [B, queries, width]; `logits` turns them into scores."""
        prefix, queries = self.prefix(image, text), self.queries.expand(len(image), -1, -1)
        mask = prefix_mask(prefix.shape[1], queries.shape[1]).to(image.device)
        x = self.transformer(torch.cat([prefix, queries.to(prefix.dtype)], dim=1), mask)  # [B, P + Q, width]
        return x[:, prefix.shape[1] :]

    def prefix(self, image: Tensor, text: Tensor | None) -> Tensor:
        parts = [self.from_image(image)]
        if self.from_text is not None and text is not None:
            parts.append(self.from_text(text))
        return torch.cat(parts, dim=1)  # [B, P, width]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., width] -> [..., vocab]: ask for the places that have a target, the others cost as much."""
        return self.out(self.norm(hidden))


def prefix_mask(prefix: int, queries: int) -> Tensor:
    """[P + Q, P + Q], True where a row may look at a column."""
    mask = torch.ones(prefix + queries, prefix + queries, dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True
    return mask
