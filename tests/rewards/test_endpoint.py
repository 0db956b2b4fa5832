"""A chat endpoint as judge, against a server on this machine: what is asked, patience, refusals, what is kept."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from alignment.config.compose import compose
from alignment.config.rewards import Reward
from alignment.errors import ConfigError, InputError, MachineError
from alignment.files import read_jsonl, write_jsonl
from alignment.pipeline.identity import identity_side
from alignment.rewards import Judge, chat_client
from alignment.stages import judge
from alignment.stages.context import StageContext
from alignment.stages.parts import judge_of
from tests.rewards.conftest import row
from tests.stages.conftest import MakeContext, make_context  # noqa: F401

KEY = "sk-secret-of-this-test-0123456789"
Answer = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: Any) -> Answer:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@dataclass
class Server:
    """answer(question, how many questions came before it) -> what it says. asked: (path, headers, body) so far."""

    answer: Callable[[dict[str, Any], int], Answer]
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: Any = field(default_factory=threading.Lock)
    port: int = 0


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(lambda question, before: completion("Score: 10"))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with made.lock:
                before = len(made.asked)
                made.asked.append((self.path, dict(self.headers), body))
                made.at_once += 1
                made.most_at_once = max(made.most_at_once, made.at_once)
            status, headers, text = made.answer(body, before)
            with made.lock:
                made.at_once -= 1
            try:
                if "Drip-Head" in headers:
                    self._drip(b"HTTP/1.1 200 OK\r\nX: " + text)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(text)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if "Drip" in headers:
                    self._drip(text)
                else:
                    self.wfile.write(text)
            except OSError:  # whoever asked has gone
                pass

        def _drip(self, text: bytes) -> None:
            for byte in text:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)

        def log_message(self, *args: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.port = listening.server_port
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    listening.shutdown()
    listening.server_close()


SETTINGS = {
    "kind": "endpoint", "weight": 1.0, "model": "judge-7b", "system": None, "prompt": "Q: {prompt}\nA: {answer}",
    "pattern": r"Score:\s*(-?\d+)", "low": 1.0, "high": 10.0, "temperature": 0.0, "max_tokens": 16,
    "api_key_env": None, "timeout_s": 5.0, "retries": 2, "backoff_s": 0.01, "concurrency": 4, "cache": True,
}  # fmt: skip


def judge_at(port: int, shared: Path | None = None, alive: Any = lambda: None, **changes: Any) -> Judge:
    term = {**SETTINGS, "url": f"http://127.0.0.1:{port}/v1/", **changes}
    return Judge(Reward.model_validate({"terms": {"term": term}}), {}, alive, shared)


def told(scores: list[dict[str, Any]]) -> list[Any]:
    """Each reward, or why there is none."""
    return [score["reward"] if "failed" not in score else score["failed"]["term"] for score in scores]


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
        "the endpoint answered with HTTP 503",
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
    assert told(slow.score([row()] * 2, ["fast", "slow"])) == [1.0, "the endpoint took longer than 0.7 s"]
    over.set()


@pytest.mark.parametrize("part", ["Drip", "Drip-Head"])
def test_an_answer_that_comes_in_drops_is_given_up_too(server: Server, part: str) -> None:
    """Twenty bytes a second, of its body or of its head, each in time: 4 s for what may take 0.5."""
    drops: Answer = (200, {part: "yes"}, b" " * 80)
    server.answer = lambda question, before: drops if before else completion("Score: 10")
    slow = judge_at(server.port, timeout_s=0.5, retries=0, concurrency=1)
    assert told(slow.score([row()] * 2, ["fast", "slow"])) == [1.0, "the endpoint took longer than 0.5 s"]


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
    with pytest.raises(MachineError, match=r"cannot be reached .*has answered nothing yet") as error:
        judge_at(1, retries=1).score([row()], ["a"])
    assert error.value.retry
    server.answer = lambda question, before: FLAKY["503"]
    with pytest.raises(MachineError, match="answered with HTTP 503, and has answered nothing yet"):
        judge_at(server.port).score([row()], ["a"])


def test_an_endpoint_that_has_gone_ends_the_stage_for_now(
    server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It answers ten questions and then none; three in a row are enough here. Those ten are not asked again."""
    monkeypatch.setattr(chat_client, "GONE", 3)
    server.answer = lambda question, before: completion("Score: 10") if before < 10 else FLAKY["503"]
    texts = [str(i) for i in range(40)]
    with pytest.raises(MachineError, match="HTTP 503, and has answered nothing of the last 3 questions") as error:
        judge_at(server.port, tmp_path, concurrency=1, retries=0).score([row()] * 40, texts)
    assert error.value.retry
    assert len(server.asked) == 10 + 3
    server.answer = lambda question, before: completion("Score: 10")
    assert told(judge_at(server.port, tmp_path).score([row()] * 40, texts)) == [1.0] * 40
    assert len(server.asked) == 13 + 30


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


