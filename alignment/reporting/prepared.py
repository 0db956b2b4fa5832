"""What a prepare stage tells of its rows beside their numbers: faults they are kept with, languages, personal data, and
how much longer chosen answers are."""

from __future__ import annotations

from typing import Any

from alignment.reporting import words

Row = dict[str, Any]
NAMED = 5  # languages


def faults(counts: Row, examples: Any) -> list[Row]:
    """Reasons with their rows, the most frequent first, and where the first ones stand."""
    known = [row for row in examples or [] if isinstance(row, dict)]
    return [
        {"reason": reason, "count": words.count(count), "examples": [e for e in known if e.get("reason") == reason]}
        for reason, count in by_count(counts)
    ]


def by_count(counts: Row) -> list[tuple[str, float]]:
    return sorted(((name, count) for name, count in counts.items() if count), key=lambda item: (-item[1], item[0]))


def kept_with(told: Row) -> Row:
    """fault -> rows that are kept with it, of all data sets."""
    found: Row = {}
    for source in _sources(told):
        for fault, rows in (source.get("kept_with") or {}).items():
            found[fault] = found.get(fault, 0) + rows
    return found


def facts(told: Row) -> list[tuple[str, str]]:
    """(what, in words) of each data set, and of what evaluation prompts were compared."""
    sources, found = _sources(told), []
    for source in sources:
        of = f"{source.get('name')} · " if len(sources) > 1 else ""
        known = ("languages", _languages(source)), ("personal data", _counts(source.get("personal")))
        for name, text in (*known, ("longer answers", _bias(source.get("length_bias") or {}))):
            if text:
                found.append((of + name, text))
    if text := _counts(told.get("evaluation_prompts")):
        found.append(("evaluation prompts", text))
    return found


def _sources(told: Row) -> list[Row]:
    return [one for one in told.get("sources") or [] if isinstance(one, dict)]


def _languages(source: Row) -> str:
    ordered = by_count(source.get("languages") or {})
    whole = sum(count for _, count in ordered)
    more = [f"{len(ordered) - NAMED} more"] if len(ordered) > NAMED else []
    return ", ".join([f"{words.number(100 * count / whole, 1)} % {name}" for name, count in ordered[:NAMED]] + more)


def _counts(counts: Row | None) -> str:
    return ", ".join(f"{words.count(count)} {name.replace('_', ' ')}" for name, count in (counts or {}).items())


def _bias(bias: Row) -> str:
    if not bias:
        return ""
    share, chosen, rejected = (bias[name] for name in ("chosen_longer", "chosen_tokens", "rejected_tokens"))
    tokens = f"{words.number(chosen, 0)} against {words.number(rejected, 0)} tokens"
    return f"chosen longer in {words.number(100 * share, 0)} % of pairs ({tokens})"
