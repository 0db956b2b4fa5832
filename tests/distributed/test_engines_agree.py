"""Every engine on two and four gloo ranks trains the model that one process trains: losses, metrics, weights. And
interrupted it does so bit for bit as uninterrupted.

Equal means to 1e-5 in fp32 (the largest differences seen are about 1e-6), whatever the number of ranks, the token
budget and with it the number of micro-batches: all three differ between the arms.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from alignment.config.losses import PAIR_LOSSES
from alignment.life import LONGEST
from tests.distributed import bare, run_stages
from tests.distributed.launching import STRATEGIES, launch, rows_of, weights_of, write_plan, write_starts
from tests.distributed.test_resume import bits, steps_of
from tests.forks import FORKING
from tests.training import tiny

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
WHOLE = {"max_steps": 8}  # an epoch of 40 rows in batches of 6, and the beginning of the next one
SHORT = {"max_steps": 4}
STOPS = [3, None]  # before the last step, or the one before it
COMPILED = {"compile": True, "tokens_per_micro_batch": 256}  # one shape of pack
VARIANTS: dict[str, Any] = {  # of adapters, all of them at once
    "lora": {
        "dora": True, "rslora": True, "init": "orthogonal",
        "modules_to_save": ["norm", "lm_head", "input_layernorm"],
    },
    "start": "untied",
}  # fmt: skip
SHARED: dict[str, Any] = {"sequence_parallel": 2, "tokens_per_micro_batch": 40}
CHECKPOINTING = {"gradient_checkpointing": True}
MOVES = {"max_steps": 5, "reference_update": {"every_steps": 2, "share": 0.6}}
# Losses of pairs, several in one sum: losses see log-probs alone, and what differs in one differs in the sum.
MIXES: dict[str, dict[str, Any]] = {
    "plain": {"loss": dict.fromkeys((name for name, of in PAIR_LOSSES.items() if of.reference and not of.whole), 0.1)},
    "whole": {"loss": {name: 0.3 for name, of in PAIR_LOSSES.items() if of.whole}},
    "free": {"loss": {name: 0.2 for name, of in PAIR_LOSSES.items() if not of.reference}},
    "weighed": {**MOVES, "loss": {"sigmoid": 0.8, "sft": 1.0}, "weighting": "wpo", "ld_alpha": 0.5, "divergence": "js"},
}
MIXES["plain"]["label_smoothing"] = 0.1
MIXES["free"]["lora"] = True
CASES = {
    **{f"{kind}_{strategy}": (kind, strategy, WHOLE, {}) for kind in ("sft", "dpo") for strategy in STRATEGIES},
    "sft_zero3_lora": ("sft", "zero3", {"lora": True}, {}),
    "dpo_zero2_lora": ("dpo", "zero2", {"lora": True}, {}),
    "dpo_zero3_lora": ("dpo", "zero3", {"lora": True}, {}),
    "sft_zero3_checkpointing": ("sft", "zero3", {}, {**CHECKPOINTING, "tokens_per_micro_batch": 60}),
    "dpo_ddp_lora": ("dpo", "ddp", {"lora": True}, {}),
    "sft_ddp_variants_checkpointing": ("sft", "ddp", VARIANTS, CHECKPOINTING),
    "dpo_zero1_variants": ("dpo", "zero1", VARIANTS, {}),
    "sft_zero2_variants": ("sft", "zero2", VARIANTS, {}),
    "dpo_zero3_variants": ("dpo", "zero3", VARIANTS, {}),
    "sft_zero3_variants_checkpointing": ("sft", "zero3", VARIANTS, CHECKPOINTING),
    "dpo_zero3_variants_offload": ("dpo", "zero3", VARIANTS, {"offload": "all"}),
    "sft_zero3_offload_checkpointing": ("sft", "zero3", {}, {**CHECKPOINTING, "offload": "all"}),
    "sft_ddp_sequence": ("sft", "ddp", {}, SHARED),
    "dpo_zero1_sequence": ("dpo", "zero1", {}, SHARED),
    "sft_zero3_sequence": ("sft", "zero3", {}, {**CHECKPOINTING, "sequence_parallel": 2}),
    "dpo_zero3_variants_sequence": ("dpo", "zero3", VARIANTS, SHARED),
    "dpo_zero3_offload_sequence": ("dpo", "zero3", {}, {**SHARED, "offload": "all"}),
    "sft_zero2_offload": ("sft", "zero2", {}, {"offload": "optimizer"}),
    # Attention with sinks cannot be packed, which is found in the middle of a forward.
    "sft_zero3_padded": ("sft", "zero3", {"start": "sinks"}, {}),
    **{f"reward_model_{strategy}": ("reward_model", strategy, {}, {}) for strategy in STRATEGIES},
    "reward_model_zero3_lora": ("reward_model", "zero3", {"lora": True, "centring": 0.01}, {}),
    "bce_zero2_checkpointing": (
        "reward_model",
        "zero2",
        {"loss": "bce"},
        {**CHECKPOINTING, "tokens_per_micro_batch": 60},
    ),
    "mse_zero3": ("reward_model", "zero3", {"loss": "mse"}, {"tokens_per_micro_batch": 60}),
    # What looks at the whole global batch first.
    "kto_ddp_checkpointing": ("kto", "ddp", WHOLE, {**CHECKPOINTING, "tokens_per_micro_batch": 60}),
    **{f"kto_{strategy}": ("kto", strategy, {}, {"tokens_per_micro_batch": 60}) for strategy in STRATEGIES[1:]},
    **{f"apo_{strategy}": ("kto", strategy, {"loss": "apo_zero_unpaired"}, {}) for strategy in ("zero2", "zero3")},
    **{f"dpo_{strategy}_{mix}": ("dpo", strategy, MIXES[mix], {}) for strategy in ("zero2", "zero3") for mix in MIXES},
    "dpo_zero2_weighed": ("dpo", "zero2", {**MIXES["weighed"], "lora": True}, {}),
    "dpo_ddp_whole": ("dpo", "ddp", MIXES["whole"], {}),
    "dpo_zero1_moving_checkpointing": ("dpo", "zero1", MOVES, CHECKPOINTING),
    "kto_zero3_sequence": ("kto", "zero3", {}, SHARED),
    "dpo_zero3_whole_sequence": ("dpo", "zero3", MIXES["whole"], SHARED),
    "dpo_zero3_moving_sequence": ("dpo", "zero3", MOVES, SHARED),
    "dpo_zero3_moving_hpz": ("dpo", "zero3", MOVES, {"hpz": 2}),  # weights are written beside both their copies
    "dpo_zero3_whole_offload": ("dpo", "zero3", MIXES["whole"], {"offload": "all"}),
    "kto_zero3_offload": ("kto", "zero3", {}, {"offload": "all"}),
    "reward_model_zero3_offload": ("reward_model", "zero3", {}, {"offload": "all"}),
    "sft_zero1_offload": ("sft", "zero1", {}, {"offload": "optimizer"}),
    "dpo_zero3_offload_optimizer": ("dpo", "zero3", {}, {"offload": "optimizer"}),
    "sft_uneven": ("sft", "zero2", {"global_batch_size": 5}, {}),
    **{f"dpo_{strategy}_compiled": ("dpo", strategy, {}, COMPILED) for strategy in ("ddp", "zero2")},
}
CASES = {
    name: (kind, strategy, {**SHORT, **settings}, engine) for name, (kind, strategy, settings, engine) in CASES.items()
}
# Interrupted as not interrupted, bit for bit; more of these in test_resume.py.
RESUMED = [
    *(
        "dpo_ddp",
        "sft_zero1",
        "dpo_zero1",
        "sft_zero2",
        "dpo_zero3",
        "dpo_ddp_lora",
        "dpo_zero2_lora",
        "sft_zero3_lora",
    ),
    *(
        "sft_zero2_variants",
        "dpo_zero3_variants",
        "sft_zero3_offload_checkpointing",
        "sft_zero3_sequence",
        "sft_zero2_offload",
    ),
    *(f"{kind}_{strategy}" for kind in ("kto", "reward_model") for strategy in ("zero2", "zero3")),
    *(f"dpo_{strategy}_{mix}" for strategy in ("zero2", "zero3") for mix in ("whole", "weighed")),
]
FOUR = {
    "sft_ddp": ("sft", "ddp", SHORT, {"tokens_per_micro_batch": 40}),
    "dpo_ddp": ("dpo", "ddp", WHOLE, {"tokens_per_micro_batch": 60}),
    "dpo_zero3": ("dpo", "zero3", SHORT, {}),
    # As on two machines of two: each has a second copy of the weights. A process has several micro-batches a step, or
    # the model parameters that no number of ranks divides, or some that ZeRO-3 keeps whole.
    "sft_hpz": ("sft", "zero3", SHORT, {"hpz": 2, "tokens_per_micro_batch": 40}),
    "dpo_hpz_small": ("dpo", "zero3", {**SHORT, "start": "small"}, {"hpz": 2, "param_persistence_threshold": 60}),
    "sft_hpz_persistent": ("sft", "zero3", SHORT, {"hpz": 2, "param_persistence_threshold": 600}),
    "dpo_sequence": (
        "dpo", "zero2", {**WHOLE, "start": "untied"}, {"sequence_parallel": 2, "tokens_per_micro_batch": 30}
    ),
    "dpo_hpz_lora": ("dpo", "zero3", {**SHORT, "lora": True}, {"hpz": 2, "tokens_per_micro_batch": 60}),
    "sft_hpz_offload": ("sft", "zero3", SHORT, {"hpz": 2, "offload": "all"}),
}  # fmt: skip
# Padded, against one process that packs; and what no stage does (tests/distributed/bare.py).
OTHERS = {
    "sft_padded": ("sft", "ddp", SHORT, {"padded": True}),
    "dpo_padded": ("dpo", "ddp", SHORT, {"padded": True}),
    "unlabelled": ("unlabelled", "ddp", {}, {"tokens_per_micro_batch": 1}),
}
IGNORED = {"step", "time", "tokens_per_s"}


def plan_of(cases: dict[str, tuple[str, str, dict, dict]]) -> list[dict[str, Any]]:
    plan = []
    for name, (kind, strategy, settings, engine) in cases.items():
        case = {"kind": kind, "strategy": strategy, "settings": settings, "engine": engine}
        plan.append({"name": name, "front_end": "compiled" in name, **case})
        if name in RESUMED:  # at once: DDP rounds otherwise in a process that DeepSpeed was in
            plan.append({"name": f"{name}_parts", **case, "stops": STOPS})
    return plan


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    launch(folder, 2, plan_of({**CASES, **OTHERS, "bf16": ("dpo", "zero2", {**WHOLE, "precision": "bf16"}, {})}))
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """name of the case's one-process twin -> its folder; each twin runs once, in this process, with another budget."""
    folder, done = tmp_path_factory.mktemp("alone"), {}

    def run(kind: str, changes: dict[str, Any]) -> Path:
        name = f"{kind}{sorted(changes.items())}".replace(" ", "")
        write_starts(folder)
        if name not in done:
            lora = tiny.adapters(changes.get("lora", False))
            stage = "sft" if kind in bare.KINDS else kind
            start = changes.get("start", "start")
            settings = getattr(tiny, stage)(
                **{name: value for name, value in changes.items() if name != "start"} | {"lora": lora}
            )
            inputs = {**tiny.write_inputs(folder, stage), "model": folder / start}
            context = tiny.context(
                folder / str(len(done)), inputs, settings,
                tiny.engine("single", tokens_per_micro_batch=250),
            )  # fmt: skip
            if kind in bare.KINDS:
                bare.run(kind, context)
            else:
                importlib.import_module(f"alignment.stages.{kind}").run(context)
            done[name] = context.folder
        return done[name]

    return run


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("four")
    heads = {"name": "heads", "kind": "sft", "strategy": "ddp", "settings": {}, "engine": {"sequence_parallel": 4}}
    launch(folder, 4, [*plan_of(FOUR), {**heads, "fails": True}])
    return folder


