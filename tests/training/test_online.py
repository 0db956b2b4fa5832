"""Online stages: equal to TRL on the same answers, whatever the split; interrupted as not interrupted; they learn."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.errors import InputError, PreemptedError, TrainingError
from alignment.stages import grpo as grpo_stage
from alignment.stages import online as online_stage
from alignment.stages import online_dpo as online_dpo_stage
from alignment.stages import ppo as ppo_stage
from alignment.stages import rloo as rloo_stage
from alignment.training.online_preference import OnlineDPOTrainer
from alignment.training.policy_gradient import PolicyGradientTrainer
from alignment.training.ppo import PPOTrainer
from alignment.training.rollouts import Answer, Group, Rollout, Targets, best_and_worst, measured, with_signal
from alignment.training.trainers import Packing
from tests.training import online, tiny, trainers
from tests.training.test_resume import After, rows, weights

STAGES = {"rloo": rloo_stage, "grpo": grpo_stage, "online_dpo": online_dpo_stage, "ppo": ppo_stage}
KINDS = {
    "rloo": PolicyGradientTrainer, "grpo": PolicyGradientTrainer, "online_dpo": OnlineDPOTrainer, "ppo": PPOTrainer,
}  # fmt: skip
STEPS = 4


# --- against TRL ------------------------------------------------------------------------------------------------------


class Given:
    """Before a TRL trainer: the answers of our rollouts, with their advantages, in the place of its own."""

    rollouts: list[tuple[list[Group], Any]]

    def _send_telemetry(self) -> None:
        pass

    def _prepare_inputs(self: Any, batch: Any) -> dict[str, Any]:
        groups, prompt = self.rollouts[self.state.global_step]
        answers = [answer for group in groups for answer in group.answers]
        prompts = [prompt(group.number) for group in groups for _ in group.answers]
        inputs = {
            "prompt_ids": filled(prompts, left=True), "prompt_mask": filled([[1] * len(p) for p in prompts], left=True),
            "completion_ids": filled([a.ids for a in answers]),
            "completion_mask": filled([[int(a.kept)] * len(a.ids) for a in answers]),
            "advantages": torch.tensor([a.advantages[0] for a in answers], dtype=torch.float32),
        }  # fmt: skip
        mask = inputs["completion_mask"]
        inputs["num_items_in_batch"] = mask.sum()
        key = id(groups[0])
        if key not in self.olds:
            self.olds[key] = self._logps(self.model, inputs)
        inputs["old_per_token_logps"] = self.olds[key]
        inputs["old_logps"] = (self.olds[key] * mask).sum(1)
        if self.beta:
            inputs["ref_per_token_logps"] = self._logps(self.ref_model, inputs)
        return inputs

    @torch.no_grad()
    def _logps(self: Any, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        found = self._get_per_token_logps_and_entropies(model, ids, mask, inputs["completion_ids"].shape[1])
        return found[0]


def filled(rows: list[list[int]], left: bool = False) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows])


class StockGRPO(Given, trl.GRPOTrainer):
    pass


class StockRLOO(Given, trl.RLOOTrainer):
    pass


def stock(folder: Path, settings: Any, rollouts: Any, **own: Any) -> Any:
    start = folder / "start" / "model"
    count = settings.global_batch_size * settings.completions_per_prompt
    kinds = {"grpo": (StockGRPO, trl.GRPOConfig), "rloo": (StockRLOO, trl.RLOOConfig)}
    kind, config = kinds[settings.kind]
    args = config(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=count, learning_rate=1e-3, use_cpu=True,
        lr_scheduler_type="constant", num_generations=settings.completions_per_prompt, bf16=False, report_to="none",
        max_completion_length=settings.max_new_tokens, logging_steps=1, disable_tqdm=True, save_strategy="no",
        epsilon=settings.epsilon_low, epsilon_high=settings.epsilon_high, weight_decay=0.0,
        gradient_checkpointing=False, adam_epsilon=1e-4, **own,
    )  # fmt: skip
    trainer = kind(
        AutoModelForCausalLM.from_pretrained(start), lambda completions, **more: [0.0] * len(completions), args,
        Dataset.from_list([{"prompt": "a"}] * count), processing_class=AutoTokenizer.from_pretrained(start),
    )  # fmt: skip
    trainer.rollouts, trainer.olds = rollouts, {}
    trainer.train()
    return trainer


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "grpo": (online.grpo(kl=online.kl(coefficient=1.0)), {"loss_type": "grpo", "beta": 1.0}),
    "grpo, as in its paper": (
        online.grpo(kl=online.kl(coefficient=1.0, corrected=False)),
        {"loss_type": "grpo", "beta": 1.0, "use_bias_correction_kl": False},
    ),
    "dapo": (online.grpo(aggregate="token", epsilon_high=0.28, kl=online.NO_KL), {"loss_type": "dapo", "beta": 0.0}),
    "dr_grpo": (
        online.grpo(aggregate="constant", scale_by_std=False, kl=online.NO_KL), {"loss_type": "dr_grpo", "beta": 0.0},
    ),
    "gspo": (
        online.grpo(ratio="sequence_mean", kl=online.NO_KL),
        {"loss_type": "grpo", "beta": 0.0, "importance_sampling_level": "sequence"},
    ),
    "rloo": (online.rloo(kl=online.NO_KL), {"beta": 0.0}),
}  # fmt: skip
# With answers that were cut, and are not trained on.
CASES |= {
    f"{name}, masked": (settings.model_copy(update={"truncated": "mask"}), own)
    for name, (settings, own) in CASES.items()
    if name in ("grpo", "dr_grpo", "rloo", "dapo")
}


@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_weights_equal_those_of_trl_on_the_same_answers(name: str, tmp_path: Path) -> None:
    """Two updates of each of two rollouts; in the second the ratio is no longer 1. Ours in several micro-batches.

    AdamW's epsilon is above the rounding of gradients, which it would else blow up to the size of the rate."""
    settings, own = CASES[name]
    settings = settings.model_copy(update={"epochs_per_rollout": 2, "learning_rate": 1e-3, "adam_epsilon": 1e-4})
    mine, seen = online.trainer(tmp_path, settings, STEPS), []
    step = mine.training_step
    mine.training_step = lambda *given: (step(*given), seen.append((mine._rollout.groups, mine._prompt)))[0]
    mine.train()
    theirs = stock(tmp_path, settings, seen, **own)
    ours, trls = ([row for row in one.state.log_history if "loss" in row] for one in (mine, theirs))
    for one, other in zip(ours, trls, strict=True):
        if name != "rloo, masked":  # of a masked answer TRL adds its advantage, a constant
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    assert ours[1]["ratio"] != pytest.approx(1.0, abs=1e-6)
    for one, other in zip(mine.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


LN2 = math.log(2)


def one_prompt(*reference: list[float]) -> Rollout:
    """Answers of two tokens, each of log-prob -1; the first has a reward of 1, the others of 0. Coefficient 1/2."""
    answers = [Answer([5, 6], [-1.0, -1.0], True, reward=float(not at), reference=r) for at, r in enumerate(reference)]
    return Rollout(0, 0.5, [Group(0, 0, answers)], {})


@pytest.mark.parametrize(("estimator", "far"), [("k1", LN2), ("k2", LN2**2 / 2), ("k3", LN2 - 0.5)])
def test_the_pull_is_taken_off_the_reward(estimator: Any, far: float, tmp_path: Path) -> None:
    """By hand: of the first answer one token is twice as likely as under the start model. Of an answer in RLOO: 1 -
    far / 2 against 0. Of each token in PPO: -far / 2 with the first, the reward with the last."""
    pull = online.kl(coefficient=0.5, estimator=estimator, place="reward")
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
    trainer = online.trainer(tmp_path, online.rloo(kl=online.kl(target=target, estimator="k3", place="reward")), 1)
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_of_a_step_stays_what_it_was_while_training_goes_on(kind: str, tmp_path: Path) -> None:
    """It is written beside the next step. Rows of metrics are of three steps, of which a checkpoint has a part."""
    settings = getattr(online, kind)(log_every=3, batches_per_rollout=2)
    trainer, states = online.trainer(tmp_path, settings, 3, kind=KINDS[kind]), []
    step = trainer.training_step

    def noted(*given: Any) -> Any:
        state = trainer.training_state()
        states.append((state, json.dumps(state)))
        return step(*given)

    trainer.training_step = noted
    trainer.train()
    assert len(states) == 3 and all(json.dumps(state) == was for state, was in states)
    assert [len(state["trained_on"]) for state, _ in states] == [0, 1, 2]


def test_what_was_decoded_with_is_not_kept(tmp_path: Path) -> None:
    trainer = online.trainer(tmp_path, online.rloo(), 1)
    trainer._before_training()
    with trainer._decoding() as model:
        model(torch.ones(1, 3, dtype=torch.long), use_cache=True)
    assert trainer._output is None


def test_online_dpo_is_dpo_on_the_best_and_the_worst_answer(tmp_path: Path) -> None:
    """Of four answers with known rewards; DPO's losses are TRL's (test_stages.py). Prompts come in the same order."""
    same = {name: tiny.COMMON[name] for name in ("global_batch_size", "schedule", "warmup_ratio", "weight_decay")}
    mine = online.trainer(tmp_path, online.online_dpo(**same), STEPS, kind=OnlineDPOTrainer)
    pairs = []
    for number, row in enumerate(mine.train_dataset):
        ranked = sorted((online.given(number, branch)[::-1] for branch in range(4)), key=lambda one: one[0])
        pairs.append({"prompt_ids": row["prompt_ids"], "chosen_ids": ranked[-1][1], "rejected_ids": ranked[0][1]})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "start" / "model")
    theirs = trainers.ours("dpo", model, tmp_path, tmp_path / "start" / "model", STEPS, rows=pairs)
    assert trainers.losses(mine) == pytest.approx(trainers.losses(theirs), abs=1e-6)
    assert mine.state.log_history[0]["loss"] == pytest.approx(math.log(2))


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


