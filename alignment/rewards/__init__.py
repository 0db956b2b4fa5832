"""What an answer is worth: a weighted sum of terms, each of a kind that is chosen by name (docs/rewards.md)."""

from alignment.rewards.judge import Judge
from alignment.rewards.relevance import Encoder

__all__ = ["Encoder", "Judge"]
