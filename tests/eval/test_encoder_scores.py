"""Scores of encoders against hand-worked cases, and the probe of a run on folders and on the made-up world."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from vlm_lab.data.labelled import LabelledFolder
from vlm_lab.eval.encoders import class_embeddings, linear_probe, retrieval, zero_shot

AXES = torch.eye(4)


def test_class_embeddings_are_means_of_unit_vectors_made_unit_again() -> None:
    vectors = {"a cat": AXES[0], "cat.": AXES[1], "a dog": AXES[2], "dog.": AXES[2]}
    found = class_embeddings(
        lambda texts: torch.stack([vectors[text] for text in texts]), ["cat", "dog"], ["a {}", "{}."]
    )
    assert found[0].tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0, 0]) and torch.equal(found[1], AXES[2])


def test_zero_shot_counts_nearest_classes() -> None:
    images = torch.tensor([[1.0, 0.1, 0, 0], [0, 1.0, 0.2, 0], [0.3, 0.2, 0, 0]])
    assert zero_shot(images, torch.tensor([0, 1, 1]), AXES[:2]) == pytest.approx(2 / 3)


def test_retrieval_by_hand() -> None:
    """Six pairs; image 0's text is second best for it, the others' are best; both ways."""
    texts = torch.eye(6)
    images = torch.eye(6)
    images[0] = torch.tensor([0.6, 0.8, 0, 0, 0, 0])
    found = retrieval(images, texts)
    assert found["text_r1"] == pytest.approx(5 / 6) and found["text_r5"] == 1
    assert found["image_r1"] == 1  # text 0 is still closest to image 0
    assert found["text_r10"] == found["image_r10"] == 1


def test_an_encoder_that_always_says_the_same_finds_nothing() -> None:
    same = torch.ones(12, 3)
    assert set(retrieval(same, same).values()) == {0}


def test_random_features_find_at_chance() -> None:
    draw = torch.Generator().manual_seed(0)
    found = retrieval(*(torch.randn(400, 32, generator=draw) for _ in range(2)))
    assert found["text_r10"] == pytest.approx(10 / 400, abs=0.02)


def test_a_linear_probe_finds_what_is_linear_and_nothing_else() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=draw)
    linear, noise = (x[:, 0] * 3 + 1 > x[:, 1]).long(), torch.randint(0, 2, (600,), generator=draw)
    for labels, low, high in ((linear, 0.97, 1.0), (noise, 0.38, 0.62)):
        accuracy = linear_probe((x[:400] * 7 + 3, labels[:400]), (x[400:] * 7 + 3, labels[400:]))
        assert low <= accuracy <= high


def test_folders_of_classes(tmp_path: Path) -> None:
    for name, files in {"red": ["a.png", "deep/b.JPG"], "blue": ["c.webp", "note.txt"]}.items():
        for file in files:
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), name).save(path) if path.suffix != ".txt" else path.write_text("x")
    folder = LabelledFolder(str(tmp_path))
    assert folder.classes == ("blue", "red")
    assert [(folder[i][0].name, folder[i][1]) for i in range(len(folder))] == [
        ("c.webp", 0),
        ("a.png", 1),
        ("b.JPG", 1),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures in folders named after their classes"):
        LabelledFolder(str(tmp_path / "empty"))
