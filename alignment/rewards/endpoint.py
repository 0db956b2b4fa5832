"""endpoint: a model behind an OpenAI-compatible chat endpoint as judge. Its score as a number in [0, 1].

An answer without a word is worth 0, and nobody is asked. What was answered is kept by digest of what was asked, so that
a stage that is tried again, or judges the same answers for another purpose, asks only what is new.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

from alignment.config.reward_terms import Endpoint
from alignment.files import digest, read_json, write_json
from alignment.rewards.chat_client import Client, Request
from alignment.rewards.patterns import last
from alignment.rewards.term import Answer, Failed, Term, Value, worded

KEPT = "replies"  # folder of what runs share
Reply = str | Failed


def endpoint(settings: Endpoint, name: str, alive: Callable[[], None], shared: Path | None) -> Term:
    """name: of the term. alive is called after each reply. shared: where replies are kept, in a folder of their own.

    Raises MachineError if the key is not there; a call does if nothing is to be had from the endpoint at all.
    """
    client = Client(settings, f"reward.terms.{name}")
    kept = Replies(shared / KEPT if shared is not None and settings.cache else None)
    pattern = re.compile(settings.pattern, re.S)

    def values(answers: Sequence[Answer]) -> list[Value]:
        asked = [request(settings, answer) for answer in answers]
        names = [digest(one) for one in asked]
        replies: dict[str, Reply] = {}
        unknown: dict[str, Request] = {}
        for one, key in zip(asked, names, strict=True):
            if key not in replies and key not in unknown:
                if (reply := kept.get(key)) is None:
                    unknown[key] = one
                else:
                    replies[key] = reply

        def take(key: str, reply: Reply) -> None:
            replies[key] = reply
            if isinstance(reply, str) and not isinstance(score(reply, pattern, settings), Failed):
                kept.put(key, reply)
            alive()

        ask_all(client, unknown, settings.concurrency, take)
        return [score(replies[key], pattern, settings) for key in names]

    return worded(values)


def request(settings: Endpoint, answer: Answer) -> Request:
    """What is sent, but for the key."""
    system = [{"role": "system", "content": settings.system}] if settings.system is not None else []
    turns = [*system, {"role": "user", "content": filled(settings.prompt, answer)}]
    limits = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
    return {"model": settings.model, "messages": turns, **limits}


def filled(template: str, answer: Answer) -> str:
    """The placeholders of a template replaced, all at once: one that an answer writes stays as it is."""
    turns = answer.row["prompt"]
    asked = answer.asked if len(turns) == 1 else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    known = {"prompt": asked, "answer": answer.text}
    for name in ("reference", "expected"):
        known[name] = str(answer.row.get(name, ""))
    return re.sub(r"\{(prompt|answer|reference|expected)\}", lambda found: known[found[1]], template)


def score(reply: Reply, pattern: re.Pattern[str], settings: Endpoint) -> Value:
    """The number in the last match of the pattern, from low to high as one from 0 to 1."""
    if isinstance(reply, Failed):
        return reply
    try:
        found = last(pattern, reply)
        value = float(found[1]) if found else None
    except Failed as failed:
        return failed
    except (TypeError, ValueError):
        value = None
    if value is None:
        return Failed("the judge's reply has no score")
    if not settings.low <= value <= settings.high:
        return Failed(f"the judge's score is not from {settings.low:g} to {settings.high:g}")
    return (value - settings.low) / (settings.high - settings.low)


class Replies:
    """Texts by the digest of what was asked. None: nothing is kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def get(self, key: str) -> str | None:
        if self.folder is None:
            return None
        try:
            reply = read_json(self._path(self.folder, key))["reply"]
        except (OSError, ValueError, KeyError, TypeError):  # not there, or cut short
            return None
        return reply if isinstance(reply, str) else None

    def put(self, key: str, reply: str) -> None:
        if self.folder is None:
            return
        try:
            write_json(self._path(self.folder, key), {"reply": reply}, durable=False)
        except OSError:
            pass  # a full disk costs questions, not the run

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.json"


def ask_all(client: Client, requests: dict[str, Request], concurrency: int, take: Callable[[str, Reply], None]) -> None:
    """Several at a time; `take` is called here with each reply as it comes. Raises what one of them ends in.

    In threads that nobody waits for if this ends early: a request to stop is not kept waiting for an endpoint.
    """
    todo: SimpleQueue[tuple[str, Request]] = SimpleQueue()
    done: SimpleQueue[tuple[str, Reply | BaseException]] = SimpleQueue()
    for item in requests.items():
        todo.put(item)
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                key, one = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((key, client.ask(one, stop)))
            except BaseException as error:
                done.put((key, error))

    for _ in range(min(concurrency, len(requests))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(len(requests)):
            key, reply = done.get()
            if isinstance(reply, BaseException) and not isinstance(reply, Failed):
                raise reply
            take(key, reply)
    finally:
        stop.set()
