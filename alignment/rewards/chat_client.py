"""Asks an OpenAI-compatible chat endpoint one question at a time: with patience, and without ever telling the key."""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from alignment.config.reward_terms import LOCAL, ChatEndpoint
from alignment.errors import MachineError
from alignment.rewards.term import Failed

Request = dict[str, Any]
LONGEST_WAIT = 60.0  # seconds between two tries
LARGEST = 4 << 20  # bytes of a reply
GONE = 64  # questions in a row without an answer, each after all its tries
UP = "is it up?"
AT_LAST = ", at the last try"  # so ends why, of a question that was given up: later the same one may be answered
TRY_AGAIN = {408, 409, 425, 429}  # and all from 500 on
HOPELESS = {  # for every question
    401: "the key is refused",
    403: "the key is refused",
    404: "there is no such model or address",
    405: "it takes no questions there",
}


class _Refused(Exception):
    """One try went wrong. after: seconds the endpoint asks to be left alone. gone: there was no connection at all.
    odd: it replied, but with what is no answer; so it may reply for ever."""

    def __init__(self, what: str, after: float = 0.0, gone: bool = False, odd: bool = False):
        super().__init__(what)
        self.after, self.gone, self.odd = after, gone, odd


class _NoConnection(OSError):
    """None was made, whatever was asked. Its cause says why."""


class _Until(io.RawIOBase):
    """What a connection says, until a point of the monotonic clock: a socket's own time-out begins anew each byte."""

    def __init__(self, connection: socket.socket, until: float):
        self.connection, self.until = connection, until
        self.said = connection.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self.until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.connection.settimeout(left)
        return self.said.readinto(buffer)

    def close(self) -> None:
        self.said.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(self, connection: socket.socket, until: float, **given: Any):
        super().__init__(connection, **given)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(connection, until))


class _Connection(http.client.HTTPConnection):
    """Its time-out is for all of one question, to the last byte of the reply."""

    def __init__(self, *given: Any, **more: Any):
        super().__init__(*given, **more)
        assert self.timeout is not None
        self.response_class = partial(_Response, until=time.monotonic() + self.timeout)  # type: ignore[assignment]

    def connect(self) -> None:
        try:
            super().connect()
        except OSError as error:
            raise _NoConnection from error