# --- whatever the split -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STAGES)
def test_neither_micro_batches_nor_padding_nor_sharing_change_anything(kind: str, tmp_path: Path) -> None:
    changes = {} if kind == "online_dpo" else {"aggregate": "token", "whiten": kind == "ppo"}
    settings, found = getattr(online, kind)(epochs_per_rollout=2, **changes), []
    arms = ({"budget": 10_000}, {"budget": 60}, {"packing": Packing(share=False)}, {"packing": Packing(on=False)})
    for more in arms[:3] if kind == "ppo" else arms:
        trainer = online.trainer(tmp_path, settings, STEPS, kind=KINDS[kind], **more)
        trainer.train()
        rows = [row for row in trainer.state.log_history if "loss" in row]
        names = [
            name for name in ("loss", "grad_norm", "kl", "ratio", "value_loss", "rewards/margins") if name in rows[0]
        ]
        found.append([[row[name] for name in names] for row in rows])
    for other in found[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(found[0]), atol=1e-5, rtol=1e-4)


def test_the_reference_is_the_start_model_with_and_without_adapters(tmp_path: Path) -> None:
    """Before the first update the KL is 0; after some it is not."""
    for lora in (None, tiny.LORA):
        trainer = online.trainer(tmp_path, online.grpo(lora=lora, learning_rate=1e-2), STEPS)
        trainer.train()
        found = [row["kl"] for row in trainer.state.log_history if "kl" in row]
        assert found[0] == pytest.approx(0, abs=1e-6) and found[-1] > 1e-5


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


