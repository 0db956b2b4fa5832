"""Rows of a file -> token ids and masks on disk: the prepare stage beside TRL's SFTTrainer (its `dataset.map`).

    python -m bench.preparation --rows 1000000 --rounds 3 --out docs/preparation.json

The rows are those of the quickstart, over and over, each with a number, so that none is there twice. Both arms
read the same JSON lines with the same tokenizer, template and number of workers, each in a process of its own, by
turns. Seconds are those from the open file to the saved (TRL: cached) table, without imports and model. Memory is the
growth of what the process and its workers hold for themselves (anonymous memory) over what they held before. Ours does
more meanwhile: it checks, compares, splits, and writes the rows as text too. Token ids are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench.summary import spread

ARMS = ("ours", "trl")
EVERY = 0.5  # seconds between two looks at the memory: a look walks all pages, at the cost of who is looked at


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(json.dumps({"ours": _ours, "trl": _trl}[given.arm](given.folder, given.workers)))
        return 0
    with tempfile.TemporaryDirectory(prefix="alignment-bench-") as folder:
        made = _measure(given.rows, given.rounds, given.workers, Path(folder))
    text = json.dumps(made, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    return 0


def _measure(rows: int, rounds: int, workers: int, folder: Path) -> dict[str, Any]:
    size = _write_input(rows, folder)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(rounds):
        for arm in ARMS if number % 2 == 0 else ARMS[::-1]:
            one = _run(arm, workers, folder)
            print(f"round {number + 1}, {arm}: {json.dumps(one)}", file=sys.stderr, flush=True)
            found[arm].append(one)
    equal = len({one["ids"] for runs in found.values() for one in runs}) == 1
    arms = {
        arm: {
            "rows_per_s": spread([rows / one["seconds"] for one in runs]),
            "growth_mb": spread([one["growth"] / 1e6 for one in runs]),
            "cpu_s": spread([one["cpu"] for one in runs]),
        }
        for arm, runs in found.items()
    }
    return {
        "rows": rows, "input_mb": size / 1e6, "workers": workers, "rounds": rounds, "equal_ids": equal, **arms,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "packages": {name: version(name) for name in ("trl", "transformers", "tokenizers", "datasets")},
    }  # fmt: skip


def _run(arm: str, workers: int, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        environment = {**os.environ, "HF_DATASETS_CACHE": f"{scratch}/cache", "TMPDIR": scratch}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "bench.preparation", "--arm", arm, "--folder", str(folder)]
        done = subprocess.run(
            [*command, "--workers", str(workers)], env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _write_input(rows: int, folder: Path) -> int:
    """rows.jsonl and tokenizer/, from the quickstart's own data and model. Returns the bytes of the rows."""
    from alignment.config.compose import compose
    from alignment.data.fetch import fetch
    from alignment.data.formats import canonical
    from alignment.data.gguf import opened
    from alignment.data.models import usable_tokenizer
    from alignment.data.sources import read_rows

    experiment = compose(["experiment=quickstart"])
    source = fetch(experiment.model.source)
    with opened(source) as place:
        usable_tokenizer(place, experiment.model, str(source), lambda text: None).save_pretrained(folder / "tokenizer")
    given = list(read_rows(fetch(experiment.data["instructions"].source, what="data")))
    talks = [canonical(row, "alpaca")["messages"] for row in given]
    talks = [talk for talk in talks if talk[-1]["content"].strip()]
    with open(folder / "rows.jsonl", "w", encoding="utf-8") as stream:
        for number in range(rows):
            *prompt, answer = talks[number % len(talks)]
            prompt = [*prompt[:-1], {**prompt[-1], "content": f"{number}. {prompt[-1]['content']}"}]
            stream.write(json.dumps({"prompt": prompt, "completion": [answer]}, ensure_ascii=False) + "\n")
    return (folder / "rows.jsonl").stat().st_size


# --- arms -------------------------------------------------------------------------------------------------------------


def _ours(folder: Path, workers: int) -> dict[str, Any]:
    from alignment.config.compose import compose
    from alignment.config.stages.preparing import Splits
    from alignment.data.chat import Chat
    from alignment.data.named import source_of
    from alignment.data.preparation import judge
    from alignment.data.splitting import Share, divide
    from alignment.data.writing import write

    path = f"data.instructions.source.path={folder}/rows.jsonl"
    longest = [f"stage.prepare_sft.{name}=100000" for name in ("max_length", "max_prompt_length")]
    experiment = compose(["pipeline=sft", "data=path", path, *longest])
    settings, chat = experiment.stage["prepare_sft"], Chat.load(folder / "tokenizer")
    nothing_held_out = Splits(heldout=0, prompts=0, train=None)
    out = Path(tempfile.mkdtemp())
    with Watched() as watched:
        source = source_of("instructions", experiment.data["instructions"], settings, experiment.checks, chat)
        judged = judge([source], out, lambda *a, **k: None, workers)
        parts = divide(judged, nothing_held_out, settings.seed, [Share()])
        judged.tally.close()
        write(judged, parts, out, chat)
    from datasets import load_from_disk

    return {**watched.told, "ids": _digest(load_from_disk(str(out / "train")))}


def _trl(folder: Path, workers: int) -> dict[str, Any]:
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape))
    kept: dict[str, Any] = {}

    class Timed(SFTTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            with Watched() as watched:
                rows = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
                made = super()._prepare_dataset(rows, *args, **kwargs)
            kept.update(watched=watched, made=made)
            return made

    first = load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", streaming=True).take(2)
    from datasets import Dataset

    few = Dataset.from_list(list(first))  # what the trainer looks at before; the rows are read where time is taken
    arguments = SFTConfig(output_dir=tempfile.mkdtemp(), dataset_num_proc=workers, report_to=[], use_cpu=True)
    Timed(model=model, args=arguments, train_dataset=few, processing_class=tokenizer)
    return {**kept["watched"].told, "ids": _digest(kept["made"])}


def _digest(rows: Any) -> str:
    """Of all rows' token ids, whatever their order."""
    total = 0
    for batch in rows.select_columns(["input_ids"]).with_format("numpy").iter(1000):
        for ids in batch["input_ids"]:
            one = hashlib.blake2b(ids.astype("int32").tobytes(), digest_size=8)
            total += int.from_bytes(one.digest(), "little")
    return f"{total % (1 << 64):016x}"


# --- measures ---------------------------------------------------------------------------------------------------------


class Watched:
    """Seconds, processor seconds and growth of memory of this process and its children, from begin to end."""

    def __enter__(self) -> Watched:
        self._before = self._most = sum(_anonymous(one) for one in _family(os.getpid()))
        self._cpu, self._began, self._over = sum(os.times()[:4]), time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        seconds = time.monotonic() - self._began
        self._over.set()
        self._thread.join()
        growth, cpu = self._most - self._before, sum(os.times()[:4]) - self._cpu
        self.told = {"seconds": seconds, "growth": growth, "cpu": cpu}

    def _look(self) -> None:
        while not self._over.wait(EVERY):
            self._most = max(self._most, sum(_anonymous(one) for one in _family(os.getpid())))


def _family(process: int) -> Iterator[int]:
    yield process
    try:
        children = Path(f"/proc/{process}/task").glob("*/children")
        for child in {int(one) for file in children for one in file.read_text().split()}:
            yield from _family(child)
    except OSError:  # it has just ended
        return


def _anonymous(process: int) -> int:
    """Bytes that the process holds for itself; what it shares with the process it was forked from counts once."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


if __name__ == "__main__":
    sys.exit(main())
