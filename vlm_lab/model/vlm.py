"""The vision-language model: encode, connect, splice at the placeholders, language model, loss.

Knows nothing of files, configs or Lightning. Training rows are packed (many samples in one row, `cu_seqlens` marks
where each begins); generation takes one sample per row, padded on the left.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from vlm_lab.batch import IMAGE_TOKEN, Batch, Prompts
from vlm_lab.model.arrange import arrange
from vlm_lab.model.attention import for_kernel
from vlm_lab.model.connectors import Connector, DeepConnector
from vlm_lab.model.features import FeatureMap, without_padding
from vlm_lab.model.inside import decoder_layers, inside
from vlm_lab.model.loss import blockwise_cross_entropy, by_blocks, headless
from vlm_lab.model.native import native_features
from vlm_lab.model.seen import Seen, sample_numbers


def answer_loss(llm: Any, embeds: Tensor, batch: Batch) -> Tensor:
    """Sum of the cross-entropy over a packed row's targets; `embeds` [1, L, D] is what the LLM reads."""
    answers: Any = batch.answers
    targets = batch.targets[0, answers]
    call = partial(
        llm,
        inputs_embeds=embeds,
        position_ids=batch.position_ids,
        attention_mask=batch.input_ids.new_zeros(1, 1, 1, 1),  # 4-D: taken as it is, so no L x L mask is built
        cu_seq_lens_q=batch.cu_seqlens,
        **for_kernel(batch.cu_seqlens, embeds.device),
        use_cache=False,
        logits_to_keep=answers,
    )
    if by_blocks(llm, len(answers)):
        with headless(llm) as head:
            hidden = call().logits  # [1, answers, D]
        return blockwise_cross_entropy(hidden[0], head.weight, head.bias, targets)
    logits = call().logits  # [1, answers, vocabulary]
    return F.cross_entropy(logits[0].float(), targets, reduction="sum")


class VLM(nn.Module):
    """`encoder.<name>`, `connector` and `llm` are the module paths that a stage's `train:` table names.

    `newline`: whether the tiling's layouts hold newline embeddings. The one vector is `connector.newline`, so that a
    stage trains it with the connector, as LLaVA does.
    """

    def __init__(
        self, encoders: dict[str, nn.Module], connector: Connector, llm: PreTrainedModel, newline: bool = False
    ) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict(encoders)
        self.connector = connector
        self.llm: Any = llm
        self.lookups: dict[str, Callable[[Tensor], FeatureMap]] = {}  # in the place of encoders whose features are kept
        if newline:
            connector.newline = nn.Embedding(1, connector.out_dim)
            nn.init.normal_(connector.newline.weight, std=connector.out_dim**-0.5)
        if isinstance(connector, DeepConnector):
            connector.layer_blocks(len(decoder_layers(llm)))  # makes them

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over the row's answer tokens (a scalar; divide by the global count of them)."""
        seen = self.see(batch)
        with inside(self.llm, self.connector, seen):
            return answer_loss(self.llm, self.splice(batch, seen), batch)

    def embed(self, batch: Batch | Prompts) -> Tensor:
        """What the LLM reads: [B, L, D]."""
        return self.splice(batch, self.see(batch))

    def see(self, batch: Batch | Prompts) -> Seen:
        """Encode and connect: the visual tokens of the batch's views, and what blocks inside the LLM attend to."""
        features = {name: self.encode(name, batch) for name in self.encoder}
        connector: Any = self.connector
        memory = connector.memory(features) if isinstance(connector, DeepConnector) else None
        tokens = connector(features) if memory is None else connector.tokens(memory)  # [V, T, D]
        grid = connector.grid({name: f.grid for name, f in features.items()})
        return Seen(tokens, grid, memory, batch.input_ids == IMAGE_TOKEN, sample_numbers(batch), batch.layouts)

    def encode(self, name: str, batch: Batch | Prompts) -> FeatureMap:
        """The features of all views by one encoder, padding masked."""
        encoder, pixels = self.encoder[name], batch.pixels[name]
        if name in batch.sizes:
            return native_features(encoder, pixels, batch.sizes[name])
        return without_padding(self.lookups.get(name, encoder)(pixels), batch.layouts)

    def splice(self, batch: Batch | Prompts, seen: Seen) -> Tensor:
        """Token embeddings [B, L, D] with the visual tokens in the place of the placeholders, in reading order."""
        embeds = self.llm.get_input_embeddings()(batch.input_ids.masked_fill(seen.image, 0))
        newline, places = self.newline(batch.input_ids.device), batch.places
        assert places is not None
        if len(places) == 0:  # a text-only row still runs the encoder, so that no rank of a sharded model waits for it
            return embeds + torch.cat([0 * t.flatten() for t in (seen.tokens, newline) if t is not None]).sum()
        visual = arrange(seen.tokens, seen.grid, seen.layouts, newline).to(embeds.dtype)  # [sum of num_tokens, D]
        if len(places) != len(visual):
            raise ValueError(
                f"{len(places)} image placeholders but {len(visual)} visual tokens from {len(seen.tokens)} views"
            )
        return embeds.flatten(0, 1).index_copy(0, places, visual).view_as(embeds)

    def newline(self, device: torch.device) -> Tensor | None:
        """The newline embedding [1, D]; None if the tiling has no use for it."""
        embedding: nn.Embedding | None = getattr(self.connector, "newline", None)
        return None if embedding is None else embedding(torch.zeros(1, dtype=torch.long, device=device))

    @torch.inference_mode()
    def generate(self, prompts: Prompts, max_new_tokens: int, stop: list[int], **sampling: object) -> Tensor:
        """Continue left-padded prompts, greedily unless `sampling` says otherwise: new ids [B, <= max_new_tokens].

        Padding after a stop token is `stop[0]`. Raises nothing on prompts without images.
        """
        seen = self.see(prompts)
        with inside(self.llm, self.connector, seen):
            return self.llm.generate(
                inputs_embeds=self.splice(prompts, seen),
                attention_mask=prompts.attention_mask,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop,
                pad_token_id=stop[0],
                **{"do_sample": False, **sampling},
            )
