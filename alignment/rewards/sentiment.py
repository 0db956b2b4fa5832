"""sentiment: the compound score of the VADER lexicon (Hutto & Gilbert 2014) of the answer, in [-1, 1]."""

from __future__ import annotations

from alignment.errors import MachineError
from alignment.rewards.term import Term, each, worded


def sentiment(name: str) -> Term:
    """name: of the term. Raises MachineError if the package is missing."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        fix = "pip install 'alignment[sentiment]'"
        raise MachineError("the package vaderSentiment is missing", where=f"reward.terms.{name}", fix=fix) from None
    analyzer = SentimentIntensityAnalyzer()
    return worded(each(lambda answer: float(analyzer.polarity_scores(answer.text)["compound"])))
