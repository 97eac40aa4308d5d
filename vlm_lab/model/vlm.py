"""The vision-language model: encode, connect, splice at the placeholders, language model, loss.

Knows nothing of files, configs or Lightning. Training rows are packed (many samples in one row, `cu_seqlens` marks
where each begins); generation takes one sample per row, padded on the left.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vlm_lab.batch import IMAGE_TOKEN, Batch, Prompts
from vlm_lab.model.connectors import Connector


class VLM(nn.Module):
    """`encoder.<name>`, `connector` and `llm` are the module paths that a stage's `train:` table names."""

    def __init__(self, encoders: dict[str, nn.Module], connector: Connector, llm: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(encoders)
        self.connector = connector
        self.llm = llm

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over the row's answer tokens (a scalar; divide by the global count of them)."""
        answers = batch.targets[0].ne(-100).nonzero().squeeze(1)  # positions that predict an answer token
        logits = self.llm(
            inputs_embeds=self.embed(batch.input_ids, batch.pixels),  # [1, L, D]
            position_ids=batch.position_ids,
            attention_mask=batch.input_ids.new_zeros(1, 1, 1, 1),  # 4-D: taken as it is, so no L x L mask is built
            cu_seq_lens_q=batch.cu_seqlens,
            use_cache=False,
            logits_to_keep=answers,
        ).logits  # [1, answers, vocabulary]
        return F.cross_entropy(logits[0].float(), batch.targets[0, answers], reduction="sum")

    def embed(self, input_ids: Tensor, pixels: dict[str, Tensor]) -> Tensor:
        """Token embeddings [B, L, D] with the visual tokens in the place of the placeholders, in reading order."""
        image = input_ids == IMAGE_TOKEN
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(image, 0))
        visual = self.connect(pixels).flatten(0, 1).to(embeds.dtype)  # [V * T, D]
        count = int(image.sum())
        if count == 0:  # a text-only row still runs the encoder, so that no rank of a sharded model waits for it
            return embeds + 0 * visual.sum()
        if count != len(visual):
            raise ValueError(f"{count} image placeholders but {len(visual)} visual tokens from {len_views(pixels)} views")
        return embeds.masked_scatter(image.unsqueeze(-1), visual)

    def connect(self, pixels: dict[str, Tensor]) -> Tensor:
        """pixels {encoder: [V, 3, S, S]} -> visual tokens [V, T, D]."""
        return self.connector({name: encoder(pixels[name]) for name, encoder in self.encoder.items()})

    @torch.inference_mode()
    def generate(self, prompts: Prompts, max_new_tokens: int, stop: list[int], **sampling: object) -> Tensor:
        """Continue left-padded prompts, greedily unless `sampling` says otherwise: new token ids [B, <= max_new_tokens].

        Padding after a stop token is `stop[0]`. Raises nothing on prompts without images.
        """
        return self.llm.generate(
            inputs_embeds=self.embed(prompts.input_ids, prompts.pixels),
            attention_mask=prompts.attention_mask,
            max_new_tokens=max_new_tokens,
            eos_token_id=stop,
            pad_token_id=stop[0],
            **{"do_sample": False, **sampling},
        )


def len_views(pixels: dict[str, Tensor]) -> int:
    return len(next(iter(pixels.values())))
