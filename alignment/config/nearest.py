"""The nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What a setting is called in TRL, OpenRLHF or verl -> here, below the same key.
ELSEWHERE = {
    "num_generations": "completions_per_prompt", "n_samples_per_prompt": "completions_per_prompt",
    "max_completion_length": "max_new_tokens", "max_response_length": "max_new_tokens",
    "num_iterations": "epochs_per_rollout", "num_ppo_epochs": "epochs_per_rollout", "ppo_epochs": "epochs_per_rollout",
    "scale_rewards": "scale_by_std", "importance_sampling_level": "ratio", "mask_truncated_completions": "truncated",
    "epsilon": "epsilon_low", "cliprange": "epsilon_low", "cliprange_value": "value_clip",
    "vf_coef": "value_coefficient",
    "kl_coef": "kl.coefficient", "init_kl_coef": "kl.coefficient", "kl_estimator": "kl.estimator",
    "loss_type": "loss", "loss_weights": "loss", "f_divergence_type": "divergence", "rpo_alpha": "loss",
    "num_train_epochs": "epochs", "lr": "learning_rate", "lr_scheduler_type": "schedule", "bf16": "precision",
    "train_batch_size": "global_batch_size", "per_device_train_batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size", "logging_steps": "log_every", "peft_config": "lora",
}  # fmt: skip


def by_words(name: str, known: Iterable[str]) -> list[str]:
    """The known that have it as a part between underscores."""
    return [one for one in known if f"_{name}_" in f"_{one}_"]


def closest(name: str, known: Iterable[str], prefix: str = "", otherwise: str = "known: ") -> str:
    """The fix for a name that is none of the known: the one that has it as a part, or the nearest of them, else all."""
    known = list(known)
    if (here := ELSEWHERE.get(name, "")).partition(".")[0] in known:
        return f"here it is `{prefix}{here}`"
    parts = by_words(name, known)
    near = parts if len(parts) == 1 else difflib.get_close_matches(name, known, 1, 0.5)
    return f"did you mean `{prefix}{near[0]}`?" if near else otherwise + (", ".join(known) or "none")
