"""Fixtures for whole runs: a tiny random Llama with a byte tokenizer, a few rows, and the command line in a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.config.data_checks import Checks
from alignment.config.paths import CONF
from alignment.imports import kept

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1", WANDB_SILENT="true")
os.environ.setdefault("ALIGNMENT_CHECK", "false")  # eight seconds a launch; tests/test_launching.py has it on


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long ones first, so that two workers end together; xdist must be told not to sort them itself."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """It imports all that tests use."""
    with kept():
        return (yield)


def default_checks(**changes: Any) -> Checks:
    """Those of conf/, but for the share that may be dropped: rows of tests are mostly faulty on purpose."""
    values = yaml.safe_load((CONF / "data/checks/default.yaml").read_text(encoding="utf-8"))
    return Checks(**{**values, "max_dropped": 1.0, **changes})


TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_tiny_model(folder: Path, template: str | None = TEMPLATE) -> Path:
    """A two-layer random Llama (GQA, tied embeddings, 512 positions) with a byte-level tokenizer, 260 tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    specials = ["<pad>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({token: i for i, token in enumerate(specials + letters)}, []))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=specials[2:]
    )
    tokenizer.chat_template = template
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one-layer BERT with the byte tokenizer: its similarities mean nothing, but differ."""
    import torch
    from transformers import BertConfig, BertModel

    folder = write_tiny_model(tmp_path_factory.mktemp("encoder"))
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=261, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def instruction_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty rows of one question and one answer each."""
    moods = ("good", "bad", "great", "awful", "fine")
    pairs = [(f"What is {i}?", f"{i} is {moods[i % 5]}.") for i in range(40)]
    rows = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in pairs
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def preference_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"prompt": f"Is {i} nice?", "chosen": f"Yes, {i} is lovely.", "rejected": f"No, {i}!"} for i in range(24)]
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def tiny_settings(tiny_model: Path, tiny_encoder: Path, instruction_rows: Path, preference_rows: Path) -> list[str]:
    """Settings that make any pipeline run in about a minute: tiny model, few rows, few steps, one thread."""
    return [
        *("model=path", f"model.source.path={tiny_model}", "data=path"),
        f"data.instructions.source.path={instruction_rows}",
        f"data.preferences.source.path={preference_rows}",
        *("~reward.terms.relevance.source", f"+reward.terms.relevance.source={{kind: path, path: {tiny_encoder}}}"),
        *("tracking=none", "min_free_gb=0", "engine.threads=1"),
    ]


# For pipelines that have these stages.
TINY_STAGES = {
    "prepare_sft": ["splits.heldout=6", "splits.prompts=6", "splits.train=24"],
    "prepare_preference": [],
    "sft": ["global_batch_size=8", "lora.rank=2"],
    "sample": ["max_new_tokens=6", "completions_per_prompt=3"],
    "judge": ["finished_only=false", "min_margin=0.0"],
    "dpo": ["global_batch_size=4", "lora.rank=2"],
    "evaluate": ["max_new_tokens=6"],
    "compare": ["resamples=100"],
}


def tiny_stages(*names: str) -> list[str]:
    return [f"stage.{name}.{setting}" for name in names for setting in TINY_STAGES[name]]


# A start model imported, rows prepared, a model trained: what is killed and signalled needs no more.
SHORT = """# @package _global_
defaults:
  - /stage@stage.import_model: import_model
  - /stage@stage.prepare_sft: prepare_sft
  - /stage@stage.sft: sft
  - _self_
pipeline:
  nodes:
    start: {stage: import_model, inputs: {}}
    rows: {stage: prepare_sft, inputs: {model: start}}
    sft: {stage: sft, inputs: {model: start, data: rows}}
  final: sft
"""


@pytest.fixture(scope="session")
def short_settings(tmp_path_factory: pytest.TempPathFactory, tiny_settings: list[str]) -> list[str]:
    """Settings of that pipeline, eight steps long, and a folder of configs that has it."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "short.yaml").write_text(SHORT)
    short = ["--config-dir", str(folder), "pipeline=short", *tiny_settings, *tiny_stages("prepare_sft", "sft")]
    return [*short, "stage.sft.max_steps=8"]


# The smallest pipeline whose final model is trained and evaluated, for sweeps; its rate decides how good it becomes.
SMALL = """# @package _global_
defaults:
  - /stage@stage.import_model: import_model
  - /stage@stage.prepare_sft: prepare_sft
  - /stage@stage.sft: sft
  - /stage@stage.evaluate: evaluate
  - _self_
stage:
  prepare_sft: {splits: {heldout: 6, prompts: 0, train: 24}}
  sft: {global_batch_size: 8, epochs: 60.0, schedule: constant, warmup_ratio: 0.0, lora: {rank: 2}}
  evaluate: {max_new_tokens: 2}
pipeline:
  nodes:
    start:    {stage: import_model, inputs: {}}
    rows:     {stage: prepare_sft, inputs: {model: start}}
    sft:      {stage: sft, inputs: {model: start, data: rows}}
    measured: {stage: evaluate, inputs: {model: sft, data: rows, reference: start}}
  final: sft
"""


@pytest.fixture(scope="session")
def small_settings(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, instruction_rows: Path) -> list[str]:
    """Settings of that pipeline, and a folder of configs that has it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "pipeline").mkdir()
    (folder / "pipeline" / "small.yaml").write_text(SMALL)
    return [
        *(
            "--config-dir",
            str(folder),
            "pipeline=small",
            "reward=sentiment",
            "model=path",
            f"model.source.path={tiny_model}",
        ),
        *("data=path", f"data.instructions.source.path={instruction_rows}"),
        *("tracking=none", "min_free_gb=0", "engine.threads=1"),
    ]


Command = Callable[..., subprocess.CompletedProcess[str]]


def environment(store: Path) -> dict[str, str]:
    return {
        **os.environ,
        "ALIGNMENT_STORE": str(store),
        "ALIGNMENT_CACHE": str(store.parent / "cache"),
        "COLUMNS": "160",
    }


@pytest.fixture(scope="session")
def command() -> Command:
    """Run `alignment <arguments>` against a store; checks the exit code."""

    def run(store: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "alignment.cli", *arguments],
            env=environment(store), cwd=store.parent, capture_output=True, text=True, timeout=540, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def forked() -> Command:
    """As `command`, but for the ranks of its stages, which are forks of a process that has imported all."""
    from tests.faults.runs import start

    def run(store: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        driver = start(store.parent, arguments, environment(store))
        found, out, errors = driver.wait(540), driver.told, driver.errors
        assert found == code, out + errors
        return subprocess.CompletedProcess(arguments, found, out, errors)

    return run


def runs(command: Command, store: Path) -> list[dict[str, Any]]:
    return list(json.loads(command(store, "status", "--json").stdout))


def states(run: dict[str, Any]) -> dict[str, str]:
    return {node["name"]: node["state"] for node in run["nodes"]}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "alignment", folder], check=False).returncode:
        pytest.skip("a file system of its own needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path, leave: int = 0) -> None:
    """Write `filler` until no more than `leave` bytes are free."""
    with open(disk / "filler", "wb", buffering=0) as stream, suppress(OSError):
        while shutil.disk_usage(disk).free > leave and stream.write(b"\0" * 4096):
            pass