def comparer(port: int, **changes: Any) -> Any:
    asked = {name: value for name, value in SETTINGS.items() if name not in ("kind", "weight", "low", "high")}
    asked |= {"prompt": "{prompt}: {first} or {second}?", "pattern": "Better: ([ABC])", "first": "A", "second": "B"}
    term = {"kind": "repetition", "weight": 1.0, "words": 1}
    comparison = {**asked, "url": f"http://127.0.0.1:{port}/v1", **changes}
    return Judge(Reward.model_validate({"terms": {"term": term}, "comparison": comparison}), {}).compare


def test_of_two_answers_one_is_better_or_none(server: Server) -> None:
    """The judge prefers the longer; what it does not understand has failed; who says nothing loses unasked."""

    def answer(question: dict[str, Any], before: int) -> Answer:
        first, second = question["messages"][0]["content"].split(": ")[1][:-1].split(" or ")
        if "?" in first + second:
            return completion("Hm.")
        better = "A" if len(first) > len(second) else "B" if len(first) < len(second) else "C"
        return completion(f"Better: C, no: Better: {better}")

    server.answer = answer
    compare = comparer(server.port)
    games = [("long", "s"), ("s", "long"), ("same", "size"), ("?", "x"), ("", "x"), ("x", " "), ("", "\n"), ("a", "a")]
    outcomes = compare([row()] * len(games), *zip(*games, strict=True))
    assert [one if isinstance(one, int) else str(one) for one in outcomes] == [
        1, -1, 0, "the judge's reply has no verdict", -1, 1, 0, 0,
    ]  # fmt: skip
    assert len(server.asked) == 4
    assert server.asked[0][2]["messages"][0]["content"].startswith("Say something: ")


