"""TRL's trainers as they come, on a tiny model: what the tests of this folder compare with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from datasets import Dataset

from tests.training import models

KINDS = {"sft": (trl.SFTTrainer, trl.SFTConfig), "dpo": (trl.DPOTrainer, trl.DPOConfig)}


def model(tokenizer: Any) -> Any:
    """A random Llama of two layers."""
    return models.make("llama", {**models.SMALL, "vocab_size": len(tokenizer)}, scale=2.0)


def trainer(
    kind: str, tokenizer: Any, rows: Sequence[dict[str, Any]] | Dataset, folder: Path, policy: Any = None, **args: Any
) -> Any:
    """kind: sft, dpo or cpo. rows: as people have them, text or messages. policy: None is a random model.

    args: of the trainer's configuration; what is not named stays as TRL has it, but for reports and precision.
    DPO has a second model as reference, where it does not make one itself."""
    made, config = KINDS[kind] if kind in KINDS else experimental()
    policy = model(tokenizer) if policy is None else copy.deepcopy(policy)
    own = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1, **args}
    alone = kind != "dpo" or own.get("precompute_ref_log_probs") or hasattr(policy, "peft_config")
    more = {} if alone else {"ref_model": copy.deepcopy(policy)}
    data = rows if isinstance(rows, Dataset) else Dataset.from_list(list(rows))
    args_ = config(output_dir=str(folder / "stock"), **own)
    return made(model=policy, args=args_, train_dataset=data, processing_class=tokenizer, **more)


def experimental() -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        from trl.experimental.cpo import CPOConfig, CPOTrainer
    return CPOTrainer, CPOConfig


def history(made: Any) -> list[dict[str, float]]:
    """Train; the rows that it logs."""
    made.train()
    return [row for row in made.state.log_history if "loss" in row]


def batch(made: Any, numbers: Sequence[int]) -> dict[str, Any]:
    """These rows, prepared and collated by the trainer itself."""
    columns = made._signature_columns or made.train_dataset.column_names
    rows = [made.train_dataset[number] for number in numbers]
    return made.data_collator([{name: row[name] for name in columns if name in row} for row in rows])
