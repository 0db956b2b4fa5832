"""Rows that are silently trained on as something else; docs/pains.md, 1 to 7.

The stock half of each test is TRL's own preparation of the same rows. That TRL warns of some of it is in docs/pains.md:
whoever does not read the log of a run has the result all the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from transformers import DataCollatorForLanguageModeling

from alignment.data.chat import Chat
from alignment.errors import InputError
from alignment.files import read_json
from tests.conftest import write_tiny_model
from tests.data.conftest import PLAIN, assistant, make_tokenizer, user
from tests.data.preparing import mix, qa, run
from tests.pains import stock
from tests.training import tiny
from tests.training.test_stages import run as run_stage

EOS, BOS, IGNORED = 1, 2, -100
ANSWER = "{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def trained(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


def test_trl_1623_eos_masked_when_pad_is_eos() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    # Of today's TRL labels go by position; what it used, and most scripts use, is transformers' collator.
    ids = tokenizer("Q:hi\nA:yo<eos>")["input_ids"]
    stock_labels = DataCollatorForLanguageModeling(tokenizer, mlm=False)([{"input_ids": ids}])["labels"][0].tolist()
    assert stock_labels == [*ids[:-1], IGNORED], "the one token that ends an answer is not trained"

    (row,) = run(Chat(tokenizer), [qa("hi", "yo")]).rows["train"]
    assert trained(row) == tokenizer("yo<eos>")["input_ids"]


def test_trl_5988_end_of_turn_outside_the_assistant_mask(tmp_path: Path) -> None:
    marked = "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}"
    template = PLAIN.replace(ANSWER, marked + "{% else %}{{ m['content'] }}{% endif %}")
    talk, tokenizer = [user("hi"), assistant("yo")], make_tokenizer(template)
    theirs = stock.trainer("sft", tokenizer, [{"messages": talk}], tmp_path, assistant_only_loss=True).train_dataset
    assert trained(theirs[0]) == tokenizer("yo")["input_ids"], "it trains, though it can never learn to stop"

    (row,) = run(Chat(tokenizer), [{"messages": talk}]).rows["train"]
    assert trained(row) == tokenizer("yo<eos>")["input_ids"]
    write_tiny_model(tmp_path / "start" / "model")
    theirs.select_columns(["input_ids", "labels"]).save_to_disk(str(tmp_path / "theirs" / "train"))
    inputs = {"model": tmp_path / "start", "data": tmp_path / "theirs"}
    with pytest.raises(InputError, match="is not trained: the model would never learn to stop"):
        run_stage(tmp_path, tiny.sft(), inputs=inputs)
    assert not (tmp_path / "out" / "metrics.jsonl").exists(), "before the first step"


def test_trl_5213_prompt_alone_is_no_prefix(tmp_path: Path) -> None:
    """With the merge ": x" the prompt's last token is another one once the answer follows."""
    tokenizer = make_tokenizer(merges=((":", "x"),))
    asked = tokenizer.apply_chat_template([user("q")], add_generation_prompt=True, return_dict=True)["input_ids"]
    rows = [{"prompt": [user("q")], "completion": [assistant(text)]} for text in ("xyz", "zyx")]
    merged, plain = stock.trainer("sft", tokenizer, rows, tmp_path).train_dataset
    assert plain["input_ids"][: len(asked)] == asked
    assert merged["input_ids"][: len(asked)] != asked, "trained on a context that generation never sees"

    made = run(Chat(tokenizer), [qa("q", "xyz"), qa("q2", "zyx")])
    assert made.counts == {"merged_prompt": 1}
    assert [row["number"] for row in made.rows["train"]] == [2]


def test_trl_6361_template_rewrites_earlier_turns(tmp_path: Path) -> None:
    """Qwen 3's own template, as TRL ships it."""
    tokenizer = make_tokenizer((TEMPLATES / "qwen3.jinja").read_text())
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    talk = [user("a"), assistant("<think>\nfirst\n</think>\n\nb"), user("c"), assistant("<think>\nlast\n</think>\n\nd")]
    (row,) = stock.trainer("sft", tokenizer, [{"messages": talk}], tmp_path).train_dataset
    text = tokenizer.decode(trained(row))
    assert "last" in text and "first" not in text, "the thought of the first answer is gone without a word"

    with pytest.raises(InputError, match=r"rows\.jsonl:1: the chat template leaves out or rewrites the assistant turn"):
        run(Chat(tokenizer), [{"messages": talk}])
    rows = [{"messages": talk}, {"messages": talk[:1] + talk[3:]}]
    made = run(Chat(tokenizer), rows, checks={"template": "drop"}, max_length=200, max_prompt_length=100)
    assert made.counts == {"template": 1} and made.fit == 1