@pytest.mark.parametrize("name", CASES)
def test_losses_metrics_and_weights_equal_those_of_one_process(name: str, together: Path, alone: Any) -> None:
    kind, _, changes, _ = CASES[name]
    # A row is as wide as its neighbours, and a pack that is shared or compiled is filled up.
    widths = {"computed_share"} if {"padded", "sequence", "compiled"} & {*name.split("_")} else set()
    require_equal(alone(kind, changes), together / name, together / changes.get("start", "start"), IGNORED | widths)


@pytest.mark.parametrize("name", RESUMED)
def test_interrupted_it_is_the_same_bit_for_bit(name: str, together: Path) -> None:
    steps = CASES[name][2]["max_steps"]
    for rank in range(2):
        assert steps_of(together / f"{name}_parts", rank) == list(range(1, steps + 1)), "none was computed twice"
    assert bits(together / f"{name}_parts") == bits(together / name)


@pytest.mark.parametrize("name", ["sft_padded", "dpo_padded"])
def test_padded_rows_on_two_ranks_train_as_one_process_that_packs(name: str, together: Path, alone: Any) -> None:
    assert rows_of(together / name)[0]["computed_share"] > 1, "padding was computed"
    require_equal(alone(OTHERS[name][0], SHORT), together / name, together / "start", IGNORED | {"computed_share"})