class _SafeConnection(_Connection, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_SafeConnection, request)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for this address alone."""

    def redirect_request(self, *given: Any, **more: Any) -> None:
        return None


class Client:
    """where: what errors are said to be about. Raises MachineError if the variable with the key is not set."""

    def __init__(self, settings: ChatEndpoint, where: str):
        self.settings, self.where = settings, where
        self.url = f"{settings.url.rstrip('/')}/chat/completions"
        self.headers = {"Content-Type": "application/json", "User-Agent": "alignment"}
        if settings.api_key_env is not None:
            self.headers["Authorization"] = f"Bearer {self._key(settings.api_key_env)}"
        # Through no proxy to this machine itself: a key goes there over http, and a proxy on the way would read it.
        direct = [urllib.request.ProxyHandler({})] if urlsplit(self.url).hostname in LOCAL else []
        self.opener = urllib.request.build_opener(_NoRedirect, _Http, _Https, *direct)
        self.heard = False  # a completion, ever
        self.tries = 0  # that have ended, of all questions
        self.unanswered = 0  # questions in a row

    def _key(self, name: str) -> str:
        key = os.environ.get(name, "").strip()
        if not key.isascii() or not key.isprintable() or not key:
            what = f"the variable {name} is {'not set' if not key else 'no key'}, and api_key_env names it"
            raise MachineError(what, where=self.where, fix=f"export {name}=..., where the stage runs")
        return key

    def ask(self, request: Request, stop: threading.Event) -> str | Failed:
        """The reply's text. Tried again `retries` times, after waits that double, or as long as it is asked to wait.

        Raises MachineError if it is hopeless, if no question was ever answered, or if it must be gone: there is no
        connection, or so many questions in a row had no answer.
        """
        body, wait, gone, odd = json.dumps(request).encode(), self.settings.backoff_s, False, False
        for left in range(self.settings.retries, -1, -1):
            try:
                reply = self._once(body)
                self.heard, self.unanswered = True, 0
                return reply
            except Failed as failed:
                self.heard, self.unanswered = True, 0
                return failed
            except _Refused as refused:
                self.tries += 1
                why, gone, odd = str(refused), refused.gone, refused.odd
                spread = wait * random.uniform(0.5, 1.0)  # so that many do not come back at once
                if not left or stop.wait(min(max(spread, refused.after), LONGEST_WAIT)):
                    break
                wait *= 2
        self.unanswered += 1
        if stop.is_set() or (self.heard and not gone and self.unanswered < GONE):
            return Failed(f"the endpoint {why}{'' if odd else AT_LAST}")
        raise self._ended(why, gone, odd)

    def _ended(self, why: str, gone: bool, odd: bool) -> MachineError:
        what = f"the endpoint has gone: it {why}"
        if not self.heard or not gone:
            since = f"of the last {self.unanswered} questions" if self.heard else "of this attempt's questions"
            what = f"the endpoint {why}, and has answered none {since}"
        fix = "is it a chat endpoint, and its `url` right up to /v1?" if odd and not self.heard else UP
        return gone_for_now(what, self._place(), fix)

    def _once(self, body: bytes) -> str:
        """Raises _Refused (worth another try), Failed (this question is refused), MachineError (all will be)."""
        asked = urllib.request.Request(self.url, body, self.headers)
        try:
            with self.opener.open(asked, timeout=self.settings.timeout_s) as response:
                text = _read(response)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except TimeoutError:
            raise _Refused(f"took longer than {self.settings.timeout_s:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if gone := isinstance(cause, _NoConnection):
                cause = cause.__cause__
            if isinstance(cause, TimeoutError):
                raise _Refused(f"took longer than {self.settings.timeout_s:g} s", gone=gone) from None
            told = getattr(cause, "strerror", None) or type(cause).__name__
            raise _Refused(f"cannot be reached ({told})", gone=gone) from None
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise _Refused("answered with something that is no chat completion", odd=True) from None
        if not isinstance(reply, str):
            raise _Refused("answered without a text", odd=True)
        return reply.encode("utf-8", "replace").decode()  # half a character, as JSON can have it, could not be kept

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        """By the status alone: what the endpoint writes may have the key in it."""
        told = f"HTTP {error.code}"
        if error.code in TRY_AGAIN or error.code >= 500:
            after = str(error.headers.get("Retry-After", ""))
            return _Refused(f"answered with {told}", float(after) if after.isdecimal() else 0.0)
        if error.code in HOPELESS or error.code < 400:
            why = HOPELESS.get(error.code, "it sends elsewhere")
            fix = "check url, model and api_key_env"
            return MachineError(f"the endpoint answered with {told}: {why}", where=self._place(), fix=fix)
        return Failed(f"the endpoint refused the question with {told}")

    def _place(self) -> str:
        return place(self.where, self.settings)


def place(where: str, settings: ChatEndpoint) -> str:
    return f"{where} ({settings.url})"


def gone_for_now(what: str, where: str, fix: str = UP) -> MachineError:
    """Another attempt at the stage may find it up."""
    error = MachineError(what, where=where, fix=fix)
    error.retry = True
    return error


def _read(response: http.client.HTTPResponse) -> bytes:
    """All of it. Raises TimeoutError, _Refused if it has no end, or ends before it should."""
    parts: list[bytes] = []
    size, whole = 0, response.length or 0  # of a chunked reply the parts say where it ends
    try:
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                raise _Refused("sent more than a reply can have", odd=True)
    except (http.client.IncompleteRead, ConnectionError):
        raise _Refused("broke off in its reply") from None
    if size < whole:
        raise _Refused("broke off in its reply")
    return b"".join(parts)
