"""Many questions to a chat endpoint: each once, several at a time, replies kept for whoever asks the same.

What was answered is kept by digest of what was asked, and at which address, so that a stage that is tried again, or
judges the same answers for another purpose, asks only what is new: two servers may call their models alike.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar

from alignment.config.reward_terms import ChatEndpoint
from alignment.files import digest, read_json, write_json
from alignment.rewards.chat_client import Client, Request
from alignment.rewards.term import Failed, Row

SHOWN = 200  # characters of a reply of which nothing can be made
KEPT = "replies"  # folder of what runs share
Reply = str | Failed
T = TypeVar("T")


class Asker:
    """where: what errors are said to be about. alive is called after each reply. shared: where replies are kept.

    Raises MachineError if the key is not there; a call does if nothing is to be had from the endpoint at all.
    """

    def __init__(self, settings: ChatEndpoint, where: str, alive: Callable[[], None], shared: Path | None):
        self.settings, self.alive = settings, alive
        self.client, self._shown = Client(settings, where), False
        self.kept = Replies(shared / KEPT if shared is not None and settings.cache else None)

    def __call__(self, texts: Sequence[str | Failed], read: Callable[[str], T]) -> list[T | Failed]:
        """What `read` makes of the reply to each text, or why there is none; one that could not be filled is not asked.
        A reply that it raises Failed for is not kept: another attempt asks again."""
        asked = {text: self._request(text) for text in texts if isinstance(text, str)}
        names = {text: digest({"url": self.client.url, **request}) for text, request in asked.items()}
        found: dict[str, T | Failed] = {}
        for text, name in names.items():
            if (reply := self.kept.get(name)) is not None and not isinstance(value := _read(reply, read), Failed):
                found[text] = value

        def take(text: str, reply: Reply) -> None:
            value = found[text] = _read(reply, read)
            if isinstance(reply, str) and isinstance(value, Failed):
                self._show(reply, value)
            elif isinstance(reply, str):
                self.kept.put(names[text], reply)
            self.alive()

        unknown = {text: request for text, request in asked.items() if text not in found}
        ask_all(self.client, unknown, self.settings.concurrency, take, self.alive)
        return [found[text] if isinstance(text, str) else text for text in texts]

    def _show(self, reply: str, failed: Failed) -> None:
        """The first in the stage's log, so that one sees whether the judge or the pattern is wrong."""
        if not self._shown:
            print(f"{self.client.where}: {failed}: {reply[:SHOWN]!r}", flush=True)
        self._shown = True

    def _request(self, text: str) -> Request:
        """What is sent, but for the key."""
        system = [] if self.settings.system is None else [{"role": "system", "content": self.settings.system}]
        limits = {"temperature": self.settings.temperature, "max_tokens": self.settings.max_tokens}
        return {"model": self.settings.model, "messages": [*system, {"role": "user", "content": text}], **limits}


def _read(reply: Reply, read: Callable[[str], T]) -> T | Failed:
    if isinstance(reply, Failed):
        return reply
    try:
        return read(reply)
    except Failed as failed:
        return failed


def filled(template: str, row: Row, answers: Mapping[str, str]) -> str | Failed:
    """The placeholders of a template replaced, all at once: one that an answer writes stays as it is. Failed if the row
    lacks what one of them asks for."""
    for name in ("reference", "expected"):
        if f"{{{name}}}" in template and row.get(name) is None:
            return Failed(f"its row has no `{name}`, which the prompt has")
    turns = row["prompt"]
    talk = "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
    known = {**answers, "prompt": turns[0]["content"] if len(turns) == 1 else talk}
    known |= {name: str(row.get(name, "")) for name in ("reference", "expected")}
    names = "|".join(known)
    return re.sub(rf"\{{({names})\}}", lambda found: known[found[1]], template)


class Replies:
    """Texts by the digest of what was asked, and where. None: nothing is kept."""

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


def ask_all(
    client: Client,
    requests: dict[str, Request],
    concurrency: int,
    take: Callable[[str, Reply], None],
    alive: Callable[[], None],
) -> None:
    """Several at a time; `take` is called here with each reply as it comes, `alive` after tries that brought none.
    Raises what one of them ends in.

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
                stop.set()  # what ends one question ends all
                done.put((key, error))

    for _ in range(min(concurrency, len(requests))):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in range(len(requests)):
            key, reply = _next(done, client, alive)
            if isinstance(reply, BaseException) and not isinstance(reply, Failed):
                raise reply
            take(key, reply)
    finally:
        stop.set()


def _next(done: SimpleQueue[T], client: Client, alive: Callable[[], None]) -> T:
    """Patience with an endpoint that is down for a while is longer than that of who watches over this process."""
    tries = client.tries
    while True:
        try:
            return done.get(timeout=1.0)
        except Empty:
            if client.tries > tries:
                tries = client.tries
                alive()
