"""Questions about the schema's shape: what a place is called, which keys it knows, which side each key is on."""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


def locate(root: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[str, Any]:
    """Pydantic's error location -> (dotted key as a person writes it, the class or dict type that owns its last part).

    Pydantic puts the tag of a discriminated union into the location; a person does not write it.
    """
    place: Any = root
    owner: Any = root
    parts: list[str] = []
    for step in loc:
        members = _members(place)
        if len(members) > 1:
            place = next((m for m in members if step in _tags(m)), members[0])
            owner = place
            continue
        place = members[0]
        owner = place
        parts.append(str(step))
        place = _child(place, step)
    return ".".join(parts), owner


def keys(owner: Any) -> list[str]:
    """Keys that the class knows; none for an open dict."""
    return list(owner.model_fields) if _is_model(owner) else []


def known_near(root: type[BaseModel], key: str) -> tuple[str, list[str]]:
    """The key and the keys known where it was written (over all members of a union)."""
    places: list[Any] = [root]
    for step in key.split(".")[:-1]:
        places = [_child(m, step) for place in places for m in _members(place)]
        places = [place for place in places if place is not None]
    known = {name for place in places for member in _members(place) for name in keys(member)}
    return key, sorted(known)


def is_open(root: type[BaseModel], key: str) -> bool:
    """Whether the place is a mapping with keys of anybody's choice, or lies in one that holds what it does not know."""
    return any(get_origin(member) is dict or member is Any for member in types(root, key))


def types(root: type[BaseModel], key: str) -> list[Any]:
    """What a value there may be (over all members of a union); empty for a key that is not known."""
    places: list[Any] = [root]
    for step in key.split("."):
        places = [_child(member, step) for place in places for member in _members(place)]
        places = [place for place in places if place is not None]
    return [member for place in places for member in _members(place)]


def leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf below a validated value."""
    if isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from leaves(getattr(value, name), f"{key}.{name}")
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, f"{key}.{name}")
    else:
        yield key, value


def side(field: FieldInfo) -> str | None:
    """'identity' or 'execution', as declared where the key is defined."""
    extra = field.json_schema_extra
    return str(extra["side"]) if isinstance(extra, dict) and "side" in extra else None


def of_side(which: str, settings: type[BaseModel]) -> tuple[str, ...]:
    """Names of the fields that are of one side, in order."""
    return tuple(name for name, field in settings.model_fields.items() if side(field) == which)


def _is_model(place: Any) -> bool:
    return isinstance(place, type) and issubclass(place, BaseModel)


def _members(annotation: Any) -> list[Any]:
    """The alternatives of a type, None left out, Annotated unwrapped."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [m for a in get_args(annotation) if a is not type(None) for m in _members(a)]
    return [annotation]


def _tags(member: Any) -> tuple[Any, ...]:
    if not _is_model(member) or "kind" not in member.model_fields:
        return ()
    return get_args(member.model_fields["kind"].annotation)


def _child(place: Any, step: int | str) -> Any:
    if _is_model(place):
        field = place.model_fields.get(str(step))
        return field.annotation if field else None
    if get_origin(place) is dict:
        return get_args(place)[1]
    if get_origin(place) is list:
        return get_args(place)[0]
    return None
