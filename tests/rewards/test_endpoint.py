"""A chat endpoint as judge, against a server on this machine: what is asked, patience, refusals, what is kept."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.config.rewards import Reward
from alignment.errors import ConfigError, InputError, MachineError
from alignment.pipeline.identity import identity_side
from alignment.rewards import Judge, chat_client
from tests.rewards.conftest import row
from tests.rewards.serving import KEY, SETTINGS, Answer, Server, completion, judge_at, told
from tests.stages.conftest import MakeContext, make_context  # noqa: F401


def test_the_score_of_the_reply_from_low_to_high_is_a_number_from_0_to_1(server: Server) -> None:
    """1 is 0, 10 is 1, 4 a third of the way; the last score counts; 11 is no score of this scale."""
    replies = {"a": "Score: 1", "b": "Score: 10", "c": "Not Score: 10 but\nScore: 4", "d": "Good!", "e": "Score: 11"}
    server.answer = lambda question, before: completion(replies[question["messages"][0]["content"][-1]])
    calls: list[int] = []
    scores = judge_at(server.port, alive=lambda: calls.append(1)).score([row()] * 7, [*replies, "", " \n"])
    wrong = ["the judge's reply has no score", "the judge's score is not from 1 to 10"]
    assert told(scores) == [0.0, 1.0, pytest.approx(1 / 3), *wrong, 0.0, 0.0]
    assert len(server.asked) == len(calls) == 5, "nobody is asked about an answer without a word"


def test_what_is_asked_is_the_template_filled_once(server: Server) -> None:
    """An answer that writes a placeholder is not filled in turn."""
    turns = [{"role": "user", "content": "Hi {answer}"}, {"role": "assistant", "content": "Hello"},
             {"role": "user", "content": "Why?"}]  # fmt: skip
    changes = {"system": "Be fair.", "prompt": '{prompt}|{answer}|{reference}|{expected}|{"score": 1}'}
    judge_at(server.port, **changes).score([{"prompt": turns, "reference": "R", "expected": 4}], ["{reference}!"])
    ((path, headers, body),) = server.asked
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers
    text = 'user: Hi {answer}\nassistant: Hello\nuser: Why?|{reference}!|R|4|{"score": 1}'
    messages = [{"role": "system", "content": "Be fair."}, {"role": "user", "content": text}]
    assert body == {"model": "judge-7b", "messages": messages, "temperature": 0.0, "max_tokens": 16}


def test_nobody_is_asked_what_its_row_has_no_text_for(server: Server) -> None:
    judge = judge_at(server.port, prompt="{answer}, or {reference}?")
    server.answer = lambda question, before: completion("Score: 10")
    scores = judge.score([row(), row(reference="R"), row(reference=None)], ["a", "b", "c"])
    why = "its row has no `reference`, which the prompt has"
    assert told(scores) == [why, 1.0, why] and len(server.asked) == 1


def test_questions_are_asked_several_at_a_time_and_each_once(server: Server) -> None:
    """The first four wait for each other."""
    together = threading.Barrier(4)

    def answer(question: dict[str, Any], before: int) -> Answer:
        if before < 4:
            together.wait(60)
        return completion("Score: 10")

    server.answer = answer
    texts = [str(i % 8) for i in range(16)]
    assert told(judge_at(server.port, timeout_s=60.0).score([row()] * 16, texts)) == [1.0] * 16
    assert len(server.asked) == 8
    assert server.most_at_once == 4


FLAKY = {
    "429": (429, {"Retry-After": "0"}, b"slow down"),
    "500": (500, {}, b""),
    "503": (503, {}, b"\xff"),
    "garbage": (200, {}, b"<html>"),
    "no choices": (200, {}, b'{"choices": []}'),
    "no text": completion(None),
    "nested": (200, {}, b"[" * 100000),
    "cut": (200, {"Content-Length": "400"}, b'{"choices": ['),
}


@pytest.mark.parametrize("first", FLAKY)
def test_what_may_pass_is_tried_again(server: Server, first: str) -> None:
    server.answer = lambda question, before: FLAKY[first] if before < 2 else completion("Score: 10")
    assert told(judge_at(server.port).score([row()], ["a"])) == [1.0]
    assert len(server.asked) == 3


def test_what_does_not_pass_fails_for_that_answer_alone(server: Server) -> None:
    bad = {"b": FLAKY["503"], "c": FLAKY["garbage"], "d": (400, {}, b"too long")}
    server.answer = lambda question, before: bad.get(question["messages"][0]["content"][-1], completion("Score: 10"))
    scores = judge_at(server.port, concurrency=1).score([row()] * 4, list("abcd"))
    assert told(scores) == [
        1.0,
        "the endpoint answered with HTTP 503, at the last try",
        "the endpoint answered with something that is no chat completion",
        "the endpoint refused the question with HTTP 400",
    ]
    assert len(server.asked) == 1 + 3 + 3 + 1


def test_it_waits_as_long_as_it_is_asked_to(server: Server) -> None:
    late: Answer = (429, {"Retry-After": "1"}, b"")
    server.answer = lambda question, before: late if before == 0 else completion("Score: 10")
    began = time.monotonic()
    assert told(judge_at(server.port).score([row()], ["a"])) == [1.0]
    assert time.monotonic() - began >= 1.0


def test_an_answer_that_takes_too_long_is_given_up(server: Server) -> None:
    over = threading.Event()

    def answer(question: dict[str, Any], before: int) -> Answer:
        if question["messages"][0]["content"].endswith("slow"):
            over.wait(60)
        return completion("Score: 10")

    server.answer = answer
    slow = judge_at(server.port, timeout_s=0.7, retries=0, concurrency=1)
    assert told(slow.score([row()] * 2, ["fast", "slow"])) == [
        1.0,
        "the endpoint took longer than 0.7 s, at the last try",
    ]
    over.set()


@pytest.mark.parametrize("part", ["Drip", "Drip-Head"])
def test_an_answer_that_comes_in_drops_is_given_up_too(server: Server, part: str) -> None:
    """Twenty bytes a second, of its body or of its head, each in time: 4 s for what may take 0.5."""
    drops: Answer = (200, {part: "yes"}, b" " * 80)
    server.answer = lambda question, before: drops if before else completion("Score: 10")
    slow = judge_at(server.port, timeout_s=0.5, retries=0, concurrency=1)
    assert told(slow.score([row()] * 2, ["fast", "slow"])) == [
        1.0,
        "the endpoint took longer than 0.5 s, at the last try",
    ]


@pytest.mark.parametrize("status", [401, 403, 404, 405, 307])
def test_what_is_hopeless_ends_at_once_and_tells_no_key(
    server: Server, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the key follow to where the endpoint sends."""
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\n")
    elsewhere = {"Location": f"http://127.0.0.1:{server.port}/elsewhere"}
    server.answer = lambda question, before: (status, elsewhere, f"wrong key {KEY}".encode())
    with pytest.raises(MachineError, match=f"HTTP {status}") as error:
        judge_at(server.port, api_key_env="JUDGE_KEY", concurrency=1).score([row()] * 4, list("abcd"))
    assert KEY not in str(error.value)
    assert not error.value.retry
    ((path, headers, _),) = server.asked
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")


