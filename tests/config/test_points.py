"""A sweep's points are composed a fast way; it gives what Hydra and the schema give one by one, errors included."""

from __future__ import annotations

import copy
import pickle
import random
import re
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from alignment import hydra_app
from alignment.config import compose
from alignment.config.paths import CONF
from alignment.config.points import Points
from alignment.config.schema import Experiment
from alignment.errors import InputError
from alignment.hydra_app import Loader, many_objects
from alignment.pipeline import graph
from alignment.pipeline.identity import one_look
from tests.config.test_compose import REFUSED

MIXTURES = 12
MORE = (
    "+data.more.lists={pairs: best_worst, min_margin: 0.0, max_pairs: 1}",
    "+data.more.cap=4",
    "+data.more.epochs=1.0",
    "+data.more.weight=1.0",
)  # keys of a data set
OTHERS = "rslora: false, dora: false, init: kaiming, modules_to_save: [], quantize: null"  # keys of lora
FAST = [
    [],
    ["seed=3"],
    ["experiment=quickstart", "stage.dpo.beta=0.05", "seed=1"],
    ["stage.dpo.beta=0.05", "experiment=quickstart", "engine=zero2", "seed=1"],
    ["pipeline=dpo", "stage.dpo.epochs=2.0"],
    ["pipeline=iterative_dpo", "pipeline.rounds.count=2", "stage.dpo.beta=0.2"],
    ["pipeline=sft", "model=path", "model.source.path=m", "tracking=none"],
    ["model=hub", "model.source.id=a/b", f"model.source.revision={'0' * 40}"],
    ["data=path", "data.instructions.source.path='a, b.jsonl'", "data.preferences.source.path=b"],
    ["engine=ddp", "launcher=torchrun", "launcher.processes=4", "launcher.time_limit='1:00:00'"],
    ["++stage.dpo.lora.rank=4", "++stage.dpo.beta=0.3"],
    ["stage.dpo.lora=null"],
    ["stage.dpo.lora={rank: 4, alpha: 8.0}"],
    ["stage.dpo.lora=null", f"stage.dpo.lora={{rank: 1, alpha: 2.0, dropout: 0.0, target_modules: [q], {OTHERS}}}"],
    ["stage.sft.lora.target_modules=[q_proj,v_proj]"],
    ["stage.sft.lora.target_modules=[q_proj,v_proj]", "stage.sft.lora.target_modules.1=k_proj"],
    ["~reward.terms.relevance"],
    ["~reward.terms.relevance.source", "+reward.terms.relevance.source={kind: path, path: /x}"],
    ["~stage.dpo.beta", "+stage.dpo.beta=0.2"],
    ["~stage.dpo.beta=0.1", "++stage.dpo.beta=0.7"],
    ["~seed", "+seed=4"],
    ["+name=mine", "++seed=2"],
    [
        "+data.more={source: {kind: path, path: x}, format: auto, columns: {}, limit: 5}",
        *MORE,
        "stage.prepare_sft.dataset=more",
    ],
    [
        "+data.more.source={kind: path, path: x}",
        "+data.more.format=alpaca",
        "+data.more.columns={}",
        "+data.more.limit=null",
        *MORE,
    ],
    ["+pipeline.nodes.again={stage: dpo, inputs: {model: sft, data: pairs}}", "pipeline.final=again"],
    ["~pipeline.nodes.verdict"],
    ["stage.dpo.seed=7", "seed=9"],
    ["stage.dpo.seed=${stage.sft.seed}", "stage.sft.seed=${seed}", "seed=5"],
    ["stage.dpo.lora='${stage.sft.lora}'", "stage.sft.lora.rank=3"],
    ["store='${oc.env:HOME}/x'"],
    ["store='it, is = {odd}'", "tracking.project='a \\'b\\''", "name=mine"],
    ["checkpoint.every_minutes=null", "min_free_gb=1e-1", "model.eos_token=' <|end|> '"],
    ["stage.sft.learning_rate=1e-4", "stage.sft.learning_rate=2e-4"],
    ["store='${tracking.project}'", "tracking.project='${name}'", "name=mine"],
]
SLOW = [
    ["hydra.job.name=mine"],
    ["+hydra={job: {name: mine}}"],
    ["experiment=numbered"],
    ["experiment=dated", "seed=3"],
    ["experiment=linked", "~stage.dpo.lora", "+stage.dpo.lora=null"],
    ["~stage.dpo.seed", "+stage.dpo.seed=1"],
    [
        f"~stage.dpo.lora={{rank: 8, alpha: 16.0, dropout: 0.0, target_modules: all-linear, {OTHERS}}}",
        "+stage.dpo.lora=null",
    ],
]
OWN = {
    "numbered": "name: n-${hydra:job.num}",
    "dated": "name: n-${now:%Y}\nstage: {dpo: {seed: '${seed}'}}",
    "linked": "stage: {dpo: {lora: '${stage.sft.lora}'}}",
    "near": "seed: ${stage.dpo.max_steps}\nstage: {sft: {seed: '${..dpo.seed}', epochs: 3.0}}",
    "listed": "stage: {sft: {lora: {target_modules: ['${name}', k]}}}",
}
WRONG = [
    *(overrides for overrides, _ in REFUSED),
    ["seed=-1"],
    ["+stage.dpo.beta=1.0"],
    ["~stage.dpo.betta"],
    ["~stage.dpo.beta=0.7"],
    ["~stage.dpo.beta"],
    ["~stage"],
    ["~name", "+name=mine"],
    ["+engine=ddp"],
    ["++engine=ddp"],
    ["+engin=ddp"],
    ["engine@here=ddp"],
    ["engine={strategy: ddpp}"],
    ["engine.offload=all"],
    ["seed=${sed}"],
    ["seed=${seed}"],
    ["stage.dpo.seed=???"],
    ["seed=???"],
    ["stage.dpo.lora=???"],
    ["seed.of=1"],
    ["stage.dpo.seed='${hydra.job.num}'"],
    ["hydra=basic"],
    ["stage.dpo.lora='${stage.sft.lora}'", "stage.dpo.lora.rank=3"],
    ["stage[dpo].beta=0.3"],
    ["name='n-${hydra:job.num}'"],
    ["+hydra.callbacks.x._target_=os.mkdir"],
    ["hydra.job_logging={root: {handlers: [x]}}"],
    ["engine=zero4", "stage.dpo.betta=1"],
    ["loss=[sigmoid,nll]"],
    ["seed=choice(1,2)"],
    ["stage.dpo.seed=${..sft.seed}", "stage.sft.seed=2"],
    ["stage.dpo={seed: '${.global_batch_size}'}"],
    ["a=b=c", "'"],
]
# Some of each kind: by the schema, by checks, by Hydra, by OmegaConf, by the guard, and seen by a job alone.
SAID = [
    ["stage.dpo.betta=0.2"],
    ["stage.dpo.beta=strong"],
    ["engine.offload=all"],
    ["pipeline=sft"],
    ["engine=zero4", "stage.dpo.betta=1"],
    ["~stage.dpo.beta"],
    ["seed=choice(1,2)"],
    ["a=b=c", "'"],
    ["seed=${sed}"],
    ["seed=${seed}"],
    ["stage.dpo.lora=???"],
    ["model=path"],
    ["stage.dpo={seed: '${.global_batch_size}'}"],
    ["+hydra.callbacks.x._target_=os.mkdir"],
    ["stage.dpo.seed='${hydra.job.num}'"],
    ["name='n-${hydra:job.num}'"],
]
OF_HYDRA = [
    ["hydra/sweeper=basic", "hydra.sweeper.max_batch_size=2"],
    ["hydra.job.name=mine", "hydra.job.chdir=true", "hydra.sweep.dir=here/${seed}"],
    ["hydra.job.config.override_dirname.exclude_keys=[seed]", "hydra.job.config.override_dirname.kv_sep=_"],
    ["hydra.overrides.task=[x]"],
    ["hydra.job.env_copy=[HOME]"],
    ["hydra.sweeper.max_batch_size='${seed}'"],
]


