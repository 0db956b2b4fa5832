"""The chat program: as a person starts it once, and its turns in this process, input from a string."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from alignment import chat, cli, generation
from tests.conftest import write_tiny_model
from tests.generation.conftest import sharpen

HOW = ["--temperature", "0", "--max-new-tokens", "6"]
Talk = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_tiny_model(tmp_path_factory.mktemp("chat"))
    sharpen(folder)
    return folder


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Talk:
    """talk(*arguments, say=...) -> (exit code, standard output, standard error)."""

    def run(*arguments: str, say: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(say))
        code = chat.main([*HOW, *arguments])
        return (code, *capfd.readouterr())

    return run


def answer(model: Path, *turns: str, system: str = "") -> str:
    """The greedy answer to alternating user and assistant turns."""
    loaded = generation.load(model, "fp32")
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    start = [{"role": "system", "content": system}] if system else []
    how = {"max_new_tokens": 6, "temperature": 0.0, "top_p": 1.0, "seed": 0, "batch_size": 1}
    return generation.generate(*loaded, [start + messages], **how)[0][0].text


def test_a_process_answers_one_prompt_on_standard_output(model: Path) -> None:
    command = [sys.executable, "-m", "alignment.chat", *HOW, "--model", f"tiny={model}", "--prompt", "Hello"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ.copy(), timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, answer(model, "Hello") + "\n", "")
    assert done.stdout.strip()


def test_several_models_answer_one_under_the_other_with_their_speed(model: Path, talk: Talk) -> None:
    code, out, _ = talk("--model", f"start={model}", "--model", f"dpo={model}", "--prompt", "Hello")
    assert code == 0
    assert out.count(answer(model, "Hello")) == 2
    assert out.index("[start]\n") < out.index("tokens/s)") < out.index("[dpo]\n")


def test_lines_of_a_pipe_are_turns_with_a_memory_that_commands_change(model: Path, talk: Talk) -> None:
    lines = ["Hello", "", "And you?", "/reset", "Hello", "/system Be kind", "Hello", "/help", "/exit", "never read"]
    code, out, errors = talk("--model", f"tiny={model}", say="\n".join(lines))
    first = answer(model, "Hello")
    second, kind = answer(model, "Hello", first, "And you?"), answer(model, "Hello", system="Be kind")
    assert out == "".join(text + "\n" for text in (first, second, first, kind))
    assert len({first, second, kind}) == 3
    assert errors.startswith("unknown command /help")
    assert code == 0


def test_the_end_of_the_input_ends_the_talk(model: Path, talk: Talk) -> None:
    assert talk("--model", f"tiny={model}", say="") == (0, "", "")


def test_a_turn_too_long_for_the_window_is_said_and_the_talk_goes_on(model: Path, talk: Talk) -> None:
    _, out, errors = talk("--model", f"tiny={model}", say="x" * 600 + "\nHello\n")
    assert out == answer(model, "Hello") + "\n"
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert "/reset" in errors


@pytest.mark.parametrize(
    ("arguments", "code", "what"),
    [
        (["--model", "x=/nowhere/at/all"], 3, "no such model folder"),
        (["--model", "nameless"], 2, "expected NAME=FOLDER"),
        (["--model", "x=.", "--temperature", "-1"], 2, "--temperature at least 0"),
    ],
)
def test_errors_are_one_line_with_their_exit_code(arguments: list[str], code: int, what: str, talk: Talk) -> None:
    found, out, errors = talk(*arguments, "--prompt", "Hello")
    assert found == code
    assert what in errors
    assert errors.count("\n") == 1
    assert out == ""


def test_an_interrupted_answer_is_kept_as_far_as_it_came() -> None:
    asked: list[list[dict[str, str]]] = []

    def interrupted(messages: list[dict[str, str]]) -> Iterator[str]:
        asked.append(messages)
        yield "Once"
        yield " upon"
        if len(asked) == 1:
            raise KeyboardInterrupt

    speaker, written = chat.Speaker("tiny", interrupted, system="Be brief"), list[str]()
    assert speaker.reply("Tell", written.append)[0] == 2
    assert "".join(written) == "Once upon [stopped]"
    speaker.reply("Go on", written.append)
    assert asked[1] == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "Tell"},
        {"role": "assistant", "content": "Once upon"},
        {"role": "user", "content": "Go on"},
    ]


def test_a_reward_model_s_folder_is_not_talked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path, tmp_path / "model"):
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text('{"architectures": ["LlamaForSequenceClassification"]}')
        assert cli.main(["chat", str(tmp_path), "--prompt", "hi"]) == 2
        assert f"{folder}: is a LlamaForSequenceClassification, which judges and does" in capsys.readouterr().err
        (folder / "config.json").unlink()
