"""Training that silently computes something else, or the same thing again; docs/pains.md, 8, 9, 11 to 13 and 21."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.data.models import import_model
from alignment.files import read_jsonl
from alignment.stages import dpo
from alignment.training.attention import PACKED
from alignment.training.reference import ReferenceStore, row_digests, weights_digest
from tests.data.conftest import model_settings
from tests.data.test_adapters import adapter_of
from tests.pains import stock
from tests.training import models, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRS = [
    {"prompt": f"Is {i} nice?", "chosen": f" Yes, {i} is {'very ' * (1 + 3 * (i % 4))}so.", "rejected": f" No, {i}!"}
    for i in range(8)
]


def train(folder: Path, name: str, rows: list[dict[str, Any]] | None = None, **settings: Any) -> tuple[Any, Any]:
    """A DPO stage in folder/name: its summary, and its context."""
    inputs = tiny.write_inputs(folder, "dpo")
    if rows is not None:
        Dataset.from_list(rows).save_to_disk(str(folder / "rows" / "train"))
        inputs["data"] = folder / "rows"
    budget = settings.pop("budget", 120)
    setup = tiny.engine(tokens_per_micro_batch=budget)
    context = tiny.context(folder / name, inputs, tiny.dpo(**settings), setup)
    context.shared = folder
    return dpo.run(context), context


def metrics(context: Any, name: str) -> list[float]:
    return [row[name] for row in read_jsonl(context.folder / "metrics.jsonl")]


def test_trl_1230_packed_documents_see_each_other(tiny_model: Path, tmp_path: Path) -> None:
    """TRL's default packing is right by now, on any attention; `wrapped` is not."""
    rows, tokenizer = [{"text": f"{n} is {n * 7919}."} for n in range(8)], AutoTokenizer.from_pretrained(tiny_model)
    apart = {}
    for strategy in ("bfd", "wrapped"):
        how = {"packing": True, "packing_strategy": strategy, "max_length": 60}
        made = stock.trainer("sft", tokenizer, rows, tmp_path, **how)
        given = stock.batch(made, [0])
        ids = given.pop("input_ids")
        begin, end = ((ids[0] == tokenizer.eos_token_id).nonzero().flatten()[:2] + 1).tolist()
        model = made.model.eval()
        with torch.no_grad():
            packed, alone = model(input_ids=ids, **given).logits[0, begin:end], model(ids[:, begin:end]).logits[0]
        apart[strategy] = float((packed - alone).abs().max())
    assert apart["wrapped"] > 0.01 > 1e-5 > apart["bfd"]

    ours, batch = models.packing_model("llama"), models.rows(1, groups=4)
    alone = ours(**batch, use_cache=False, fused_lm_head=True).log_probs
    ours.set_attn_implementation(PACKED)
    others = {**batch, "input_ids": batch["input_ids"].clone()}
    others["input_ids"][1] = torch.where(batch["attention_mask"][1] == 1, (batch["input_ids"][1] - 2) % 257 + 3, 0)
    first, second = (ours(pack=models.packed(given, 1)).log_probs for given in (batch, others))
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-5)
    assert torch.equal(first[[0, 2, 3]], second[[0, 2, 3]]), "another neighbour changes nothing, to the bit"
    assert not torch.equal(first[1], second[1])


def test_trl_2175_gradient_accumulation_changes_the_loss(tiny_model: Path, tmp_path: Path) -> None:
    """SFT is mended in TRL; the likelihood term of DPO is still averaged within each micro-batch."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    losses = []
    policy = models.make("llama", {**models.SMALL, "vocab_size": len(tokenizer)})
    for size in (8, 2):
        how = {
            "policy": policy,
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": 8 // size,
            "max_steps": 1,
        }
        made = stock.trainer("dpo", tokenizer, PAIRS, tmp_path, loss_type=["sigmoid", "sft"], **how)
        losses.append(stock.history(made)[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3, losses

    found = []
    for budget in (10_000, 1):  # all pairs at once, each alone
        _, context = train(tmp_path, str(budget), loss={"sigmoid": 1.0, "sft": 1.0}, max_steps=3, budget=budget)
        found.append([metrics(context, name) for name in ("loss", "grad_norm")])
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5) and found[0][1] == pytest.approx(found[1][1], abs=1e-4)


def test_trl_1365_wrong_reference_under_adapters(tmp_path: Path) -> None:
    """Of a start model that is a base and a trained adapter. TRL keeps a copy of the adapter as reference by now; what
    it did, and what PEFT offers by itself, is the model with its adapter off."""
    from peft import PeftModel

    base = tiny.write_inputs(tmp_path, "dpo")["model"] / "model"
    adapter_of(base, tmp_path / "adapter")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    given = models.together([torch.tensor(row["prompt_ids"] + row["chosen_ids"]) for row in tiny.pair_rows(4)])
    with torch.no_grad():
        policy = model(given["input_ids"]).logits.log_softmax(-1)
        with model.disable_adapter():
            off = model(given["input_ids"]).logits.log_softmax(-1)
    ratio = (policy - off).gather(-1, given["input_ids"][..., None]).sum((1, 2))
    assert abs(float(-logsigmoid(0.1 * (ratio[:2] - ratio[2:])).mean()) - math.log(2)) > 0.05, "at the first step"

    start = tmp_path / "imported" / "start"
    import_model(base, model_settings(), start / "model", lambda *a, **k: None, print, tmp_path / "adapter")
    inputs = {**tiny.write_inputs(tmp_path, "dpo"), "model": start}
    context = tiny.context(tmp_path / "out", inputs, tiny.dpo(lora=tiny.LORA, max_steps=1), tiny.engine())
    context.shared = tmp_path
    assert dpo.run(context)["first_loss"] == pytest.approx(math.log(2), abs=1e-6)
    merged, rows = AutoModelForCausalLM.from_pretrained(start / "model"), Dataset.from_list(tiny.pair_rows())
    require_reference(tmp_path, merged, start / "model", rows, most=6)


def kept(folder: Path, weights: str) -> ReferenceStore:
    store = ReferenceStore(folder / "reference", weights=weights, adapter=None, dtype="fp32")
    store.open(store.segments(print))
    return store


def require_reference(folder: Path, model: Any, start: Path, rows: Dataset, most: int) -> None:
    """So many of these pairs are kept, and their log-probs are the model's, which is asked row by row."""
    store, digests = kept(folder, weights_digest(start)), row_digests(rows)
    found = sorted({*range(len(rows))} - {*store.missing(digests).tolist()})
    assert len(found) == most
    for number in found:
        row, values = rows[number], []
        for side in ("chosen_ids", "rejected_ids"):
            ids = torch.tensor([row["prompt_ids"] + row[side]])
            with torch.no_grad():
                table = model(ids).logits[0, :-1].log_softmax(-1)
            values.append(table.gather(-1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0].numpy())
        assert np.concatenate(values) == pytest.approx(store[digests[number].tobytes()], abs=1e-4)


