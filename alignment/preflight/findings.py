"""What a look before a run finds, as lines for who shows them; and what its parts hand on to each other."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from alignment.data.chat import Chat
from alignment.errors import AlignmentError, unusable
from alignment.estimating.seen import Lengths
from alignment.estimating.windows import Prompts


class Start(NamedTuple):
    """The start model. config: of transformers; None if it has none. window: in tokens; None where it has no limit."""

    chat: Chat
    config: Any
    window: int | None


class Looked(NamedTuple):
    """At the rows of a node that prepares them."""

    lengths: Lengths
    prompts: Prompts
    heldout: Mapping[str, list[Any]] = MappingProxyType({})  # where a prompt for evaluation stands -> the prompt


def tell(check: str, state: str, what: str, **more: Any) -> None:
    print(json.dumps({"check": check, "state": state, "what": what, **more}), flush=True)


@contextmanager
def told(check: str, guess: bool = False, folder: Path | None = None) -> Iterator[None]:
    """What goes wrong in here is a finding; what is inside depends on it, and is left out. guess: of an estimate, whose
    own errors stop no run. folder: which is written to, for errors that name no file."""
    try:
        yield
    except AlignmentError as error:
        tell(check, "failed", error.what, where=error.where, fix=error.fix, code=error.exit_code)
    except OSError as error:
        told = unusable(error)
        where = told.where or (str(folder) if folder else None)
        tell(check, "failed", told.what, where=where, fix=told.fix, code=told.exit_code)
    except Exception as error:
        if not guess:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        tell(check, "note", f"is not estimated: {type(error).__name__}: {first}")
