"""NEFTune: noise on what the language model reads, in training only (Jain et al. 2023, arXiv 2310.05914)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def neftune(llm: nn.Module, alpha: float) -> RemovableHandle:
    """Until the handle is removed, every pass of `llm` reads embeddings with noise (those of images included)."""

    def noisy(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        embeds, starts = kwargs["inputs_embeds"], kwargs["cu_seq_lens_q"]
        return args, {**kwargs, "inputs_embeds": embeds + noise(embeds, starts, alpha)}

    return llm.register_forward_pre_hook(noisy, with_kwargs=True)


def noise(embeds: Tensor, cu_seqlens: Any, alpha: float) -> Tensor:
    """Uniform(-1, 1) * alpha / sqrt(L * D) for packed embeddings [1, sum of L, D], L being each sample's own length."""
    lengths = torch.as_tensor(cu_seqlens, device=embeds.device).diff()
    scale = alpha / (lengths * embeds.shape[-1]).sqrt()  # [samples]
    uniform = torch.empty_like(embeds).uniform_(-1, 1)
    return uniform * scale.repeat_interleave(lengths)[None, :, None].to(embeds.dtype)