def test_metrics_of_a_rollout() -> None:
    """Rewards 1, 3 and 2, none: mean 2, deviations 1 and 0; of four answers one was cut, one could not be judged."""
    groups = [
        Group(0, 0, [Answer([5, 1], [], True, 1.0, {"x": 0.0}), Answer([5], [], False, 3.0, {"x": 1.0})]),
        Group(1, 1, [Answer([5, 6, 1], [], True, 2.0, {"x": 2.0}), Answer([1, 1], [], True)]),
    ]
    assert measured(groups) == pytest.approx(
        {
            "reward": 2.0, "reward_std": 0.5, "reward/x": 1.0, "reward_std/x": math.sqrt(2 / 3), "reward_failed": 1.0,
            "answer_tokens": 2.0, "stop_rate": 0.75, "no_signal": 0.5,
        }
    )  # fmt: skip
    rollout = Rollout(3, 0.1, groups, {"reward": 2.0})
    assert Rollout.from_json(json.loads(json.dumps(rollout.to_json()))) == rollout


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online_stage, "judge_of", lambda context: online.letters())


def run(folder: Path, settings: Any, stop_after: int | None = None, setup: Any = None, saving: Any = None) -> Any:
    inputs = online.write_inputs(folder.parent)
    context = tiny.context(folder, inputs, settings, setup or tiny.engine(), saving=saving)
    if stop_after is not None:
        context.stop = After(context, stop_after)
    return STAGES[settings.kind].run(context)


