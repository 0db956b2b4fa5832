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


def one_by_one(prompts, answers, rows):
    """Each when it is asked for, and each of another kind."""
    for answer in answers:
        if answer == "stop":
            raise SystemExit("enough")
        yield {"text": "1.0", "huge": 10**400, "own": Own(), "half": 0.5}[answer]


class Own:
    def __float__(self):
        raise ZeroDivisionError

    def __repr__(self):
        raise ZeroDivisionError


def a_text(prompts, answers, rows):
    return "1" * len(answers)


def a_set(prompts, answers, rows):
    return set(range(len(answers)))


def too_few(prompts, answers, rows):
    return [1.0]


def one_number(prompts, answers, rows):
    return 1.0
