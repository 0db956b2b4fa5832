"""The reward of the configuration: terms by kind, each normalised and weighted; a failure is told, not guessed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config import reward_terms as kinds
from alignment.config.reward_terms import Clip, Normalise, Sigmoid, ZScore
from alignment.config.rewards import LARGEST, Reward
from alignment.errors import InputError
from alignment.rewards import rules
from alignment.rewards.answer import answer
from alignment.rewards.chat_client import AT_LAST, gone_for_now, place
from alignment.rewards.comparison import Comparer
from alignment.rewards.endpoint import endpoint
from alignment.rewards.instructions import instructions
from alignment.rewards.python import python
from alignment.rewards.relevance import relevance
from alignment.rewards.sentiment import sentiment
from alignment.rewards.term import Answer, Failed, Row, Term, Value

Score = dict[str, Any]


@dataclass(frozen=True)
class Means:
    """What a term may need beside its settings. alive: to be called when a part of a long work is done.

    shared: a folder for what outlives this process; None: nothing does.
    """

    name: str
    folders: Sequence[Path]
    alive: Callable[[], None]
    shared: Path | None
    code: Mapping[Path, bytes]


class Judge:
    """Scores answers by a reward of the configuration. Holds models, but no state: a score depends on row and answer
    alone. Each process has its own.

    folders: term -> folders of its models, in the order of `sources()`, or `reads()`, of its settings. alive: called
    now and then while it scores, so that who watches over the process sees that it gets on. shared: a folder in which
    what was answered by endpoints is kept. code: files that were read already.
    compare: (rows, first, second) -> which answers are better; None where the reward has no comparison.
    reward: as much of it as is asked (`Reward.read`).
    """

    def __init__(
        self,
        reward: Reward,
        folders: Mapping[str, Sequence[Path]],
        alive: Callable[[], None] = lambda: None,
        shared: Path | None = None,
        code: Mapping[Path, bytes] | None = None,
    ):
        self.reward = reward
        self.compare = Comparer(reward.comparison, alive, shared) if reward.comparison is not None else None
        means = {name: Means(name, folders.get(name, ()), alive, shared, code or {}) for name in reward.terms}
        self._unscaled = {n for n, t in reward.terms.items() if isinstance(t, kinds.Relevance) and t.normalise}
        self._watched = {name for name, term in reward.terms.items() if not term.weight}
        self.terms = {name: MAKERS[type(term)](term, means[name]) for name, term in reward.terms.items()}

    def score(self, rows: Sequence[Row], answers: Sequence[str], tokens: Sequence[int] | None = None) -> list[Score]:
        """One {"reward": float, "terms": {name: float}} an answer, in their order.

        answers[i] answers rows[i], which has `prompt` (messages) and what else its terms read: `reference`, `checks`.
        tokens: lengths of the answers, end-of-turn token included. terms: normalised, before their weights.
        Of relevance that is normalised "unscaled": {name: float} has the cosine: its limit in a comparison is one.
        Where a term fails its value is None, the reward too if the term weighs anything, and "failed": {name: why}
        stands beside them.
        """
        lengths: Sequence[int | None] = tokens if tokens is not None else [None] * len(answers)
        given = [Answer(row, text, length) for row, text, length in zip(rows, answers, lengths, strict=True)]
        found = {name: term(given) for name, term in self.terms.items()}
        columns = {name: self._scaled(name, column) for name, column in found.items()}
        scores = [self._sum({name: column[i] for name, column in columns.items()}) for i in range(len(given))]
        for name in self._unscaled:
            for score, value in zip(scores, found[name], strict=True):
                score.setdefault("unscaled", {})[name] = None if score["terms"][name] is None else value
        return scores

    def _scaled(self, name: str, column: Sequence[Value]) -> list[Value]:
        scale = scaling(self.reward.terms[name].normalise)
        return [value if isinstance(value, Failed) else _finite(value, scale) for value in column]

    def _sum(self, values: Mapping[str, Value]) -> Score:
        failed = {name: str(value) for name, value in values.items() if isinstance(value, Failed)}
        terms = {name: None if isinstance(value, Failed) else value for name, value in values.items()}
        told: Score = {"reward": None, "terms": terms, **({"failed": failed} if failed else {})}
        if not failed.keys() <= self._watched:
            return told
        weighted = {name: self.reward.terms[name].weight * value for name, value in terms.items() if value is not None}
        total = sum(weighted.values(), 0.0)
        if why := _beyond(total):
            largest = max(weighted, key=lambda name: abs(weighted[name]))
            return {**told, "failed": {**failed, largest: f"with its weight the reward is {why}"}}
        return {**told, "reward": total}

    def failures(self, scores: Sequence[Score]) -> int:
        """How many answers have no reward. Raises InputError if their share is above `reward.max_failed_share`."""
        failed = [score["failed"] for score in scores if score["reward"] is None]
        self.check_share(failed, len(failed), len(scores))
        return len(failed)

    def failed_comparisons(self, failed: Sequence[Mapping[str, str]], compared: int) -> int:
        """How many of those that were compared failed, each with {name: why}. Raises InputError as above."""
        self.check_share(failed, len(failed), compared, "comparisons failed")
        return len(failed)

    def check_share(
        self, failed: Sequence[Mapping[str, str]], without: int, count: int, what: str = "answers have no reward"
    ) -> None:
        """Raises InputError if so many of `count` are more than `reward.max_failed_share`, and some of them are new;
        MachineError, for another attempt at the stage, if they are not without those that an endpoint gave no reply to.

        failed: of these why, {name of a term: why}; `without` may be more, of earlier rollouts.
        """
        limit = self.reward.max_failed_share
        if not failed or without <= limit * count:
            return
        counted = [{name: why for name, why in one.items() if name not in self._watched} for one in failed]
        unheard = [one for one in counted if one and all(why.endswith(AT_LAST) for why in one.values())]
        for_now = without - len(unheard) <= limit * count
        reasons = Counter(reason for one in (unheard if for_now else counted) for reason in one.items())
        ((name, why), times), more = reasons.most_common(1)[0], len(reasons) - 1
        others = f", beside {more} other reason{'s' * (more > 1)}" if more else ""
        newest = " among those sampled last" if len(failed) < without else ""
        told = f"{without} of {count} {what}: {why} ({times} times{newest}{others})"
        part, where = ("comparison", "reward.comparison") if self.compare else ("term", f"reward.terms.{name}")
        asked = self.reward.comparison if self.compare else self.reward.terms[name]
        if for_now and isinstance(asked, kinds.ChatEndpoint):
            raise gone_for_now(told, place(where, asked))
        raise InputError(told, where=where, fix=f"mend the {part}, or raise reward.max_failed_share, {limit:g}")


MAKERS: dict[type[kinds.Term], Callable[[Any, Means], Term]] = {
    kinds.Sentiment: lambda term, means: sentiment(means.name),
    # config/checks.py refuses one without a source
    kinds.Relevance: lambda term, means: relevance(means.folders[0], means.alive),
    kinds.Length: lambda term, means: rules.length(term),
    kinds.Format: lambda term, means: rules.form(term),
    kinds.Regex: lambda term, means: rules.regex(term),
    kinds.Repetition: lambda term, means: rules.repetition(term),
    kinds.Language: lambda term, means: rules.language(term),
    kinds.Instructions: lambda term, means: instructions(term),
    kinds.Answer: lambda term, means: answer(term),
    kinds.Model: lambda term, means: _model(term, means),
    kinds.Python: lambda term, means: python(term, means.name, means.alive, means.code),
    kinds.Endpoint: lambda term, means: endpoint(term, means.name, means.alive, means.shared),
}


def _model(term: kinds.Model, means: Means) -> Term:
    from alignment.rewards.model import model  # with transformers, which a reward of rules does without

    return model(term, means.folders, means.alive)


def scaling(normalise: Normalise | None) -> Callable[[float], float]:
    """A fixed transform: values of two models, or of two steps, stay comparable."""
    if isinstance(normalise, Clip):
        return lambda value: min(max(value, normalise.low), normalise.high)
    if isinstance(normalise, Sigmoid):
        return lambda value: 0.5 * (1.0 + math.tanh(0.5 * value))  # 1 / (1 + e^-x), without overflow
    if isinstance(normalise, ZScore):
        return lambda value: (value - normalise.mean) / normalise.std
    return lambda value: value


def _finite(value: float, scale: Callable[[float], float]) -> Value:
    """The value scaled; one that is no number stays none, even where a scale would make it one."""
    scaled = scale(value) if math.isfinite(value) else value
    why = _beyond(scaled)
    return Failed(f"its value is {why}") if why else scaled


def _beyond(value: float) -> str:
    """What it is, where it is no number that can be trained on; else empty."""
    if abs(value) <= LARGEST:
        return ""
    return f"{value:g}, more than {LARGEST:g} in size" if math.isfinite(value) else str(value)