def test_no_proxy_sees_what_is_asked_on_this_machine(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy would read the key. It is this server, too: of a question through it, the path is a whole address."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    assert told(judge_at(server.port, api_key_env="JUDGE_KEY").score([row()], ["a"])) == [1.0]
    assert [path for path, _, _ in server.asked] == ["/v1/chat/completions"]


@pytest.mark.parametrize("value", [None, "", "a\nb", "clé"])
def test_a_key_that_is_not_there_or_is_none_is_told_by_the_name_of_its_variable(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(MachineError, match=r"the variable JUDGE_KEY is (not set|no key)") as error:
        judge_at(1, api_key_env="JUDGE_KEY")
    assert "clé" not in str(error.value)


def test_an_endpoint_that_never_answered_ends_the_stage_for_now(server: Server) -> None:
    """Nothing listens at port 1; another attempt at the stage may find it up."""
    with pytest.raises(MachineError, match=r"cannot be reached .*has answered none of this attempt's q") as error:
        judge_at(1, retries=1).score([row()], ["a"])
    assert error.value.retry
    server.answer = lambda question, before: FLAKY["503"]
    with pytest.raises(MachineError, match="answered with HTTP 503, and has answered none of this attempt's q"):
        judge_at(server.port).score([row()], ["a"])


def test_what_is_no_chat_endpoint_is_said_to_be_none(server: Server) -> None:
    server.answer = lambda question, before: FLAKY["garbage"]
    with pytest.raises(MachineError, match=r"no chat completion, .*\(is it a chat endpoint, and its `url` right up to"):
        judge_at(server.port, retries=0).score([row()], ["a"])


def test_one_reply_without_a_score_is_shown(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.answer = lambda question, before: completion("I refuse, " * 100)
    judge_at(server.port, concurrency=1).score([row()] * 3, list("abc"))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("reward.terms.term: the judge's reply has no score: 'I refuse, I refuse, ")
    server.answer = lambda question, before: completion("Score: 7")
    judge_at(server.port, shared=tmp_path).score([row()], ["a"])
    server.answer = lambda question, before: completion("worth 6")
    judge_at(server.port, shared=tmp_path, pattern=r"worth (\d)").score([row()], ["a"])
    assert capsys.readouterr().out == "", "one that is kept, and is asked for anew, is no failure"
    assert len(line) < 300


def test_an_endpoint_that_has_gone_ends_the_stage_for_now(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It answers ten questions and then none; three in a row are enough here. Those ten are not asked again."""
    monkeypatch.setattr(chat_client, "GONE", 3)
    server.answer = lambda question, before: completion("Score: 10") if before < 10 else FLAKY["503"]
    texts = [str(i) for i in range(40)]
    with pytest.raises(MachineError, match="HTTP 503, and has answered none of the last 3 questions") as error:
        judge_at(server.port, tmp_path, concurrency=1, retries=0).score([row()] * 40, texts)
    assert error.value.retry
    assert len(server.asked) == 10 + 3
    server.answer = lambda question, before: completion("Score: 10")
    assert told(judge_at(server.port, tmp_path).score([row()] * 40, texts)) == [1.0] * 40
    assert len(server.asked) == 13 + 30


def test_an_endpoint_that_dies_has_gone_and_costs_no_answer_its_reward(server: Server, tmp_path: Path) -> None:
    """After six of eight: the other two are no failures, of which there may be too many, but a stage to try again."""

    def answer(question: dict[str, Any], before: int) -> Answer:
        if before == 5:
            server.close()
        return completion("Score: 10")

    server.answer = answer
    texts = [str(i) for i in range(8)]
    with pytest.raises(MachineError) as error:
        judge_at(server.port, tmp_path, concurrency=1).score([row()] * 8, texts)
    where = f"reward.terms.term (http://127.0.0.1:{server.port}/v1/)"
    assert str(error.value) == f"{where}: the endpoint has gone: it cannot be reached (Connection refused) (is it up?)"
    assert error.value.retry and error.value.exit_code == 4
    assert told(judge_at(server.port, tmp_path).score([row()] * 6, texts[:6])) == [1.0] * 6, "these were kept"


def test_a_server_that_drops_what_it_is_asked_has_gone_where_too_many_answers_fail(server: Server) -> None:
    """As a tunnel does whose far end is dead: it takes the connection, and closes it. A refusal is another reason."""

    def answer(question: dict[str, Any], before: int) -> Answer:
        if question["messages"][0]["content"].endswith("no"):
            return 400, {}, b""
        assert before < 6
        return completion("Score: 10")

    server.answer = answer
    judge = judge_at(server.port, concurrency=1)
    scores = judge.score([row()] * 8, [str(i) for i in range(8)])
    assert told(scores)[5:] == [1.0, *["the endpoint cannot be reached (RemoteDisconnected), at the last try"] * 2]
    with pytest.raises(
        MachineError, match=r"v1/\): 2 of 8 answers have no reward: the endpoint cannot be rea"
    ) as error:
        judge.failures(scores)
    assert error.value.retry
    with pytest.raises(InputError, match="3 of 9 answers have no reward"):
        judge.failures([*scores, *judge.score([row()], ["no"])])


@pytest.mark.parametrize("how", ["503", "slow", "cut"])
def test_a_gateway_whose_server_has_died_has_gone_where_too_many_answers_fail(server: Server, how: str) -> None:
    """It answers, for the server behind it, hangs, or breaks off: no fault of the reward, another attempt may find it
    up. What was answered and has no score is."""
    over = threading.Event()

    def answer(question: dict[str, Any], before: int) -> Answer:
        if question["messages"][0]["content"].endswith("no"):
            return FLAKY["garbage"]  # a reply, which may be the same for ever
        if before >= 6 and how == "slow":
            over.wait(60)
        return completion("Score: 10") if before < 6 else FLAKY["cut" if how == "cut" else "503"]

    server.answer = answer
    judge = judge_at(server.port, concurrency=1, retries=0, timeout_s=0.5)
    scores = judge.score([row()] * 8, [str(i) for i in range(8)])
    with pytest.raises(MachineError, match=r"2 of 8 answers have no reward: the endpoint .*, at the last try") as error:
        judge.failures(scores)
    assert error.value.retry
    with pytest.raises(InputError, match="3 of 9 answers have no reward"):
        judge.failures([*scores, *judge.score([row()], ["no"])])
    over.set()


def test_patience_with_an_endpoint_is_a_sign_of_life(server: Server) -> None:
    """Two tries end without an answer, and two seconds pass before the third."""
    wait: Answer = (429, {"Retry-After": "1"}, b"")
    server.answer = lambda question, before: wait if before < 2 else completion("Score: 10")
    calls: list[int] = []
    assert told(judge_at(server.port, alive=lambda: calls.append(1)).score([row()], ["a"])) == [1.0]
    assert len(calls) >= 2, "one is for the reply"


def test_half_a_character_in_a_reply_is_no_end_of_the_stage(server: Server, tmp_path: Path) -> None:
    """JSON can have one; no file can."""
    server.answer = lambda question, before: completion("\ud800 Score: 10")
    for _ in range(2):
        assert told(judge_at(server.port, tmp_path).score([row()], ["a"])) == [1.0]
    assert len(server.asked) == 1


def test_replies_are_kept_by_what_was_asked_where_and_only_those_with_a_score(server: Server, tmp_path: Path) -> None:
    replies = {"a": "Score: 10", "b": "Hm."}
    server.answer = lambda question, before: completion(replies[question["messages"][0]["content"][-1]])

    def asked(judge: Judge) -> str:
        before = len(server.asked)
        assert told(judge.score([row()] * 2, ["a", "b"]))[0] == 1.0
        return "".join(sorted(body["messages"][0]["content"][-1] for _, _, body in server.asked[before:]))

    assert asked(judge_at(server.port, tmp_path)) == "ab"
    assert asked(judge_at(server.port, tmp_path)) == "b"
    assert asked(judge_at(server.port, tmp_path, model="another")) == "ab"
    assert asked(judge_at(server.port, tmp_path, cache=False)) == "ab"
    assert asked(judge_at(server.port, None)) == "ab"
    assert asked(judge_at(server.port, tmp_path, url=f"http://127.0.0.1:{server.port}/v1")) == "b"
    elsewhere = {"url": f"http://localhost:{server.port}/v1"}
    assert asked(judge_at(server.port, tmp_path, **elsewhere)) == "ab", "what answers there may be another model"
    assert asked(judge_at(server.port, tmp_path, **elsewhere)) == "b"
    (kept,) = [file for file in tmp_path.rglob("*.json") if "Score" in file.read_text()][:1]
    kept.write_text('{"reply": "Sco')
    files = list(tmp_path.rglob("*.json"))
    assert len(files) == 3
    again = [asked(judge_at(server.port, tmp_path, **one)) for one in ({}, {"model": "another"}, elsewhere)]
    assert sorted(again) == ["ab", "b", "b"]


def test_a_request_to_stop_does_not_wait_for_the_endpoint(server: Server) -> None:
    """It comes with the first reply, while another question is being answered, and no further one is asked."""
    over = threading.Event()

    def answer(question: dict[str, Any], before: int) -> Answer:
        if before:
            over.wait(60)
        return completion("Score: 10")

    class Stop(Exception):
        pass

    def alive() -> None:
        raise Stop

    server.answer = answer
    with pytest.raises(Stop):
        judge_at(server.port, alive=alive, concurrency=2, timeout_s=60.0).score([row()] * 8, list("abcdefgh"))
    assert not over.is_set()
    over.set()
    until = time.monotonic() + 60
    while server.at_once and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(server.asked) <= 3


def test_what_is_asked_is_in_the_key_and_where_and_how_patiently_is_not() -> None:
    def key(**changes: Any) -> Any:
        term = {**SETTINGS, "url": "http://a/v1", **changes}
        return identity_side(Reward.model_validate({"terms": {"term": term}}))

    asked = {"model": "m", "system": "s", "prompt": "{answer}", "pattern": "(.)", "low": 0.0, "high": 9.0}
    for name, value in {**asked, "temperature": 1.0, "max_tokens": 8}.items():
        assert key(**{name: value}) != key(), name
    patience = {"timeout_s": 1.0, "retries": 0, "backoff_s": 2.0, "concurrency": 1, "cache": False}
    for name, value in {**patience, "url": "https://b/v1", "api_key_env": "KEY"}.items():
        assert key(**{name: value}) == key(), name


REFUSED = {
    "api_key_env=sk-0123456789012345678901": "api_key_env` must be the name of an environment variable (export the key",
    "url=http://me:pw@localhost/v1": "`reward.terms.judge.url` has more than an address in it",
    "url=localhost:8000": "`reward.terms.judge.url` is no address (such as http://localhost:8000/v1, in ASCII)",
    "url='http://[::1/v1'": "`reward.terms.judge.url` is no address (such as",
    "url=http://localhost:80000/v1": "`reward.terms.judge.url` is no address (such as",
    "url='http://localhost/é'": "`reward.terms.judge.url` is no address (such as",
    "pattern='\\d+'": "`reward.terms.judge.pattern` has no group",
    "prompt='{anwser}'": "has the placeholder {anwser}, which is none (did you mean `answer`?)",
    "prompt='{prompt}'": "`reward.terms.judge.prompt` lacks {answer}",
    "low=10.0": "`reward.terms.judge.low` is 10, and `reward.terms.judge.high` 10",
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_cannot_be_is_one_line(setting: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose(["reward=endpoint", "reward.terms.judge.model=m", f"reward.terms.judge.{setting}"])
    assert REFUSED[setting] in str(error.value)
    assert "sk-0" not in str(error.value)