def test_axolotl_1616_two_begin_of_text_tokens(tmp_path: Path) -> None:
    """Text that a template has rendered, given to a tokenizer that begins every text itself."""
    tokenizer = make_tokenizer("{{ bos_token }}" + PLAIN, bos=True)
    prompt = tokenizer.apply_chat_template([user("q")], add_generation_prompt=True, tokenize=False)
    (row,) = stock.trainer("sft", tokenizer, [{"prompt": prompt, "completion": "a"}], tmp_path).train_dataset
    assert row["input_ids"][:2] == [BOS, BOS]

    (row,) = run(Chat(tokenizer), [qa("q", "a")]).rows["train"]
    assert row["input_ids"][:2] == [BOS, *tokenizer("Q", add_special_tokens=False)["input_ids"]]
    (row,) = run(Chat(tokenizer), [qa(prompt, "a")]).rows["train"]
    assert row["input_ids"].count(BOS) == 1, "one that is spelled out in a row is text, and counted"
    assert run(Chat(tokenizer), [qa(prompt, "a"), qa("q", "a")], checks={"control_text": "drop"}).fit == 1
    Chat(tokenizer).check(needs_bos=True)
    with pytest.raises(InputError, match="two begin-of-text tokens"):
        Chat(make_tokenizer("{{ bos_token }}{{ bos_token }}" + PLAIN, bos=True)).check(needs_bos=True)
    with pytest.raises(InputError, match="begins every text with '<bos>', the chat template does not"):
        Chat(make_tokenizer(PLAIN, bos=True)).check(needs_bos=True)


def test_trl_1640_template_absent_or_another_one(tmp_path: Path) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    made = stock.trainer("dpo", make_tokenizer(), [pair], tmp_path)
    assert made.train_dataset[0]["prompt_ids"] == make_tokenizer()("q")["input_ids"], "text gets no template"
    talk = {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]}
    first, other = (stock.trainer("dpo", make_tokenizer(one), [talk], tmp_path) for one in (PLAIN, "# " + PLAIN))
    assert first.train_dataset[0]["prompt_ids"] != other.train_dataset[0]["prompt_ids"], "and nobody compares them"

    chat = Chat(make_tokenizer())
    prepared, folder = mix(chat, {"mine": [pair]}, task="preference")
    asked = chat.tokenizer.apply_chat_template([user("q")], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert prepared.rows["train"][0]["prompt_ids"] == asked
    assert read_json(folder / "data_report.json")["template_sha256"] == chat.template_sha256
    write_tiny_model(tmp_path / "start" / "model")
    inputs = {"model": tmp_path / "start", "data": folder}
    with pytest.raises(InputError, match="the rows were rendered with another chat template than this model's"):
        run_stage(tmp_path, tiny.dpo(), inputs=inputs)


def test_trl_6548_truncation_empties_an_answer(tmp_path: Path) -> None:
    tokenizer, limit = make_tokenizer(), 40
    full = {"prompt": "q" * limit, "chosen": "a", "rejected": "b"}
    same = {"prompt": "q", "chosen": "s" * limit + "good", "rejected": "s" * limit + "bad"}
    simpo = stock.trainer("cpo", tokenizer, [full], tmp_path, loss_type="simpo", max_length=limit)
    assert simpo.compute_loss(simpo.model, stock.batch(simpo, [0])).isnan()
    dpo = stock.trainer("dpo", tokenizer, [same], tmp_path, max_length=limit, max_steps=1)
    assert stock.history(dpo)[0]["grad_norm"] < 1e-5, "both sides are cut to the same: nothing is learned"
    assert torch.equal(*stock.batch(dpo, [0])["input_ids"])

    longer = {"prompt": "r", "chosen": "a", "rejected": "a " + "b" * limit}
    fine = {"prompt": "t", "chosen": "a", "rejected": "b"}
    alike = {"prompt": "u", "chosen": "a", "rejected": "a"}
    made = run(Chat(tokenizer), [full, same, longer, alike, fine], task="preference", max_length=limit)
    assert made.counts == {"long_prompt": 1, "long_row": 2, "identical_sides": 1}
    assert [row["number"] for row in made.rows["train"]] == [5], "whole rows or none"
