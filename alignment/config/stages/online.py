"""Stages that train on answers which the model in training has just given, judged by the reward."""

from __future__ import annotations

from typing import ClassVar, Literal

from alignment.config.settings import Settings, identity
from alignment.config.stages.base import Reads
from alignment.config.stages.training import Train


class Kl(Settings):
    """The pull towards the start model. estimator: Schulman's k1, k2 or k3 (alignment/training/losses/policy.py)."""

    coefficient: float = identity(ge=0)
    estimator: Literal["k1", "k2", "k3"] = identity()
    place: Literal["reward", "loss"] = identity()
    target: float | None = identity(gt=0)
    gain: float = identity(gt=0, le=1)
    corrected: bool = identity()

    def idle(self) -> frozenset[str]:
        if self.coefficient == 0:
            return frozenset({"estimator", "place", "target", "gain", "corrected"})
        unread = {"gain": self.target is None, "corrected": self.place == "reward"}
        return frozenset(name for name, is_so in unread.items() if is_so)


class Online(Train):
    """A rollout is `batches_per_rollout` global batches of prompts with `completions_per_prompt` answers each, drawn
    from the policy; it is trained on `epochs_per_rollout` times."""

    reads: ClassVar[Reads] = {"data": "prompts"}
    task = "sft"  # whose rows have a split of prompts
    groups = ("reward",)
    packages = (*Train.packages, "tokenizers", "vaderSentiment")
    completions_per_prompt: int = identity(ge=2)
    max_new_tokens: int = identity(gt=0)
    sampling_batch_size: int = identity(gt=0)
    batches_per_rollout: int = identity(ge=1)
    epochs_per_rollout: int = identity(ge=1)
    truncated: Literal["keep", "mask", "penalty"] = identity()
    truncation_penalty: float = identity(ge=0)

    @property
    def refers(self) -> bool:
        """Whether the loss compares the policy with the start model."""
        return True

    @property
    def holds_reference(self) -> bool:
        """Whether the start model is kept beside the policy: where there is no adapter that can be switched off."""
        return self.refers and self.lora is None

    def answers_trained_on(self) -> int:
        """To each prompt, at most."""
        return self.completions_per_prompt

    def steps_per_rollout(self) -> int:
        return self.batches_per_rollout * self.epochs_per_rollout

    def idle(self) -> frozenset[str]:
        return frozenset() if self.truncated == "penalty" else frozenset({"truncation_penalty"})


class OnlineDpo(Online):
    """DPO on the best and the worst of answers that the policy has just given (after Guo et al. 2024,
    arXiv:2402.04792, who take two)."""

    kind: Literal["online_dpo"] = identity()
    beta: float = identity(gt=0)
    min_margin: float = identity(ge=0)

    def answers_trained_on(self) -> int:
        return 2


class Clipped(Online):
    """The clipped surrogate of an answer's or a token's ratio, weighed by the advantage."""

    kl: Kl = identity()
    ratio: Literal["token", "sequence", "sequence_mean"] = identity()
    epsilon_low: float = identity(gt=0, lt=1)
    epsilon_high: float = identity(gt=0)
    aggregate: Literal["sequence", "token", "constant"] = identity()
    whiten: bool = identity()

    @property
    def refers(self) -> bool:
        return self.kl.coefficient > 0

    def idle(self) -> frozenset[str]:
        """Of a rollout that is trained on once the ratio is 1, to the bit."""
        clip = frozenset({"epsilon_low", "epsilon_high"} if self.steps_per_rollout() == 1 else ())
        return super().idle() | clip


class PolicyGradient(Clipped):
    """REINFORCE's kind: what other answers to the prompt are worth is the baseline."""

    resamples: int = identity(ge=0)


class Rloo(PolicyGradient):
    """REINFORCE with the other answers' mean reward as baseline (Ahmadian et al. 2024, arXiv:2402.14740)."""

    kind: Literal["rloo"] = identity()


class Grpo(PolicyGradient):
    """Advantages relative to the prompt's other answers (Shao et al. 2024, arXiv:2402.03300), with the options of
    Dr. GRPO (arXiv:2503.20783) and DAPO (arXiv:2503.14476)."""

    kind: Literal["grpo"] = identity()
    scale_by_std: bool = identity()


class Ppo(Clipped):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347; of language models Ziegler et al. 2019,
    arXiv:1909.08593): each token's advantage by a value head and GAE."""

    kind: Literal["ppo"] = identity()
    completions_per_prompt: int = identity(ge=1)
    gamma: float = identity(gt=0, le=1)
    lam: float = identity(ge=0, le=1)
    value_coefficient: float = identity(gt=0)
    value_clip: float | None = identity(gt=0)

    def idle(self) -> frozenset[str]:
        """Its ratio and values are of another pass than the update's, and differ by rounding in its first one too."""
        return Online.idle(self)
