"""Settings that cannot work together are refused by plan and run alike, in one line, before anything is made."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from alignment import cli, runs
from alignment.config import shape
from alignment.config.compose import compose
from alignment.config.paths import CONF
from alignment.config.stages.reward_model import RewardModel
from alignment.errors import ConfigError

IMPOSSIBLE = {
    "stage.compare.candidate=dop": "names `dop`, which `verdict` does not compare (did you mean `dpo`?)",
    "stage.compare.baseline=strat": "names `strat`, which `verdict` does not compare (did you mean `start`?)",
    "stage.compare.candidate=start": "`stage.compare.candidate` is the baseline, start (name two of: start, sft, "
    "sft_best_of_n, dpo)",
    "stage.dpo.lora.init=pissa": "must be kaiming, gaussian or orthogonal, got 'pissa' (pissa moves a part of",
    "stage.dpo.lora.init=pissa_niter_4": "'pissa_niter_4' (pissa_niter_4 moves a part of the weights",
    "stage.dpo.lora.init=orthogonal stage.dpo.lora.rank=3": "has init orthogonal, which needs an even rank",
    "stage.sft.lora.target_modules=[q_proj] stage.sft.lora.modules_to_save=[q_proj]": "names q_proj in both",
    "model.adapter={kind:path,path:mine}": "`model.storage_precision` is bf16, which would round away some of",
    "stage.sft.lora.quantize=nf4 engine=zero3": "`engine.strategy` zero3, which would cast or cut weights of 4 bits",
    "stage.dpo.lora.quantize=nf4": "`dpo` would use none of it (leave that stage out: ~pipeline.nodes.reference ~pip",
    "launcher=torchrun engine=single": "`engine.strategy` is single, which is one process, and `launcher` gives",
    "launcher=torchrun launcher.processes=16 engine=zero2": "`stage.sft.global_batch_size` is 8, too few for 16",
    "engine=zero2 engine.offload=all": "`engine.offload` is all, which needs ZeRO-3, and `engine.strategy` is zero2",
    "engine=ddp engine.offload=optimizer": "`engine.offload` is optimizer, which needs ZeRO, and",
    "engine=zero3 engine.nvme_path=/fast": "`engine.nvme_path` is set, and `engine.offload` is none: no parameters",
    "engine=zero3 engine.quantized_weights=true": "`engine.quantized_weights` must be false, got True (8 or 4 bits a",
    "engine=zero3 engine.quantized_gradients=true": "`engine.quantized_gradients` must be false",
    "engine=zero3 engine.sequence_parallel=2": "`engine.sequence_parallel` is 2, which does not divide `launcher.proc",
    "launcher=torchrun engine=ddp engine.sequence_parallel=2 engine.compile=true": "and `engine.compile` is true",
    "launcher=torchrun engine=zero3 engine.sequence_parallel=2 engine.hpz=2": "`engine.hpz` 2: the two were not tried",
    "stage.sft.lora.quantize=nf4 engine.compile=true": "`engine.compile` was not tried with weights of 4 bits",
    "launcher=torchrun engine=ddp stage.sft.lora.quantize=nf4 engine.sequence_parallel=2": "`engine.sequence_parallel`",
    "engine=zero3 engine.compile=true": "`engine.compile` is true, and `engine.strategy` is zero3, which gathers",
    "engine.tokens_per_micro_batch=0": "`engine.tokens_per_micro_batch` must be auto or a whole number above 0, got 0",
    "engine.gradient_checkpointing=atuo": "`engine.gradient_checkpointing` must be auto, true or false, got 'atuo'",
    "engine.param_persistence_threshold=0": "`engine.param_persistence_threshold` is set, which ZeRO-3 alone knows",
    "engine.hpz=0": "`engine.hpz` should be greater than or equal to 1, got 0",
    "engine.hpz=8": "`engine.hpz` is 8, which ZeRO-3 alone knows, and `engine.strategy` is single",
    "launcher=torchrun launcher.processes=4 engine=zero3 engine.hpz=3": "`engine.hpz` is 3, which does not divide `lau",
    "engine.offload=all": "`engine.offload` is all, which needs ZeRO, and `engine.strategy` is single",
    "stage.sft.lora.dropout=0.1": "`stage.sft.lora.dropout` must be 0.0, got 0.1 (its masks would make results depend",
    "stage.dpo.lora.dropout=0.1": "`stage.dpo.lora.dropout` must be 0.0, got 0.1 (its masks would make results depend",
    "reward.terms.relevance.source=null": "`reward.terms.relevance.source` is null, and a relevance term needs",
    "+reward.terms.kl={kind:sentiment,weight:1.0,source:null}": "`reward.terms.kl` has the name of another number",
    "stage.prepare_sft.dataset=null": "`stage.prepare_sft.dataset` is null, and `task` is sft (name one of: instr",
    "~pipeline.nodes.pairs.inputs.data": "`stage.prepare_preference.dataset` is null, and `pairs` is given no pairs",
    "stage.prepare_preference.dataset=preferences": "`pipeline.nodes.pairs.inputs.data` names `judged`: rows have one",
    "stage.prepare_sft.against=[bench]": "`stage.prepare_sft.against` names `bench`, which the data group lacks",
    "stage.prepare_sft.against=[instructions]": "names `instructions`, and so does `stage.prepare_sft.dataset` (train",
    "stage.prepare_sft.against=[preferences] checks.contamination_share=null": "`checks.contamination_share` is null",
    "stage.prepare_sft.dataset=instruction": "names `instruction`, which the data group lacks (did you mean `instruc",
    "stage.prepare_sft.task=preference": "`stage.prepare_sft.task` is preference, and `data.instructions.format` is",
    "stage.prepare_sft.max_prompt_length=81": "`stage.prepare_sft.max_prompt_length` is 81, more than the whole row's",
    "stage.prepare_sft.max_length=40": "`stage.prepare_sft.max_prompt_length` is 56, more than the whole row's",
    "stage.prepare_sft.splits.prompts=0": "`stage.prepare_sft.splits.prompts` is 0, and `samples` needs such rows",
    "stage.prepare_sft.splits.heldout=0": "`stage.prepare_sft.splits.heldout` is 0, and `evaluate_start` needs such",
    "+pipeline.nodes.pairs.inputs.heldout=samples": "names `samples`, which makes samples, not rows (nodes that make",
    "pipeline.final=verdict": "`pipeline.final` names `verdict`, which makes a verdict, not a model",
    "pipeline.nodes.dpo.inputs.model=rows": "names `rows`, which makes rows, not a model (nodes that make a model: st",
    "pipeline.nodes.dpo.inputs.data=rows": "`stage.prepare_sft.task` is sft, and `dpo` trains on rows for preference",
    "pipeline.nodes.dpo.inputs.model=start": "`dpo` has the model `start`, and its reference, `reference`, `sft` (",
    "stage.reference.precision=bf16": "`stage.reference.precision` is bf16, and `stage.dpo.precision` fp32: `dpo`",
    "stage.evaluate.best_of=4": "`stage.evaluate.best_of` is 4, and `stage.evaluate.temperature` 0: the bound of its",
    "stage.judge.pairs=none": "`stage.judge.pairs` is none, and nothing else is asked of it (stage.judge.best=true",
    "stage.judge.pairs=none stage.judge.best=true": "`stage.prepare_preference.task` is preference, and `stage.judge`",
    "stage.sample.prompts=1000": "`stage.sample.prompts` is 1000, and `stage.prepare_sft.splits.prompts` ",
    "stage.sample.first_prompt=100": "`stage.sample.first_prompt` is 100, and `stage.prepare_sft.splits.prompts` ",
    "stage.sample.first_prompt=79 stage.sample.prompts=9": "`stage.sample.prompts` is 9 after the first 79, and `stage",
    "stage.sample.completions_per_prompt=1": "`stage.sample.completions_per_prompt` is 1, and a pair needs two answers",
    "~pipeline.nodes.dpo.inputs.model": "`pipeline.nodes.dpo.inputs` lacks the role `model`",
}


# What `run` is asked too; the others are asked of `plan`, which composes alike (tests/test_cli.py).
RUN = [
    "stage.compare.candidate=dop",
    "stage.dpo.lora.init=pissa",
    "launcher=torchrun engine=single",
    "~pipeline.nodes.pairs.inputs.data",
]


@pytest.mark.parametrize(
    ("command", "overrides"), [*(("plan", one) for one in IMPOSSIBLE), *(("run", one) for one in RUN)]
)
def test_an_impossible_setting_is_one_line_and_leaves_nothing(
    command: str, overrides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ALIGNMENT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(runs.Session, "execute", lambda *_: pytest.fail("nothing refused it"))
    assert cli.main([command, "experiment=quickstart", *overrides.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    where = in_conf("stage/prepare_preference.yaml", "dataset:") if "pairs.inputs.data" in overrides else "command line"
    assert line.startswith(f"alignment: error: {where}: ")
    assert IMPOSSIBLE[overrides] in line
    assert not (tmp_path / "store").exists()


def in_conf(file: str, beginning: str) -> str:
    """How an error names the line of conf/ that begins so."""
    lines = (CONF / file).read_text().splitlines()
    return f"conf/{file}:{1 + next(i for i, line in enumerate(lines) if line.strip().startswith(beginning))}"


def with_own(folder: Path, experiment: str) -> tuple[Path, list[str]]:
    """The file of an experiment of one's own, and the command that plans it."""
    file = folder / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"# @package _global_\n{experiment}")
    return file, ["plan", "--config-dir", str(folder), "experiment=mine", f"store={folder / 'store'}"]


