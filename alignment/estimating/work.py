"""What a stage computes of each of its rows: forwards with gradients, without, and tokens that are sampled."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from alignment.config.stages.online import Online, Ppo
from alignment.config.stages.preference import Dpo, Kto
from alignment.config.stages.reward_model import RewardModel
from alignment.config.stages.training import Reference, Sft, Train
from alignment.estimating import operations
from alignment.estimating.operations import Counts, Trained
from alignment.training.rows import Sizes, column_lengths, pair_sizes, scored_sizes, sft_sizes
from alignment.training.shape import Shape, adapter_parameters


@dataclass(frozen=True)
class Records:
    """Of R rows that are trained on. trained: in forward and backward. looked: in forwards without gradients, with how
    many of them come to one step. reference: in the forward that DPO's kind has before its first step, once a row.
    prompts, answers: tokens of what is sampled for each, [R] and [R, answers]; once in `epochs_per_rollout` steps."""

    sizes: Sizes
    trained: Counts
    looked: Counts | None = None
    looks: float = 1.0
    reference: Counts | None = None
    prompts: np.ndarray | None = None
    answers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.sizes.lengths)


def records_of(settings: Train | Reference, rows: Any) -> Records:
    """rows: a datasets.Dataset of tokenised rows, as preparation makes them or a training stage renames them; of a
    stage that trains online, the tokens of its prompts. Lengths of what is sampled are the longest it may have."""
    if isinstance(settings, Online):
        return _online(settings, np.asarray(rows))
    if isinstance(settings, Sft):
        sizes = sft_sizes(rows)
        return Records(sizes, operations.of_rows(sizes.lengths, sizes.weights))
    if isinstance(settings, Kto):
        return _unpaired(settings, rows)
    if isinstance(settings, RewardModel) and settings.loss != "bradley_terry":
        sizes = scored_sizes(rows)
        return Records(sizes, operations.of_rows(sizes.lengths, np.zeros_like(sizes.lengths)))
    prompt, *answers = (column_lengths(rows, f"{part}_ids") for part in ("prompt", "chosen", "rejected"))
    pairs = operations.of_branches(prompt, np.stack(answers, 1), scored=not isinstance(settings, RewardModel))
    records = Records(pair_sizes(rows), pairs)
    if isinstance(settings, Reference):
        return replace(records, reference=pairs)
    return _preference(settings, records) if isinstance(settings, Dpo) else records


def _preference(settings: Dpo, records: Records) -> Records:
    """A loss of whole batches looks at all pairs first; a reference that moves is asked anew once it has."""
    looks = float(any(traits.whole for traits in settings.traits))
    looks += float(settings.refers and settings.reference_update is not None)
    looked = records.trained if looks else None
    return replace(records, looked=looked, looks=looks, reference=records.trained if settings.refers else None)


def _unpaired(settings: Kto, rows: Any) -> Records:
    """An answer with gradients, and one to another prompt without, where the loss looks at it."""
    named = "completion_ids" if "completion_ids" in rows.column_names else "chosen_ids"
    prompt, answer = (column_lengths(rows, name) for name in ("prompt_ids", named))
    other = column_lengths(rows, "rejected_ids") if "rejected_ids" in rows.column_names else np.roll(answer, -1)
    other = other if settings.has_reference_point else np.zeros_like(other)
    sizes = Sizes(prompt + answer + other, 2 * (prompt + np.maximum(answer, other)), np.ones(len(rows), dtype=np.int64))
    trained = operations.of_rows(prompt + answer, answer)
    both = operations.of_branches(prompt, np.stack([answer, other], 1))
    looked = operations.of_rows(prompt + other, other) if settings.has_reference_point else None
    return Records(sizes, trained, looked, reference=both)


def _online(settings: Online, prompts: np.ndarray) -> Records:
    """prompts: [R], tokens."""
    count, longest = settings.answers_trained_on(), settings.max_new_tokens
    sizes = Sizes(
        prompts + count * longest, count * (prompts + longest), np.ones(len(prompts), dtype=np.int64)
    )  # as stages/online.py has them
    trained = operations.of_branches(prompts, np.full((len(prompts), count), longest))
    again = settings.steps_per_rollout() > 1 or isinstance(settings, Ppo)
    looks = (float(settings.refers) + float(again)) / settings.epochs_per_rollout
    answers = np.full((len(prompts), settings.completions_per_prompt), longest)
    return Records(sizes, trained, trained if looks else None, looks, prompts=prompts, answers=answers)


def trained_of(settings: Train | Reference, config: Any, shape: Shape, checkpointing: bool, on_gpu: bool) -> Trained:
    """config: a transformers configuration, of which shape is."""
    lora = settings.lora if isinstance(settings, Train) else None
    adapters = 0.0
    if lora is not None:
        adapters = adapter_parameters(config, lora.rank, lora.target_modules, lora.dora) / shape.layers
    outputs = 1 if isinstance(settings, RewardModel) else None
    return Trained(lora is None, adapters, checkpointing, on_gpu, outputs)


class Operations(NamedTuple):
    """[R], of each row: of its part of a step; of the pass before the first one; of its sampling; and the tokens that a
    step computes with gradients."""

    step: np.ndarray
    before: np.ndarray
    sampling: np.ndarray
    tokens: np.ndarray


def operations_of(shape: Shape, records: Records, trained: Trained, epochs_per_rollout: int = 1) -> Operations:
    step = operations.update(shape, records.trained, trained)
    if records.looked is not None:
        step = step + records.looks * operations.forward(shape, records.looked, trained.adapters, trained.outputs)
    nothing = np.zeros(len(records))
    # adapters are off where the start model is asked
    before = nothing if records.reference is None else operations.forward(shape, records.reference)
    sampling = nothing
    if records.prompts is not None and records.answers is not None:
        sampling = operations.decoding(shape, records.prompts, records.answers) / epochs_per_rollout
    return Operations(step, before, sampling, records.trained.tokens)
