"""Pieces of a row -> messages: {"role": "system" | "user" | "assistant" | "tool", "content": text}.

An assistant's message may have `reasoning_content`, what it thinks before it answers, and `tool_calls`, each {"type":
"function", "function": {"name", "arguments": an object}}; that of a tool its `name` and `tool_call_id`. What functions
there are to call, `tools`, stands in the first message, so that a conversation is whole wherever it goes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from alignment.data.sources import Row, type_name
from alignment.errors import InputError

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
SHAREGPT_ROLES |= {"function_call": "assistant", "observation": "tool", "tool": "tool"}
BESIDE = ("name", "tool_call_id")  # of a tool's turn, kept as they are
REASONING = (
    "reasoning_content"  # of DeepSeek, Qwen 3, vLLM; `reasoning` of OpenRouter, `thinking` of gpt-oss mean it, too
)
THOUGHTS = (REASONING, "reasoning", "thinking")
READ = {*THOUGHTS, "tools", "tool_calls", "function_call", "weight", *BESIDE, "id"}  # beside a role and a text
HOLDERS = ("messages", "conversations", "prompt", "instruction", "completion", "chosen", "rejected")  # of turns
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
CALL = 'a call is {"function": {"name": ..., "arguments": {...}}}'


def message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def text(row: Row, key: str, *, optional: bool = False) -> str:
    """Raises InputError."""
    value = row.value.get(key)
    if value is None and optional:
        return ""
    if key not in row.value:
        raise InputError(f"has no {key!r}", where=row.where, fix=f"keys found: {', '.join(row.value)}")
    if not isinstance(value, str):
        raise InputError(f"{key!r} must be text, is {type_name(value)}", where=row.where)
    return value


def turns(row: Row, key: str, role: str) -> list[Message]:
    """A text (said by `role`), one message, or a list of messages. Raises InputError."""
    value = row.value.get(key)
    if isinstance(value, dict):
        return [_turn(value, f"{key!r}", row)]
    return messages(row, key) if isinstance(value, list) else [message(role, text(row, key))]


def messages(row: Row, key: str) -> list[Message]:
    """Raises InputError."""
    value = row.value.get(key)
    if key not in row.value:
        raise InputError(f"has no {key!r}", where=row.where, fix=f"keys found: {', '.join(row.value)}")
    if isinstance(value, str) and value.lstrip().startswith("["):  # as CSV has lists
        value = _parsed(value)
    if not isinstance(value, list):
        fix = 'such as [{"role": "user", "content": "..."}, ...], in CSV as text'
        raise InputError(f"{key!r} must be a list of messages, is {type_name(value)}", where=row.where, fix=fix)
    if not value:
        raise InputError(f"{key!r} holds no messages", where=row.where)
    return [_turn(turn, f"{key}[{number}]", row) for number, turn in enumerate(value)]


def with_system(row: Row, said: list[Message]) -> list[Message]:
    """After the row's own `system` turn, and with the row's `tools` in the first one. Raises InputError."""
    system = text(row, "system", optional=True)
    if any("tools" in turn for turn in said[1:]):
        raise InputError("'tools' stand in a later message", where=row.where, fix="of the row, or of its first message")
    first = dict(said[0])
    tools = first.pop("tools", None) if row.value.get("tools") is None else row.value["tools"]
    said = [*([message("system", system)] if system else []), first, *said[1:]]
    tools = _parsed(tools) if isinstance(tools, str) else tools
    if tools is None or tools == []:
        return said
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        what = f"'tools' must be a list of functions (JSON schema), is {type_name(tools)}"
        raise InputError(what, where=row.where)
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    for number, tool in enumerate(tools):
        if not isinstance(tool["function"], dict) or not isinstance(tool["function"].get("name"), str):
            raise InputError(f"tools[{number}] has no function with a name", where=row.where)
    return [{**said[0], "tools": tools}, *said[1:]]


def dialogue(row: Row, key: str) -> list[Message] | None:
    """A text that is a whole conversation, as Anthropic's HH-RLHF has it: "\n\nHuman: ...\n\nAssistant: ...". None if
    it is none."""
    value = row.value.get(key)
    if not isinstance(value, str) or not re.match(r"\s*Human:", value):
        return None
    parts = re.split(r"(?:^\s*|\n\n)(Human|Assistant):", value)[1:]
    said = zip(parts[::2], parts[1::2], strict=True)
    return [message(SPEAKERS[speaker], words.strip()) for speaker, words in said]


def answers_of(messages: list[Message]) -> list[int]:
    """Which of them answer something: the assistant's, but for one that begins the conversation, a greeting."""
    return [number for number, turn in enumerate(messages) if number and turn["role"] == "assistant"]


