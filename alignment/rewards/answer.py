"""answer: whether what an answer comes to is what is expected: `expected` of its row, else the row's own answer."""

from __future__ import annotations

import math
import re
import unicodedata

from alignment.config.reward_terms import Answer as Settings
from alignment.rewards.term import Answer, Failed, Term, each

GAP = r"[ \u00a0\u2009\u202f]"  # no-break, thin and narrow no-break spaces, too
WHOLE = rf"(?:[1-9]\d{{0,2}}(?:{GAP}\d{{3}})+(?!\d)|\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)"
BEFORE = r"[-+−]?[$€£]?"
NUMBER = rf"{BEFORE}(?:{WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?"
MIXED = rf"({BEFORE}{WHOLE}){GAP}+(?=\d{{1,2}}\s*/\s*\d)"  # 4 of 4 1/2; of three digits they are thousands
FRACTION = re.compile(rf"(?<![\w.])(?:{MIXED})?({NUMBER})(?:\s*/\s*({NUMBER}))?")
LATEX = re.compile(r"\\[dt]?frac *(?:\{([^{}]*)\}|(\d)) *(?:\{([^{}]*)\}|(\d))")
# Inside of a number, 10,\!000 or 10{,}000, or behind it.
SPACES = re.compile(r"\\[!,]|(?<=\d)\{(?=,\})|(?<=,)\}(?=\d)|\^ *\{? *\\circ *\}?")
OF_UNIT = re.compile(r"(?<=[A-Za-z}])[\^_] *(?:\{ *[-−]?\d+ *\}|[-−]?\d)")  # of cm^2
TIMES = r"(?:[x×*·]|\\times|\\cdot)"
POWER = re.compile(rf"(?<=\d) *{TIMES} *10 *\^ *(?:\{{ *([-+−]?\d+) *\}}|([-+−]?\d+))")
# A number of an expression that is not worked out: its last number is not what it comes to.
BEFORE_IT = re.compile(rf"(?:[\^_√]|\\sqrt *(?:\[\d*\])?) *\{{? *$|\d *{TIMES} *$|\}} *\{{ *$|(?:\\pi|[π)}}]) */ *$")
BEHIND_IT = re.compile(r" *\}? *(?:\\sqrt|\\pi\b|[√π^⁰¹²³⁴⁵⁶⁷⁸⁹⁻])")
AFTER_DIGIT = re.compile(r"(?<=\d) *(?=\\[dt]?frac *[\d{])")  # 4\frac{1}{2} is 4 1/2
MARK = re.compile(r"####\s*(\S.*)")  # of GSM8K (Cobbe et al. 2021, arXiv:2110.14168)
BOXED = r"\boxed{"  # of MATH (Hendrycks et al. 2021, arXiv:2103.03874)


def answer(settings: Settings) -> Term:
    """1 where both say the same, else 0, also for one in which nothing is found. Fails where nothing is expected."""

    def value(given: Answer) -> float:
        expected = given.row.get("expected", given.row.get("reference"))
        if expected is None:
            raise Failed("its row expects nothing: it has neither `expected` nor `reference`")
        said, wanted = found(given.text, settings.find), found(str(expected), "auto")
        if settings.compare == "text":
            return float(said is not None and plain(said) == plain(wanted or ""))
        target = number(wanted or "")
        if target is None:
            raise Failed(f"its row expects no number, but {str(expected)!r}")
        mine = number(said or "")
        return float(mine is not None and math.isclose(mine, target, rel_tol=0.0, abs_tol=settings.tolerance))

    return each(value)


def found(text: str, how: str) -> str | None:
    """What the text comes to, None if it does not say. auto: what is boxed, else what is marked, else all of it."""
    if how == "whole":
        return text
    if how == "boxed":
        return boxed(text)
    if how == "marked":
        marked = MARK.findall(text)
        return marked[-1] if marked else None
    return next((said for said in (boxed(text), found(text, "marked")) if said is not None), text)


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...}, with the braces in it; None if there is none, or it has no end."""
    start = text.rfind(BOXED)
    depth = 1
    for end in range(start + len(BOXED), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start + len(BOXED) : end]
    return None


def plain(text: str) -> str:
    """For comparing: without regard to case, compatible characters, white space, and quotes and end marks around it."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(" .!?\"'`*$")


def number(text: str) -> float | None:
    r"""The last number, fraction or mixed number of a text; None if there is none that is finite, or it is a part of a
    root, a power or a product, as in 2\sqrt{5}: their last number is not what they come to.

    1,234.5, 1 234.5 and 10,\!000 are one number each, as in English, and so are 3 \times 10^8 and 4 1/2, if the
    fraction is below 1.
    """
    text = OF_UNIT.sub("", SPACES.sub("", text))
    text = POWER.sub(lambda power: f"e{(power[1] or power[2]).replace('−', '-')}", text)
    text = LATEX.sub(lambda parts: f"{parts[1] or parts[2]}/{parts[3] or parts[4]}", AFTER_DIGIT.sub(" ", text))
    *_, written = (None, *FRACTION.finditer(text))
    if (
        written is None
        or BEFORE_IT.search(text[max(0, written.start() - 40) : written.start()])
        or BEHIND_IT.match(text[written.end() :])
    ):
        return None
    parts = (part or "" for part in written.groups())
    whole, above, below = (re.sub(r"[,$€£+\s]", "", part).replace("−", "-") for part in parts)
    share = float(above) / float(below or 1) if float(below or 1) else math.inf
    if whole and share < 1:
        share = float(whole) + math.copysign(share, -1 if whole.startswith("-") else 1)
    return share if math.isfinite(share) else None
