"""What several stages need: progress over the parts of a stage, the rows of a split, whether they are rendered as the
model's template does, the judge of the experiment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignment.data.chat import Chat
from alignment.errors import InputError
from alignment.files import read_json, read_jsonl
from alignment.rewards import Judge
from alignment.stages.context import StageContext


class Parts:
    """One progress line over parts of unlike length. shares: part -> its rough share of the time, in any unit."""

    def __init__(self, context: StageContext, shares: Mapping[str, float]):
        self.context, self.shares = context, shares
        self.whole = sum(shares.values())

    def __call__(self, part: str) -> Callable[..., None]:
        """progress(step, total, **facts) of this part; the stage's step is in thousandths of the whole."""
        names = list(self.shares)
        before = sum(self.shares[name] for name in names[: names.index(part)])

        def progress(step: int, total: int, **facts: Any) -> None:
            done = before + self.shares[part] * step / max(total, 1)
            self.context.progress(round(1000 * done / self.whole), 1000, note=part, share=True, **facts)

        progress(0, 1, force=True)  # also of a part that says nothing for long
        return progress


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a file that a parent wrote. Raises InputError if it is not there or empty."""
    path = folder / name
    rows = list(read_jsonl(path)) if path.is_file() else []
    if not rows:
        raise InputError(f"{name} has no rows", where=str(path), fix="give the split rows in the prepare stage")
    return rows


def check_template(chat: Chat, data: Path) -> None:
    """data: the result of the stage that prepared the rows. Raises InputError where they were rendered with another
    template than the model's: it would be trained, or measured, on another text than it is asked with."""
    if read_json(data / "data_report.json")["template_sha256"] != chat.template_sha256:
        what = "the rows were rendered with another chat template than this model's"
        raise InputError(what, where=chat.name, fix="prepare them with this model")


def judge_of(context: StageContext) -> Judge:
    """What the stage reads of the experiment's reward, its models fetched, or taken from the parents that are reward
    models."""
    from alignment.data.fetch import fetch

    reward, folders = context.experiment.reward.read(context.settings.compares), {}
    for name, term in reward.terms.items():
        trained = [context.inputs[role] / "model" for role in term.reads(context.inputs)]
        folders[name] = [*map(fetch, term.sources()), *trained]
    return Judge(reward, folders, context.alone, context.shared, context.code)
