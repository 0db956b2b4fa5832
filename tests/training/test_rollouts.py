"""Rollouts of online training: what answers are worth by hand, which of them count, and what is told of them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignment.errors import TrainingError
from alignment.training.online_preference import OnlineDPOTrainer
from alignment.training.ppo import PPOTrainer
from alignment.training.rollouts import Answer, Group, Rollout, Targets, best_and_worst, measured, with_signal
from tests.training import online

LN2 = math.log(2)


def one_prompt(*reference: list[float]) -> Rollout:
    """Answers of two tokens, each of log-prob -1; the first has a reward of 1, the others of 0. Coefficient 1/2."""
    answers = [Answer([5, 6], [-1.0, -1.0], True, reward=float(not at), reference=r) for at, r in enumerate(reference)]
    return Rollout(0, 0.5, [Group(0, 0, answers)], {})


def test_the_pull_is_taken_off_the_reward(tmp_path: Path) -> None:
    """By hand: of the first answer one token is twice as likely as under the start model, ln 2 nats. Of an answer in
    RLOO: 1 - ln 2 / 2 against 0. Of each token in PPO: -ln 2 / 2 with the first, the reward with the last."""
    pull, far = online.kl(coefficient=0.5, estimator="k1", place="reward"), LN2
    rollout = one_prompt([-1.0 - LN2, -1.0], [-1.0, -1.0])
    online.trainer(tmp_path, online.rloo(completions_per_prompt=2, kl=pull), 1)._credit(rollout)
    first, second = rollout.groups[0].answers
    assert first.advantages == pytest.approx([1 - far / 2] * 2) and second.advantages == pytest.approx(
        [far / 2 - 1] * 2
    )
    ppo = online.trainer(tmp_path, online.ppo(completions_per_prompt=2, kl=pull), 1, kind=PPOTrainer)
    assert ppo._rewards(first, 0.5).tolist() == pytest.approx([-far / 2, 1.0])


@pytest.mark.parametrize(("target", "factor"), [(0.2, 1.02), (0.3, 1.0155245), (99.0, 0.98)])
def test_the_coefficient_follows_the_distance_of_an_answer(target: float, factor: float, tmp_path: Path) -> None:
    """ln 2 nats and 0: a mean of 0.346574 an answer, which is 0.155245 above 0.3."""
    trainer = online.trainer(tmp_path, online.rloo(kl=online.kl(target=target, estimator="k1", place="reward")), 1)
    rollout = one_prompt([-1.0 - LN2, -1.0], [-1.0, -1.0])
    trainer._control(rollout)
    assert rollout.metrics["kl_answer"] == pytest.approx(LN2 / 2)
    assert trainer._coefficient == pytest.approx(0.05 * factor)


def test_the_loss_of_ppo_is_that_of_the_policy_and_a_tenth_of_that_of_the_values(tmp_path: Path) -> None:
    """By hand: advantages 1 and -1 at a ratio of 1: -1 + 1; a value 1 below its return, and one that is right: 1/2. The
    third token is none of the answer's."""
    trainer = online.trainer(tmp_path, online.ppo(kl=online.NO_KL), 1, kind=PPOTrainer)
    logs, values = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[0.5, 0.0, 9.0]])
    nothing = torch.zeros(1, 3)
    targets = Targets(
        mask=torch.tensor([[True, True, False]]), advantages=torch.tensor([[1.0, -1.0, 0.0]]), rollout=logs, old=logs,
        reference=nothing, values=values, returns=torch.tensor([[1.5, 0.0, 0.0]]), fresh=False, coefficient=0.0,
    )  # fmt: skip
    output = SimpleNamespace(log_probs=logs, entropy=nothing, state_values=values)
    assert float(trainer._sum(output, targets)) == pytest.approx(0.1 * 0.5)
    groups = [Group(0, 0, [Answer([5, 6], [-1.0, -2.0], True, reward=0.0)])]
    assert trainer._weight(groups) == 2


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_pull_in_the_loss_is_as_strong_whichever_ratio_the_surrogate_takes(estimator: Any, tmp_path: Path) -> None:
    """Without advantages the loss is the pull alone, here of an answer that an older policy has given."""
    now, found = torch.tensor([[-1.0, -2.0, -1.5]]), {}
    mask = torch.ones(1, 3, dtype=torch.bool)
    for ratio in ("token", "sequence", "sequence_mean"):
        settings = online.grpo(ratio=ratio, kl=online.kl(coefficient=1.0, estimator=estimator), epochs_per_rollout=2)
        trainer, logs = online.trainer(tmp_path, settings, 1), now.clone().requires_grad_()
        nothing = torch.zeros(1, 3)
        targets = Targets(mask, nothing, now, now + 0.1, now - 0.3, nothing, nothing, fresh=False, coefficient=1.0)
        trainer._sum(SimpleNamespace(log_probs=logs, entropy=nothing), targets).backward()
        found[ratio] = logs.grad
    assert found["token"].abs().min() > 1e-3
    for other in found.values():
        torch.testing.assert_close(other, found["token"])


