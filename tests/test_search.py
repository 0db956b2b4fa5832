"""What Optuna asks for and is told: trials that end, fail or are hopeless; one metric or several; the same again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
from omegaconf import DictConfig, OmegaConf
from optuna.trial import TrialState

from alignment import hydra_app, search
from alignment.config.compose import compose
from alignment.config.schema import Experiment
from alignment.config.stages.preference import Dpo
from alignment.errors import ConfigError, LostError, MachineError
from alignment.reporting.judges import deciding
from alignment.runs import Session
from alignment.search import Pruned
from alignment.signals import Listener

Answer = Callable[[int, Experiment], Any]
BETA = "stage.dpo.beta=tag(log, interval(0.01, 1.0))"


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Experiment]]:
    """sweep(answer, *settings): Hydra's multirun with Optuna, in which answer(number, experiment) is what becomes of a
    trial. Returns what was asked for; the words of what was refused go into `refused`. The study lies in study.db. A
    setting without a value is left at its default."""
    monkeypatch.chdir(tmp_path)

    def run(
        answer: Answer, *settings: str, vary: tuple[str, ...] = (BETA,), refused: list[str] | None = None
    ) -> list[Experiment]:
        asked: list[Experiment] = []

        def execute(points: Sequence[hydra_app.Point | hydra_app.Refused], master: DictConfig | None) -> list[Any]:
            assert master is not None
            values: list[Any] = []
            for point in points:
                if isinstance(point, hydra_app.Refused):
                    values.append(point.error)
                    if refused is not None:
                        refused.append(str(point.error))
                    continue
                search.objective(master, point.experiment)
                values.append(answer(len(asked), point.experiment))
                asked.append(point.experiment)
            return values

        given = [
            *("-m", "experiment=quickstart", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=6"),
            *("hydra.sweeper.n_jobs=2", "hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=1.0"),
            *("hydra.sweeper.sampler.seed=0", "hydra.sweeper.study_name=s", "hydra.sweeper.storage=sqlite:///study.db"),
        ]
        names = [setting.split("=")[0] for setting in settings]
        kept = [setting for setting in given if setting.split("=")[0] not in names]
        assert hydra_app.main([*kept, *(one for one in settings if one[0] == "~" or "=" in one), *vary], execute) == 0
        return asked

    return run


def told() -> optuna.Study:
    return optuna.load_study(study_name="s", storage="sqlite:///study.db")


def states() -> list[str]:
    return [trial.state.name for trial in told().trials]


def beta(experiment: Experiment) -> float:
    dpo = experiment.stage["dpo"]
    assert isinstance(dpo, Dpo)
    return dpo.beta


def of_beta(number: int, experiment: Experiment) -> float:
    return -abs(beta(experiment) - 0.1)


def test_each_trial_is_told_what_it_came_to(sweep: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ends = {1: Pruned("loss 9 at best"), 2: LostError("rank 0 was killed"), 4: None}
    asked = sweep(lambda number, experiment: ends.get(number, float(number)))
    assert states() == ["COMPLETE", "PRUNED", "FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert [trial.value for trial in told().trials if trial.state == TrialState.COMPLETE] == [0.0, 3.0, 5.0]
    assert [trial.params["stage.dpo.beta"] for trial in told().trials] == [beta(experiment) for experiment in asked]
    out, err = capfd.readouterr()
    assert [line.split(" (")[0] for line in out.splitlines()[:2]] == [
        "✗ trial 4",
        "6 trials: 3 done, 1 pruned, 2 failed",
    ]
    assert out.splitlines()[2] == f"best: reward 5.000  with stage.dpo.beta={beta(asked[5])}"
    assert err == "", "one line for a failed trial, and that is its own"


def test_the_same_command_asks_for_the_same_trials_and_what_it_learned_matters(sweep: Any) -> None:
    given = ("hydra.sweeper.n_trials=14", "hydra.sweeper.sampler.n_startup_trials=4", "hydra.sweeper.storage=null")
    first, again = (list(map(beta, sweep(of_beta, *given))) for _ in range(2))
    assert first == again
    assert first != list(map(beta, sweep(lambda number, experiment: -of_beta(number, experiment), *given)))


def test_several_metrics_have_a_direction_each(sweep: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ends: dict[int, Any] = {0: (1.0, 5.0), 1: (2.0, 9.0), 2: (0.5, 9.0), 3: Pruned("hopeless")}
    both = ["objective=[reward,kl]", "hydra.sweeper.direction=[maximize,minimize]", "hydra.sweeper.n_trials=4"]
    sweep(lambda number, experiment: ends[number], *both)
    assert states() == ["COMPLETE"] * 3 + ["PRUNED"]
    assert sorted(trial.values for trial in told().best_trials) == [[1.0, 5.0], [2.0, 9.0]]
    out = capfd.readouterr().out
    assert "2 that no other beats in all of reward, kl:" in out
    assert out.count("best: reward ") == 2 and "log-ratio to ref. 5.00" in out


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "nsgaii", "motpe", "grid"])
def test_every_sampler_takes_pruned_and_failed_trials(sampler: str, sweep: Any) -> None:
    ends = {1: Pruned("hopeless"), 2: LostError("gone")}
    how, vary = [f"hydra/sweeper/sampler={sampler}"], (BETA, "stage.dpo.learning_rate=tag(log, interval(1e-5, 1e-3))")
    if sampler == "grid":
        how, vary = [*how, "hydra.sweeper.sampler.seed"], ("stage.dpo.beta=choice(0.1,0.2,0.3,0.4,0.5,0.6)",)
    several = sampler in ("nsgaii", "motpe")
    if several:
        how += ["objective=[reward,kl]", "hydra.sweeper.direction=[maximize,minimize]"]
    asked = sweep(lambda n, e: ends.get(n, (float(n), 1.0) if several else float(n)), *how, vary=vary)
    assert sorted(states()) == ["COMPLETE"] * 4 + ["FAIL", "PRUNED"]
    assert len(asked) == 6 and (sampler != "grid" or len(set(map(beta, asked))) == 6)


def test_too_many_failures_at_once_end_the_search(sweep: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ends = {2: LostError("gone"), 3: Pruned("hopeless")}
    asked = sweep(lambda number, experiment: ends.get(number, 1.0), "hydra.sweeper.max_failure_rate=0.4")
    assert len(asked) == 4
    assert "the search ends: 1 of 2 trials have failed (hydra.sweeper.max_failure_rate=0.4)" in capfd.readouterr().out


def test_if_all_fail_there_is_no_best(sweep: Any, capfd: pytest.CaptureFixture[str]) -> None:
    sweep(lambda number, experiment: LostError("gone"))
    assert capfd.readouterr().out.splitlines()[-1] == "6 trials: 6 failed"


def test_settings_that_do_not_fit_together_are_one_failed_trial(sweep: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """One by one they are right: a prompt may have at most 96 tokens, a row 128 or, in this trial, 9."""
    lengths = "stage.prepare_sft.max_length=choice(9,128)"
    asked = sweep(of_beta, "hydra/sweeper/sampler=grid", "hydra.sweeper.sampler.seed", vary=(lengths,))
    assert len(asked) == 1
    assert sorted(states()) == ["COMPLETE", "FAIL"]
    assert "2 trials: 1 done, 1 failed" in capfd.readouterr().out


def test_what_hydra_refuses_is_one_failed_trial_in_the_words_of_a_grid(sweep: Any) -> None:
    refused: list[str] = []
    given = ("hydra/sweeper/sampler=grid", "hydra.sweeper.sampler.seed", "hydra.sweeper.n_jobs=1")
    vary = ("engine=choice(zero2,zer3,zero3)",)
    asked = sweep(lambda number, experiment: 1.0, *given, vary=vary, refused=refused)
    assert {experiment.engine.strategy for experiment in asked} == {"zero2", "zero3"}
    assert sorted(states()) == ["COMPLETE", "COMPLETE", "FAIL"]
    with pytest.raises(ConfigError) as grids:
        hydra_app.main(["-m", "experiment=quickstart", "engine=zero2,zer3,zero3"], lambda points, master: [])
    assert refused == [str(grids.value)]
    assert "no engine is called 'zer3' (did you mean engine=zero3?)" in refused[0]


def test_if_the_first_trial_is_refused_the_others_go_on(sweep: Any) -> None:
    """Also if that happens again, as long as another value may do: of two, a choice draws the same one often."""
    lengths = "stage.prepare_sft.max_length=choice(9,128)"
    given = ("hydra.sweeper.sampler.seed=4", "hydra.sweeper.n_jobs=1")  # by this seed it begins with three of 9
    sweep(lambda number, experiment: 1.0, *given, vary=(lengths, BETA))
    assert states() == ["FAIL"] * 3 + ["COMPLETE"] * 2 + ["FAIL"]


def test_by_the_packages_own_rate_the_first_refusal_ends_the_search(
    sweep: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ("hydra.sweeper.max_failure_rate=0.0", "hydra.sweeper.n_jobs=1")
    assert sweep(of_beta, *given, vary=("stage.prepare_sft.max_length=range(8,10)",)) == []
    assert "the search ends: 1 of 1 trials have failed (hydra.sweeper.max_failure_rate=0)" in capfd.readouterr().out


@pytest.mark.parametrize(
    "vary",
    [
        ("stage.dpo.bta=interval(0.01,1)",),
        ("stage.dpo.bta=choice(0.1,0.2)", "seed=choice(3)"),
        ("+stage.dpo.bta=range(1,9)", BETA),
        (BETA, "seed=-1"),
        ("seed=-1",),
    ],
    ids=" ".join,
)
def test_what_no_value_can_mend_ends_the_search(vary: tuple[str, ...], sweep: Any) -> None:
    refused: list[str] = []
    with pytest.raises(ConfigError) as caught:
        sweep(of_beta, "hydra.sweeper.n_jobs=1", "hydra.sweeper.n_trials=40", vary=vary, refused=refused)
    assert set(refused) == {str(caught.value)} and len(refused) < 20
    right = "did you mean `stage.dpo.beta`?" if "bta" in vary[0] else "`seed` should be greater than or equal to 0"
    assert right in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (["objective=[reward,kl]"], "`hydra.sweeper.direction` has 1 of them, and `objective` names 2: reward, kl"),
        (["objective=[rewrd]"], "`objective` names `rewrd`, which no evaluation measures (did you mean `reward`?)"),
        (["hydra.sweeper.direction=[max]"], "`hydra.sweeper.direction` is max (one of: minimize, maximize)"),
        (["hydra.sweeper.n_jobs=0"], "hydra.sweeper.n_jobs: n_jobs is 0 (at least 1)"),
        (["hydra.sweeper.n_trials=-1"], "hydra.sweeper.n_trials: n_trials is -1 (at least 1)"),
        (["hydra.sweeper.n_jobs=0.5"], "command line: `hydra.sweeper.n_jobs`: Value '0.5' of type 'float' could not"),
        (["seed=range(3,1)"], "command line: `seed` goes from 3 to 1 (the lower end comes first"),
        (["stage.dpo.beta=tag(log, interval(1.0,0.1))"], "command line: `stage.dpo.beta` goes from 1.0 to 0.1"),
        (["hydra.sweeper.max_failure_rate=2"], "hydra.sweeper.max_failure_rate: max_failure_rate is 2"),
        (
            ["~pipeline.nodes.evaluate_dpo", "~pipeline.nodes.verdict"],
            "the pipeline evaluates no final model (choose a pipeline with an evaluation",
        ),
    ],
)
def test_what_cannot_be_looked_for_is_one_line(settings: list[str], line: str, sweep: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        sweep(of_beta, *settings)
    assert line in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "vary"),
    [
        ("reward", "reward.terms.sentiment.weight=interval(0.1,2)"),
        ("reward", "reward=choice(sentiment,length)"),
        ("relevance", "reward.terms.relevance.source.version=choice(a,b)"),
        ("reward", "++reward.terms.sentiment.weight=interval(0.1,2)"),
    ],
)
def test_a_search_is_not_among_judges(metric: str, vary: str, sweep: Any) -> None:
    """Or the largest weight would be the best one."""
    said = rf"`{vary.partition('=')[0].lstrip('+')}` is varied, and decides how {metric} is measured"
    with pytest.raises(ConfigError, match=said) as caught:
        sweep(of_beta, f"objective=[{metric}]", vary=(vary,))
    assert caught.value.where == "objective"


@pytest.mark.parametrize(
    "vary",
    [
        "stage.reward_model.learning_rate=interval(1e-5,1e-4)",
        "stage.sft.learning_rate=interval(1e-5,1e-4)",
        "data.preferences.max_rows=choice(100,200)",
        "model=choice(demo,tiny)",
        "pipeline.nodes.evaluate_rloo.inputs.reward_model=choice(reward_model,sft)",
        "pipeline.nodes.pairs.inputs.model=choice(sft,start)",
    ],
)
def test_a_reward_model_that_judges_is_not_searched_by_what_it_says(vary: str, sweep: Any) -> None:
    """`experiment=rlhf` trains one on given pairs from the SFT model, and RLOO and the evaluations read it."""
    said = rf"`{vary.partition('=')[0]}` is varied, and decides how reward is"
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        sweep(of_beta, "experiment=rlhf", "objective=[reward]", vary=(vary,))


@pytest.mark.parametrize(
    ("setting", "vary"),
    [
        ("objective=[sentiment]", "stage.reward_model.learning_rate=interval(1e-5,1e-4)"),
        ("reward.terms.preference.weight=0.0", "stage.reward_model.learning_rate=interval(1e-5,1e-4)"),
        ("objective=[kl]", "stage.sft.learning_rate=interval(1e-5,1e-4)"),
        ("objective=[reward]", "stage.reward_model.seed=range(0,3)"),
        ("objective=[reward]", "stage.rloo.learning_rate=interval(1e-5,1e-4)"),
        ("objective=[reward]", "stage.reward_model.log_every=range(1,3)"),
    ],
)
def test_what_trains_no_judge_of_the_metric_may_be_searched(setting: str, vary: str, sweep: Any) -> None:
    weighed = "reward.terms.sentiment.weight=1.0"  # or a reward without the model's term would be none
    sweep(lambda number, experiment: 1.0, "hydra.sweeper.n_trials=1", "experiment=rlhf", weighed, setting, vary=(vary,))
    assert states() == ["COMPLETE"]


@pytest.mark.parametrize(
    ("term", "vary"),
    [
        ("reward=[sentiment,length] reward.terms.length.weight=0.0", "reward.terms.length.low=range(1,3)"),
        ("reward=endpoint reward.terms.judge.url=http://localhost:1/v1 reward.terms.judge.model=m",
         "reward.terms.judge.timeout_s=interval(1.0,9.0)"),
    ],
    ids=["of weight 0", "in no key"],
)  # fmt: skip
def test_what_does_not_decide_the_reward_may_be_searched(term: str, vary: str, sweep: Any) -> None:
    sweep(
        lambda number, experiment: 1.0,
        "hydra.sweeper.n_trials=1",
        "experiment",
        "pipeline=rloo",
        *term.split(),
        vary=(vary,),
    )
    assert states() == ["COMPLETE"]


def test_what_decides_a_metric_is_told_of_configs_that_nobody_has_validated() -> None:
    """A model that is trained by RLOO is made of the reward too, and no evaluation compares pairs."""
    model = {"kind": "model", "roles": "reward_model", "weight": 1.0}
    nodes = {
        "rm": {"stage": "rm", "inputs": {"model": "on"}}, "on": {"stage": "on", "inputs": {"model": "start"}},
        "eval": {"stage": "eval", "inputs": {"reward_model": "rm", "model": 3, 4: "on"}}, "odd": 3,
        "other": {"stage": "none"},
    }  # fmt: skip
    stages = {"rm": {"kind": "reward_model"}, "on": {"kind": "rloo"}, "eval": {"kind": "evaluate"}, "odd": None}
    config = {"reward": {"terms": {"m": model, "odd": None}}, "pipeline": {"nodes": nodes}, "stage": stages}
    assert deciding(["reward.comparison.model", "reward.comparison"], "reward", config) is None
    assert deciding(["reward.terms.other.low"], "m", config) == "reward.terms.other.low", "RLOO was taught by it"
    assert deciding(["stage.on.beta", "stage.on.epochs"], "m", config) == "stage.on.epochs"
    assert deciding(["reward.terms.m.timeout_s", "reward.max_failed_share"], "m", config) is None
    assert deciding(["reward.terms.url"], "reward", config) == "reward.terms.url", "a term of that name"
    assert deciding(["pipeline.nodes.rm.inputs.model"], "reward", config) == "pipeline.nodes.rm.inputs.model"
    for empty in ({}, {"reward": None}, {"reward": {"terms": {"m": model}}, "pipeline": [1], "stage": None}):
        assert deciding(["stage.rm.epochs"], "reward", empty) is None


def test_a_term_s_weight_may_be_searched_by_what_it_does_not_decide(sweep: Any) -> None:
    varied = ("reward.terms.sentiment.weight=interval(0.1,2)",)
    sweep(of_beta, "objective=[relevance]", "hydra.sweeper.n_trials=1", vary=varied)
    assert states() == ["COMPLETE"]


def test_a_study_that_cannot_be_kept_is_one_line_without_its_password(sweep: Any) -> None:
    for storage in ("sqlite:////nowhere/x.db", "mysql://me:hunter2@nowhere/x", "x"):
        with pytest.raises(MachineError) as caught:
            sweep(of_beta, f"hydra.sweeper.storage='{storage}'")
        shown = "[removed]" if "hunter2" in storage else storage
        assert str(caught.value).startswith(f"hydra.sweeper.storage={shown}: the study cannot be kept: ")
        assert "\n" not in str(caught.value) and "hunter2" not in str(caught.value)
        assert "sqlalche.me" not in str(caught.value)


@pytest.mark.parametrize(
    ("metric", "way", "line"),
    [
        ("reward", "minimize", "minimize for reward, of which more is better"),
        ("repetition", "maximize", "maximize for repetition, of which less is better"),
        ("sentiment", "minimize", "minimize for sentiment, of which more is better"),
        ("kl", "maximize", ""),
        ("reward", "maximize", ""),
    ],
)
def test_a_direction_that_looks_for_the_worst_is_worth_a_warning(
    metric: str, way: str, line: str, sweep: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    sweep(of_beta, f"objective=[{metric}]", f"hydra.sweeper.direction={way}", "hydra.sweeper.n_trials=1")
    out = capfd.readouterr().out
    assert (f"warning: hydra.sweeper.direction is {line}" in out) if line else ("warning" not in out)


def test_of_a_term_that_the_reward_subtracts_a_sweep_looks_for_the_least(
    sweep: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    negative = "reward.terms.sentiment.weight=-1"
    plain = OmegaConf.create({"hydra": {"sweeper": {"_target_": search.LEARNS_NOTHING}}})
    experiment = compose(["experiment=quickstart", negative, "objective=[sentiment,reward]"])
    assert [one["direction"] for one in search.objective(plain, experiment)] == ["minimize", "maximize"]
    sweep(of_beta, "objective=[sentiment]", negative, "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=1")
    assert "is maximize for sentiment, of which less is better" in capfd.readouterr().out


def test_the_shipped_search_is_chosen_by_its_name(sweep: Any, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["hydra.sweeper.n_trials=3", "hydra/sweeper=optuna", "experiment=quickstart"]
    asked = sweep(of_beta, "sweep=optuna_dpo", *given, vary=())
    assert len({(beta(e), getattr(e.stage["dpo"], "learning_rate")) for e in asked}) == 3  # noqa: B009
    assert {(e.pruning.kind, e.objective[0]) for e in asked} == {("percentile", "reward")}
    assert "warning" not in capfd.readouterr().out


def test_if_all_are_refused_the_command_ends_as_the_first_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    session = Session(Listener(), wait=False, arguments=[])
    given = ["-m", "experiment=quickstart", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid"]
    given += ["hydra.sweeper.n_jobs=1", "hydra.sweeper.max_failure_rate=1.0"]
    hydra_app.main([*given, "hydra.sweeper.direction=maximize", "engine=choice(zer2,zer3)"], session.execute)
    with pytest.raises(ConfigError, match=r"2 of 2 points failed; the first: no engine is called 'zer[23]'"):
        session.finish()
    said = [line.partition(" is called")[0] for line in capfd.readouterr().out.splitlines() if "✗" in line]
    assert sorted(said) == [f"✗ engine={name}  command line: no engine" for name in ("zer2", "zer3")]


@pytest.mark.parametrize("jobs", [1, 3])
def test_what_is_wrong_with_all_trials_is_said_once(
    jobs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["-m", "experiment=quickstart", "hydra/sweeper=optuna", f"hydra.sweeper.n_jobs={jobs}", "objective=[foo]"]
    given += ["hydra.sweeper.direction=maximize", "hydra.sweeper.max_failure_rate=1.0", BETA]
    with pytest.raises(ConfigError, match="`objective` names `foo`, which no evaluation measures"):
        hydra_app.main(given, Session(Listener(), wait=False, arguments=[]).execute)
    assert capfd.readouterr().out == ""


def test_without_the_extra_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.core.config_store import ConfigStore

    monkeypatch.delitem(ConfigStore.instance().repo["hydra"]["sweeper"], "optuna.yaml")
    with pytest.raises(ConfigError) as caught:
        hydra_app.main(["-m", "sweep=optuna_dpo", "experiment=quickstart"], lambda points, master: [])
    line = "conf/sweep/optuna_dpo.yaml:5: no hydra/sweeper is called 'optuna' (pip install 'alignment[optuna]')"
    assert str(caught.value) == line
