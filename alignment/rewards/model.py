"""model: what trained reward models say of prompt and answer: any number, of which differences alone have a meaning.

Several are an ensemble. Where they disagree a policy has more likely found their faults than a better answer, so doubt
costs (Coste et al. 2023, arXiv:2310.02743; there the variance, here its root, which has the unit of a reward).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from alignment import guarded, loading
from alignment.config.reward_terms import Model
from alignment.control_tokens import ControlTokens
from alignment.errors import InputError
from alignment.padding import by_budget
from alignment.rewards.term import Answer, Failed, Term, Value

TOKENS_PER_BATCH = 4096  # padded
TRAINED = "give the result of a stage that trains one"


def model(settings: Model, folders: Sequence[Path], alive: Callable[[], None]) -> Term:
    """folders: one of each member. alive is called after each batch. Raises InputError if one does not load."""
    scorers = [Scorer(folder, settings.end) for folder in folders]

    def values(answers: Sequence[Answer]) -> list[Value]:
        columns = [scorer(answers, alive) for scorer in scorers]
        return [_joined(row, settings) for row in zip(*columns, strict=True)]

    return values


def _joined(values: Sequence[Value], settings: Model) -> Value:
    """Of the members: the least, or the mean less `uncertainty` times the standard deviation (of these, not n - 1)."""
    known = [value for value in values if not isinstance(value, Failed)]
    if len(known) < len(values):
        return next(value for value in values if isinstance(value, Failed))
    if odd := [value for value in known if not math.isfinite(value)]:  # the least of such depends on their order
        return Failed(f"the value of a member is {odd[0]}")
    if settings.combine == "worst":
        return min(known)
    return statistics.fmean(known) - settings.uncertainty * statistics.pstdev(known)


def check_outputs(config: Any, folder: Path) -> None:
    """config: a transformers configuration, None if the folder has none. Raises InputError where it is no reward
    model's."""
    if config is None or config.num_labels != 1:
        has = "has no config.json" if config is None else f"has {config.num_labels} outputs, a reward model one"
        raise InputError(has, where=str(folder), fix=TRAINED)


class Scorer:
    """One sequence-classification model with one output, on the GPU where there is one, and its chat template.

    end: see the settings. precision: fp32 | bf16. Raises InputError if the folder has no such model.
    """

    def __init__(self, folder: Path, end: str = "end_of_turn", precision: str = "fp32"):
        self.end = end
        found = loading.load(AutoModelForSequenceClassification, folder, "reward model", precision)
        self.model, self.tokenizer, lost = found
        self._check(lost, folder)
        config = self.model.config.get_text_config()
        if config.pad_token_id is None:
            config.pad_token_id = self.tokenizer.pad_token_id
        self.pad = config.pad_token_id  # by which the model finds where a row ends: not always the tokenizer's
        on_gpu = torch.cuda.is_available()
        # Which it is by then: the current one may become another.
        self.device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self.model.to(self.device).eval()
        self.control = ControlTokens(self.tokenizer)
        self.window = getattr(self.model.config, "max_position_embeddings", None)

    def _check(self, lost: Sequence[str], folder: Path) -> None:
        where = str(folder)
        if lost:
            raise InputError(f"is no reward model: its weights lack {', '.join(lost[:3])}", where=where, fix=TRAINED)
        check_outputs(self.model.config, folder)
        if not self.tokenizer.chat_template:
            raise InputError("the reward model's tokenizer has no chat template", where=where)
        if self.tokenizer.eos_token is None:
            raise InputError("the reward model's tokenizer has no end-of-turn token", where=where)
        if self.tokenizer.pad_token_id is None and self.model.config.get_text_config().pad_token_id is None:
            raise InputError("the reward model's tokenizer has no padding token", where=where)

    def __call__(self, answers: Sequence[Answer], alive: Callable[[], None]) -> list[Value]:
        encoded = [self._encoded(answer) for answer in answers]
        rows = [ids for ids in encoded if not isinstance(ids, Failed)]
        found = [0.0] * len(rows)
        for batch, rewards in self.rewards(rows, by_budget(list(map(len, rows)), TOKENS_PER_BATCH)):
            for row, reward in zip(batch, rewards, strict=True):
                found[row] = reward
            alive()
        known = iter(found)
        return [ids if isinstance(ids, Failed) else next(known) for ids in encoded]

    def _encoded(self, answer: Answer) -> list[int] | Failed:
        try:
            return self.encode(answer)
        except Failed as failed:
            return failed

    def encode(self, answer: Answer) -> list[int]:
        """Token ids of the conversation, the answer in it, through its end-of-turn token or all that the template
        writes. Raises Failed for what the template refuses, or what the model cannot read as it is meant."""
        if found := self.control.find(answer.text):  # no policy writes it as text but to be taken for something else
            raise Failed(f"the answer spells the control token {found}")
        said = {"role": "assistant", "content": answer.text}
        turns = self.control.hidden([*answer.row["prompt"], said])
        try:
            text = guarded.render(self.tokenizer, turns, None)
            before = guarded.render(self.tokenizer, turns[:-1], None, prompt=True)
            end = text.find(str(self.tokenizer.eos_token), len(before)) if self.end == "end_of_turn" else -1
            ids = self.control.encode(text if end < 0 else text[: end + len(self.tokenizer.eos_token)])
        except InputError as error:
            raise Failed(f"of the reward model: {error.what}") from error
        if self.window is not None and len(ids) > self.window:
            raise Failed(f"is longer than the reward model's window of {self.window} tokens")
        return ids

    def rewards(
        self, rows: Sequence[Sequence[int]], batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], list[float]]]:
        """(a batch, rewards of its rows), one after the other. rows: token ids. batches: numbers of rows that go
        through the model together."""
        for batch in batches:
            yield batch, self._forward([rows[row] for row in batch])

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Sequence[int]]) -> list[float]:
        """One value a row; padded on the right, where nothing of the row looks."""
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[self.pad] * (width - len(row))] for row in rows], device=self.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.device)
        return [float(value) for value in self.model(input_ids=ids, attention_mask=mask).logits[:, 0].cpu()]
