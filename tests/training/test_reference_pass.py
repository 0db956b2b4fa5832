"""Reference log-probs of a run: computed once, found by the next, recomputed if damaged, never another model's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import alignment.stages.dpo as dpo_stage
from alignment.errors import PreemptedError, TrainingError
from alignment.training.preference import DPO
from alignment.training.reference import ReferenceStore, row_digests, weights_digest
from tests.forks import FORKING, say_into
from tests.training import tiny

ROWS = 40


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the pairs that were computed, in order."""
    real, numbers = DPO.score, []

    def counted(trainer: Any, given: Any) -> Any:
        numbers.extend(given)
        return real(trainer, given)

    monkeypatch.setattr(DPO, "score", counted)
    return numbers


@pytest.mark.parametrize(("checkpointing", "most"), [(False, 240), (True, 120)])
def test_the_pass_takes_twice_the_tokens_of_a_step_unless_that_keeps_little_itself(
    checkpointing: bool, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs have 10 to 73 tokens: of 40 pairs some micro-batch fills more than half of the budget."""
    real, sizes = DPO.score, []

    def sized(trainer: Any, given: Any) -> Any:
        sizes.append(trainer.batches.tokens(given))
        return real(trainer, given)

    monkeypatch.setattr(DPO, "score", sized)
    inputs = tiny.write_inputs(tmp_path, "dpo", ROWS)
    setup = tiny.engine(tokens_per_micro_batch=120, gradient_checkpointing=checkpointing)
    dpo_stage.run(tiny.context(tmp_path / "out", inputs, tiny.dpo(), setup))
    assert most / 2 < max(sizes) <= most


def run(folder: Path, name: str, shared: bool = True, **changes: Any) -> list[dict[str, float]]:
    """The metrics of a DPO stage of 10 steps of 6 of 40 pairs."""
    inputs = tiny.write_inputs(folder, "dpo", ROWS)
    context = tiny.context(folder / name, inputs, tiny.dpo(**changes), tiny.engine())
    context.shared = folder if shared else None
    dpo_stage.run(context)
    return [json.loads(line) for line in (context.folder / "metrics.jsonl").read_text().splitlines()]


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows]


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("reference/*/*.safetensors"))


def test_a_second_run_with_another_beta_rate_loss_seed_or_adapter_computes_nothing(
    tmp_path: Path, scored: list[int]
) -> None:
    first = run(tmp_path, "first")
    assert sorted(scored) == list(range(ROWS)), "each pair once, though 10 steps of 6 see 20 of them twice"
    for number, changes in enumerate(
        ({"beta": 0.5}, {"learning_rate": 1e-4}, {"loss": "ipo_mean"}, {"seed": 9}, {"lora": tiny.LORA})
    ):
        run(tmp_path, f"other{number}", **changes)
    assert len(scored) == ROWS
    assert losses(run(tmp_path, "again")) == losses(first), "the same numbers, bit for bit"


def test_kept_log_probs_train_as_computed_ones_do(tmp_path: Path) -> None:
    run(tmp_path, "fill", beta=0.5)
    assert losses(run(tmp_path, "kept")) == losses(run(tmp_path, "computed", shared=False))


def test_a_pass_that_is_asked_to_stop_keeps_what_it_has_and_says_so(
    tmp_path: Path, scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignment.training.reference_pass.BLOCK", 8)
    inputs = tiny.write_inputs(tmp_path, "dpo", ROWS)
    context = tiny.context(tmp_path / "stopped", inputs, tiny.dpo(), tiny.engine())
    context.shared, told = tmp_path, context.progress

    def progress(step: int, total: int, **facts: Any) -> None:
        context.stop.asked = "SIGTERM" if step >= 12 else None
        told(step, total, **facts)

    monkeypatch.setattr(context, "progress", progress)
    with pytest.raises(PreemptedError, match="SIGTERM: nothing was made yet") as stopped:
        dpo_stage.run(context)
    assert stopped.value.kept is True
    assert len(scored) == 16
    run(tmp_path, "again")
    assert sorted(scored) == list(range(ROWS))


def test_only_the_pairs_that_the_run_will_see_are_computed(tmp_path: Path, scored: list[int]) -> None:
    run(tmp_path, "short", max_steps=2)
    assert len(scored) == len(set(scored)) == 12
    run(tmp_path, "long", max_steps=10)
    assert sorted(scored) == list(range(ROWS)), "and the next run adds the others"


def test_another_precision_is_another_reference(tmp_path: Path, scored: list[int]) -> None:
    run(tmp_path, "fp32", max_steps=2)
    run(tmp_path, "bf16", max_steps=2, precision="bf16")
    assert len(scored) == 24 and len(list((tmp_path / "reference").iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_file_is_noticed_and_its_rows_are_computed_again(
    damage: str, tmp_path: Path, scored: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(tmp_path, "first")
    (segment,) = segments(tmp_path)
    content = bytearray(segment.read_bytes())
    if damage == "flipped":
        content[-10] ^= 1
    segment.write_bytes(content if damage == "flipped" else content[:-100])
    assert losses(run(tmp_path, "second")) == losses(first)
    assert len(scored) == 2 * ROWS
    assert re.search(r"warning: .*safetensors: the file is damaged.*computed again", capsys.readouterr().out)
    assert "the file is damaged" in (tmp_path / "second" / "warnings.txt").read_text()


def test_whole_files_with_another_models_numbers_stop_the_run_before_its_first_update(tmp_path: Path) -> None:
    from datasets import load_from_disk

    inputs = tiny.write_inputs(tmp_path, "dpo", ROWS)
    rows = load_from_disk(str(inputs["data"] / "train"))
    weights = weights_digest(inputs["model"] / "model")
    store = ReferenceStore(tmp_path / "reference", weights=weights, adapter=None, dtype="fp32")
    random = np.random.default_rng(0)
    lengths = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows]
    store.append(row_digests(rows), [-8 * random.random(length, dtype=np.float32) for length in lengths])
    with pytest.raises(TrainingError, match="the reference is not the start model"):
        run(tmp_path, "run")


def in_a_process(folder: Path, beta: float) -> None:
    say_into(folder / f"said-{beta}.txt")
    run(folder, f"run{beta}", beta=beta)


@pytest.mark.slow
def test_runs_that_start_together_compute_each_pair_once(tmp_path: Path) -> None:
    """Real processes, as the jobs of a sweep are."""
    tiny.write_inputs(tmp_path, "dpo", ROWS)
    betas = (0.1, 0.2, 0.3)
    together = [FORKING.Process(target=in_a_process, args=(tmp_path, beta)) for beta in betas]
    for process in together:
        process.start()
    for process in together:
        process.join(240)
    texts = [(tmp_path / f"said-{beta}.txt").read_text() for beta in betas]
    assert [process.exitcode for process in together] == [0] * 3, texts
    computed = [int(re.search(r"(\d+) were computed", text)[1]) for text in texts]  # type: ignore[index]
    assert sorted(computed) == [0, 0, ROWS], texts
    assert len(segments(tmp_path)) == 1
