"""The LightningModule of encoder pretraining: VLM training's optimizer, schedule and checkpoints, another step."""

from torch import Tensor

from vlm_lab.batch import CaptionBatch
from vlm_lab.module import VLMTraining


class EncoderTraining(VLMTraining):
    """Trains an encoder and what pretraining adds to it (`model/pretrain`), one global batch a step.

    A contrastive loss needs the whole step at once, so there is no accumulation over rows; the model computes its
    batch in parts of `stage.micro_batch` pairs, with the gradient of the whole.
    """

    def training_step(self, batch: CaptionBatch, index: int) -> Tensor:  # type: ignore[override]
        self.total = self.sum_over_processes(batch.valid.sum().float())
        self.step_ids = batch.ids
        loss = self.vlm(batch, self.stage.micro_batch).total
        self.step_loss = loss.detach()
        return loss * self.trainer.world_size  # undoes the mean over processes: losses are shares of a sum
