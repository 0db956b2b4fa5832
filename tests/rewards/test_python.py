"""A function of the user's own as a term: what it is given, what becomes of its errors, what of it is in the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignment.config.compose import compose
from alignment.config.rewards import Reward
from alignment.errors import ConfigError, InputError
from alignment.pipeline.identity import identity_side
from alignment.rewards import Judge
from tests.rewards.conftest import judge_by, row

OWN = Path(__file__).with_name("own_reward.py")


def own(path: Path = OWN, function: str = "reward") -> dict[str, Any]:
    return {"kind": "python", "source": {"kind": "path", "path": str(path)}, "function": function}


def line(text: str) -> int:
    return 1 + next(i for i, line in enumerate(OWN.read_text().splitlines()) if text in line)


def test_the_function_is_given_prompts_answers_and_rows_of_which_it_may_do_as_it_likes() -> None:
    rows = [row(expected="no"), row()]
    scores = judge_by(**own()).score(rows, ["no way", "no way"])
    assert [score["reward"] for score in scores] == [1.0, 0.0]
    assert rows == [row(expected="no"), row()]


def test_the_file_is_compiled_as_python_would(tmp_path: Path) -> None:
    """Its annotations are no texts, as they are in files that ask for that."""
    path = tmp_path / "kinds.py"
    path.write_text("def f(x: int): ...\ndef reward(prompts, answers, rows): return [f.__annotations__['x'] is int]\n")
    assert [score["reward"] for score in judge_by(**own(path)).score([row()], ["a"])] == [1.0]


def test_what_it_switches_of_pytorch_is_as_it_was(tmp_path: Path) -> None:
    """Code for inference has gradients off, for which training would have none."""
    path = tmp_path / "off.py"
    path.write_text(
        "import torch\ntorch.set_grad_enabled(False)\n"
        "def reward(prompts, answers, rows):\n    torch.set_default_dtype(torch.float64)\n"
        "    torch.set_default_device('meta')\n    yield 1.0\n"
    )
    assert [score["reward"] for score in judge_by(**own(path)).score([row()], ["a"])] == [1.0]
    assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
    assert torch.zeros(1).device.type == "cpu"


def test_only_answers_that_it_raises_for_fail_with_file_and_line() -> None:
    scores = judge_by(**own()).score([row()] * 5, ["yes", "boom", "nan", "none", "no"])
    assert [score["reward"] for score in scores] == [1.0, None, None, None, 0.0]
    assert [score["failed"]["term"] for score in scores[1:4]] == [
        f"{OWN}:{line('raise ValueError')}: ValueError: no such answer",
        "its value is nan",
        "its value is None, which is no number",
    ]


def test_whatever_it_says_of_an_answer_costs_that_answer_alone() -> None:
    """A generator is asked inside, and may even try to end the process."""
    scores = judge_by(**own(function="one_by_one")).score([row()] * 5, ["half", "stop", "text", "huge", "own"])
    assert [score["reward"] for score in scores] == [0.5, None, None, None, None]
    told = [score["failed"]["term"] for score in scores[1:]]
    assert told[0] == f"{OWN}:{line('raise SystemExit')}: SystemExit: enough"
    assert told[1] == "its value is '1.0', which is no number"
    assert told[2].startswith("its value is 1000000000")
    assert told[3] == "its value is Own, which is no number"


def test_it_is_given_some_answers_at_a_time_and_shows_life_between() -> None:
    calls: list[int] = []
    reward = Reward.model_validate({"terms": {"term": {"weight": 1.0, **own()}}})
    scores = Judge(reward, {}, lambda: calls.append(1)).score([row()] * 70, ["yes"] * 70)
    assert [score["reward"] for score in scores] == [1.0] * 70
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("too_few", "returned 1 values for 2 answers"),
        ("one_number", "returned float, not a list of numbers"),
        ("a_text", "returned str, not a list of numbers"),
        ("a_set", "returned set, not a list of numbers"),
    ],
)
def test_what_is_no_list_of_values_is_an_error(function: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as told:
        judge_by(**own(function=function)).score([row()] * 2, ["a", "b"])
    assert told.value.where == f"{OWN}: {function}"


def test_a_file_that_cannot_be_run_is_one_line_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("import math\n\nx = 1 / 0\n\ndef reward(prompts, answers, rows): return []\n")
    with pytest.raises(InputError) as told:
        judge_by(**own(tmp_path / "bad.py"))
    where = f"{tmp_path / 'bad.py'}:3: ZeroDivisionError: division by zero"
    assert str(told.value) == f"reward.terms.term: cannot be run: {where}"


def test_the_file_is_looked_at_before_anything_runs(tmp_path: Path) -> None:
    """Parsed, that is: neither composing nor planning runs it."""
    (tmp_path / "ran.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\ndef reward(p, a, r): return a\n")
    (tmp_path / "odd.py").write_text("x = 1\ndef reward(:\n")
    (tmp_path / "args.py").write_text(
        "def one(answers): ...\ndef named(p, a, r, *, k): ...\ndef any(*these, k=1): ...\ndef more(p, a, r, b=2): ...\n"
    )
    for function in ("any", "more"):
        path = f"reward.terms.own.source.path={tmp_path / 'args.py'}"
        compose(["reward=python", path, f"reward.terms.own.function={function}"])
    chosen = ["reward=python", f"reward.terms.own.source.path={tmp_path / 'ran.py'}"]
    compose(chosen)
    assert not (tmp_path / "trace").exists()
    for path, function, message in (
        (tmp_path / "none.py", "reward", "which cannot be read: No such file or directory"),
        (tmp_path / "odd.py", "reward", "which is no Python, line 2: invalid syntax"),
        (tmp_path / "ran.py", "rewards", "does not define (did you mean `reward`?)"),
        (tmp_path / "args.py", "one", f"which does not take three arguments ({tmp_path / 'args.py'}, line 1)"),
        (tmp_path / "args.py", "named", f"which does not take three arguments ({tmp_path / 'args.py'}, line 2)"),
    ):
        with pytest.raises(ConfigError) as told:
            compose(["reward=python", f"reward.terms.own.source.path={path}", f"reward.terms.own.function={function}"])
        assert message in str(told.value)


def test_its_text_is_in_the_key_and_not_its_path(tmp_path: Path) -> None:
    def key(path: Path, text: str, function: str = "reward") -> Any:
        path.write_text(text)
        return identity_side(Reward.model_validate({"terms": {"term": {"weight": 1.0, **own(path, function)}}}))

    first = key(tmp_path / "a.py", "def reward(): ...")
    assert first == key(tmp_path / "b.py", "def reward(): ...")
    assert first != key(tmp_path / "c.py", "def reward(): ....")
    assert first != key(tmp_path / "d.py", "def reward(): ...", "other")
