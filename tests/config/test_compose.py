"""Every shipped config composes; every wrong key is one line that names key, file and the nearest right key."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from alignment.config import shape
from alignment.config.compose import compose
from alignment.config.launchers import SlurmLauncher
from alignment.config.nearest import ELSEWHERE
from alignment.config.paths import CONF
from alignment.config.schema import STAGES, Experiment
from alignment.config.stages.answering import Compare, Evaluate
from alignment.config.stages.online import Kl
from alignment.config.stages.training import Lora, Sft
from alignment.errors import ConfigError
from alignment.pipeline import graph

CHOICES = [
    f"{folder.name}={file.stem}"
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ("stage", "chat_template", "hydra")
    for file in sorted(folder.glob("*.yaml"))
]


# What conf/ leaves to the command, and choices that make sense with others only.
COMPLETED = {
    "model=path": ["model.source.path=m"],
    "model=hub": ["model.source.id=a/b", f"model.source.revision={'0' * 40}"],
    "data=path": ["data.instructions.source.path=rows.jsonl"],
    "reward=python": [f"reward.terms.own.source.path={Path(__file__).parent.parent / 'rewards' / 'own_reward.py'}"],
    "reward=endpoint": ["reward.terms.judge.model=m"],
    "reward=endpoint_pairwise": ["reward.terms.judge.model=m", "stage.judge.judging=pairwise"],
    "reward=model": ["+reward.terms.preference.members.one={kind: path, path: m}"],
    "reward=watch_sentiment": ["reward=[watch_sentiment,length]"],
    "launcher=torchrun": ["engine=ddp"],
    "launcher=slurm": ["engine=zero2"],
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_shipped_choice_composes_and_validates(choice: str) -> None:
    compose([choice, *COMPLETED.get(choice, [])])


@pytest.mark.parametrize("pipeline", [file.stem for file in sorted((CONF / "pipeline").glob("*.yaml"))])
def test_every_pipeline_makes_a_graph_whose_parents_come_first(pipeline: str) -> None:
    nodes = graph.build(compose([f"pipeline={pipeline}"]))
    names = [node.name for node in nodes]
    for node in nodes:
        assert all(names.index(parent.name) < names.index(node.name) for parent in node.parents.values())


@pytest.mark.parametrize("ours", sorted(set(ELSEWHERE.values())))
def test_what_other_tools_call_a_setting_leads_to_one_that_is_there(ours: str) -> None:
    first, _, below = ours.partition(".")
    stages = [stage for stage in STAGES.values() if first in stage.model_fields]
    assert stages and (not below or below in Kl.model_fields)


def test_every_comparison_shows_the_best_of_several_answers() -> None:
    """What trains on a reward is held against the simplest use of it."""
    compared, without = set(), set()
    for choice in [*(f"pipeline={file.stem}" for file in (CONF / "pipeline").glob("*.yaml")), "experiment=rlhf"]:
        experiment = compose([choice])
        nodes, stage = experiment.pipeline.nodes, experiment.stage
        for node in (node for node in nodes.values() if isinstance(stage[node.stage], Compare)):
            compared.add(choice)
            shown = [stage[nodes[parent].stage] for parent in node.inputs.values()]
            if not any(isinstance(one, Evaluate) and one.best_of > 1 for one in shown):
                without.add(choice)
    assert not without and len(compared) >= 11


# A pipeline's keys are its nodes.
EXPLAINED = (file for file in CONF.glob("*/*.yaml") if file.parent.name != "pipeline")


@pytest.mark.parametrize("file", sorted(EXPLAINED), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_key_of_conf_is_explained_on_its_line(file: Path) -> None:
    """Keys with a value; experiments only choose, and choices are explained in config.yaml."""
    keys = [line for line in file.read_text().splitlines() if re.match(r"\s*[a-z_0-9]+: [^#\s]", line)]
    assert [key for key in keys if "#" not in key and file.parent.name != "experiment"] == []


REFUSED = [
    (["stage.dpo.betta=0.2"], "command line: unknown key `stage.dpo.betta` (did you mean `stage.dpo.beta`?)"),
    (["+stage.dpo.betta=0.2"], "command line: unknown key `stage.dpo.betta` (did you mean `stage.dpo.beta`?)"),
    (["stage.grpo.scale_by_std=true"], "`stage.grpo.scale_by_std` is not among the settings chosen (it comes with pip"),
    (
        ["reward=length", "reward.terms.lenght.low=3"],
        "unknown key `reward.terms.lenght` (did you mean `reward.terms.le",
    ),
    (["reward=length", "reward.terms.length.whole=true"], "line: unknown key `reward.terms.length.whole` ("),
    (["reward.terms.length.low=3"], "is not among the settings chosen (it comes with reward=composed, reward=length)"),
    (["stage.dpo.beta=strong"], "command line: `stage.dpo.beta` should be a valid number, got 'strong'"),
    (["stage.dpo.beta=-1"], "command line: `stage.dpo.beta` should be greater than 0, got -1"),
    (["stage.dpo.beta=1e400"], "command line: `stage.dpo.beta` should be a finite number, got inf"),
    (["stage.dpo.loss={sigmoid: inf}"], "line: `stage.dpo.loss` has a loss without a finite weight above 0 ("),
    (["stage.sft.lora.rank=1.5"], "command line: `stage.sft.lora.rank` should be a valid integer, got 1.5"),
    (["stage.sft.global_batch_size=true"], "`stage.sft.global_batch_size` should be a valid integer, got True"),
    (["stage.sft.lora={rnk: 8}"], "line: unknown key `stage.sft.lora.rnk` (did you mean `stage.sft.lora.rank`?)"),
    (["stage.sft.lora=null", "stage.sft.lora.rank=8"], "`stage.sft.lora` is null (write +stage.sft.lora.rank=...)"),
    (["stage.sft={lr: 1e-4}"], "unknown key `stage.sft.lr` (here it is `stage.sft.learning_rate`)"),
    (["stage.dpo.lora=8"], "`stage.dpo.lora` should be settings, {name: value, ...}, got 8"),
    (
        ["reward=sentiment", "reward.terms.sentiment.normalise=soft"],
        "`reward.terms.sentiment.normalise` should be settings, {name: value, ...}, got 'soft'",
    ),
    (["stage.dpo.loss_type=ipo"], "unknown key `stage.dpo.loss_type` (here it is `stage.dpo.loss`)"),
    (
        ["stage.dpo.reference_update={share: 0.5}"],
        "`stage.dpo.reference_update.every_steps` is missing (it has no value of its own: stage.dpo.reference_up",
    ),
    (["stage.dpo.loss=sigmoidal"], "names an unknown loss, got 'sigmoidal' (did you mean `sigmoid`?)"),
    (["stage.dpo.loss={kto: 1.0}"], "names no loss of pairs (pipeline=kto stage.kto.loss=kto, on single answers)"),
    (["stage.dpo.loss=dpo"], "names no loss of pairs, got 'dpo' (DPO's own is loss=sigmoid)"),
    (["stage.dpo.loss=bco"], "names an unknown loss, got 'bco' (did you mean `bco_pair`?)"),
    (
        ["loss=sigmoid,ipo_mean"],
        "(several losses have weights: stage.dpo.loss='{sigmoid: 1.0, ipo_mean: 1.0}'; a sweep: add -m)",
    ),
    (["stage.dpo.loss=sigmoid,hinge"], "(several losses have weights: stage.dpo.loss='{sigmoid: 1.0, hinge: 1.0}'; a"),
    (["reward=composed,length"], "line: `reward` is given several values (a sweep: add -m)"),
    (["reward=format,length"], "`reward` is given several values (a list: reward=[format,length]; a sweep: add -m)"),
    (["objective=kl,reward"], "is given several values (a list: objective=[kl,reward]; a sweep: add -m)"),
    (
        ["loss=[sigmoid,nll]"],
        "command line: `loss` lists sigmoid and nll, which set `stage.dpo.loss` to different values: only the last "
        "counts (several losses have weights: stage.dpo.loss='{sigmoid: 1.0, nll: 1.0}')",
    ),
    (
        ["loss=[sigmoid,rpo]"],
        "`stage.dpo.loss` to different values: only the last counts (several losses have weights: ",
    ),
    (
        ["reward=[format,composed,length]"],
        "`reward` lists format and composed, which set `reward.terms.form.weight` to different values: only the last "
        "counts (choose one of them, and set `reward.terms.form.weight` itself where it should be another)",
    ),
    (
        ["stage.dpo.loss.nll=0.2"],
        "command line: `stage.dpo.loss` is one name, in whose place `nll` would be (write all losses with their "
        "weights, as in stage.dpo.loss='{sigmoid: 1.0, nll: 0.2}')",
    ),
    (["+stage.dpo.loss.nll=0.2"], "line: `stage.dpo.loss` is one name, in whose place `nll` would be (write all"),
    (["loss=mpo", "stage.dpo.loss.nll=0.2"], "`stage.dpo.loss.nll` is new there (write +stage.dpo.loss.nll=0.2)"),
    (["loss=kto"], "no loss is called 'kto' (pipeline=kto stage.kto.loss=kto, on single answers)"),
    (["loss=dpo"], "no loss is called 'dpo' (DPO's own is loss=sigmoid)"),
    (["loss=ipo"], "no loss is called 'ipo' (did you mean loss=ipo_mean or loss=ipo_sum?)"),
    (["loss=grpo"], "no loss is called 'grpo' (did you mean pipeline=sft_grpo?)"),
    (["pipeline=ppo"], "no pipeline is called 'ppo' (did you mean pipeline=sft_ppo?)"),
    (["pipeline=simpo"], "no pipeline is called 'simpo' (did you mean loss=simpo?)"),
    (["pipeline=rlhf"], "no pipeline is called 'rlhf' (did you mean experiment=rlhf?)"),
    (["engine=zero4"], "command line: no engine is called 'zero4' (did you mean engine=zero3?)"),
    (
        ["reward=null"],
        "command line: `reward=null` chooses no file (to choose nothing leave it out; else one of: answer",
    ),
    (["reward=[length,null]"], "command line: `reward=[length,null]` chooses no file ("),
    (["reward=[length,lenght]"], "command line: no reward is called 'lenght' (did you mean reward=length?)"),
    (["+seed=1"], "command line: `seed` is there already (write seed=1)"),
    (["engin=zero3"], "command line: unknown key `engin` (did you mean `engine`?)"),
    (
        ["launcher.kind=slrm"],
        "`launcher.kind` should be one of 'local', 'torchrun', 'slurm', got 'slrm' (did you mean 'slurm'?)",
    ),
    (["launcher=torchrun", "launcher.processes=0"], "`launcher.processes` should be greater than or equal to 1, got 0"),
    (
        ["launcher=slurm", "launcher.stages={sft: {nodes: 8}}"],
        "`launcher.stages` takes new keys one by one (write +launcher.stages.NAME=...)",
    ),
    (
        ["launcher=slurm", "launcher.stages.sft.nodes=8"],
        "`launcher.stages.sft.nodes` is new there (write +launcher.stages.sft.nodes=8)",
    ),
    (
        ["launcher=slurm", "engine=zero2", "+launcher.stages.sft.nodse=8"],
        "`launcher` asks for what cannot be: `launcher.stages.sft.nodse`: no such key (did you mean `nodes`?)",
    ),
    (
        ["launcher=slurm", "engine=zero2", "launcher.stages.sft.nodez=2"],
        "command line: unknown key `launcher.stages.sft.nodez` (did you mean `launcher.stages.sft.nodes`?)",
    ),
    (["experimnt=dpo"], "command line: unknown key `experimnt` (did you mean `experiment`?)"),
    (["+experimnt=dpo"], "command line: unknown key `experimnt` (did you mean `experiment`?)"),
    (
        ["launcher=slurm", "engine=zero2", "+launcher.stages.sftt.nodes=8"],
        "names `sftt`, which is no node or stage of the pipeline (did you mean `sft`?)",
    ),
    (["launcher=slurm", "launcher.setup=['module load x; rm y']"], "is no line that sets up an environment"),
    (["launcher=slurm", "launcher.setup=['conda run python -c 1']"], "is no line that sets up an environment"),
    (["launcher=slurm", "launcher.setup=['export LD_PRELOAD=/x.so']"], "is no line that sets up an environment"),
    (["launcher=slurm", "launcher.setup=['export LD_PRELOAD+=/x.so']"], "is no line that sets up an environment"),
    (["launcher=slurm", "launcher.setup=['export A=1 $A=/x.so']"], "is no line that sets up an environment"),
    (
        ["launcher=slurm", "launcher.setup=['export A=1 DB_PASSWORD=hunter2']"],
        "command line: `launcher.setup.0` holds a secret by its name, DB_PASSWORD: scripts, run.json and every "
        "stage.json would show it (put the line into a file that nobody else reads, and `source` it; or give it the",
    ),
    (["launcher=slurm", "launcher.setup=['export HF_TOKEN=\"hunter2']"], "holds a secret by its name, HF_TOKEN"),
    (
        [
            "launcher=slurm",
            "launcher.container={kind: apptainer, image: a, options: [--nv,'--env=A=1,API_KEY=hunter2']}",
        ],
        "command line: `launcher.container.options.1` holds a secret by its name, API_KEY: scripts, run.json and every "
        "stage.json would show it (export it before the command: jobs and their containers get it, with apptainer's "
        "--cleanenv as APPTAINERENV_API_KEY)",
    ),
    (
        ["launcher=slurm", "launcher.container={kind: enroot, image: a, options: [--env,'DB_PASSWORD=hunter2']}"],
        "`launcher.container.options.1` holds a secret by its name, DB_PASSWORD",
    ),
    (
        ["launcher=slurm", "+launcher.options.container-env='A=1,DB_PASSWORD=hunter2'"],
        "`launcher.options` holds a secret by its name, DB_PASSWORD: scripts, run.json and every stage.json would show "
        "it (export DB_PASSWORD before the command: jobs get its environment)",
    ),
    (["launcher=slurm", "+launcher.options.site-token=hunter2"], "holds a secret by its name, site-token"),
    (["launcher=slurm", "launcher.interface='ib0; id'"], "`launcher.interface` is no list of network interfaces"),
    (["launcher=slurm", "launcher.interface='ib0|id'"], "`launcher.interface` is no list of network interfaces"),
    (
        ["launcher=slurm", "+launcher.options.clusters=b"],
        "command line: `launcher.options` names another cluster (give the command on that cluster's login node: ",
    ),
    (["launcher=slurm", "+launcher.options.cluster=b"], "`launcher.options` names another cluster (give the"),
    (["launcher=slurm", "+launcher.options.M=b"], "`launcher.options.M"),
    (["launcher=slurm", "+launcher.options.time=3"], "names what is not for it to say"),
    (["launcher=slurm", "+launcher.options.dependenc=afterok:1"], "names what is not for it to say"),
    (["launcher=slurm", "launcher.time_limit=60"], "has a time_limit of 60 s, of which grace=120 s are for saving"),
    (["launcher=torchrun", "engine=ddp", "launcher.nodes=2"], "`launcher.nodes` is 2, and `launcher.head` is null"),
    (["launcher=torchrun", "engine=ddp", "launcher.rank=1"], "`launcher.rank` is 1, and there are 1 nodes"),
    (["nonsense"], "command line: `nonsense` is no setting (settings are written key=value)"),
    (["stage..seed=1"], "command line: `stage..seed=1` cannot be read (settings are written key=value)"),
    (
        ["launcher=slurm", "launcher.memory=64GB"],
        "`launcher.memory` is not written as it should be, got '64GB' (a whole number, of MB or with K, M, G or T: 64G",
    ),
    (["launcher=slurm", "launcher.memory=-1"], "`launcher.memory` is not written as it should be, got '-1'"),
    (["launcher=slurm", "+launcher.stages.sft.memory=-1"], "`launcher.stages.sft.memory`"),
    (["launcher=slurm", "launcher.comment='a$b'"], "got 'a$b' (one line without quotes, $, ` and \\)"),
    (["name='my run'"], "`name` is not written as it should be, got 'my run' (letters, digits, `.`, `_` and `-`"),
    (
        ["launcher=slurm", "launcher.setup=[export FOO=bar, module load cuda]"],
        "`launcher.setup` has a value in its list that cannot be read as it stands (write "
        """'launcher.setup=["export FOO=bar","module load cuda"]')""",
    ),
    (
        ["seed=1,2"],
        "command line: `seed` is given several values (a sweep: add -m)",
    ),
    (["objective=[rewards]"], "`objective` names `rewards`, which no evaluation measures (did you mean `reward`?)"),
    (["objective=[]"], "`objective` list should have at least 1 item"),
    (["objective=[kl,kl]"], "command line: `objective` names a metric twice: kl, kl (name each once)"),
    (["pruning=median", "pruning.node=judged"], "names `judged`, which is no node that trains (known: sft, dpo)"),
    (
        ["pruning=median", "launcher=torchrun", "engine=ddp", "launcher.nodes=2", "launcher.head=a:1"],
        "`launcher.nodes` is above 1: the machines would not stop the same trials (pruning=none, or launcher=slurm)",
    ),
    (["pruning=media"], "command line: no pruning is called 'media' (did you mean pruning=median?)"),
    (["pruning.percentile=30"], "`pruning.percentile` is not among the settings chosen (it comes with pruning=median)"),
    (["pipeline=sft"], "`stage.judge` is set, but the pipeline has no such stage"),
    (["pipeline.final=dpoo"], "`pipeline.final` names `dpoo`, which is no node (did you mean `dpo`?)"),
    (["pipeline.nodes.dpo.inputs.model=sfy"], "names `sfy`, which is no node (did you mean `sft`?)"),
    (["+pipeline.nodes.dpo.inputs.modle=sft"], "a stage of this kind has no such role (did you mean `model`?)"),
    (["pipeline.nodes.dpo.stage=dpoo"], "names `dpoo`, which the stage group lacks (did you mean `dpo`?)"),
    (["+pipeline.nodes.start.inputs.model=dpo"], "a stage of this kind has no such role"),
    (["pipeline.nodes.sft.inputs={model: dpo, data: rows}"], "the pipeline goes in a circle: "),
    (["stage.prepare_sft.dataset=instruction"], "names `instruction`, which the data group lacks"),
    (
        ["model=path"],
        "conf/model/path.yaml:4: `model.source.path` has no value (add model.source.path=... to the command)",
    ),
]


@pytest.mark.parametrize(("overrides", "line"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_a_wrong_setting_is_one_line(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        graph.build(compose(["experiment=quickstart", *overrides]))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["pipeline=sft_rloo", "stage.rloo.scale_by_std=true"], "unknown key `stage.rloo.scale_by_std` ("),
        (["~reward"], "nothing is chosen for `reward` (leave it to conf/config.yaml, or choose one of: answer, comp"),
    ],
)
def test_what_is_wrong_without_an_experiment(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert str(caught.value).startswith(f"command line: {line}")


@pytest.mark.parametrize("off", [[], ["stage.sft.lora=null"]], ids=["as it is", "from null"])
def test_adapters_given_in_part_have_the_other_values_of_conf(off: list[str]) -> None:
    plain, given = (
        compose([*off, *overrides]).stage["sft"] for overrides in ([], ["stage.sft.lora={rank: 16, dora: true}"])
    )
    conf = {file: yaml.safe_load(file.read_text()).get("lora") for file in (CONF / "stage").glob("*.yaml")}
    assert all(value == Lora().model_dump() for value in conf.values() if value is not None) and any(conf.values())
    assert isinstance(plain, Sft) and (plain.lora is None) == bool(off)
    assert isinstance(given, Sft) and given.lora == Lora(rank=16, dora=True)


def test_a_line_that_passes_a_secret_on_by_its_variable_is_let_through() -> None:
    lines = ["export HF_TOKEN=$MINE", 'export API_KEY="$MINE" TOKENIZERS_PARALLELISM=false', "source /me/secrets"]
    given = compose(["experiment=quickstart", "launcher=slurm", "engine=zero2", f"launcher.setup={lines}"]).launcher
    assert given.model_dump()["setup"] == lines


def test_memory_is_a_number_too_as_sbatch_takes_it() -> None:
    slurm = ["experiment=quickstart", "launcher=slurm", "engine=zero2"]
    for given, kept in (("0", "0"), ("'0'", "0"), ("1500", "1500"), ("64G", "64G"), ("null", None)):
        launcher = compose([*slurm, f"launcher.memory={given}", f"+launcher.stages.sft.memory={given}"]).launcher
        assert isinstance(launcher, SlurmLauncher)
        asked = [launcher.resources(name, distributed=True).memory for name in ("dpo", "sft")]
        assert asked == [kept, kept]


def test_options_that_only_name_a_variable_or_a_file_are_no_secrets() -> None:
    inside = ["--nv", "--env=OMP_NUM_THREADS=4", "--env-file=/me/secrets", "--container-env=DB_PASSWORD"]
    given = compose(
        [
            *("experiment=quickstart", "launcher=slurm", "engine=zero2"),
            f"launcher.container={{kind: apptainer, image: /a.sif, options: {inside}}}",
            *("+launcher.options.wckey=lab", "+launcher.options.licenses=matlab:1"),
        ]
    ).launcher.model_dump()
    assert (given["container"]["options"], given["options"]) == (inside, {"wckey": "lab", "licenses": "matlab:1"})


def test_a_wrong_key_in_a_file_names_the_file_and_its_line(tmp_path: Path) -> None:
    own = tmp_path / "experiment"
    own.mkdir()
    (own / "mine.yaml").write_text("# @package _global_\nstage:\n  dpo:\n    beta: 0.1\n    betta: 0.2\n")
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=mine"], (tmp_path,))
    assert str(caught.value) == (
        f"{own / 'mine.yaml'}:5: unknown key `stage.dpo.betta` (did you mean `stage.dpo.beta`?)"
    )


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "defaults:\n  - override /engine: zero4\n  - _self_\n",
            "3: no engine is called 'zero4' (did you mean engine=zero3?)",
        ),
        (
            "defaults:\n  - override /reward: [length, lenght]\n  - _self_\n",
            "3: no reward is called 'lenght' (did you mean reward=length?)",
        ),
        ("defaults:\n  - override /engin: zero3\n  - _self_\n", "3: unknown group `engin` (did you mean `engine`?)"),
        (
            "defaults:\n  - override /loss: [sigmoid, nll]\n  - _self_\n",
            "3: `loss` lists sigmoid and nll, which set `stage.dpo.loss` to different values: only the last counts "
            "(several losses have weights: stage.dpo.loss='{sigmoid: 1.0, nll: 1.0}')",
        ),
        (
            "defaults:\n  - override /reward: [[length], format]\n  - _self_\n",
            "3: `override /reward` lists ['length'], which is no file's name (names alone: [length, format])",
        ),
        (
            "defaults:\n  - override /pipeline: sft_rloo\n  - _self_\nreward:\n  terms:\n    own: {kind: length}\n",
            "7: `reward.terms.own` lacks weight, unit, low, high, fall_off (none has a value of its own: set all of "
            "them, as the file in conf/ that is most like it does)",
        ),
        ("seed: ${sed}\n", "2: `seed`: Interpolation key 'sed' not found"),
        ("seed: [\n", "3: this is not YAML: expected the node content, but found '<stream end>'"),
    ],
)
def test_what_a_file_chooses_or_refers_to_wrongly_names_the_file_and_its_line(
    text: str, line: str, tmp_path: Path
) -> None:
    own = tmp_path / "experiment"
    own.mkdir()
    (own / "mine.yaml").write_text(f"# @package _global_\n{text}")
    with pytest.raises(ConfigError) as caught:
        compose(["experiment=mine"], (tmp_path,))
    assert str(caught.value) == f"{own / 'mine.yaml'}:{line}"


def test_a_config_cannot_name_code(tmp_path: Path) -> None:
    own = tmp_path / "experiment"
    own.mkdir()
    (own / "evil.yaml").write_text("# @package _global_\nstage:\n  dpo:\n    _target_: os.system\n")
    with pytest.raises(ConfigError, match=r"unknown key `stage\.dpo\._target_`"):
        compose(["experiment=evil"], (tmp_path,))


def test_the_name_of_a_run_is_its_experiment_else_its_pipeline() -> None:
    assert compose(["experiment=quickstart"]).name == "quickstart"
    assert compose(["pipeline=sft"]).name == "sft"
    assert compose(["experiment=quickstart", "name=mine"]).name == "mine"


def test_conf_holds_yaml_only_once_per_key() -> None:
    """YAML takes the last of two equal keys in silence; none of ours has two."""

    class Strict(yaml.SafeLoader):
        pass

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[str, object]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: {keys}"
        return loader.construct_mapping(node, deep=True)

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    for file in CONF.rglob("*.yaml"):
        yaml.load(file.read_text(), Strict)


@pytest.mark.parametrize("pipeline", ["sft_dpo", "sft_ppo", "sft_grpo", "sft_online_dpo", "kto", "sft_reward_model"])
@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_no_setting_is_infinite_or_nan(pipeline: str, number: float) -> None:
    choices = [f"pipeline={pipeline}", "reward=composed", "+stage.dpo.reference_update={every_steps: 1, share: 1.0}"]
    experiment = compose(choices[: 3 if pipeline == "sft_dpo" else 2])
    keys = [key.split(".")[1:] for key, _ in shape.leaves(experiment, "")]
    assert len(keys) > 150
    for *above, last in keys:
        raw = experiment.model_dump()
        reduce(dict.__getitem__, above, raw)[last] = number
        with pytest.raises(ValidationError):
            Experiment.model_validate(raw)
