"""Scoring: hand-worked cases of normalisation, option letters, groups and averages."""

import pytest

from vlm_lab.eval.metrics import correct, letter, normalise, score
from vlm_lab.evaluate import flat


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Red.", "red"), ("  two  words ", "two words"), ('"Yes"', "yes"), ("3.5", "3.5"), ("U.S.A.", "u.s.a"), ("", "")],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", "B"),
        ("b.", "B"),
        ("(A)", "A"),
        ("B. blue", "B"),
        ("A: red", "A"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("C", None),  # only two options
        ("a dog", None),  # the article is not taken for an option: "dog" is none of them
        ("", None),
        ("Because", None),
    ],
)
def test_letter(text: str, expected: str | None) -> None:
    assert letter(text, ["red", "blue"]) == expected


def record(group: str, prediction: str, target: str, choices: list[str] | None = None) -> dict:
    return {"group": group, "prediction": prediction, "target": target, "choices": choices}


def test_choices_are_scored_by_letter_and_open_answers_by_text() -> None:
    assert correct(record("g", "B. blue", "B", ["red", "blue"]))
    assert correct(record("g", "blue", "B", ["red", "blue"]))
    assert not correct(record("g", "", "B", ["red", "blue"]))
    assert correct(record("g", "Blue.", "blue"))
    assert not correct(record("g", "light blue", "blue"))


def test_scores_average_over_groups_not_over_questions() -> None:
    records = [record("a", "x", "x"), record("a", "y", "x"), record("a", "x", "x"), record("b", "no", "yes")]
    table = score(records)
    assert table["a"] == {"accuracy": pytest.approx(2 / 3), "n": 3, "majority": 1.0, "words": 1.0}
    assert table["b"] == {"accuracy": 0.0, "n": 1, "majority": 1.0, "words": 1.0}
    assert table["all"] == {"accuracy": pytest.approx(1 / 3), "majority": 1.0, "n": 4, "words": 1.0}
    assert score(records) == table  # scoring twice gives the same


def test_words_are_those_of_open_answers() -> None:
    """Two and four words, an option's that do not count, and a group of options alone."""
    open_ones = [record("a", "it is", "x"), record("a", "  The star is red. ", "x"), record("b", "", "x")]
    table = score([*open_ones, record("a", "A. a red star", "A", ["red", "blue"]), record("c", "A", "A", ["x", "y"])])
    assert [table[group]["words"] for group in ("a", "b", "c", "all")] == [3.0, 0.0, None, 1.5]
    metrics = flat({"scenes": {"real": table, "none": table}})
    assert metrics["eval/scenes.words"] == 1.5
    assert "eval/scenes.none.words" not in metrics


def test_nothing_to_score() -> None:
    assert score([]) == {}
