"""What becomes of rows that have a fault: a stop, a drop that is counted, or training on them as they are."""

from __future__ import annotations

from typing import Literal

from alignment.config.settings import Settings, identity

Unusable = Literal["error", "drop"]  # nothing can be trained on such a row
Action = Literal["error", "drop", "keep"]
Spelled = Literal["error", "drop", "neutralise"]  # neutralise: it is ordinary text to the model


class Checks(Settings):
    """Of each fault what it does to the row; the faults in words: FAULTS.

    near_threshold: Jaccard index; contamination_share: of a prompt's words; personal: None for no look; each None costs
    nothing, and nor does languages=False. max_dropped: share of a data set's rows.
    """

    malformed: Unusable = identity()
    unknown_format: Unusable = identity()
    unread: Action = identity()
    unwanted: Action = identity()
    template: Unusable = identity()
    no_answer: Unusable = identity()
    empty_answer: Unusable = identity()
    merged_prompt: Unusable = identity()
    no_pair: Unusable = identity()
    control_text: Spelled = identity()
    turn_order: Action = identity()
    empty_prompt: Action = identity()
    identical_sides: Action = identity()
    duplicate: Action = identity()
    contradiction: Action = identity()
    leak: Action = identity()
    heldout: Action = identity()
    near_duplicate: Action = identity()
    near_leak: Action = identity()
    near_threshold: float | None = identity(gt=0, le=1)
    contamination: Action = identity()
    contamination_share: float | None = identity(ge=0, lt=1)
    personal: Action | None = identity()
    languages: bool = identity()
    max_dropped: float = identity(ge=0, le=1)

    def idle(self) -> frozenset[str]:
        near = ("near_duplicate", "near_leak") if self.near_threshold is None else ()
        return frozenset({*near, *(("contamination",) if self.contamination_share is None else ())})


FAULTS = {
    "malformed": "is not what its format asks for",
    "unknown_format": "has no known format",
    "unread": "has a field that nothing reads",
    "unwanted": "is labelled as an answer that is not wanted",
    "template": "the chat template refuses or rewrites it",
    "no_answer": "has no answer at its end",
    "empty_answer": "has an empty answer",
    "merged_prompt": "the answer's first letters merge with the prompt's last token",
    "no_pair": "has no two answers whose scores are apart",
    "control_text": "spells out a control token",
    "turn_order": "the turns do not alternate user, assistant",
    "empty_prompt": "has an empty prompt",
    "identical_sides": "has the same answer on both sides",
    "duplicate": "stands in the data before",
    "contradiction": "says the opposite of a row before",
    "leak": "shares its first prompt with another split",
    "heldout": "its first prompt is held out for evaluation",
    "near_duplicate": "is nearly the same as a row before",
    "near_leak": "is nearly the same as a held-out row",
    "contamination": "shares n-grams with an evaluation prompt",
    "personal": "holds personal data or a secret",
    # over_long of the stage, not a setting of checks
    "long_prompt": "its prompt is longer than max_prompt_length",
    "long_row": "is longer than max_length",
    "truncated": "was too long: its prompt is cut from the left",
}
