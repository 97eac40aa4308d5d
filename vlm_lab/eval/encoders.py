"""How good a pretrained encoder is by itself: zero-shot classification, retrieval, a linear probe. Pure functions.

Features come in as tensors; vlm_lab/probe.py makes them from a run. Accuracies are fractions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

KS = (1, 5, 10)


def class_embeddings(encode: Callable[[list[str]], Tensor], classes: Sequence[str], templates: Sequence[str]) -> Tensor:
    """[classes, E] of length 1: per class the mean of its templates' unit vectors, as open_clip builds its classifier.

    `encode` gives unit vectors [texts, E]; a template has `{}` where the class goes.
    """
    rows = [encode([template.format(name) for template in templates]).mean(0) for name in classes]
    return F.normalize(torch.stack(rows), dim=-1)


def zero_shot(images: Tensor, labels: Tensor, classes: Tensor) -> float:
    """Share of the images [N, E] whose nearest class embedding [C, E] is the right one."""
    return float((images @ classes.T).argmax(1).eq(labels).float().mean())


def retrieval(images: Tensor, texts: Tensor) -> dict[str, float]:
    """R@1, 5, 10 both ways for pairs of unit vectors [N, E]: is the own partner among the best k?

    Others with the very same score count as better, so a constant encoder finds nothing.
    """
    scores = images @ texts.T
    own = scores.diagonal()
    ranks = {
        "text": (scores >= own[:, None]).sum(1),  # of the own text among all; 1 is the best
        "image": (scores >= own[None]).sum(0),
    }
    return {f"{what}_r{k}": float((rank <= k).float().mean()) for what, rank in ranks.items() for k in KS}


def linear_probe(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], decay: float = 1e-3) -> float:
    """Test accuracy of multinomial logistic regression on (features [N, C], labels [N]), standardised on `train`.

    `decay` weighs half the squared norm of the weights against the mean cross-entropy. Full batches, L-BFGS.
    """
    features, labels = train
    mean, std = features.mean(0), features.std(0).clamp(min=1e-6)
    x, y = (features - mean) / std, (test[0] - mean) / std
    weight = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=x.dtype)
    bias = torch.zeros(len(weight), dtype=x.dtype)
    with torch.enable_grad():
        weight, bias = torch.nn.Parameter(weight), torch.nn.Parameter(bias)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(x @ weight.T + bias, labels) + decay / 2 * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)  # type: ignore[arg-type]
    return float((y @ weight.T + bias).argmax(1).eq(test[1]).float().mean())
