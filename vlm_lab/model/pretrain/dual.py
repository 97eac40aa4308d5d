"""`DualEncoder`: an encoder with the towers that pretrain it. Pictures with captions in, losses out.

OpenVision (arXiv 2505.04601): InfoNCE with the raw caption and with one sentence of the synthetic one, half each, plus
2 x the cross-entropy of the full synthetic caption. With other settings of `Towers`: CLIP (`synthetic=False,
caption=0`), SigLIP (`contrastive=sigmoid` besides), OpenVision 2 (`contrastive=None`).
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlm_lab.batch import IGNORE, CaptionBatch
from vlm_lab.model.pretrain.blocks import norm
from vlm_lab.model.pretrain.decoder import CaptionDecoder
from vlm_lab.model.pretrain.kept import encode, take
from vlm_lab.model.pretrain.losses import caption_loss, info_nce, sigmoid_loss, target_count
from vlm_lab.model.pretrain.text import TextTower


@dataclass
class Losses:
    """This process's shares; their sums over all processes are the losses of the global batch. None: not computed."""

    total: Tensor
    contrastive: Tensor | None
    caption: Tensor | None


class ImageHead(nn.Module):
    """Mean of the patch tokens (no class token is among them), norm, projection: [B, N, dim] -> [B, out_dim].

    `normed`: the encoder's output has been through its final norm (`layer: -1`); OpenVision's is after the mean, which
    is `layer: [-1]`.
    """

    def __init__(self, dim: int, out_dim: int, normed: bool) -> None:
        super().__init__()
        self.norm = nn.Identity() if normed else norm(dim)
        self.proj = nn.Linear(dim, out_dim, bias=False)
        nn.init.normal_(self.proj.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.proj(self.norm(tokens.mean(1)))


class InfoNCE(nn.Module):
    """The temperature is learnt; the scale starts at 1 / 0.07 and has no upper limit, as in OpenVision's code.

    Shape [1]: DeepSpeed cannot hold parameters without a dimension.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def forward(self, image: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        return info_nce(image, text, self.log_scale.exp(), valid)


class Sigmoid(nn.Module):
    """SigLIP's scale and bias, which start at 10 and -10; shape [1], as above."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def forward(self, image: Tensor, text: Tensor, valid: Tensor) -> Tensor:
        return sigmoid_loss(image, text, self.log_scale.exp(), self.bias, valid)


class Towers(nn.Module):
    """What pretraining adds to an encoder of `dim` channels, and throws away afterwards.

    Args:
        normed: whether the encoder's output has been through its final norm.
        width, depth, heads, mlp: of the text tower and, the same, of the caption decoder.
        out_dim: channels of the space that images and texts share.
        vocab, length, queries: word pieces, tokens of a text with its [CLS], tokens of a decoded caption.
        contrastive: the loss between images and texts; None: no text tower.
        synthetic: whether one sentence of the synthetic caption is a second positive beside the raw caption.
        caption: weight of the caption loss; 0: no decoder.
        fuse: whether the decoder reads the raw caption beside the image (OpenVision), or the image alone (SigLIP 2).
    """

    def __init__(
        self,
        dim: int,
        width: int,
        depth: int,
        heads: int,
        mlp: int,
        out_dim: int,
        vocab: int = 32000,
        length: int = 80,
        queries: int = 128,
        normed: bool = False,
        contrastive: Literal["infonce", "sigmoid"] | None = "infonce",
        synthetic: bool = True,
        caption: float = 2.0,
        fuse: bool = True,
    ) -> None:
        super().__init__()
        if contrastive is None and caption == 0:
            raise ValueError("towers: contrastive = null and caption = 0 leave nothing to learn; set one of them")
        self.synthetic, self.weight = synthetic, caption
        self.length, self.queries = length, queries
        self.image = self.text = self.contrast = self.decoder = None
        if contrastive is not None:
            self.image = ImageHead(dim, out_dim, normed)
            self.text = TextTower(width, depth, heads, mlp, out_dim, vocab, length)
            self.contrast = {"infonce": InfoNCE, "sigmoid": Sigmoid}[contrastive]()
        if caption:
            text_dim = width if contrastive is not None and fuse else None
            self.decoder = CaptionDecoder(dim, text_dim, width, depth, heads, mlp, vocab, queries)


@dataclass
class Seen:
    """What a part of the batch contributes: image features, features of each view of the text, summed caption loss."""

    image: Tensor | None
    texts: list[Tensor]
    caption: Tensor | None


class DualEncoder(nn.Module):
    """`encoder.<name>` and `towers` are the module paths that a stage's `train:` table names."""

    def __init__(self, name: str, encoder: nn.Module, towers: Towers) -> None:
        super().__init__()
        self.name, self.encoder, self.towers = name, nn.ModuleDict({name: encoder}), towers

    def forward(self, batch: CaptionBatch, micro_batch: int | None = None) -> Losses:
        """Losses over the global batch, that is over all processes and all of `batch`.

        `micro_batch`: pairs that are encoded at a time. More pairs are encoded in parts whose activations are computed
        again in the backward pass, so memory is that of one part and the gradient still that of the whole batch.
        """
        size = len(batch.ids)
        if micro_batch is None or micro_batch >= size:
            return self.losses([self.see(batch)], batch)
        again = partial(checkpoint, self.see, use_reentrant=False)
        parts = [again(batch[start : start + micro_batch]) for start in range(0, size, micro_batch)]
        return self.losses(parts, batch)

    def losses(self, parts: list[Seen], batch: CaptionBatch) -> Losses:
        contrastive = caption = None
        if self.towers.contrast is not None:
            image = unit(torch.cat([part.image for part in parts if part.image is not None]))  # [B, E]
            texts = [unit(torch.cat(view)) for view in zip(*(part.texts for part in parts), strict=True)]
            with torch.autocast(image.device.type, enabled=False):  # cosines times a scale of 100 need all their digits
                views = [self.towers.contrast(image, text, batch.valid) for text in texts]
            contrastive = torch.stack(views).mean()
        if self.towers.decoder is not None:
            written = torch.stack([part.caption for part in parts if part.caption is not None]).sum()
            caption = written / target_count(batch.targets)
        terms = [(1.0, contrastive), (self.towers.weight, caption)]
        return Losses(torch.stack([w * loss for w, loss in terms if loss is not None]).sum(), contrastive, caption)

    def see(self, batch: CaptionBatch) -> Seen:
        """Both towers and the decoder over a part of the batch."""
        tokens = encode(self.encoder[self.name], batch.pixels, batch.kept)  # [b, N, C]
        texts, states = [], None
        if self.towers.text is not None:
            ids = torch.cat([batch.raw, batch.synthetic]) if self.towers.synthetic else batch.raw
            features, states = self.towers.text(ids)  # [views * b, E], [views * b, T - 1, width]
            texts = list(features.split(len(batch.ids)))
            states = states[: len(batch.ids)]  # of the raw caption
        image = None if self.towers.image is None else self.towers.image(tokens)
        return Seen(image, texts, self.write(tokens, states, batch))

    def write(self, tokens: Tensor, states: Tensor | None, batch: CaptionBatch) -> Tensor | None:
        """Summed cross-entropy of the captions; with `batch.read` the decoder sees those of the tokens alone."""
        if self.towers.decoder is None:
            return None
        hidden = self.towers.decoder(tokens if batch.read is None else take(tokens, batch.read), states)
        wanted = batch.targets != IGNORE  # [b, queries]
        return caption_loss(self.towers.decoder.logits(hidden[wanted]), batch.targets[wanted])

    def image_features(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, out_dim] of length 1."""
        head = self.towers.image
        if head is None:
            raise ValueError("these towers have no contrastive part: they give no image features")
        return unit(head(encode(self.encoder[self.name], pixels)))

    def text_features(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, out_dim] of length 1."""
        if self.towers.text is None:
            raise ValueError("these towers have no contrastive part: they give no text features")
        return unit(self.towers.text(ids)[0])


def unit(features: Tensor) -> Tensor:
    """[..., E] of length 1, in float32 (or better, where it came so)."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