def test_a_process_without_a_labelled_token_does_its_part(together: Path, alone: Any) -> None:
    for step in range(bare.STEPS):
        assert bare.labels_by_process(step)[step % 2] == 0 < bare.labels_by_process(step)[1 - step % 2]
    found = together / "unlabelled"
    require_equal(alone("unlabelled", {}), found, found / "start")


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_train_as_one_process_does(name: str, four: Path, alone: Any) -> None:
    kind, _, changes, _ = FOUR[name]
    filled = {"computed_share"} if "sequence" in name else set()
    require_equal(alone(kind, changes), four / name, four / changes.get("start", "start"), IGNORED | filled)


@pytest.mark.parametrize("name", ["sft_ddp_sequence", "sft_zero3_sequence"])
def test_each_token_is_computed_by_one_of_those_that_share_it(name: str, together: Path) -> None:
    """A pack is filled up by one token at most: of packs of 40 and more, less than a tenth. Twice would be 2."""
    shares = [row["computed_share"] for row in rows_of(together / name)]
    assert min(shares) >= 1 and max(shares) < 1.1


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_layers_were_compiled(strategy: str, together: Path) -> None:
    """For packs that are filled up; of the compiler all but what writes code, which takes longer than the rest."""
    assert min(row["computed_share"] for row in rows_of(together / f"dpo_{strategy}_compiled")) > 1
    assert (together / "said-0.txt").read_text().count("2 layers are compiled at their first packs") == 2