def test_rounding_of_rewards_is_no_preference(tmp_path: Path) -> None:
    """Where answers are scored together with others, as with another number of processes, they may differ so much."""
    answers = [Answer([1], [0.0], True, reward=reward) for reward in (0.5, 0.7, 0.7 + 1e-8, 0.5 - 1e-8)]
    best, worst = best_and_worst(answers) or (None, None)
    assert best is answers[1] and worst is answers[0]
    assert best_and_worst(answers[1:3]) is None and with_signal([Group(0, 0, answers[1:3])]) == [False]


def test_the_last_rollout_is_no_larger_than_its_updates(tmp_path: Path) -> None:
    """Two batches trained on twice; of six steps two are left, which are one batch trained on twice."""
    settings = online.rloo(batches_per_rollout=2, epochs_per_rollout=2, global_batch_size=2)
    trainer = online.trainer(tmp_path, settings, 6)
    trainer.train()
    assert trainer._taken == 6 and len(trainer._rollout.groups) == 2


def test_answers_that_are_all_cut_are_no_signal_and_move_no_coefficient(tmp_path: Path) -> None:
    """Their rewards differ, but nothing of them is trained on."""
    settings = online.rloo(truncated="mask", resamples=1, kl=online.kl(estimator="k1", place="reward", target=6.0))
    trainer = online.trainer(tmp_path, settings, 1, finished=False)
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["no_signal"] == 1.0 and row["loss"] == 0.0 and trainer._taken == 8
    assert "kl_answer" not in row and trainer._coefficient == settings.kl.coefficient


def test_where_answers_are_worth_the_same_there_is_no_pair(tmp_path: Path) -> None:
    """A margin that few pairs have: they alone are divided by; where there is none the loss is 0."""
    for margin, some in ((2.0, True), (99.0, False)):
        trainer = online.trainer(tmp_path, online.online_dpo(min_margin=margin), 1, kind=OnlineDPOTrainer)
        trainer.train()
        (row,) = (row for row in trainer.state.log_history if "loss" in row)
        assert (0 < row["pairs"] < 4) if some else row["pairs"] == 0
        assert row["loss"] == pytest.approx(math.log(2) if some else 0.0)


def test_ppo_credits_tokens_by_its_values_which_begin_at_zero(tmp_path: Path) -> None:
    """V = 0, gamma = 1, no KL: the advantage of the token k before the last one is lam^k times the reward."""
    settings = online.ppo(kl=online.NO_KL, epochs_per_rollout=1)
    trainer = online.trainer(tmp_path, settings, 1, kind=PPOTrainer)
    trainer.train()
    for answer in (answer for group in trainer._rollout.groups for answer in group.answers):
        wanted = [answer.reward * 0.95**k for k in reversed(range(len(answer.ids)))]
        assert answer.values == [0.0] * len(answer.ids) and answer.advantages == pytest.approx(wanted)
        assert answer.returns == answer.advantages
    assert trainer._plain_model().value_head.weight.abs().sum() > 0, "it is trained"


# --- answers that count or not ----------------------------------------------------------------------------------------


def test_without_a_reward_an_answer_is_not_trained_on_and_is_counted(tmp_path: Path) -> None:
    trainer = online.trainer(tmp_path, online.grpo(), 1)
    judge = trainer._judge

    def sometimes(numbers: Any, answers: Any, alive: Any) -> None:
        judge(numbers, answers, alive)
        answers[1].reward = None

    trainer._judge = sometimes
    trainer.train()
    assert trainer.state.log_history[0]["reward_failed"] == 1
    facts = trainer.facts()
    assert facts["reward_failed"] == trainer.state.global_step, "one of each rollout"
    (lost,) = [a for group in trainer._rollout.groups for a in group.answers if a.reward is None]
    assert not lost.kept and set(lost.advantages) == {0.0} and lost.reference is None


