"""Hidden patches: the loss by hand on the hidden cells of valid pictures alone, and what the encoder gets to see."""

from dataclasses import replace

import pytest
import torch
from pretrain_parts import small_batch, small_encoder

from vlm_lab.batch import CaptionBatch
from vlm_lab.model.pretrain import MaskedEncoder

KEPT = [0, 3, 5, 6, 10, 15]  # of 16 cells of 8 x 8 pixels


def parts() -> tuple[MaskedEncoder, CaptionBatch]:
    torch.manual_seed(0)
    batch = small_batch()
    return MaskedEncoder("eye", small_encoder()), replace(batch, kept=torch.tensor(KEPT).repeat(8, 1))


def test_the_loss_by_hand() -> None:
    """Mean absolute error of the normalised pixels, cell by cell in float64: within 1e-5."""
    model, batch = parts()
    eye = model.encoder["eye"]
    hidden = [cell for cell in range(16) if cell not in KEPT]
    shown = batch.pixels.clone()
    for cell in hidden:
        y, x = 8 * (cell // 4), 8 * (cell % 4)
        shown[:, :, y : y + 8, x : x + 8] = eye.shift.round().to(torch.uint8)
    errors = []
    with torch.no_grad():
        said = model.towers(eye(shown).tokens)
        pixels = eye.normalised(batch.pixels)
        for picture, cell in ((picture, cell) for picture in range(7) for cell in hidden):  # the eighth is invalid
            y, x = 8 * (cell // 4), 8 * (cell % 4)
            errors.append((said[picture, cell] - pixels[picture, :, y : y + 8, x : x + 8].flatten()).abs().double())
        found = model(batch).total
    assert found.item() == pytest.approx(torch.cat(errors).mean().item(), abs=1e-5)


def test_hidden_pixels_are_wanted_and_not_seen() -> None:
    model, batch = parts()
    hidden = torch.ones(8, 16, dtype=torch.bool)
    hidden[:, KEPT] = False
    darker = batch.pixels.clone()
    darker[:, :, :8, 8:16] //= 2  # cell 1, hidden
    assert torch.equal(model.painted(darker, hidden), model.painted(batch.pixels, hidden))
    assert model(replace(batch, pixels=darker)).total != model(batch).total