def words(turn: Message, *but: str) -> Iterator[str]:
    """All texts of a message but what stands under these keys: its content and reasoning, names and arguments of calls,
    descriptions of tools."""
    for key, value in turn.items():
        if key not in ("role", *but):
            yield from _texts(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(inner)


def said(turn: Message) -> str:
    """All that a message says, its content, its reasoning and what it calls: equal for equal messages."""
    beside = {key: turn[key] for key in (REASONING, "tools", "tool_calls", *BESIDE) if key in turn}
    return turn["content"] + (json.dumps(beside, sort_keys=True) if beside else "")


def unread(row: Row) -> str:
    """The first fields of a turn that hold something and that nothing here reads, in words; "" if there are none."""
    if beside := [repr(key) for key in _held(row.value) if key in THOUGHTS]:
        return f"the row has {', '.join(beside)} beside its turns"
    for holder in HOLDERS:
        for number, turn in enumerate(_listed(row.value.get(holder))):
            keys = _held(turn)
            known = READ | ({"from", "value"} if "from" in keys else {"role", "content"})
            if odd := [repr(key) for key in keys if key not in known]:
                return f"{holder}[{number}] has {', '.join(odd)}"
    for number, answer in enumerate(_listed(row.value.get("completions"))):  # what else they have speaks of them
        if odd := [repr(key) for key in _held(answer) if key in THOUGHTS]:
            return f"completions[{number}] has {', '.join(odd)}"
    return ""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _held(turn: Any) -> list[str]:
    """Keys under which there is something."""
    return [key for key, value in turn.items() if value not in (None, "", [], {})] if isinstance(turn, dict) else []


def _turn(turn: Any, name: str, row: Row) -> Message:
    """{"role", "content"} or ShareGPT's {"from", "value"}."""
    if not isinstance(turn, dict):
        raise InputError(f"{name} must be an object, is {type_name(turn)}", where=row.where)
    role_key, text_key = ("from", "value") if "from" in turn else ("role", "content")
    role, content = turn.get(role_key), turn.get(text_key)
    known = SHAREGPT_ROLES if role_key == "from" else dict(zip(ROLES, ROLES, strict=True))
    if not isinstance(role, str) or role not in known:
        raise InputError(f"{name}.{role_key} is {role!r}", where=row.where, fix=f"known: {', '.join(known)}")
    if role_key == "from" and role == "function_call":
        call = _call(_parsed(content) if isinstance(content, str) else content, f"{name}.value", row)
        return {**message("assistant", ""), **_reasoning(turn, "assistant", name, row), "tool_calls": [call]}
    if turn.get("function_call"):
        raise InputError(f"{name}.function_call is not supported", where=row.where, fix="write it as tool_calls")
    made = message(known[role], _content(content, f"{name}.{text_key}", row, optional=bool(turn.get("tool_calls"))))
    made |= _reasoning(turn, made["role"], name, row)
    if calls := turn.get("tool_calls"):
        if made["role"] != "assistant" or not isinstance(calls, list):
            raise InputError(f"{name}.tool_calls must be a list, in a turn of the assistant", where=row.where)
        made["tool_calls"] = [_call(call, f"{name}.tool_calls[{n}]", row) for n, call in enumerate(calls)]
    if (weight := turn.get("weight")) is not None:  # OpenAI's: whether an answer is trained on
        if made["role"] != "assistant" or isinstance(weight, bool) or weight not in (0, 1):
            raise InputError(f"{name}.weight must be 0 or 1, in a turn of the assistant", where=row.where)
        made |= {"weight": 0} if weight == 0 else {}
    if turn.get("tools") is not None:
        made["tools"] = turn["tools"]  # see with_system
    if made["role"] == "tool":
        made |= {key: turn[key] for key in BESIDE if isinstance(turn.get(key), str)}
    return made


def _reasoning(turn: dict[str, Any], role: str, name: str, row: Row) -> Message:
    """What is thought before an answer, under the one name that it has here."""
    given = {key: turn[key] for key in THOUGHTS if turn.get(key) not in (None, "")}
    for key, value in given.items():
        if not isinstance(value, str) or role != "assistant":
            what = f"{name}.{key} must be text in a turn of the assistant, is {type_name(value)} in one of the {role}"
            raise InputError(what, where=row.where)
    if len(set(given.values())) > 1:
        raise InputError(f"{name} has {' and '.join(given)} that differ", where=row.where, fix="keep one")
    value = next(iter(given.values()), "")
    return {REASONING: value} if value.strip() else {}


def _content(value: Any, name: str, row: Row, *, optional: bool) -> str:
    """A text, or OpenAI's list of parts that are texts."""
    if value is None and optional:
        return ""
    if isinstance(value, list) and value and all(isinstance(part, dict) for part in value):
        for part in value:
            if not isinstance(part.get("text"), str):
                what = f"{name} has a part of the type {part.get('type')!r} without text: only text can be trained on"
                raise InputError(what, where=row.where)
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise InputError(f"{name} must be text, is {type_name(value)}", where=row.where)
    return value


def _call(call: Any, name: str, row: Row) -> dict[str, Any]:
    """Of OpenAI, or the function alone. Arguments that are JSON in a text become the object: templates write them."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(f"{name} is no call of a function", where=row.where, fix=CALL)
    given = function.get("arguments", {})
    arguments = _parsed(given) if isinstance(given, str) else given
    if not isinstance(arguments, dict):
        found = "text that is no such object in JSON" if isinstance(given, str) else type_name(given)
        raise InputError(f"{name}: arguments must be an object, is {found}", where=row.where, fix=CALL)
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _parsed(value: str) -> Any:
    """What a text says as JSON, itself if it says nothing."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
