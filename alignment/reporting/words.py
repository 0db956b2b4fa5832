"""How numbers, times and names read, the same in the terminal and in the report."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
NOTHING = "\N{EM DASH}"

ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|.)")  # of a terminal: colours, titles

BETWEEN = re.compile(
    "(The above exception was the direct cause of|During handling of the above exception)"
)  # tracebacks

ACRONYMS = {"sft": "SFT", "dpo": "DPO", "kto": "KTO", "grpo": "GRPO", "rloo": "RLOO", "ppo": "PPO"}
DONE = ("done", "reused")
SHOWN = {"loss": "last loss", "reward": "reward", "reward_mean": "reward", "stop_rate": "stop rate", "rows": "rows"}
SHOWN |= {"train": "train", "pairs": "pairs", "dropped": "dropped", "computed": "computed"}
SHOWN |= {"reference_computed": "reference log-probs computed"}
SHOWN |= {"kl_answer": "KL to the start", "no_signal": "without signal"}
SHOWN |= {"accuracy": "accuracy", "ece": "ECE", "spearman": "rank correlation", "tensors": "tensors"}
BETTER = {
    "better": "Better",
    "worse": "Worse",
    "broken": "Broken",
    "no measurable difference": "No measurable difference",
}


@dataclass(frozen=True)
class Metric:
    """title: how people call it. unit: of its numbers. percent: the number is a share of 1, shown as a percentage."""

    title: str
    unit: str
    percent: bool = False
    digits: int = 3


METRICS = {
    "reward": Metric("Reward", "weighted sum of its terms"),
    "sentiment": Metric("Sentiment", f"{MINUS}1 to 1"),
    "relevance": Metric("Relevance", f"{MINUS}1 to 1"),
    "stop_rate": Metric("Stop rate", "answers that end by themselves", percent=True),
    "tokens": Metric("Answer length", "tokens", digits=1),
    "repetition": Metric("Repetition", "of its three-word sequences", percent=True),
    "kl": Metric("Log-ratio to ref.", "nats per answer", digits=2),
    "heldout_nll": Metric("Held-out loss", "nats per token"),
}


def metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(name.replace("_", " ").capitalize(), "")


def label(name: str) -> str:
    """sft -> SFT, start -> start: a model or node name as it is shown."""
    return "_".join(ACRONYMS.get(part, part) for part in name.split("_"))


def with_acronyms(text: str) -> str:
    """A sentence that names models: "dpo is better than start" -> "DPO is better than start"."""
    return " ".join(ACRONYMS.get(word, word) for word in text.split(" "))


def of_prompts(row: dict[str, Any], asked: Any) -> str:
    """of 15 of 20 prompts: a row of the verdict's table where not all have a value of every model; else empty."""
    known = finite(row.get("prompts"))
    return f"of {count(known)} of {count(asked)} prompts" if known is not None and known != finite(asked) else ""