@pytest.mark.parametrize("kind", ["grpo", "grpo_lora", "ppo_lora", "online_dpo"])
def test_interrupted_is_uninterrupted_bit_for_bit_in_the_middle_of_a_rollout(
    kind: str, tmp_path: Path, judged: None
) -> None:
    """Rollouts of two global batches, each trained on twice: stops after 2 and 5 of 8 steps leave one unfinished."""
    name, _, lora = kind.partition("_lora") if "_lora" in kind else (kind, "", None)
    own = {"grpo": {"kl": online.kl(target=0.1), "resamples": 1}}.get(name, {})
    how = {"batches_per_rollout": 2, "epochs_per_rollout": 2, "max_steps": 8}
    settings = getattr(online, name)(lora=None if lora is None else tiny.LORA, **how, **own)
    run(tmp_path / "whole", settings)
    for stop in (1, 4):
        with pytest.raises(PreemptedError, match="saved at step"):
            run(tmp_path / "parts", settings, stop_after=stop)
    run(tmp_path / "parts", settings)
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_two_answers_of_online_dpo_are_as_long_as_two_answers(
    tmp_path: Path, judged: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rotary frequencies follow the longest row beyond 40 tokens. No prompt with its answer has more, of which two are
    trained on of eight that are sampled: such a model is packed."""
    path = online.write_inputs(tmp_path)["model"] / "model" / "config.json"
    rotary = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    config = {**json.loads(path.read_text()), "rope_parameters": rotary, "max_position_embeddings": 40}
    path.write_text(json.dumps(config))
    run(tmp_path / "run", online.online_dpo(max_steps=1, completions_per_prompt=8))
    assert "records are packed" in capsys.readouterr().out


def test_answers_do_not_depend_on_how_many_are_decoded_together(tmp_path: Path, judged: None) -> None:
    found = []
    for size in (4, 16):
        run(tmp_path / str(size), online.rloo(sampling_batch_size=size, max_steps=3))
        found.append([row["reward"] for row in rows(tmp_path / str(size))])
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_layers_computed_twice_and_bf16_decode_and_train_the_same_policy(tmp_path: Path, judged: None) -> None:
    """Gradient checkpointing changes nothing; in bf16 decoding and training agree to its rounding."""
    arms = {
        "plain": ({}, {}), "twice": ({}, {"gradient_checkpointing": True}), "bf16": ({"precision": "bf16"}, {}),
    }  # fmt: skip
    for name, (settings, setup) in arms.items():
        run(tmp_path / name, online.grpo(lora=tiny.LORA, max_steps=3, **settings), setup=tiny.engine(**setup))
    assert rows(tmp_path / "twice") == rows(tmp_path / "plain")
    assert all(row["mismatch"] < 1e-5 for row in rows(tmp_path / "plain"))
    assert all(0 < row["mismatch"] < 2e-2 for row in rows(tmp_path / "bf16"))


def test_answers_without_a_reward_end_it_above_the_share_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_stage, "judge_of", lambda context: online.letters("moody"))
    with pytest.raises(InputError, match=r"\d+ of \d+ answers have no reward: letters: its value is nan"):
        run(tmp_path / "run", online.rloo(max_steps=2))


def test_a_policy_that_gives_nan_ends_its_training(tmp_path: Path, judged: None) -> None:
    start = online.write_inputs(tmp_path)["model"] / "model"
    model = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    model.save_pretrained(start)
    with pytest.raises(TrainingError, match="the policy cannot answer: the model gives log-probs that are NaN"):
        run(tmp_path / "run", online.rloo(max_steps=2))


@pytest.mark.parametrize("kind", STAGES)
def test_it_learns(kind: str, tmp_path: Path, judged: None, one_thread: None) -> None:
    """The share of letters a to m in an answer, of random bytes 0.06, is more than trebled in 16 steps, or 40 of PPO,
    which learns what answers are worth meanwhile."""
    how: dict[str, Any] = {} if kind == "online_dpo" else {"kl": online.NO_KL}
    how |= {"lam": 1.0} if kind == "ppo" else {}
    steps = 40 if kind == "ppo" else 16
    settings = getattr(online, kind)(
        max_steps=steps, learning_rate=1e-2, completions_per_prompt=8, global_batch_size=8, **how
    )
    run(tmp_path / "run", settings, setup=tiny.engine(tokens_per_micro_batch=1000))
    told = [row["reward"] for row in rows(tmp_path / "run")]
    first, last = sum(told[:3]) / 3, sum(told[-3:]) / 3
    assert len(told) == steps and last > 3 * first, (first, last)


@pytest.mark.parametrize("kind", ["online_dpo", "ppo"])
def test_the_model_written_is_the_one_trained(kind: str, tmp_path: Path, judged: None) -> None:
    run(tmp_path / "run", getattr(online, kind)(max_steps=2))
    assert (
        load_file(tmp_path / "run" / "model" / "model.safetensors").keys()
        == load_file(tmp_path / "start" / "model" / "model.safetensors").keys()
    )
    digest = hashlib.sha256((tmp_path / "start" / "model" / "model.safetensors").read_bytes()).hexdigest()
    assert weights(tmp_path / "run") != digest
