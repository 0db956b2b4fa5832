"""Settings of online stages: what is impossible together, and what is in a stage's key."""

from __future__ import annotations

import pytest

from alignment.config.compose import compose
from alignment.errors import ConfigError
from tests.training import online

IMPOSSIBLE = {
    "rloo": {
        "engine.compile=true": "`engine.compile` is true, and `stage.rloo` decodes",
        "launcher=torchrun launcher.processes=2 engine=zero3 engine.hpz=2": "`engine.hpz` is 2, and `stage.rloo`",
        "stage.rloo.kl.coefficient=0.0 stage.rloo.kl.target=6.0": "`stage.rloo.kl.target` is 6, and",
        "stage.rloo.kl.place=loss stage.rloo.kl.corrected=false": "`stage.rloo.kl.estimator` is k1, and `stage",
        "stage.rloo.truncated=mask": "`stage.rloo.truncated` is mask, and `stage.rloo.kl.place` reward: answers that",
        "stage.rloo.kl.estimator=k3": "`stage.rloo.kl.place` is reward, and `stage.rloo.kl.estimator` k3: off a reward",
        "stage.rloo.kl.estimator=k2": "`stage.rloo.kl.place` is reward, and `stage.rloo.kl.estimator` k2: off a reward",
        "stage.rloo.kl.target=6.0 stage.rloo.resamples=2": "`stage.rloo.kl.target` is 6, and `stage.rloo.resamples` 2:",
        "stage.rloo.aggregate=token": "`stage.rloo.aggregate` is token, and `stage.rloo.ratio` sequence: an",
        "stage.rloo.lora.quantize=nf4": "`stage.rloo.lora.quantize` is nf4, and decoding was not tried",
        "stage.rloo.completions_per_prompt=1": "`stage.rloo.completions_per_prompt` should be greater than or equal",
        "stage.prepare_sft.splits.prompts=0": "`stage.prepare_sft.splits.prompts` is 0, and `rloo` needs such rows",
    },
    "online_dpo": {"stage.online_dpo.beta=0.0": "`stage.online_dpo.beta` should be greater than 0"},
    "grpo": {
        "stage.grpo.kl.place=reward stage.grpo.kl.estimator=k1": "`stage.grpo.scale_by_std` true: a prompt whose",
        "stage.grpo.kl.target=6.0 stage.grpo.truncated=mask": "`stage.grpo.kl.target` is 6, and `stage.grpo.trunc",
        "stage.grpo.ratio=sequence_mean stage.grpo.aggregate=constant": "`stage.grpo.ratio` sequence_mean: an answer's",
    },
    "ppo": {
        "stage.ppo.lam=1.5": "`stage.ppo.lam` should be less than or equal to 1",
        "stage.ppo.ratio=sequence stage.ppo.aggregate=sequence": "`stage.ppo.ratio` is sequence: one ratio for an",
        "stage.ppo.kl.target=6.0 stage.ppo.truncated=mask": "`stage.ppo.kl.target` is 6, and `stage.ppo.trunc",
        "stage.ppo.kl.estimator=k3": "`stage.ppo.kl.place` is reward, and `stage.ppo.kl.estimator` k3",
    },
}


@pytest.mark.parametrize(("kind", "overrides"), [(kind, one) for kind, every in IMPOSSIBLE.items() for one in every])
def test_what_is_impossible_together_is_refused(kind: str, overrides: str) -> None:
    with pytest.raises(ConfigError) as told:
        compose([f"pipeline=sft_{kind}", *overrides.split()])
    assert IMPOSSIBLE[kind][overrides] in str(told.value)


def test_what_changes_nothing_as_the_others_stand_is_not_in_the_key() -> None:
    """Of a rollout that is trained on once the ratio is 1 to the bit; PPO's is of another pass, and 1 to rounding."""
    clip = {"epsilon_low", "epsilon_high"}
    assert online.rloo().idle() == {"truncation_penalty", *clip}
    assert online.rloo(truncated="penalty", batches_per_rollout=2).idle() == frozenset()
    assert online.ppo(epochs_per_rollout=1).idle() == online.ppo().idle()
    assert online.kl(coefficient=0.0).idle() == {"estimator", "place", "target", "gain", "corrected"}
    assert online.kl(coefficient=0.1, target=None).idle() == {"gain"}
    assert online.kl(target=6.0, place="reward").idle() == {"corrected"}
    assert online.ppo().idle() == online.online_dpo().idle() == {"truncation_penalty"}