def test_those_who_share_packs_keep_reference_log_probs_once(four: Path) -> None:
    """dpo_sequence alone has a reference of its own among those of full packs: of dpo_ddp, and of the small model."""
    files = [len(list(folder.glob("*.safetensors"))) for folder in four.glob("reference/*")]
    assert sorted(files) == [2, 4, 4]


def test_processes_that_cannot_share_the_heads_of_a_model_are_told(four: Path) -> None:
    for rank in range(4):
        said = (four / "heads" / f"error-{rank}.txt").read_text()
        assert said.startswith("engine.sequence_parallel: this model's packs cannot be shared by processes: 4 ")
        assert "4 processes cannot share 4 heads and 2 of keys equally" in said


def test_each_machine_has_a_second_copy_of_the_weights_with_hpz_alone(four: Path) -> None:
    summaries = {name: json.loads((four / name / "summary.json").read_text()) for name in ("dpo_zero3", "sft_hpz")}
    assert {name: summary["second_copy"] for name, summary in summaries.items()} == {"dpo_zero3": 0, "sft_hpz": 13_472}


def test_all_ranks_write_reference_log_probs_and_a_second_run_reads_them(together: Path) -> None:
    """dpo_zero2 follows dpo_ddp over the same pairs, in the same process group."""
    written = sorted(len(list(folder.glob("*.safetensors"))) for folder in together.glob("reference/*"))
    assert written == [2, 2, 6], "one a rank: bf16; another model; fp32, of pairs, of KTO's rows and of APO-zero's"
    for name, computed in (
        ("dpo_ddp", 40),
        ("kto_ddp_checkpointing", 40),
        ("kto_zero3", 0),
        ("dpo_zero1", 0),
        ("dpo_zero2", 0),
        ("dpo_zero3", 0),
        ("bf16", 40),
    ):
        assert json.loads((together / name / "summary.json").read_text())["reference_computed"] == computed, name