@pytest.fixture(scope="module")
def loader() -> Iterator[Loader]:
    with hydra_app._hydra_as_ours([]), initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture(scope="module")
def master(loader: Loader) -> DictConfig:
    return sweep(loader)


@pytest.fixture(scope="module")
def own(loader: Loader, tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    """With a folder of one's own configs."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "experiment").mkdir()
    for name, text in OWN.items():
        (folder / "experiment" / f"{name}.yaml").write_text(f"# @package _global_\n{text}\n")
    return sweep(loader, f"hydra.searchpath=[file://{folder}]")


def sweep(loader: Loader, *hydra: str) -> DictConfig:
    return loader.load_configuration("config", [*hydra, "seed=0,1"], RunMode.MULTIRUN)


def slowly(loader: Loader, master: DictConfig, lines: list[str]) -> tuple[DictConfig, Experiment]:
    """Without the fast way; the guard is the loader's."""
    config = ConfigLoaderImpl.load_sweep_config(loader, master, lines)
    return config, compose.validate(config, config.hydra)


def same(one: Any, other: Any, path: str = "") -> None:
    """Configs equal to the last flag, and in order."""
    assert type(one) is type(other), path
    mine, theirs = vars(one._metadata).copy(), vars(other._metadata).copy()
    assert mine == theirs, path
    content = one.__dict__.get("_content", one.__dict__.get("_val"))
    others = other.__dict__.get("_content", other.__dict__.get("_val"))
    assert type(content) is type(others), path
    if isinstance(content, dict):
        assert list(content) == list(others), path
        for key in content:
            assert content[key]._parent is one
            same(content[key], others[key], f"{path}.{key}")
    elif isinstance(content, list):
        assert len(content) == len(others), path
        for number, (item, its) in enumerate(zip(content, others, strict=True)):
            assert item._parent is one
            same(item, its, f"{path}.{number}")
    else:
        assert content == others, path


def keys(experiment: Experiment) -> list[tuple[str, str]] | str:
    try:
        return [(node.name, node.key) for node in graph.build(experiment)]
    except InputError as error:  # a file that is not there
        return str(error)


def alike(loader: Loader, master: DictConfig, lines: list[str], *, fast: bool | None = True) -> None:
    point = loader.points.compose(loader, master, lines)
    config, experiment = slowly(loader, master, lines)
    if fast:
        assert point is not None
        assert point.experiment is not None
    got = loader.load_sweep_config(master, lines)
    same(got, config)
    assert OmegaConf.to_yaml(got) == OmegaConf.to_yaml(config)
    if point is not None and point.experiment is not None:
        assert point.experiment.model_dump_json() == experiment.model_dump_json()
        assert repr(point.experiment) == repr(experiment)
        assert keys(point.experiment) == keys(experiment)
        assert loader.experiment(master, lines, 0) is loader.points.known(got.hydra, lines)


@pytest.mark.parametrize("lines", FAST, ids=" ".join)
def test_a_point_is_what_hydra_makes_of_it(lines: list[str], loader: Loader, master: DictConfig) -> None:
    alike(loader, master, lines)


def test_points_may_choose_differently(loader: Loader, master: DictConfig) -> None:
    for pipeline, engine, seed in product(("sft", "dpo"), ("single", "zero2"), (0, 1)):
        alike(loader, master, [f"pipeline={pipeline}", f"engine={engine}", f"seed={seed}"])


@pytest.mark.parametrize("hydra", OF_HYDRA, ids=" ".join)
def test_what_is_told_to_hydra_is_in_each_point(hydra: list[str], loader: Loader) -> None:
    try:
        master = sweep(loader, *hydra)
    except hydra_app.Aside as refused:
        assert "env_set" in str(refused)
        return
    alike(loader, master, ["stage.dpo.beta=0.3", "engine=ddp", "seed=1"], fast=None)
    alike(loader, master, ["stage.dpo.beta=0.4", "engine=ddp", "seed=1"], fast=None)


def test_a_folder_of_ones_own(loader: Loader, own: DictConfig) -> None:
    for steps, seed in ((1, 7), (2, 8)):
        alike(loader, own, ["experiment=near", f"stage.dpo.max_steps={steps}", f"stage.dpo.seed={seed}"])
        alike(loader, own, ["experiment=linked", f"stage.sft.lora.rank={seed}"])
        alike(loader, own, ["experiment=listed", f"name=n{steps}", f"stage.sft.lora.target_modules.1=m{seed}"])


@pytest.mark.parametrize("lines", SLOW, ids=" ".join)
def test_what_is_unusual_is_left_to_hydra(lines: list[str], loader: Loader, own: DictConfig) -> None:
    point = loader.points.compose(loader, own, lines)
    assert point is None or point.experiment is None
    same(loader.load_sweep_config(own, lines), ConfigLoaderImpl.load_sweep_config(loader, own, lines))
    assert loader.points.known(own.hydra, lines) is None


@pytest.mark.parametrize("lines", WRONG, ids=" ".join)
def test_a_wrong_point_is_left_to_hydra(lines: list[str], loader: Loader, master: DictConfig) -> None:
    """Beside right ones of the same files. It says what is wrong, to a point as to a run: test_compose.py has the words
    of most, and those below are compared."""
    lines = ["experiment=quickstart", *lines]
    loader.points.compose(loader, master, ["experiment=quickstart", "seed=0"])
    point = loader.points.compose(loader, master, lines)
    assert point is None or point.experiment is None
    assert loader.points.known(master.hydra, lines) is None


@pytest.mark.parametrize("lines", SAID, ids=" ".join)
def test_a_wrong_point_is_refused_in_the_same_words(lines: list[str], loader: Loader, master: DictConfig) -> None:
    """Or let pass, if it can only be seen when the job runs; the job itself is refused then."""

    def words(load: Callable[[], Any]) -> str | None:
        try:
            load()
        except (Exception, hydra_app.Aside) as error:
            cause = error.error if isinstance(error, hydra_app.Aside) else error
            return f"{type(cause).__name__}: {cause}"
        return None

    loader.points, lines = Points(), ["experiment=quickstart", *lines]
    said = words(lambda: slowly(loader, master, lines))
    assert said is not None
    loaded = words(lambda: loader.load_sweep_config(master, lines))
    assert re.sub(r"the point \S.*?: (?=`)", "", loaded or "") == said or (
        loaded is None and ("Interpolation" in said or "has no value" in said)
    )
    assert words(lambda: loader.experiment(master, lines, 0)) is not None


def test_any_mixture_of_overrides(loader: Loader, master: DictConfig) -> None:
    """In a row, so that some begin alike."""
    chance, before = random.Random(0), FAST[2]
    for _ in range(MIXTURES):
        lines = before[: chance.randint(0, 4)] + [line for lines in chance.sample(FAST[9:], 2) for line in lines]
        before = lines
        try:
            config, experiment = slowly(loader, master, lines)
        except Exception:
            continue
        same(loader.load_sweep_config(master, lines), config)
        known = loader.points.known(master.hydra, lines)
        assert known is None or repr(known) == repr(experiment)


def test_what_a_point_is_does_not_outlive_its_environment(
    loader: Loader, master: DictConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["seed=1"]
    for store in ("one", "other"):
        monkeypatch.setenv("ALIGNMENT_STORE", store)
        alike(loader, master, lines)
        assert loader.experiment(master, lines, 0).store == store


def test_configs_of_points_share_nothing(loader: Loader, master: DictConfig) -> None:
    lines = ["experiment=quickstart", "seed=1"]
    first = loader.load_sweep_config(master, lines)
    OmegaConf.set_struct(first, False)
    OmegaConf.set_readonly(first.hydra, True)
    first.stage.dpo.beta, first.more = 9.0, 1
    first.pipeline.nodes.clear()
    same(loader.load_sweep_config(master, lines), ConfigLoaderImpl.load_sweep_config(loader, master, lines))


@pytest.mark.parametrize("sent", [copy.deepcopy, lambda loader: pickle.loads(pickle.dumps(loader))])
def test_a_loader_can_be_sent_to_another_process(
    sent: Callable[[Loader], Loader], loader: Loader, master: DictConfig
) -> None:
    """As launchers do that run jobs in several."""
    lines = ["experiment=quickstart", "seed=1"]
    config, theirs = loader.load_sweep_config(master, lines), sent(loader)
    assert theirs.points.known(master.hydra, lines) is None
    same(theirs.load_sweep_config(master, lines), config)


def test_a_job_knows_its_number_when_it_is_asked_for_ahead(loader: Loader, own: DictConfig) -> None:
    lines = ["experiment=numbered"]
    assert [loader.experiment(own, lines, number).name for number in (3, 4)] == ["n-3", "n-4"]


@pytest.mark.parametrize(("text", "checked"), [("name: n", 0), ("name: n-${hydra:job.num}", 6)])
def test_the_jobs_of_a_sweep_are_validated_once(
    text: str, checked: int, loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls, ran, validate = [], [], compose.validate
    monkeypatch.setattr(compose, "validate", lambda *given: calls.append(given) or validate(*given))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    arguments = ["--config-dir", ".", "-m", "experiment=mine", "stage.dpo.beta=0.1,0.2"]
    hydra_app.main(arguments, lambda points, sweep: ran.extend(points) or [None] * len(points))
    assert [point.experiment.stage["dpo"].beta for point in ran] == [0.1, 0.2]
    assert [point.experiment.name for point in ran] == (["n-0", "n-1"] if checked else ["n", "n"])
    assert [point.overrides[1] for point in ran] == ["stage.dpo.beta=0.1", "stage.dpo.beta=0.2"]
    assert len(calls) == checked


def test_five_hundred_points_are_planned_in_seconds(loader: Loader, master: DictConfig, tmp_path: Path) -> None:
    """The bound is for a slow and busy machine; of its time only what this process uses counts."""
    for name in ("config.json", "model.safetensors", "tokenizer.json", "rows.jsonl"):
        (tmp_path / name).write_text("{}")
    given = [
        *("experiment=quickstart", "model=path", f"model.source.path={tmp_path}", "data=path", "tracking=none"),
        *(f"data.{name}.source.path={tmp_path / 'rows.jsonl'}" for name in ("instructions", "preferences")),
        *("~reward.terms.relevance.source", f"+reward.terms.relevance.source={{kind: path, path: {tmp_path}}}"),
        *("stage.sft.global_batch_size=8", "stage.sft.lora.rank=2", "stage.dpo.global_batch_size=4"),
    ]
    points = [
        [*given, f"stage.dpo.beta={beta / 100}", f"seed={seed}"] for beta, seed in product(range(1, 21), range(25))
    ]
    for _ in range(3):  # tries: a machine that is shared is slow for seconds at a time
        loader.points = Points()
        began = time.process_time()
        with many_objects():  # as a sweep does: in a process of many tests the collector takes longer than in any other
            for lines in points:
                loader.load_sweep_config(master, lines)
            with one_look():
                runs = {
                    graph.run_id(experiment, graph.build(experiment))
                    for number, lines in enumerate(points)
                    for experiment in [loader.experiment(master, lines, number)]
                }
        took = time.process_time() - began
        print(f"{len(points)} points in {took:.2f} s")
        assert len(runs) == 500
        if took <= 5:
            return
    pytest.fail("not planned in five seconds")
