"""Identity and execution: every setting is declared on one side, and perturbing it shows that the key agrees."""

from __future__ import annotations

import copy
import typing
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from pydantic import BaseModel

from alignment.config import shape
from alignment.config.compose import compose
from alignment.config.schema import STAGES, Experiment
from alignment.config.settings import Settings
from alignment.data.fetch import fetch
from alignment.errors import ConfigError, InputError, MachineError
from alignment.pipeline import graph, identity
from alignment.pipeline.identity import content_digest, data_digest


def subclasses(of: type) -> Iterator[type]:
    for one in of.__subclasses__():
        yield one
        yield from subclasses(one)


CLASSES = [c for c in subclasses(Settings) if c.__module__.startswith("alignment.config")]


@pytest.fixture(autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.parametrize("settings", CLASSES, ids=lambda c: c.__name__)
def test_every_key_declares_its_side(settings: type[BaseModel]) -> None:
    assert {name: shape.side(f) for name, f in settings.model_fields.items() if shape.side(f) is None} == {}


def keys(experiment: Experiment) -> dict[str, str]:
    return {node.name: node.key for node in graph.build(experiment)}


def leaves(value: Any, sides: tuple[str, ...] = (), path: tuple[Any, ...] = ()) -> Iterator[Any]:
    """(path, annotation, value, sides of every key on the way) of each leaf of a validated experiment."""
    for name, field in type(value).model_fields.items():
        item, here = getattr(value, name), (*sides, str(shape.side(field)))
        if isinstance(item, BaseModel):
            yield from leaves(item, here, (*path, name))
        elif isinstance(item, dict):
            for key, below in item.items():
                if isinstance(below, BaseModel):
                    yield from leaves(below, here, (*path, name, key))
        else:
            yield (*path, name), field, item, here


COMPARISON = {
    "model": "m", "system": None, "prompt": "{first}{second}", "pattern": "(A)", "first": "A", "second": "B",
    "temperature": 0.0, "max_tokens": 1, "url": "http://a", "api_key_env": None, "timeout_s": 1.0, "retries": 0,
    "backoff_s": 1.0, "concurrency": 1, "cache": False,
}  # fmt: skip
CHECK = {"kind": "words", "relation": "at_most", "count": 20}
# names must be names of something
NAMES = {"sigmoid": ["ipo_mean"], "instruction": ["chatml"], "instructions": ["preferences"]}


def other(field: Any, value: Any) -> list[Any]:
    """Other values of a leaf that the schema might allow, best first."""
    options = [o for a in (field.annotation, *typing.get_args(field.annotation)) for o in typing.get_args(a)]
    found: list[Any] = [o for o in options if isinstance(o, str) and o != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [*found, value + 1]
    if isinstance(value, float):
        return [*found, value * 0.5 + 0.01, value * 0.9]
    if isinstance(value, list):
        return [*found, [*value, "another"], [*value, "greek"], [CHECK], 7]
    if isinstance(value, str):
        return [*found, *NAMES.get(value, []), "f" * 64, value + "x", True, 7]
    return [
        *found,
        7,
        0.5,
        "preferences",
        "A_SECRET",
        {"kind": "sigmoid"},
        {"every_steps": 2, "share": 0.5},
        COMPARISON,
        {"kind": "hub", "id": "a/b", "revision": "c" * 40, "subset": None, "split": "train"},
    ]


def perturbed(experiment: Experiment, path: tuple[Any, ...], values: list[Any]) -> Experiment | None:
    if path[-1] == "against":  # names of data sets that there are
        values = [["preferences"]]
    for value in values:
        raw = copy.deepcopy(experiment.model_dump())
        place = raw
        for part in path[:-1]:
            place = place[part]
        place[path[-1]] = value
        try:
            return Experiment.model_validate(raw)
        except ValueError:
            continue
    return None


BASE = compose(["experiment=quickstart"])
NODES = graph.build(BASE)
# Left out: the graph itself, which changes keys by wiring, and keys that have one value only.
ONE_VALUE = ("kind", "dropout", "quantized_weights", "quantized_gradients", "quantize")  # the last: the test of QLoRA
LEAVES = [
    leaf
    for leaf in leaves(BASE)
    if leaf[0][0] != "pipeline"
    and leaf[0][-1] not in ONE_VALUE
    and leaf[0] != ("reward", "terms", "sentiment", "source")
]


JUDGING = ("judge", "evaluate", "rloo", "grpo", "online_dpo", "ppo")


def readers(path: tuple[Any, ...], nodes: Sequence[graph.Node] = NODES) -> set[str]:
    """Names of the nodes that read an identity-side setting themselves, where it may change something."""
    if path == ("seed",):
        return {node.name for node in nodes if "seed" in type(node.settings).model_fields}
    if path[0] == "model":
        return {node.name for node in nodes}
    reads = {
        "stage": lambda node: node.stage == path[1],
        "checks": lambda node: node.kind == "prepare",
        "data": lambda node: getattr(node.settings, "dataset", None) == path[1],
        "reward": lambda node: node.kind in JUDGING and path[1] != "comparison",  # nobody compares
    }[path[0]]
    return {node.name for node in nodes if reads(node)}


def with_descendants(names: set[str], nodes: Sequence[graph.Node] = NODES) -> set[str]:
    for node in nodes:  # parents come first
        if names & {parent.name for role, parent in node.parents.items() if role not in node.settings.ordering}:
            names = names | {node.name}
    return names


def idle(experiment: Experiment, path: tuple[Any, ...]) -> bool:
    """Whether a setting, or one that it is a part of, changes nothing as the others stand."""
    place: Any = experiment
    for part in path:
        if isinstance(place, Settings) and part in place.idle():
            return True
        place = place[part] if isinstance(place, dict) else getattr(place, part)
    return False


def expected(base: Experiment, changed: Experiment, leaf: Any, nodes: Sequence[graph.Node]) -> set[str]:
    """Names of the nodes whose keys another value of this leaf changes."""
    path, _, _, sides = leaf
    if set(sides) != {"identity"} or (idle(base, path) and idle(changed, path)):
        return set()
    return with_descendants(readers(path, nodes), nodes)


def differing(base: Experiment, changed: Experiment) -> set[str]:
    before, after = keys(base), keys(changed)
    return {name for name in after if before[name] != after[name]}  # a node without a use any more is left out


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda leaf: ".".join(map(str, leaf[0])))
def test_a_perturbed_setting_changes_the_keys_of_those_that_read_it_and_of_what_follows_alone(leaf: Any) -> None:
    path, field, value, _ = leaf
    changed = perturbed(BASE, path, other(field, value))
    assert changed is not None, f"no other value of {path} is allowed"
    if path == ("seed",):  # stages take it by interpolation, which a validated experiment has behind it
        changed = compose(["experiment=quickstart", "seed=1"])
    assert differing(BASE, changed) == expected(BASE, changed, leaf, NODES)


# What the quickstart does not have: where it is, and its keys.
FILES = "reward=[sentiment,answer,endpoint,format,instructions,language,length,model,regex,repetition]"
TERMS = ("correct", "judge", "form", "instructions", "script", "length", "preference", "pattern", "repeats")
ELSEWHERE: dict[str, tuple[list[str], list[str]]] = {
    "rloo": (["pipeline=sft_rloo"], ["stage.rloo"]),
    "grpo": (["pipeline=sft_grpo"], ["stage.grpo"]),
    "online_dpo": (["pipeline=sft_online_dpo"], ["stage.online_dpo"]),
    "ppo": (["pipeline=sft_ppo", "stage.ppo.kl.target=1.0"], ["stage.ppo"]),
    "kto": (["pipeline=kto"], ["stage.kto"]),
    "reward_model": (["pipeline=sft_reward_model"], ["stage.reward_model", "stage.evaluate_reward"]),
    "merge": (["pipeline=sft_dpo_merge"], ["stage.merge"]),
    "tr_dpo": (["pipeline=dpo", "stage.dpo.reference_update={every_steps: 2, share: 0.5}"], ["stage.dpo"]),
    "terms": (["experiment=rlhf", FILES, "reward.terms.judge.model=m"], [f"reward.terms.{name}" for name in TERMS]),
}


@pytest.mark.parametrize("name", ELSEWHERE)
def test_so_do_the_settings_that_the_quickstart_does_not_have(name: str) -> None:
    base = compose(ELSEWHERE[name][0])
    nodes, asked = graph.build(base), tuple(f"{key}." for key in ELSEWHERE[name][1])
    looked_at = 0
    for leaf in leaves(base):
        path, field, value, _ = leaf
        if path[-1] in ONE_VALUE or not ".".join(map(str, path)).startswith(asked):
            continue
        changed = perturbed(base, path, other(field, value))
        assert changed is not None, f"no other value of {path} is allowed"
        assert differing(base, changed) == expected(base, changed, leaf, nodes), path
        looked_at += bool(expected(base, changed, leaf, nodes))
    assert looked_at


def test_no_stage_is_forgotten_here() -> None:
    there = {settings.kind for settings in BASE.stage.values()}
    assert there | ELSEWHERE.keys() | {"evaluate_reward"} >= STAGES.keys()


def test_qlora_has_a_key_of_its_own_where_its_package_is(monkeypatch: pytest.MonkeyPatch) -> None:
    found = identity.version

    def version(installed: bool, package: str) -> str:
        if package != "bitsandbytes":
            return found(package)
        if installed:
            return "0.50.2"
        raise MachineError(f"the package {package} is not installed", fix=f"pip install {package}")

    changed = perturbed(BASE, ("stage", "sft", "lora", "quantize"), ["nf4"])
    assert changed is not None
    monkeypatch.setattr(identity, "version", partial(version, True))
    before, after = keys(BASE), keys(changed)
    differ = {name for name in before if before[name] != after[name]}
    assert differ == with_descendants(readers(("stage", "sft", "lora", "quantize")))
    monkeypatch.setattr(identity, "version", partial(version, False))
    assert keys(BASE) == before, "nobody else needs it"
    with pytest.raises(MachineError, match="bitsandbytes is not installed"):
        keys(changed)


def test_of_a_reward_who_compares_has_the_comparison_in_its_key_and_all_others_the_terms() -> None:
    compares = ["reward=[sentiment_relevance,endpoint_pairwise]", "stage.judge.judging=pairwise"]
    chosen = ["experiment=quickstart", *compares, "reward.terms.judge.model=m"]
    before = keys(compose(chosen))
    evaluations = {node.name for node in NODES if node.kind == "evaluate"}
    for setting, asking in {"comparison": {"judged"}, "terms.judge": evaluations}.items():
        after = keys(compose([*chosen, f"reward.{setting}.temperature=0.5"]))
        assert {name for name in after if before[name] != after[name]} == with_descendants(asking)
    (judged,) = (node for node in graph.build(compose(chosen)) if node.name == "judged")
    assert "vaderSentiment" not in judged.identity["packages"], "a term of sentiment is not asked there"


SEES = ("global_batch_size", "epochs", "max_steps", "seed")


@pytest.mark.parametrize("name", SEES)
def test_what_pairs_a_reference_is_for_is_in_its_key_unless_all_of_them_are(name: str) -> None:
    few = compose(["experiment=quickstart", "stage.dpo.max_steps=2"])
    for base, idle in ((few, False), (BASE, name != "max_steps")):
        changed = perturbed(base, ("stage", "reference", name), [3])
        assert changed is not None
        before, after = keys(base), keys(changed)
        differ = {node for node in before if before[node] != after[node]}
        assert differ == (set() if idle else {"reference"}), "never DPO, or what follows from it"


def test_dpo_has_the_same_key_with_a_reference_before_it_and_without() -> None:
    without = compose(["experiment=quickstart", "~pipeline.nodes.reference", "~pipeline.nodes.dpo.inputs.reference"])
    assert keys(BASE) == {**keys(without), "reference": keys(BASE)["reference"]}


def test_a_sweep_has_one_reference_for_each_start_model_and_pairs() -> None:
    def count(points: list[Experiment | None]) -> list[int]:
        """Distinct keys, of these nodes."""
        found = [keys(point) for point in points if point is not None]
        assert len(found) == len(points)
        return [len({one[name] for one in found}) for name in ("sft", "reference", "dpo", "evaluate_dpo")]

    seeds = (BASE, compose(["experiment=quickstart", "seed=1"]))
    betas = [perturbed(base, ("stage", "dpo", "beta"), [beta]) for base in seeds for beta in (0.1, 0.2, 0.3)]
    assert count(betas) == [2, 2, 6, 6]
    ways = {"learning_rate": 1e-4, "loss": "ipo_mean", "lora": None}
    alone = [perturbed(BASE, ("stage", "dpo", name), [value]) for name, value in ways.items()]
    longer = ["stage.dpo.seed=7", "stage.dpo.epochs=2.0", "stage.dpo.global_batch_size=4"]  # the reference follows
    assert count([BASE, *alone, compose(["experiment=quickstart", *longer])]) == [1, 1, 5, 5]


def test_what_follows_from_a_node_is_what_the_quickstart_shows() -> None:
    """So that the test above cannot pass by expecting nothing."""
    verdicts = {"evaluate_dpo", "verdict"}
    assert with_descendants(readers(("stage", "dpo", "beta"))) == {"dpo", *verdicts}
    assert with_descendants(readers(("reward", "terms"))) == {
        *("judged", "pairs", "reference", "dpo", "evaluate_start", "evaluate_sft", "best_of_n"), *verdicts
    }  # fmt: skip
    assert {node.name for node in NODES} - with_descendants(readers(("data", "instructions"))) == {"start"}
    assert with_descendants(readers(("data", "preferences"))) == set()


def test_engine_launcher_and_tracking_change_no_key() -> None:
    elsewhere = compose(
        ["experiment=quickstart", "engine=zero3", "launcher=torchrun", "tracking=none", "store=elsewhere"]
    )
    assert keys(elsewhere) == keys(BASE)


def test_stages_with_equal_identity_share_one_key_whatever_they_are_called() -> None:
    nodes = BASE.pipeline.model_dump()
    nodes["nodes"]["twin"] = nodes["nodes"]["evaluate_sft"]
    twin = Experiment.model_validate({**BASE.model_dump(), "pipeline": nodes})
    assert keys(twin)["twin"] == keys(twin)["evaluate_sft"]


def test_a_files_content_and_not_its_path_is_its_identity(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n')
    (tmp_path / "c.jsonl").write_text('{"x": 2}\n')
    a, b, c = (content_digest(tmp_path / f"{name}.jsonl") for name in "abc")
    assert a == b != c
    (tmp_path / "a.jsonl").write_text('{"x": 22}\n')
    assert content_digest(tmp_path / "a.jsonl") != a


def write_model(folder: Path) -> Path:
    """The names of a model's files, with nothing in them that any library would take."""
    names = ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "vocab.txt", "spiece.model")
    for name in (*names, "additional_chat_templates/default.jinja"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


UNREAD = [
    *("README.md", "optimizer.pt", "original/consolidated.00.pth", "original/params.json", "onnx/config.json"),
    *(".git/config.json", ".cache/huggingface/download/config.json.metadata", ".gitattributes", "._config.json"),
]


@pytest.mark.parametrize("name", UNREAD)
def test_files_that_no_import_reads_are_not_in_the_key(name: str, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    before = content_digest(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("of no account")
    assert content_digest(folder) == before


def test_every_file_that_an_import_reads_is_in_the_key(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    digests = {content_digest(folder)}
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        file.write_text(f"another {file.name}")
        digests.add(content_digest(folder))
    (folder / "config.json").rename(folder / "generation_config.json")
    digests.add(content_digest(folder))
    assert len(digests) == len(files) + 2


def test_where_a_model_lies_is_not_in_its_key(tmp_path: Path) -> None:
    here, hidden = write_model(tmp_path / "model"), write_model(tmp_path / ".git" / "lfs" / "model")
    assert content_digest(here) == content_digest(hidden)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("to be filled")
    with pytest.raises(InputError, match="is a folder without a model's files") as caught:
        content_digest(tmp_path)
    assert caught.value.where == str(tmp_path)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_model(tmp_path / "mine")
    (tmp_path / "rows.jsonl").write_text("{}")
    where = ("model.source.path='{}/mine'", "model.chat_template='{}/mine/chat_template.jinja'",
             "data.instructions.source.path='{}/rows.jsonl'")  # fmt: skip
    short, long = (
        compose(["pipeline=sft", "model=path", "data=path", *(text.format(home) for text in where)])
        for home in ("~", tmp_path)
    )
    assert keys(short) == keys(long)
    assert fetch(short.model.source) == tmp_path / "mine"


@pytest.mark.parametrize("left", ["", '{"sha256": "ab', "{}", "[]", "null"])
def test_a_damaged_note_of_a_digest_is_no_note(left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNMENT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
    whole = content_digest(tmp_path / "a.jsonl")
    (note,) = (tmp_path / "cache" / "digests").iterdir()
    good = note.read_bytes()
    note.write_text(left)
    assert content_digest(tmp_path / "a.jsonl") == whole
    assert note.read_bytes() == good


def test_optional_packages_count_only_where_they_do_something(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    plain = graph.build(compose(["experiment=quickstart", "model=path", f"model.source.path={tmp_path}"]))
    packages = {node.name: set(node.identity["packages"]) for node in plain}
    assert "gguf" not in packages["start"]
    assert "gguf" in {node.name: node for node in graph.build(BASE)}["start"].identity["packages"]
    assert "vaderSentiment" in packages["judged"]


def test_tokenizers_is_in_the_key_of_every_stage_that_makes_token_ids_or_text() -> None:
    packages = {node.name: set(node.identity["packages"]) for node in graph.build(BASE)}
    assert {name for name in packages if "tokenizers" in packages[name]} == {
        "start", "rows", "samples", "judged", "pairs", "evaluate_start", "evaluate_sft", "evaluate_dpo", "best_of_n",
    }  # fmt: skip


def test_the_reference_is_left_out_where_the_loss_looks_at_other_rows_than_it_does() -> None:
    """KTO's needs answers to other prompts; a loss without a reference point would have them scored for nothing."""
    found = [graph.build(compose(["pipeline=kto", f"stage.kto.loss={loss}"])) for loss in ("kto", "apo_zero_unpaired")]
    assert [{"reference"} & {node.name for node in nodes} for nodes in found] == [{"reference"}, set()]


def test_a_data_set_is_what_its_files_hold_in_their_order_and_how_they_are_read(tmp_path: Path) -> None:
    for name, text in (("a.jsonl", "1"), ("b.jsonl", "2")):
        (tmp_path / name).write_text(text)
    both = data_digest(str(tmp_path / "*.jsonl"))
    assert both == data_digest(f"{tmp_path}/[ab].jsonl") != data_digest(f"{tmp_path}/[a].jsonl")
    assert data_digest(f"{tmp_path}/[a].jsonl") == data_digest(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    assert data_digest(str(tmp_path / "*.jsonl")) != both, "rows come in another order"
    before = data_digest(str(tmp_path / "c.jsonl"))
    (tmp_path / "c.jsonl").rename(tmp_path / "c.csv")
    assert data_digest(str(tmp_path / "c.csv")) != before, "the same bytes, read otherwise"


def test_data_at_an_address_is_what_its_server_says_of_it() -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/rows/one.jsonl", b"{}")
    before = data_digest("memory://rows/*.jsonl")
    assert data_digest("memory://rows/one.jsonl") == before
    system.pipe("/rows/two.jsonl", b"{}")
    assert data_digest("memory://rows/*.jsonl") != before
    with pytest.raises(InputError, match="no such file"):
        data_digest("memory://rows/three.jsonl")


@pytest.mark.parametrize(
    "address", ["s3://me:secret@host/rows.jsonl", "https://host/rows.jsonl?X-Amz-Signature=secret"]
)
def test_an_address_with_a_secret_is_refused_without_repeating_it(address: str) -> None:
    with pytest.raises(ConfigError, match=r"`data.instructions.source.path` holds a password or a signature") as caught:
        compose(["data=path", f"data.instructions.source.path='{address}'"])
    assert "secret" not in str(caught.value)


def test_a_graph_of_a_pattern_has_the_key_of_what_it_means(tmp_path: Path) -> None:
    def key(path: str) -> str:
        experiment = compose(["pipeline=sft", "data=path", f"data.instructions.source.path='{path}'"])
        return next(node.key for node in graph.build(experiment) if node.name == "rows")

    (tmp_path / "a.jsonl").write_text("1")
    before = key(f"{tmp_path}/a.jsonl")
    assert key(f"{tmp_path}/*.jsonl") == before, "where it lies is not in it"
    (tmp_path / "a.jsonl").rename(tmp_path / "a.csv")
    assert key(f"{tmp_path}/a.csv") != before, "how it is read is"
    fsspec.filesystem("memory").pipe("/graph/a.jsonl", b"1")
    assert key("memory://graph/*.jsonl") != before