def test_an_impossible_setting_of_a_file_names_the_file_and_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plan = with_own(tmp_path, "stage:\n  compare:\n    seed: 1\n    candidate: dop\n")
    assert cli.main(plan) == 2
    assert f"error: {file}:5: `stage.compare.candidate` names `dop`" in capsys.readouterr().err


def test_a_setting_of_a_file_for_a_term_that_is_not_chosen_is_told_how_to_leave_it_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plan = with_own(tmp_path, "reward:\n  terms:\n    relevance:\n      weight: 0.7\n")
    assert cli.main([*plan, "reward=length"]) == 2
    told = capsys.readouterr().err
    assert f"{file}:4: `reward.terms.relevance` is set" in told
    assert "(choose what does, or leave it out: '~reward.terms.relevance')" in told
    assert cli.main([*plan, "reward=length", "~reward.terms.relevance"]) == 0


def test_a_file_that_the_command_line_chooses_is_named_for_its_own_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "engine").mkdir()
    text = (CONF / "engine" / "ddp.yaml").read_text()
    (tmp_path / "engine" / "mine.yaml").write_text(text.replace("threads: null", "threads: 0"))
    assert cli.main(["plan", "--config-dir", str(tmp_path), "engine=mine"]) == 2
    line = 1 + [line.split(":")[0] for line in text.splitlines()].index("threads")
    assert f"{tmp_path / 'engine' / 'mine.yaml'}:{line}: `engine.threads`" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides",
    [
        "pipeline=sft stage.sft.max_steps=1 reward=sentiment",
        "pipeline=dpo data.preferences.limit=100",
        "launcher=torchrun launcher.processes=1",
        "launcher=torchrun launcher.processes=8 engine=zero3 engine.offload=all",
        "engine=zero1 engine.offload=optimizer",
        "launcher=torchrun launcher.processes=8 engine=zero3 engine.hpz=4",
        "pipeline.final=sft",
        "stage.prepare_sft.max_prompt_length=128",
        "data=path data.instructions.source.path=rows.jsonl",
    ],
)
def test_what_the_pipeline_does_not_use_and_what_is_possible_is_let_through(overrides: str) -> None:
    compose(overrides.split())