def test_trl_1148_precomputed_reference_of_another_model(tiny_model: Path, tmp_path: Path) -> None:
    """Where no reference model is kept, pairs that came after training had begun were compared with the trained model
    itself. TRL refuses them by now."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    how = {"precompute_ref_log_probs": True, "max_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0}
    made = stock.trainer("dpo", tokenizer, PAIRS, tmp_path, **how)
    made.train()
    before = torch.tensor(made.train_dataset[:2]["ref_chosen_logps"])
    later, _ = made.compute_ref_log_probs(made.model, stock.batch(made, [0, 1]))
    assert (later - before).abs().min() > 0.1, "the reference of the same pairs is another one"
    with pytest.raises(ValueError, match="Cannot compute reference log-probs"):
        made.evaluate(Dataset.from_list([{"prompt": "And?", "chosen": " Yes.", "rejected": " No!"}]))

    start, rows = tiny.write_inputs(tmp_path, "dpo")["model"] / "model", Dataset.from_list(tiny.pair_rows())
    first, _ = train(tmp_path, "first", max_steps=2)
    second, context = train(tmp_path, "second", max_steps=7, seed=9)
    assert first["reference_computed"] + second["reference_computed"] == len(rows), "what came later is added"
    plain = AutoModelForCausalLM.from_pretrained(start)
    require_reference(tmp_path, plain, start, rows, most=len(rows))
    assert metrics(context, "rewards/margins")[-1] > 0.01
    assert not kept(tmp_path, "0" * 64).segments(print), "of other weights nothing is taken"


def test_dpo_32_chosen_likelihood_falls_unseen(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a model that was fine-tuned on the chosen answers, which differ from the rejected ones in a few letters."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    pairs = [
        {"prompt": f"Is {i}?", "chosen": f" It is {i}, as I said.", "rejected": f" It is {i}, as I sang."}
        for i in range(12)
    ]
    falls = {"max_steps": 24, "learning_rate": 3e-3}
    how = {**falls, "warmup_steps": 0, "lr_scheduler_type": "constant", "per_device_train_batch_size": 6}
    good = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    tuned = stock.trainer("sft", tokenizer, good, tmp_path, **how)
    tuned.train()
    for part in (tuned.model, tokenizer):
        part.save_pretrained(tmp_path / "start" / "model")
    theirs = stock.trainer("dpo", tokenizer, pairs, tmp_path, policy=tuned.model, **how)
    told = stock.history(theirs)
    assert told[-1]["logps/chosen"] < 1.5 * told[0]["logps/chosen"] and told[-1]["rewards/margins"] > 0
    assert told[-1]["loss"] < told[0]["loss"] and "likel" not in caplog.text

    rows = [{name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in theirs.train_dataset]
    falls.update(schedule="constant", warmup_ratio=0.0)
    _, context = train(tmp_path, "falls", rows, **falls)
    warnings = (context.folder / "warnings.txt").read_text()
    assert "chosen answers become unlikely while their margin grows" in warnings and "loss=rpo or loss=dpop" in warnings
    _, context = train(tmp_path, "held", rows, loss={"sigmoid": 1.0, "nll": 1.0}, **falls)
    assert not (context.folder / "warnings.txt").exists()
    chosen, margins = metrics(context, "logps/chosen"), metrics(context, "rewards/margins")
    assert chosen[-1] > chosen[0] and margins[-1] > 1


def test_trl_3985_reference_pass_repeated(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of a sweep over beta, on the same rows and start model."""
    real, passes = trl.DPOTrainer.compute_ref_log_probs, []
    monkeypatch.setattr(
        trl.DPOTrainer, "compute_ref_log_probs", lambda self, *given: passes.append(self.beta) or real(self, *given)
    )
    Dataset.from_list(PAIRS).save_to_disk(str(tmp_path / "pairs"))
    rows, tokenizer = Dataset.load_from_disk(str(tmp_path / "pairs")), AutoTokenizer.from_pretrained(tiny_model)
    for beta in (0.1, 0.5):
        how = {"beta": beta, "precompute_ref_log_probs": True, "max_steps": 1, "per_device_train_batch_size": 8}
        stock.trainer("dpo", tokenizer, rows, tmp_path, **how).train()
    assert passes == [0.1, 0.5], "of the second run, too"

    computed = [
        train(tmp_path, name, max_steps=7, **changes)[0]["reference_computed"]
        for name, changes in {"one": {}, "two": {"beta": 0.5}, "three": {"loss": "ipo_mean", "seed": 4}}.items()
    ]
    assert computed == [40, 0, 0]
