"""What stages that train online have in common: prompts in; answers of the policy, judged, as training asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig
from trl.trainer.base_config import _BaseConfig

from alignment import generation
from alignment.config.stages.online import Online, OnlineDpo, PolicyGradient
from alignment.errors import InputError, TrainingError
from alignment.files import read_jsonl
from alignment.pipeline.store import METRICS, ROLLOUTS
from alignment.stages.context import StageContext
from alignment.stages.parts import judge_of, rows_of
from alignment.stages.train import train
from alignment.training import engine
from alignment.training.model import load, lora_config
from alignment.training.rollouts import Answer, Group
from alignment.training.rows import Sizes

WRITTEN = 200  # rollouts, at most
TOGETHER = 16  # answers judged between two signs of life
Alive = Callable[[int, int], None]


def run(context: StageContext, trainer: type) -> dict[str, Any]:
    settings: Online = context.settings
    engine.take_device(context.world_size)
    # Before the engine: under ZeRO-3 the judge's models would be sharded as they are read, and stay so.
    judge = judge_of(context)

    def make_trainer(context: StageContext, start: Path, arguments: dict[str, Any], **common: Any) -> Any:
        arguments = {name: value for name, value in arguments.items() if name != "max_length"}
        args = _BaseConfig(**arguments)  # before the model: under ZeRO-3 it is sharded while it is read
        model, tokenizer, rows = load(start), common["processing_class"], common["train_dataset"]
        return trainer(
            settings=settings,
            model=model,
            args=args,
            peft_config=lora_config(settings.lora, model),
            reference=load(start) if settings.holds_reference else None,
            sample=_sampler(settings, tokenizer),
            judge=_judging(judge, tokenizer, rows),
            check_share=judge.check_share,
            tell=_teller(context),
            show=_shower(context, tokenizer, rows, common["batches"].steps),
            **common,
        )

    summary = train(context, lambda rows: _sizes(rows, settings), make_trainer, rows_of=_prompts)
    if context.is_main:
        _warn_of_nothing(context)
    return summary


def _warn_of_nothing(context: StageContext) -> None:
    """Where no prompt of the whole run had answers of which one is better than another: it would end as if all were
    well. Not of PPO, which compares answers to other prompts, too."""
    if not isinstance(context.settings, PolicyGradient | OnlineDpo):
        return
    shares = [row["no_signal"] for row in read_jsonl(context.folder / METRICS) if "no_signal" in row]
    if shares and min(shares) == 1:
        cut = ", or were all cut (truncated=mask)" if context.settings.truncated == "mask" else ""
        told = f"no prompt had answers of unequal reward in any of {len(shares)} logged steps{cut}"
        fix = "look at the reward's terms, or sample more answers to harder prompts"
        context.warn(f"{told}: of the reward nothing was learned; {fix}")


def _prompts(context: StageContext, tokenizer: Any) -> list[dict[str, Any]]:
    """The rows of the split of prompts, with prompt_ids."""
    rows = rows_of(context.inputs["data"], "prompts.jsonl")
    encoded = [{**row, "prompt_ids": generation.encode_prompt(tokenizer, row["prompt"])} for row in rows]
    config = AutoConfig.from_pretrained(context.inputs["model"] / "model", local_files_only=True).get_text_config()
    if (window := getattr(config, "max_position_embeddings", None)) is not None:
        generation.check_window([row["prompt_ids"] for row in encoded], context.settings.max_new_tokens, window)
    empty = next((row["id"] for row in encoded if not row["prompt_ids"]), None)
    if empty is not None:
        raise InputError(f"the prompt of row {empty} has no tokens", where="prompts.jsonl")
    return encoded


def _sizes(rows: Sequence[dict[str, Any]], settings: Online) -> Sizes:
    """As long as the answers to a prompt that are trained on may become."""
    prompts, count = np.array([len(row["prompt_ids"]) for row in rows]), settings.answers_trained_on()
    answers = count * settings.max_new_tokens
    widths = count * prompts + answers
    return Sizes(prompts + answers, widths, np.ones(len(rows), dtype=np.int64))


def _teller(context: StageContext) -> Callable[[str, int, int], None]:
    """Says at once that something else is done now, which may then say nothing for long."""
    last = ""

    def tell(what: str, done: int, total: int) -> None:
        nonlocal last
        context.note(f"{what} {done}/{total}" if total else what, force=what != last)
        last = what

    return tell


def _shower(context: StageContext, tokenizer: Any, rows: Sequence[dict[str, Any]], steps: int) -> Any:
    """Writes the answers to the first prompt of a rollout into rollouts.jsonl, of as many rollouts, evenly, as a person
    can look through: what training sees, if the reward is hacked, is seen in no metric."""
    last = -(-steps // context.settings.steps_per_rollout()) - 1
    written = {round(place * last / (WRITTEN - 1)) for place in range(WRITTEN)}

    def show(number: int, step: int, group: Group) -> None:
        if number not in written:
            return
        completions = [
            {"completion": _text(tokenizer, answer), "tokens": len(answer.ids), "finished": answer.finished,
             "reward": answer.reward, "terms": answer.terms, **({"failed": answer.failed} if answer.failed else {})}
            for answer in group.answers
        ]  # fmt: skip
        row = rows[group.number]
        told = {"id": row["id"], "prompt": row["prompt"], "completions": completions}
        context.write_row(ROLLOUTS, {"step": step, "rollout": number + 1, **told})

    return show


def _text(tokenizer: Any, answer: Answer) -> str:
    return str(tokenizer.decode(answer.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _sampler(settings: Online, tokenizer: Any) -> Any:
    def sample(model: Any, prompts: Sequence[Sequence[int]], noise: Any, alive: Alive) -> list[list[Answer]]:
        stop = generation.stop_tokens(model, tokenizer)

        def progress(step: int, total: int, **facts: Any) -> None:
            alive(step * len(prompts) // total, len(prompts))

        how: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "batch_size": settings.sampling_batch_size}
        how["size_key"] = "sampling_batch_size"
        try:
            every = generation.in_order(generation.draw(model, prompts, noise, stop=stop, progress=progress, **how))
        except InputError as error:  # here the model is what training has made of it
            raise TrainingError(f"the policy cannot answer: {error.what}", fix="lower the learning rate") from error
        return [[Answer(ids, scores, ids[-1] in stop) for ids, scores in few] for few in every]

    return sample


def _judging(judge: Any, tokenizer: Any, rows: Sequence[dict[str, Any]]) -> Any:
    def judging(numbers: Sequence[int], answers: Sequence[Answer], alive: Alive) -> None:
        texts = [_text(tokenizer, answer) for answer in answers]
        scores: list[dict[str, Any]] = []
        for first in range(0, len(answers), TOGETHER):
            few = slice(first, first + TOGETHER)
            asked = [rows[number] for number in numbers[few]]
            scores += judge.score(asked, texts[few], [len(answer.ids) for answer in answers[few]])
            alive(min(few.stop, len(answers)), len(answers))
        for answer, score in zip(answers, scores, strict=True):
            if score["reward"] is not None:
                answer.reward = score["reward"]  # a term that is only watched may have failed
                answer.terms = {name: value for name, value in score["terms"].items() if value is not None}
            else:
                answer.failed = score["failed"]

    return judging
