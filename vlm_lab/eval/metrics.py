"""Scoring: pure functions from prediction records to numbers. Generation is elsewhere (eval/runner.py).

A record is a dict with `group`, `prediction`, `target`, and `choices` (None for open questions).
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Any

Record = dict[str, Any]


def normalise(text: str) -> str:
    """Lower case, single blanks, no final full stop, no surrounding quotes."""
    return " ".join(text.lower().split()).strip("\"' ").rstrip(".").strip()


def letter(text: str, choices: Sequence[str]) -> str | None:
    """The option letter that an answer names: `B`, `(b)`, `B. red`, or an option's full text; else None."""
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    if found := re.match(r"\s*\(?([A-Z](?=[).:,\s]|$)|[a-z](?=[).:]|\s*$))", text):  # "a dog" names no option
        name = found.group(1).upper()
        return name if name in letters else None
    matches = [name for name, choice in zip(letters, choices, strict=True) if normalise(choice) == normalise(text)]
    return matches[0] if len(matches) == 1 else None


def correct(record: Record) -> bool:
    """Multiple choice by letter, everything else by exact match after `normalise`."""
    if choices := record.get("choices"):
        target = letter(record["target"], choices)
        return target is not None and letter(record["prediction"], choices) == target
    return normalise(record["prediction"]) == normalise(record["target"])


def words(record: Record) -> int:
    """The length of an answer."""
    return len(record["prediction"].split())


def score(records: Sequence[Record]) -> dict[str, dict[str, Any]]:
    """{group: {accuracy, n, majority, words}} and `all`, the mean over groups (as Cambrian-1 averages).

    `majority` is the accuracy of always giving the group's most frequent answer, `words` the mean length of the answers
    to questions without options (None if there is none such).
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["group"]].append(record)
    table = {name: score_group(group) for name, group in sorted(groups.items())}
    whole = {key: average([row[key] for row in table.values()]) for key in ("accuracy", "majority", "words")}
    return {**table, "all": {**whole, "n": len(records)}} if table else {}


def average(values: Sequence[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def score_group(records: Sequence[Record]) -> dict[str, Any]:
    most_frequent = Counter(normalise(record["target"]) for record in records).most_common(1)[0][1]
    return {
        "accuracy": mean(map(correct, records)),
        "n": len(records),
        "majority": most_frequent / len(records),
        "words": average([float(words(record)) for record in records if not record.get("choices")]),
    }