def finite(value: Any) -> float | None:
    """The value as a float, or None if it is no finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any, digits: int = 3, *, sign: bool = False) -> str:
    """A number with a true minus; very small and very large ones in scientific notation; a dash for no number."""
    given = finite(value)
    if given is None:
        return NOTHING
    if not given:
        return "0"
    plus = "+" if sign else ""
    if not 1e-3 <= abs(given) < 1e6:
        text = f"{given:{plus}.{max(digits - 1, 0)}e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
        return text.replace("-", MINUS)
    return _rounded(given, digits, plus)


def _rounded(value: float, digits: int, plus: str) -> str:
    """Fixed decimals; what rounds to zero has no sign."""
    text = f"{value:{plus},.{digits}f}"
    return (text if any(c in "123456789" for c in text) else text.lstrip("-+")).replace("-", MINUS)


def metric_value(name: str, value: Any, *, sign: bool = False) -> str:
    """A value of that metric in its own unit: shares as percentages, lengths with one decimal."""
    kind, given = metric(name), finite(value)
    if given is None:
        return NOTHING
    if kind.percent:
        unit = " pts" if sign else " %"
        return _rounded(100 * given, 1, "+" if sign else "") + unit
    return _rounded(given, kind.digits, "+" if sign else "")


def interval(name: str, value: dict[str, Any], *, sign: bool = False) -> str:
    """[low, high] of {"mean", "low", "high"}; empty without both ends."""
    low, high = finite(value.get("low")), finite(value.get("high"))
    if low is None or high is None:
        return ""
    ends = [metric_value(name, end, sign=sign).removesuffix(" %").removesuffix(" pts") for end in (low, high)]
    return f"[{ends[0]}, {ends[1]}]"


def excludes_zero(value: dict[str, Any]) -> bool:
    low, high = finite(value.get("low")), finite(value.get("high"))
    return low is not None and high is not None and (low > 0 or high < 0)


def change_class(difference: dict[str, Any], higher_is_better: bool | None) -> str:
    """good | bad | moved (excludes 0, neither good nor bad) | same (0 lies inside the interval)."""
    if not excludes_zero(difference):
        return "same"
    if higher_is_better is None:
        return "moved"
    return "good" if (difference["low"] > 0) == higher_is_better else "bad"


def duration(seconds: Any) -> str:
    """12.3 s, 4 min 05 s, 2 h 03 min, 3 d 04 h."""
    given = finite(seconds)
    if given is None:
        return NOTHING
    if given < 59.95:
        return f"{given:.1f} s"
    whole = round(given)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def clock(seconds: Any) -> str:
    """0:07, 12:05, 1:02:05: for columns that tick."""
    given = finite(seconds)
    if given is None:
        return "-:--"
    whole = max(0, round(given))
    hours = f"{whole // 3600}:" if whole >= 3600 else ""
    return f"{hours}{whole % 3600 // 60:0{2 if hours else 1}d}:{whole % 60:02d}"


def moment(value: Any) -> str:
    """Unix seconds or an ISO text -> 2026-11-23 01:12 UTC; another text stays as it is."""
    if not value or not isinstance(value, (str, int, float)):
        return NOTHING
    try:
        when = datetime.fromisoformat(value) if isinstance(value, str) else datetime.fromtimestamp(value, UTC)
        when = when.astimezone(UTC) if when.tzinfo else when.replace(tzinfo=UTC)
        return when.strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return str(value)


def size(count: Any) -> str:
    """Bytes -> 269 MB (powers of ten)."""
    given = finite(count)
    if given is None:
        return NOTHING
    for unit in ("B", "kB", "MB", "GB"):
        if given < 1000:
            return f"{given:.0f} {unit}" if given >= 10 or unit == "B" else f"{given:.1f} {unit}"
        given /= 1000
    return f"{given:.1f} TB"


def count(value: Any) -> str:
    """51.0 -> 51: a count, whatever type carried it; other numbers to three decimals."""
    given = finite(value)
    return number(given, 0 if given is not None and given.is_integer() and abs(given) >= 1 else 3)


def listed(names: Sequence[str], most: int) -> str:
    """a, b and 3 more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def plain_lines(text: str) -> list[str]:
    """Lines as a terminal would show them in the end: without colours, and of a line that was written over and over, as
    progress bars are, the last state. Empty ones are left out."""
    lines = (ESCAPE.sub("", line).rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    plain = ("".join(c for c in line.expandtabs(4) if c.isprintable()).rstrip() for line in lines)
    return [line for line in plain if line]


def without_tracebacks(lines: Sequence[str], known: str = "") -> list[str]:
    """known: the text of one of them, whose message may be of several lines, and whose beginning may not be there."""
    told, kept, inside = set(plain_lines(known)), [], False
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            inside = True
        elif inside:
            inside = line.startswith(" ")  # the message is the first line that is not indented
        elif line not in told and not BETWEEN.match(line):
            kept.append(line)
    return kept


def error_text(error: Any) -> str | None:
    """The one line of an error, given as a text or as {"code", "message"}."""
    if isinstance(error, dict):
        error = error.get("message") or error.get("what")
    return " ".join(str(error).split()) if error else None


def main_facts(facts: dict[str, Any], most: int = 4) -> str:
    """The few summary metrics of a stage that a person wants on its line."""
    online = {"loss"} if "answer_tokens" in facts else set()  # which says nothing there (docs/online.md)
    known = [(name, finite(facts.get(name))) for name in SHOWN if name not in online]
    no_news = {"reference_computed": 0.0}  # they were in the store, perhaps since this stage's last attempt
    shown = SHOWN | ({"accuracy": "last accuracy"} if "loss" in facts else {})  # of the last step
    texts = [f"{shown[name]} {value:.4g}" for name, value in known if value is not None and value != no_news.get(name)]
    failed = finite(facts.get("reward_failed"))
    return "  ".join(texts[:most] + ([f"{count(failed)} answers without a reward"] if failed else []))