def test_a_stage_asks_about_pairs_in_both_orders(
    server: Server, make_context: MakeContext, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """Of three answers the longest beats both others. Between those the judge takes whichever is shown first: a tie."""

    def answer(question: dict[str, Any], before: int) -> Answer:
        first, second = question["messages"][0]["content"].split(": ")[1][:-1].split(" or ")
        return completion(f"Better: {'B' if len(first) < len(second) else 'A'}")

    server.answer = answer
    context = comparing(make_context, tmp_path, server.port, "ab", "the longest", "cd")
    assert judge.run(context)["pairs"] == 1
    assert len(server.asked) == 6
    (judged,) = read_jsonl(context.folder / "judged.jsonl")
    assert [completion["reward"] for completion in judged["completions"]] == [-0.5, 1.0, -0.5]


def test_comparisons_that_fail_are_counted_and_too_many_are_an_error(
    server: Server, make_context: MakeContext, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    """Of a, bb, ccc the judge never understands ccc with a, in one order: one comparison of three fails, and still each
    answer has a reward. The longer wins: bb against a, ccc against bb."""

    def answer(question: dict[str, Any], before: int) -> Answer:
        first, second = question["messages"][0]["content"].split(": ")[1][:-1].split(" or ")
        if (first, second) == ("ccc", "a"):
            return completion("I cannot say.")
        return completion(f"Better: {'A' if len(first) > len(second) else 'B'}")

    server.answer = answer
    context = comparing(make_context, tmp_path, server.port, "a", "bb", "ccc", max_failed_share=0.4)
    metrics = judge.run(context)
    assert (metrics["comparisons"], metrics["comparisons_failed"], metrics["reward_failed"]) == (3, 1, 0)
    (judged,) = read_jsonl(context.folder / "judged.jsonl")
    assert [completion["reward"] for completion in judged["completions"]] == [-1.0, 0.0, 1.0]
    why = {"comparison": "the judge's reply has no verdict"}
    assert judged["failed_comparisons"] == [{"answers": [0, 2], "failed": why}]
    strict = replace(context, experiment=with_share(context.experiment, 0.3))
    with pytest.raises(InputError) as told:
        judge.run(strict)
    assert str(told.value) == (
        "reward.comparison: 1 of 3 comparisons failed: the judge's reply has no verdict (1 times) (mend the "
        "comparison, or raise reward.max_failed_share, 0.3)"
    )


def with_share(experiment: Any, share: float) -> Any:
    reward = experiment.reward.model_copy(update={"max_failed_share": share})
    return experiment.model_copy(update={"reward": reward})


def comparing(
    make_context: Any, folder: Path, port: int, *texts: str, max_failed_share: float = 0.05  # noqa: F811
) -> StageContext:  # fmt: skip
    """A stage that judges the answers to one prompt by comparisons."""
    completions = [{"text": text, "tokens": 1, "finished": True} for text in texts]
    (folder / "samples").mkdir()
    write_jsonl(folder / "samples" / "samples.jsonl", [{**row(), "completions": completions}])
    context = make_context("judge", {"data": folder / "samples"}, judging="pairwise", min_margin=0.0)
    reward = context.experiment.reward.model_copy(update={"comparison": comparer(port).settings})
    experiment = context.experiment.model_copy(update={"reward": reward})
    return replace(context, experiment=with_share(experiment, max_failed_share))


def test_who_does_not_compare_neither_needs_the_comparison_nor_has_it_in_its_key(
    make_context: MakeContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """A key that is not there; who compares reads no term, so a model that is not there is nobody's."""
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    context = comparing(make_context, tmp_path, 1, "a", "bb")
    terms = {
        "gone": {"kind": "relevance", "weight": 1.0, "source": {"kind": "path", "path": str(tmp_path / "gone")}},
        "size": {"kind": "length", "weight": 1.0, "unit": "words", "low": 1, "high": None, "fall_off": 0},
    }
    raw = {"comparison": {**comparer(1).settings.model_dump(), "api_key_env": "JUDGE_KEY"}}
    both = Reward.model_validate({**raw, "terms": {"size": terms["size"]}})
    pointwise = context.settings.model_copy(update={"judging": "pointwise"})
    experiment = context.experiment.model_copy(update={"reward": both})
    scores = judge_of(replace(context, experiment=experiment, settings=pointwise)).score([row()], ["a"])
    assert scores[0]["reward"] == 1.0
    with pytest.raises(MachineError, match="JUDGE_KEY is not set"):
        judge_of(replace(context, experiment=experiment))
    monkeypatch.setenv("JUDGE_KEY", KEY)
    every = Reward.model_validate({**raw, "terms": terms})
    assert judge_of(replace(context, experiment=experiment.model_copy(update={"reward": every}))).compare
    assert set(identity_side(both.read(compares=True))) == {"terms", "comparison"}
    assert identity_side(both.read(compares=True))["terms"] == {}
    assert identity_side(both.read(compares=False)) == {"terms": identity_side(both)["terms"]}


def test_who_compares_is_in_the_key_where_somebody_does() -> None:
    plain = {"terms": {"term": {"kind": "repetition", "weight": 1.0, "words": 1}}}
    assert "comparison" not in identity_side(Reward.model_validate(plain))
    assert judge_at(1).compare is None
    chosen = ["reward=endpoint_pairwise", "reward.terms.judge.model=m"]
    reward = compose([*chosen, "stage.judge.judging=pairwise"]).reward
    assert identity_side(reward)["comparison"]["model"] == "m"
    with pytest.raises(ConfigError, match=r"`reward\.comparison\.prompt` lacks \{second\}"):
        compose([*chosen, "reward.comparison.prompt='{first}'"])
    with pytest.raises(ConfigError, match=r"`reward\.comparison` is set, and `stage\.judge\.judging` is pointwise"):
        compose(chosen)
    alone = r"`reward\.comparison` is set, and no stage of the pipeline asks which of two answers is better \(choose a"
    for pipeline in ("sft_online_dpo", "sft"):
        with pytest.raises(ConfigError, match=alone):
            compose([*chosen, f"pipeline={pipeline}"])
    other = ["+stage@stage.other=judge", "+pipeline.nodes.other={stage:other,inputs:{data:samples}}"]
    assert not compose([*chosen, *other, "stage.other.judging=pairwise"]).stage["judge"].compares, "another node does"


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