SHARERS = "engine=zero2 launcher=torchrun launcher.processes=2 engine.sequence_parallel=2"
OTHERS = {
    f"pipeline=kto {SHARERS}": None,
    "pipeline=dpo loss=simpo stage.dpo.lora.quantize=nf4": None,
    f"pipeline=sft_ppo {SHARERS}": "`ppo` is a stage of kind ppo (engine.sequence_parallel=1: sft, dpo, kto "
    "and reference alone share packs)",
    f"pipeline=sft_reward_model {SHARERS}": "a stage of kind reward_model (engine.sequence_parallel=1",
    "pipeline=kto stage.kto.desirable_weight=0 stage.kto.undesirable_weight=0": "are both 0: nothing would be learned",
    "pipeline=kto pipeline.nodes.best_of_n.inputs.model=answers": "names `answers`, which makes rows, not a model",
    "pipeline=dpo stage.dpo.loss=hinge stage.dpo.label_smoothing=0.1": "is 0.1, and hinge smooths no labels (stage.dpo",
    "pipeline=dpo stage.dpo.loss=[sigmoid]": "`stage.dpo.loss` is neither a name nor names with weights (stage.dpo.los",
    "pipeline=sft_rloo loss=simpo": "command line: `stage.dpo` is set by loss=simpo, but the pipeline has no such st",
    "experiment=rlhf reward=model": None,
    "reward=length +reward.terms.form.weight=1": "is chosen brings its `kind` (choose what does, or leave it out)",
    "experiment=rlhf pipeline=sft_grpo": "`pipeline.nodes.rloo` is set, but the pipeline has no such node; 1 more",
    "experiment=rlhf ~pipeline.nodes.best_of_n.inputs.reward_model": "and `best_of_n` no role `reward_model`",
}