def require_equal(one: Path, several: Path, start_folder: Path, ignored: set[str] = IGNORED) -> None:
    """Folders of the same stage on one process and on several."""
    expected, found = rows_of(one), rows_of(several)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for left, right in zip(expected, found, strict=True):
        assert left.keys() == right.keys()
        for metric in left.keys() - ignored:
            assert right[metric] == pytest.approx(left[metric], abs=TOLERANCE, rel=TOLERANCE), (metric, left["step"])
    start, trained, model = (weights_of(folder / "model") for folder in (start_folder, one, several))
    assert max(float((model[key] - trained[key]).abs().max()) for key in trained) <= TOLERANCE
    assert max(float((model[key] - start[key]).abs().max()) for key in start) > 1e-3, "nothing was learned"


@pytest.mark.parametrize("name", ["sft_zero3", "dpo_zero3", "dpo_zero3_lora"])
def test_zero3_really_shards_every_parameter(name: str, together: Path) -> None:
    summary = json.loads((together / name / "summary.json").read_text())
    assert summary["empty_parameters"] == summary["parameters"]
    assert summary["trained_parameters"] == (4096 if "lora" in name else 26_944)
    assert summary["distributed_type"] == "DistributedType.DEEPSPEED"
    assert len(summary["group_timeouts"]) >= 2, "DeepSpeed makes groups of its own"
    assert min(summary["group_timeouts"]) > LONGEST


@pytest.mark.parametrize("name", ["sft_zero3", "sft_zero3_padded"])
def test_zero3_puts_every_parameter_away_after_the_trial(name: str, together: Path) -> None:
    assert json.loads((together / name / "summary.json").read_text())["active_after_trial"] == 0


def test_bf16_agrees_within_its_rounding(together: Path, alone: Any) -> None:
    expected, found = rows_of(alone("dpo", {**WHOLE, "precision": "bf16"})), rows_of(together / "bf16")
    assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=2e-3)


@pytest.mark.parametrize("name", ["dpo_zero3_lora", "dpo_zero3_variants"])
def test_the_adapter_beside_the_merged_model_gives_the_same_model(name: str, together: Path) -> None:
    """To 1e-5 in its logits; that the start model's are others says that the adapter does something."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, ids = together / name, torch.arange(5, 40)[None]
    base = AutoModelForCausalLM.from_pretrained(together / CASES[name][2].get("start", "start") / "model")
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        assert not torch.allclose(merged(ids).logits, base(ids).logits, atol=1e-3)
        expected = PeftModel.from_pretrained(base, folder / "adapter")(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-5)


def test_nothing_was_compiled(together: Path) -> None:
    assert not list((together / "cache").rglob("*.so")) and not list((together / "cache").rglob("build.ninja"))


def test_zero_runs_in_one_process_without_a_launcher(tmp_path: Path, alone: Any) -> None:
    cases = {"sft_zero2": ("sft", "zero2", WHOLE, {}), "dpo_lora": ("dpo", "zero3", {**SHORT, "lora": True}, {})}
    write_plan(tmp_path, [case for case in plan_of(cases) if "stops" not in case])
    process = FORKING.Process(target=run_stages.work_alone, args=(tmp_path,))
    process.start()
    process.join(300)
    assert process.exitcode == 0, (tmp_path / "said-0.txt").read_text()[-3000:]
    for name, (kind, _, changes, _) in cases.items():
        expected, found = rows_of(alone(kind, changes)), rows_of(tmp_path / name)
        assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in expected], abs=1e-4)
