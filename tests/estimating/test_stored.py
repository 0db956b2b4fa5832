"""Rows in the store are found as long as those that they were made of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from alignment.data.chat import Chat
from alignment.estimating.stored import lengths_of, prompts_of
from tests.data.conftest import make_tokenizer
from tests.data.preparing import mix, qa


def turns(number: int) -> dict[str, Any]:
    said = [("user", f"question {number}"), ("assistant", "one"), ("user", "more"), ("assistant", "t" * number)]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


ROWS: dict[str, list[Any]] = {
    "sft": [*(turns(number) for number in range(1, 12)), *(qa(f"q{n}", "a" * n) for n in range(1, 12))],
    "preference": [{"prompt": f"q{n}", "chosen": "c" * n, "rejected": "r" * (12 - n)} for n in range(1, 12)],
    "unpaired": [{**qa(f"q{n}", "a" * n), "label": bool(n % 2)} for n in range(1, 22)],
}


@pytest.mark.parametrize("task", ROWS)
def test_lengths_and_prompts_are_those_of_the_rows(task: str) -> None:
    chat = Chat(make_tokenizer(), "model")
    made, folder = mix(chat, {"mine": ROWS[task]}, task=task, heldout=4, max_length=100, max_prompt_length=80)
    found, train = lengths_of(folder, task, 1000, 2), made.rows["train"]
    for name, column in (("prompt", "prompt_tokens"), ("tokens", "tokens"), ("trained", "trained")):
        assert getattr(found, name).tolist() == [row[column] for row in train]
    assert len(found.some) == 2 and lengths_of(folder, task, 3, 8).tokens.shape == (3,)

    prompts = prompts_of(folder, chat.tokenizer, 4)
    assert prompts.splits is not None and len(prompts.splits["prompts"]) == 0
    heldout = prompts.splits["heldout"]
    assert prompts.tokens[heldout].tolist() == [row["prompt_tokens"] for row in made.rows["heldout"]]
    assert prompts.place(int(heldout[1])) == f"{folder}/heldout.jsonl:2"
    assert prompts_of(folder, chat.tokenizer, 3).splits is None, "not all were looked at"
    assert np.array_equal(prompts.fit, np.arange(4))