def test_nothing_judged_is_an_error(tmp_path: Path) -> None:
    trainer = online.trainer(tmp_path, online.grpo(), 1)
    trainer._judge = lambda *given: None
    with pytest.raises(TrainingError, match="no answer of rollout 1 could be judged"):
        trainer.train()


@pytest.mark.parametrize("truncated", ["keep", "mask", "penalty"])
def test_truncated_answers(truncated: str, tmp_path: Path) -> None:
    trainer = online.trainer(
        tmp_path, online.rloo(truncated=truncated, truncation_penalty=7.0, kl=online.NO_KL), 1, finished=True
    )
    sample = trainer._sample_answers

    def cut(*given: Any) -> Any:
        few = sample(*given)
        few[0][0].finished = False
        return few

    trainer._sample_answers = cut
    trainer.train()
    (one,) = [(g.number, a) for g in trainer._rollout.groups for a in g.answers if not a.finished]
    number, answer = one
    assert answer.kept is (truncated != "mask")
    assert answer.reward == pytest.approx(online.given(number, 0)[1] - (7.0 if truncated == "penalty" else 0.0))


def test_prompts_without_signal_are_replaced_by_further_ones(tmp_path: Path) -> None:
    """Of the 9 prompts those of even number have equal rewards."""
    trainer = online.trainer(tmp_path, online.grpo(resamples=4, kl=online.NO_KL), 2)
    judge = trainer._judge

    def flat(numbers: Any, answers: Any, alive: Any) -> None:
        judge(numbers, answers, alive)
        for number, answer in zip(numbers, answers, strict=True):
            answer.reward = 0.5 if number % 2 == 0 else answer.reward

    trainer._judge = flat
    trainer.train()
    told = [row for row in trainer.state.log_history if "loss" in row]
    assert all(group.number % 2 for group in trainer._rollout.groups)
    assert sum(row["sampled_prompts"] for row in told) == trainer._taken > 8
    assert all(0 < row["no_signal"] < 1 for row in told)


def test_the_coefficient_follows_its_target_from_rollout_to_rollout(tmp_path: Path) -> None:
    """The KL stays far below its target: the coefficient falls by 0.2 of gain a rollout."""
    settings = online.rloo(kl=online.kl(estimator="k1", place="reward", target=100.0, gain=0.5))
    trainer = online.trainer(tmp_path, settings, 3)
    trainer.train()
    told = [row["kl_coefficient"] for row in trainer.state.log_history if "kl_coefficient" in row]
    assert told == pytest.approx([0.05, 0.05 * 0.9, 0.05 * 0.81])


def test_what_is_saved_of_a_rollout_is_what_it_was_and_copies_no_tokens() -> None:
    """Of tens of thousands of tokens a copy takes half a second, in which training waits."""
    rollout = one_prompt([-1.0, -2.0])
    answer, told = rollout.groups[0].answers[0], rollout.to_json()
    assert told["groups"][0]["answers"][0]["ids"] is answer.ids
    answer.reference, answer.old, rollout.metrics["pairs"] = [0.0, 0.0], [1.0, 1.0], 1.0
    assert Rollout.from_json(json.loads(json.dumps(told))) == one_prompt([-1.0, -2.0])


def test_metrics_of_a_rollout() -> None:
    """Rewards 1, 3 and 2, none: mean 2, deviations 1 and 0; of four answers one was cut, one could not be judged."""
    groups = [
        Group(0, 0, [Answer([5, 1], [], True, 1.0, {"x": 0.0}), Answer([5], [], False, 3.0, {"x": 1.0})]),
        Group(1, 1, [Answer([5, 6, 1], [], True, 2.0, {"x": 2.0}), Answer([1, 1], [], True)]),
    ]
    assert measured(groups) == pytest.approx(
        {
            "reward": 2.0, "reward_std": 0.5, "reward/x": 1.0, "reward_std/x": math.sqrt(2 / 3), "reward_failed": 1.0,
            "answer_tokens": 2.0, "stop_rate": 0.75,
        }
    )  # fmt: skip
    rollout = Rollout(3, 0.1, groups, {"reward": 2.0})
    assert Rollout.from_json(json.loads(json.dumps(rollout.to_json()))) == rollout
