"""A language model by itself: what `objective: next_token` trains, on rows of texts without a picture."""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from vlm_lab.batch import Batch
from vlm_lab.model.vlm import answer_loss


class TextModel(nn.Module):
    """`llm` is the module path that a stage's `train:` table names, and what its weights are saved under."""

    def __init__(self, llm: PreTrainedModel) -> None:
        super().__init__()
        self.llm: Any = llm
        self.encoder = nn.ModuleDict()  # there is none: what looks for encoders finds an empty list

    def forward(self, batch: Batch) -> Tensor:
        """Sum of the cross-entropy over the row's targets."""
        return answer_loss(self.llm, self.llm.get_input_embeddings()(batch.input_ids), batch)
