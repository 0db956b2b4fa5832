"""Online stages: equal to TRL on the same answers, whatever the split; interrupted as not interrupted; they learn."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from alignment.errors import InputError, MachineError, PreemptedError, TrainingError
from alignment.files import read_jsonl
from alignment.pipeline.store import NEXT, ROLLOUTS
from alignment.rewards import Judge
from alignment.stages import grpo as grpo_stage
from alignment.stages import online as online_stage
from alignment.stages import online_dpo as online_dpo_stage
from alignment.stages import ppo as ppo_stage
from alignment.stages import rloo as rloo_stage
from alignment.training.online_preference import OnlineDPOTrainer
from alignment.training.policy_gradient import PolicyGradientTrainer
from alignment.training.ppo import PPOTrainer
from alignment.training.rollouts import Group
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
    parts, whole = ((tmp_path / name / ROLLOUTS).read_bytes() for name in ("parts", "whole"))
    assert parts == whole and [json.loads(line)["step"] for line in whole.splitlines()] == [1, 5]


def test_some_of_the_answers_are_written_down_evenly(
    tmp_path: Path, judged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the first prompt of a rollout all, with their rewards: of 8 rollouts of the first, the last and a third."""
    monkeypatch.setattr(online_stage, "WRITTEN", 3)
    monkeypatch.setattr(online_stage, "judge_of", lambda context: online.letters("letters", "moody"))
    run(tmp_path / "run", online.rloo(max_steps=8))
    told = [json.loads(line) for line in (tmp_path / "run" / ROLLOUTS).read_text().splitlines()]
    assert [(row["rollout"], row["step"]) for row in told] == [(1, 1), (5, 5), (8, 8)]
    prompts = {row["id"]: row["prompt"] for row in read_jsonl(online.write_inputs(tmp_path)["data"] / "prompts.jsonl")}
    logged = rows(tmp_path / "run")
    for row in told:
        assert row["prompt"] == prompts[row["id"]] and len(row["completions"]) == 4
        for one in row["completions"]:
            assert one["reward"] == one["terms"]["letters"] and 1 <= one["tokens"] <= 8
    assert logged[0]["reward"] > 0 and any(one["completion"] for row in told for one in row["completions"])


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


@pytest.mark.parametrize(("processes", "visible", "chosen"), [(4, "0,1,2,3", [2]), (1, "0", [])])
def test_a_process_has_its_gpu_before_the_judge_has_its_models(
    processes: int, visible: str, chosen: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Process 2 of a machine with four: else all judges are loaded to the first GPU. One process sees one GPU."""
    taken: list[int] = []

    def judge_of(context: Any) -> Any:
        assert taken == chosen and os.environ["CUDA_VISIBLE_DEVICES"] == visible
        raise InputError("here the judge is asked for")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(online_stage, "judge_of", judge_of)
    context = tiny.context(tmp_path / "run", online.write_inputs(tmp_path), online.rloo(), tiny.engine("ddp"))
    with pytest.raises(InputError, match="here the judge is asked for"):
        rloo_stage.run(replace(context, world_size=processes))


def test_answers_without_a_reward_end_it_above_the_share_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(online_stage, "judge_of", lambda context: online.letters("moody"))
    with pytest.raises(InputError, match=r"terms.letters: \d+ of \d+ answers have no reward: its value is nan"):
        run(tmp_path / "run", online.rloo(max_steps=2))


def test_a_term_that_is_only_watched_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For about half of all answers; what it is for the others, 1 each, is told, and training is as without it."""
    for watched in (None, "moody"):
        judge = online.letters("letters", watched)
        monkeypatch.setattr(online_stage, "judge_of", lambda context, judge=judge: judge)
        run(tmp_path / str(watched), online.rloo(max_steps=2))
    assert weights(tmp_path / "moody") == weights(tmp_path / "None")
    assert all((row["reward_failed"], row["reward/moody"]) == (0, 1) for row in rows(tmp_path / "moody"))


def test_a_run_that_could_learn_nothing_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for judge in ("letters", "all_alike"):
        monkeypatch.setattr(online_stage, "judge_of", lambda context, judge=judge: online.letters(judge))
        run(tmp_path / judge, online.rloo(max_steps=2))
        told = "no prompt had answers of unequal reward in any of 2 logged steps: of the reward nothing was learned"
        assert (told in capsys.readouterr().out) is (judge == "all_alike")


@pytest.mark.parametrize("more", [0, 1])
def test_a_batch_that_has_rows_more_than_once_is_told(
    more: int, tmp_path: Path, judged: None, capsys: pytest.CaptureFixture[str]
) -> None:
    count = len(list(read_jsonl(online.write_inputs(tmp_path)["data"] / "prompts.jsonl")))
    run(tmp_path / "run", online.rloo(max_steps=1, global_batch_size=count + more))
    told = f"global_batch_size is {count + 1}, and there are {count} rows: a batch has rows more than once"
    assert (told in capsys.readouterr().out) is bool(more)


def test_who_waits_for_a_judge_reads_that_it_judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 answers a rollout, in the file that the terminal shows, before the first is judged."""
    judge, score, seen = online.letters(), Judge.score, []

    def look(self: Judge, *given: Any) -> Any:
        seen.append(json.loads((tmp_path / "run" / "progress.json").read_text())["note"])
        return score(self, *given)

    monkeypatch.setattr(Judge, "score", look)
    monkeypatch.setattr(online_stage, "judge_of", lambda context: judge)
    run(tmp_path / "run", online.rloo(max_steps=2))
    assert seen == ["judging 0/16"] * 2


def test_a_policy_that_gives_nan_ends_its_training(tmp_path: Path, judged: None) -> None:
    start = online.write_inputs(tmp_path)["model"] / "model"
    model = AutoModelForCausalLM.from_pretrained(start)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = torch.nan
    model.save_pretrained(start)
    with pytest.raises(TrainingError, match="the policy cannot answer: the model gives log-probs that are NaN"):
        run(tmp_path / "run", online.rloo(max_steps=2))


def test_too_many_answers_at_once_are_no_reason_to_try_again_with_smaller_micro_batches(
    tmp_path: Path, judged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 prompts with 4 answers each, of which half are 8."""

    def refuse(self: Any, *given: Any, logits_to_keep: int = 0, **how: Any) -> Any:
        if logits_to_keep:  # decoding
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 100.00 GiB.")
        return forward(self, *given, **how)

    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(LlamaForCausalLM, "forward", refuse)
    with pytest.raises(MachineError, match=r"out of memory: 16 answers .*stage\.\*\.sampling_batch_size=8") as caught:
        run(tmp_path / "run", online.rloo(max_steps=2), setup=tiny.engine(adapt=True))
    assert not caught.value.retry and not (tmp_path / "run" / NEXT).exists()


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
def test_the_model_written_is_the_one_trained(
    kind: str, tmp_path: Path, judged: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the last step, and nothing beside it: no value head."""
    last, step = {}, KINDS[kind].training_step

    def noted(self: Any, *given: Any) -> Any:
        last["trainer"] = self
        return step(self, *given)

    monkeypatch.setattr(KINDS[kind], "training_step", noted)
    run(tmp_path / "run", getattr(online, kind)(max_steps=2))
    written, start = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "start"))
    trained = last["trainer"]._plain_model().state_dict()
    assert written.keys() == start.keys() and any(not torch.equal(written[name], start[name]) for name in start)
    for name, value in written.items():
        torch.testing.assert_close(value, trained[name], atol=0, rtol=0)