@pytest.mark.parametrize("overrides", OTHERS)
def test_what_other_pipelines_cannot_be_is_one_line(overrides: str) -> None:
    """None: it can be."""
    if (line := OTHERS[overrides]) is None:
        compose(overrides.split())
        return
    with pytest.raises(ConfigError) as told:
        compose(overrides.split())
    assert line in str(told.value) and "\n" not in str(told.value)


SCORED = "stage.prepare_preference.task=scored data.preferences.format=scored"
LABELS = "+stage@stage.labels=prepare_preference stage.labels.task=unpaired stage.labels.dataset=preferences"
LABELS += " stage.labels.splits.heldout=9 +pipeline.nodes.labels={stage:labels,inputs:{model:sft}}"
REWARDS = {
    "pipeline.nodes.evaluate_all.inputs.model_2=member_1": "names `member_1`, the same model as",
    "stage.reward_model_2.seed=1001": "names `member_2`, the same model as",
    f"{SCORED} stage.reward_model.loss=bce stage.reward_model_3.loss=mse": "are trained with different losses",
    f"{SCORED} stage.reward_model.margin=1.0 stage.reward_model.loss=bce": "`stage.reward_model.margin` is 1.0, wh",
    "stage.reward_model.loss=bce": "`stage.prepare_preference.task` is preference, and `member_1` trains on rows for s",
    "pipeline.nodes.evaluate_one.inputs.model=sft": "names `sft`, which makes a model, not a reward model",
    "stage.reward_model.lora.quantize=nf4": "`stage.reward_model.lora.quantize` is nf4, which was not tried",
    "objective=[reward]": "`objective` names `reward`, which no evaluation measures",
    "stage.prepare_preference.splits.heldout=0": "is 0, and `evaluate_one` needs such rows",
    "stage.reward_model.label_smoothing=0.5": "`stage.reward_model.label_smoothing` should be less than 0.5",
    "pipeline.nodes.evaluate_one.inputs.data=rows": "`stage.prepare_sft.task` is sft, and `evaluate_one` nee",
    f"{LABELS} pipeline.nodes.evaluate_one.inputs.data=labels": "`stage.labels.task` is unpaired, and `evaluate_one`",
}


@pytest.mark.parametrize("overrides", REWARDS)
def test_reward_models_that_cannot_be_are_refused(overrides: str) -> None:
    settings = ["pipeline=sft_reward_ensemble", "data=quickstart", "stage.prepare_sft.splits.heldout=1"]
    with pytest.raises(ConfigError) as caught:
        compose([*settings, *overrides.split()])
    assert REWARDS[overrides] in str(caught.value)


def test_a_model_is_not_merged_with_itself() -> None:
    with pytest.raises(ConfigError, match=r"`pipeline.nodes.merged.inputs.other` names `sft`, as"):
        compose(["pipeline=sft_dpo_merge", "pipeline.nodes.merged.inputs.other=sft"])


def test_members_of_an_ensemble_follow_the_first_in_all_that_can_change_a_result_but_the_seed() -> None:
    file = yaml.safe_load((CONF / "pipeline" / "sft_reward_ensemble.yaml").read_text())["stage"]
    keys = {name for name, field in RewardModel.model_fields.items() if shape.side(field) == "identity"}
    for member in ("reward_model_2", "reward_model_3"):
        followed = {name for name, value in file[member].items() if value == f"${{stage.reward_model.{name}}}"}
        assert followed | {"seed", "kind"} == keys
