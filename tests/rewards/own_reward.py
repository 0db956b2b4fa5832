"""A reward as a user writes one."""

from dataclasses import dataclass


@dataclass
class Wanted:
    word: str


def reward(prompts, answers, rows):
    """1 for the word that the row wants; fails for answers that say so."""
    return [_one(prompt, answer, row) for prompt, answer, row in zip(prompts, answers, rows, strict=True)]


def _one(prompt, answer, row):
    assert prompt is row["prompt"]
    row["seen"] = True
    if answer == "boom":
        raise ValueError("no such answer")
    if answer == "nan":
        return float("nan")
    if answer == "none":
        return None
    return float(Wanted(row.get("expected", "yes")).word in answer)


def too_few(prompts, answers, rows):
    return [1.0]


def one_number(prompts, answers, rows):
    return 1.0
