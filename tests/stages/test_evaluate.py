from __future__ import annotations

from pathlib import Path

import pytest
import torch

from alignment import generation
from alignment.config.compose import compose
from alignment.config.rewards import RESERVED
from alignment.data.chat import Chat
from alignment.errors import InputError
from alignment.files import read_json, read_jsonl, write_jsonl
from alignment.stages import evaluate
from tests.conftest import TEMPLATE, write_tiny_model
from tests.data.preparing import run
from tests.stages.conftest import QUESTIONS, MakeContext

METRICS = {"reward", "sentiment", "stop_rate", "tokens", "repetition", "kl", "heldout_nll"}


def log_probs(folder: Path, prompt: list[int], answer: list[int]) -> list[float]:
    """Of each answer token, by one plain forward."""
    model, _ = generation.load(folder / "model", "fp32")
    with torch.inference_mode():
        table = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return [float(table[len(prompt) + i - 1, token]) for i, token in enumerate(answer)]


def test_answers_carry_every_signal_and_kl_is_the_log_ratio_on_the_models_own_answer(
    make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    context = make_context(
        "evaluate", {"model": models["sft"], "data": rows, "reference": models["start"]}, max_new_tokens=8
    )
    metrics = evaluate.run(context)
    written = list(read_jsonl(context.folder / "answers.jsonl"))
    assert [row["id"] for row in written] == [f"row-{i}" for i in range(5)]
    model, tokenizer = generation.load(models["sft"] / "model", "fp32")
    for row, question in zip(written, QUESTIONS, strict=True):
        prompt = tokenizer(f"<|user|>{question}<|assistant|>", add_special_tokens=False)["input_ids"]
        made = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        answer = made[0, len(prompt) :].tolist()
        assert row["answer"] == tokenizer.decode(answer, skip_special_tokens=True)
        assert row["tokens"] == len(answer)
        assert row["finished"] == (answer[-1] == tokenizer.eos_token_id)
        ours, theirs = (sum(log_probs(models[name], prompt, answer)) for name in ("sft", "start"))
        assert row["kl"] == pytest.approx(ours - theirs, abs=1e-3)
        reference = [*tokenizer(row["reference"])["input_ids"], tokenizer.eos_token_id]
        loss = log_probs(models["sft"], prompt, reference)
        assert row["heldout_nll"] == pytest.approx(-sum(loss) / len(loss), abs=1e-4)
        assert row["reward"] == row["terms"]["sentiment"]
    assert metrics["kl"] == pytest.approx(sum(row["kl"] for row in written) / 5)
    assert metrics["kl"] > 1.0
    assert read_json(context.folder / "evaluation.json")["metrics"] == {name: metrics[name] for name in METRICS}
    assert (metrics["prompts"], metrics["heldout_nll_missing"]) == (5, 0)
    assert set(metrics) - METRICS == {"prompts", "heldout_nll_missing", "reward_failed"} < RESERVED, "no term's names"


def test_running_means_are_logged_and_end_at_the_result(
    make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    context = make_context(
        "evaluate", {"model": models["sft"], "data": rows, "reference": models["sft"]}, max_new_tokens=4
    )
    metrics = evaluate.run(context)
    logged = list(read_jsonl(context.folder / "metrics.jsonl"))
    assert [row["step"] for row in logged] == [1, 2, 3, 4, 5]
    assert {name: logged[-1][name] for name in METRICS} == {name: metrics[name] for name in METRICS}
    assert set(logged[-1]) - METRICS == {"step", "time"} < RESERVED, "no term's names"
    answers = list(read_jsonl(context.folder / "answers.jsonl"))
    assert logged[1]["heldout_nll"] == pytest.approx((answers[0]["heldout_nll"] + answers[1]["heldout_nll"]) / 2)
    progress = read_json(context.folder / "progress.json")
    assert progress["step"] == progress["total"] == 1000


def test_the_kl_of_a_model_to_itself_is_zero_and_to_its_copy_nearly(
    make_context: MakeContext, models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "model").mkdir()
    for file in (models["sft"] / "model").iterdir():
        (tmp_path / "copy" / "model" / file.name).write_bytes(file.read_bytes())
    for name, reference, tolerance in (("itself", models["sft"], 0.0), ("copy_of", tmp_path / "copy", 1e-4)):
        context = make_context(
            "evaluate", {"model": models["sft"], "data": rows, "reference": reference}, name=name, max_new_tokens=8
        )
        evaluate.run(context)
        assert all(abs(row["kl"]) <= tolerance for row in read_jsonl(context.folder / "answers.jsonl"))


def test_two_runs_with_a_seed_write_the_same_answers(
    make_context: MakeContext, models: dict[str, Path], rows: Path
) -> None:
    inputs = {"model": models["sft"], "data": rows, "reference": models["start"]}
    texts = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        context = make_context("evaluate", inputs, name=name, max_new_tokens=6, temperature=1.0, seed=seed)
        evaluate.run(context)
        texts.append((context.folder / "answers.jsonl").read_text())
    assert texts[0] == texts[1] != texts[2]


def test_a_reference_answer_that_does_not_fit_is_counted_not_guessed(
    make_context: MakeContext, models: dict[str, Path], tmp_path: Path
) -> None:
    prompt = [{"role": "user", "content": "Hi"}]
    answers = ["Hello.", "Hello <|user|> again", "x" * 600]  # a control token, which is text; longer than the window
    write_jsonl(
        tmp_path / "heldout.jsonl",
        [{"id": str(i), "prompt": prompt, "reference": text} for i, text in enumerate(answers)],
    )
    context = make_context(
        "evaluate", {"model": models["sft"], "data": tmp_path, "reference": models["sft"]}, max_new_tokens=4
    )
    assert evaluate.run(context)["heldout_nll_missing"] == 1
    written = [row["heldout_nll"] for row in read_jsonl(context.folder / "answers.jsonl")]
    assert min(written[:2]) > 0
    assert written[2] is None


def test_the_loss_of_an_answer_is_that_of_its_calls_and_its_reasoning_too(
    make_context: MakeContext, tmp_path: Path
) -> None:
    """From rows as they are read, by a template that writes both: a reward sees the text of an answer that has one."""
    said = "{{ message.thinking }}{{ message['content'] }}{% for call in message.tool_calls or [] %}"
    said += "{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    template = TEMPLATE.replace("{{ message['content'] }}", said)
    chat = Chat.load(write_tiny_model(tmp_path / "tiny" / "model", template))
    call = {"function": {"name": "look", "arguments": {"at": "it"}}}
    answers = [{"content": None, "tool_calls": [call]}, {"content": "So.", "thinking": "Hm."}, {"content": "Plain."}]
    asked = [{"role": "user", "content": question} for question in "abc"]
    talks = [[ask, {"role": "assistant", **answer}] for ask, answer in zip(asked, answers, strict=True)]
    rows = [{"id": str(number), "messages": talk} for number, talk in enumerate(talks)]
    spare = [{"id": "spare", "text": "x"}]  # which is never held out
    sizes = {"heldout": 3, "max_length": 300, "max_prompt_length": 200}
    run(chat, [*rows, *spare], folder=tmp_path, **sizes)
    held = {row["id"]: row for row in read_jsonl(tmp_path / "heldout.jsonl")}
    assert [held[number].get("reference") for number in "012"] == [None, "So.", "Plain."]
    assert [sorted(held[number].keys() - {"id", "prompt", "reference"}) for number in "012"] == [
        ["reference_message"], ["reference_message"], []
    ]  # fmt: skip
    inputs = {"model": tmp_path / "tiny", "data": tmp_path, "reference": tmp_path / "tiny"}
    context = make_context("evaluate", inputs, max_new_tokens=4)
    assert evaluate.run(context)["heldout_nll_missing"] == 0
    found = {row["id"]: row["heldout_nll"] for row in read_jsonl(context.folder / "answers.jsonl")}
    for number, written in enumerate(('look{"at": "it"}', "Hm.So.", "Plain.")):
        ids, answer = chat.encode(f"<|user|>{'abc'[number]}<|assistant|>"), chat.encode(written + chat.eos)
        assert found[str(number)] == pytest.approx(
            -sum(log_probs(tmp_path / "tiny", ids, answer)) / len(answer), abs=1e-4
        )


def test_a_reference_with_another_tokenizer_is_refused(
    make_context: MakeContext, models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    other = write_tiny_model(tmp_path / "other" / "model")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    inputs = {"model": models["sft"], "data": rows, "reference": tmp_path / "other"}
    with pytest.raises(InputError, match="do not share a tokenizer"):
        evaluate.run(make_context("evaluate", inputs, max_new_tokens=4))


@pytest.mark.parametrize("reference", ["sft", "start"])
def test_the_best_of_several_answers_counts_and_its_kl_has_the_bound_of_that(
    reference: str, make_context: MakeContext, models: dict[str, Path], rows: Path, tiny_encoder: Path
) -> None:
    """n = 4: log 4 - 3/4 = 0.636294 nats, which alone is the KL of a model's best-of-4 from itself; from another model
    the log-ratio of the chosen answer comes to it. The answers are those that `generate` draws. The reward is that of a
    random encoder: it means nothing, but differs."""
    inputs = {"model": models["sft"], "data": rows, "reference": models[reference]}
    how = {"max_new_tokens": 12, "temperature": 1.0}
    context = make_context("evaluate", inputs, best_of=4, **how)
    encoder = "+reward.terms.relevance.source={kind: path, path: " + str(tiny_encoder) + "}"
    context.experiment = compose(["pipeline=sft_sample_dpo", "~reward.terms.relevance.source", encoder])
    metrics = evaluate.run(context)
    model, tokenizer = generation.load(models["sft"] / "model", "fp32")
    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    drawn = generation.generate(
        model, tokenizer, asked, max_new_tokens=12, temperature=1.0, top_p=1.0, batch_size=32, seed=0, completions=4
    )
    for row, prompt, few in zip(read_jsonl(context.folder / "answers.jsonl"), asked, drawn, strict=True):
        assert (row["best_of"], len(row["rewards"])) == (4, 4)
        assert row["reward"] == max(row["rewards"]) > min(row["rewards"])
        chosen = few[row["rewards"].index(row["reward"])]
        assert (row["answer"], row["tokens"]) == (chosen.text, chosen.tokens)
        ids = generation.encode_prompt(tokenizer, prompt)
        ours, theirs = (sum(log_probs(models[name], ids, chosen.token_ids)) for name in ("sft", reference))
        assert row["kl"] == pytest.approx(ours - theirs + 0.636294, abs=1e-3)
    assert metrics["kl_bound"] == pytest.approx(0.636294, abs=1e-6)
    assert set(metrics) - {*context.experiment.reward.terms} <= RESERVED


def test_of_the_answers_to_a_prompt_each_without_a_reward_says_why(
    make_context: MakeContext, models: dict[str, Path], rows: Path, tmp_path: Path
) -> None:
    """Those that begin with a letter of the alphabet's first half fail: some of four to a prompt, none is guessed."""
    source = tmp_path / "own.py"
    source.write_text(
        "def reward(prompts, answers, rows):\n    return [float('nan') if a[:1] < 'n' else 1.0 for a in answers]\n"
    )
    inputs = {"model": models["sft"], "data": rows, "reference": models["sft"]}
    context = make_context("evaluate", inputs, best_of=4, max_new_tokens=6, temperature=1.0)
    own = ["reward=python", f"reward.terms.own.source.path={source}", "reward.max_failed_share=1.0"]
    context.experiment = compose(["pipeline=sft_sample_dpo", *own])
    metrics = evaluate.run(context)
    told = list(read_jsonl(context.folder / "answers.jsonl"))
    missing = sum(row["rewards"].count(None) for row in told)
    assert 0 < missing == metrics["reward_failed"] < 20
    for row in told:
        why = row.get("rewards_failed", [None] * 4)
        assert [reward is None for reward in row["rewards"]] == [bool(one) for one in why]
        assert all(one == {"own": "its value is nan"} for one in why if one)
    known = sum(row["reward"] is not None for row in told)
    assert read_json(context.folder / "evaluation.json")["prompts"]["reward"] == known
