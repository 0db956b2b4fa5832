"""Small training runs by the real driver, on a store that has their parents already, and what they come to."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from alignment.pipeline.attempts import checkpoint
from tests.conftest import write_tiny_model
from tests.faults.driver import Fault, Order, drive
from tests.forks import FORKING

KINDS = ("sft", "dpo")
ONLINE = ("rloo", "grpo", "online_dpo", "ppo")
FURTHER = ("kto", "reward_model", *ONLINE)  # of these a slice, under engines that cut weights or gradients in parts
CUTTING = ("zero2", "zero3")
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3")
STEPS = 6
PATIENCE = 240  # seconds; whatever takes longer hangs
OF_THE_DISK = {"saving", "committing", "removing", "fsync", "rename", "replace"}  # moments: the faster it is, the more
ATTEMPT = re.compile(r"^--- attempt (\d+), ", re.MULTILINE)  # in log.txt
DIFFERENT = ("time", "tokens_per_s")  # of two runs that are alike
CONF = Path(__file__).with_name("conf")


def cells(kinds: Sequence[str] = KINDS, engines: Sequence[str] = ENGINES) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("kind", "engine"), [(kind, engine) for kind in kinds for engine in engines])


def faults(
    of_all: Sequence[str],
    of_few: Sequence[str],
    few: set[tuple[str, str]],
    further: Sequence[str] = (),
    of_online: Sequence[str] = (),
) -> pytest.MarkDecorator:
    """`kind`, `engine` and `what`: some things befall every cell, others a few of them, where the difference lies.
    further: what befalls the kinds that have a slice. of_online: what befalls those alone that sample."""
    every = [(kind, engine) for kind in KINDS for engine in ENGINES]
    found = [(*cell, what) for cell in every for what in (*of_all, *(of_few if cell in few else ()))]
    for kind, engine in ((kind, engine) for kind in FURTHER for engine in CUTTING):
        found += [(kind, engine, what) for what in (*further, *(of_online if kind in ONLINE else ()))]
    return pytest.mark.parametrize(("kind", "engine", "what"), found)


class Result(NamedTuple):
    weights: str  # SHA-256 of the final model.safetensors
    rows: list[dict[str, float]]  # of metrics.jsonl, without times


class Driver:
    """`alignment run` in a process of its own."""

    def __init__(self, order: Order):
        self.told_in, self._errors_in = order.told, order.errors
        self._process = FORKING.Process(target=drive, args=(order,))
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def told(self) -> str:
        return self.told_in.read_text(errors="replace") if self.told_in.exists() else ""

    @property
    def errors(self) -> str:
        """What it says to stderr, if that is apart."""
        return self._errors_in.read_text(errors="replace") if self._errors_in and self._errors_in.exists() else ""

    def ranks(self) -> list[int]:
        """Processes that it has started, the lowest rank first."""
        return children(self.pid)

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.alive:
            os.kill(self.pid, number)

    def wait(self, seconds: float = PATIENCE) -> int:
        """Its exit code. One that does not end is a failure of the test."""
        self._process.join(seconds)
        if self.alive:
            self._process.kill()
            self._process.join()
            pytest.fail(f"the run hangs: {self.told[-2000:]}")
        assert self._process.exitcode is not None
        return self._process.exitcode


def start(folder: Path, arguments: Sequence[str], environment: dict[str, str]) -> Driver:
    """`alignment <arguments>` in this folder."""
    told, errors = (folder / f"{secrets.token_hex(4)}.{stream}" for stream in ("out", "err"))
    return Driver(Order(list(arguments), told, environment, errors=errors))


@dataclass
class Ground:
    """What all runs of a session have in common; stores with the parents' results are copied from here."""

    folder: Path
    settings: list[str]
    wholes: dict[tuple[str, ...], Result] = field(default_factory=dict)

    def whole(self, kind: str, engine: str, *settings: str) -> Result:
        """What the uninterrupted run comes to."""
        if (kind, engine, *settings) not in self.wholes:
            case = self.case(kind, engine, self.folder / f"whole-{len(self.wholes)}", *settings)
            case.run(code=0)
            self.wholes[kind, engine, *settings] = case.result()
        return self.wholes[kind, engine, *settings]

    def case(self, kind: str, engine: str, folder: Path, *settings: str, store: Path | None = None) -> Case:
        """A run that is still to be made. store: where, if not in the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        made = Case(self, kind, engine, folder, store or folder / "store", settings)
        shutil.copytree(self._base(kind), made.store, dirs_exist_ok=True)
        return made

    def _base(self, kind: str) -> Path:
        base = self.folder / f"base-{kind}"
        if not base.exists():
            case = Case(self, kind, "single", self.folder / f"making-{kind}", self.folder / f"making-{kind}" / "s", ())
            case.folder.mkdir()
            case.run(f"stage.{kind}.max_steps=1", code=0)
            shutil.rmtree(case.place)
            shutil.rmtree(case.store / "reference", ignore_errors=True)
            shutil.rmtree(case.store / "runs")
            case.store.rename(base)
        return base


@dataclass
class Case:
    """One experiment on a store of its own, which may take several runs."""

    ground: Ground
    kind: str
    engine: str
    folder: Path
    store: Path
    settings: Sequence[str]
    started: list[Driver] = field(default_factory=list)

    def start(self, *settings: str, faults: Sequence[Fault] = (), **environment: str) -> Driver:
        if any(fault.options.get("moment") in OF_THE_DISK and fault.options["do"] != "rest" for fault in faults):
            faults = [Fault("keep_up"), *faults]  # or that moment might not come for the nth time
        order = Order(
            ["run", *self.arguments(*settings)],
            self.folder / f"told-{len(self.started)}.txt",
            {
                "ALIGNMENT_STORE": str(self.store),
                "ALIGNMENT_CACHE": str(self.folder / "cache"),
                "COLUMNS": "1000",  # what it says is searched for words, which must not be on two lines
                **environment,
            },
            faults,
        )
        self.started.append(Driver(order))
        return self.started[-1]

    def run(self, *settings: str, code: int | None = None, faults: Sequence[Fault] = (), **environment: str) -> Driver:
        driver = self.start(*settings, faults=faults, **environment)
        found = driver.wait()
        assert code is None or found == code, (found, driver.told, self.log()[-3000:])
        return driver

    def arguments(self, *settings: str) -> list[str]:
        of_stage = {"max_steps": STEPS, "global_batch_size": 4, "spike_alarm": "null"}
        if not any(setting.startswith(f"stage.{self.kind}.lora") for setting in self.settings):
            of_stage["lora"] = "null"
        several = [] if self.engine == "single" else ["launcher=torchrun", "launcher.processes=2"]
        return [
            *("--config-dir", str(CONF), f"pipeline=only_{self.kind}", *self.ground.settings),
            *(f"stage.{self.kind}.{name}={value}" for name, value in of_stage.items()),
            *(f"engine={self.engine}", *several, "checkpoint.every_steps=1", "retry_wait_s=0", "engine.watchdog_s=60"),
            *self.settings, *settings,
        ]  # fmt: skip

    @property
    def place(self) -> Path:
        """The committed result of the stage that trains."""
        records = {path.parent: json.loads(path.read_text()) for path in self.store.glob("store/*/record.json")}
        (place,) = [place for place, record in records.items() if record["kind"] == self.kind]
        return place

    @property
    def work(self) -> Path | None:
        """The work folder of the stage that trains, once it is there."""
        return next((path for path in self.store.glob("work/*") if not path.name.startswith(".")), None)

    def log(self) -> str:
        paths = [*self.store.glob("work/*/log.txt"), *self.store.glob("store/*/log.txt")]
        return "".join(path.read_text(errors="replace") for path in paths)

    def begun(self) -> list[int]:
        """The step that each attempt went on from; 0 for one that began anew, or did not come to its first step."""
        _, *parts = re.split(ATTEMPT, self.trained_log())
        found = (re.search(r"going on from the checkpoint of step (\d+)", text) for text in parts[1::2])
        return [int(one[1]) if one else 0 for one in found]

    def trained_log(self) -> str:
        """Of the stage that trains."""
        return ((self.work or self.place) / "log.txt").read_text(errors="replace")

    def progress(self) -> dict[str, Any]:
        """What the attempt at work has told of how far it is."""
        with suppress(OSError, ValueError):
            return dict(json.loads((self.work / "progress.json").read_text())) if self.work else {}
        return {}

    def reached(self) -> int:
        """The step of its newest whole checkpoint; -1 without one."""
        return checkpoint(self.work) if self.work else -1

    def pass_time(self, chance: random.Random, longest: float, most: int) -> None:
        """Wait for a random time of so many seconds at most, or, if that comes first, for a checkpoint of that step."""
        late = time.monotonic() + chance.uniform(0, longest)
        while time.monotonic() < late and self.reached() < most:
            time.sleep(0.005)

    def checkpoints(self) -> list[Path]:
        """The newest last."""
        return sorted(self.store.glob("work/*/checkpoints/step-*"))

    def record(self) -> dict[str, Any]:
        return dict(json.loads((self.place / "record.json").read_text()))

    def outcomes(self) -> list[str]:
        """Of all attempts at the stage that trains."""
        return [row["outcome"] for row in self.record()["attempts"]]

    def result(self) -> Result:
        told = [json.loads(line) for line in (self.place / "metrics.jsonl").read_text().splitlines()]
        rows = [{name: value for name, value in row.items() if name not in DIFFERENT} for row in told]
        return Result(hashlib.sha256((self.place / "model" / "model.safetensors").read_bytes()).hexdigest(), rows)

    def require_same(self, *settings: str) -> None:
        """It came to what the uninterrupted run comes to: every weight, every row once, and nothing left at work."""
        whole, mine = self.ground.whole(self.kind, self.engine, *settings), self.result()
        assert [row["step"] for row in mine.rows] == list(range(1, len(whole.rows) + 1))
        assert mine.rows == whole.rows
        assert mine.weights == whole.weights
        assert not [path for path in self.store.glob("work/*") if not path.name.startswith(".")]
        assert not (self.place / "checkpoints").exists()

    def end(self) -> None:
        for driver in self.started:
            with suppress(ProcessLookupError):
                driver.kill()


def write_inputs(folder: Path) -> list[str]:
    """A tiny model, rows and pairs; the settings that name them."""
    rows = [{"messages": [_said("user", f"What is {i}?"), _said("assistant", f"{i} is {i % 5}.")]} for i in range(24)]
    pairs = [{"prompt": f"Is {i} nice?", "chosen": f"Yes, {i} is.", "rejected": f"No, {i}!"} for i in range(24)]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        *("model=path", f"model.source.path={write_tiny_model(folder / 'model')}", "data=path"),
        f"data.instructions.source.path={folder / 'rows.jsonl'}",
        f"data.preferences.source.path={folder / 'pairs.jsonl'}",
        *("reward=length", "reward.terms.length.unit=characters", "reward.terms.length.low=1"),
        *("reward.terms.length.high=2", "reward.terms.length.fall_off=30"),  # no two answers alike get the same
        *("tracking=none", "min_free_gb=0", "engine.threads=1"),
    ]


def until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def state(pid: int) -> str:
    """Of a process, as the kernel's letter: T is stopped; empty for one that is gone."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""


def children(pid: int) -> list[int]:
    """Living processes that it has started, zombies left out, the oldest first."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            state, parent, *_ = (process / "stat").read_text().rpartition(")")[2].split()
            if int(parent) == pid and state != "Z":
                found.append(int(process.name))
    return sorted(found)
