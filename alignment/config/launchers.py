"""The launchers' part of the schema: where processes run and what is asked for them. All of it is execution side."""

from __future__ import annotations

import difflib
import re
import shlex
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from alignment.config import patterns
from alignment.config.secret_names import secrets_in
from alignment.config.settings import Settings, execution

TIME = re.compile(r"(?:(?:(\d+)-)?(\d+):)?(\d+):(\d+)")
# Lines of a shell that prepare an environment: the first word, and where that could run anything the second ones that
# do not. Whatever could run another program by its syntax is refused.
SETUP: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("module", "ml", "source", ".", "export", "unset", "ulimit", "umask"), ()),
    **dict.fromkeys(("conda", "mamba", "micromamba"), ("activate", "deactivate")),
    "spack": ("load", "unload", "env"),
}
# Variables that have something run wherever a program starts.
LOADED = {"LD_PRELOAD", "LD_AUDIT", "BASH_ENV", "ENV", "PROMPT_COMMAND", "PYTHONSTARTUP", "PYTHONINSPECT"}
EXPORTED = re.compile(rf"(?!(?:{'|'.join(sorted(LOADED))})\b)[A-Za-z_]\w*(?:\+?=|$)")
LONGEST_GRACE = 3600  # seconds
OURS = {"job-name", "output", "error", "array", "dependency", "signal", "requeue", "no-requeue", "open-mode", "chdir"}
OURS |= {"kill-on-invalid-dep", "parsable", "wrap", "wait", "test-only", "nodes", "ntasks", "ntasks-per-node", "export"}


def seconds(value: Any) -> int | None:
    """Seconds of a number, or of [[days-]hours:]minutes:seconds, which YAML may have read as such a number already."""
    if value is None:
        return None
    if isinstance(value, str) and (parts := TIME.fullmatch(value)):
        days, hours, minutes, rest = (int(part or 0) for part in parts.groups())
        value = ((days * 24 + hours) * 60 + minutes) * 60 + rest
    if type(value) is not int or not 0 < value < 10**9:
        raise PydanticCustomError(
            "time", "must be [[days-]hours:]minutes:seconds, or seconds, more than 0 and less than 1e9"
        )
    return value


def _as_text(value: Any) -> Any:
    """Whole numbers as sbatch is given them: YAML reads 0 and 1500 as numbers, 64G as text."""
    return str(value) if type(value) is int else value


def _refuse_secrets(text: str, fix: str) -> None:
    """What is set here is kept with the run, for all who read the store. fix: {name} in it is the secret's."""
    if name := next((name for name, *_ in secrets_in(text)), None):
        what = "holds a secret by its name, {name}: scripts, run.json and every stage.json would show it"
        raise PydanticCustomError("secret", what, {"name": name, "fix": fix.format(name=name)})


def _setup_line(line: str) -> str:
    """A line of the set-up. It runs in the job's shell, so it may not be more than its first word says."""
    fix = "put the line into a file that nobody else reads, and `source` it; or give it the value of a variable, $X"
    _refuse_secrets(line, fix)
    try:
        words = shlex.split(re.sub(r"\s#[^'\"]*$", "", line))  # without a comment
    except ValueError:
        words = []
    plain = re.sub(r"\$\{?\w+\}?", "", line)  # a variable's value is no syntax
    first, second = [*words, "", ""][:2]
    known = first in SETUP and (not SETUP[first] or second in SETUP[first])
    # A name is to be seen, so that `export $A=...` cannot be one of LOADED.
    loads = first == "export" and any(not EXPORTED.match(word) for word in words[1:])
    if not known or loads or re.search(r"[;&|<>`$()\n\\]", plain):
        commands = ", ".join(" ".join([name, "|".join(after)]).strip() for name, after in SETUP.items())
        fix = f"one plain command a line: {commands}; put more into a file, and `source` it"
        raise PydanticCustomError("setup", "is no line that sets up an environment", {"fix": fix})
    return line


def _container_option(text: str) -> str:
    fix = "export it before the command: jobs and their containers get it, with apptainer's --cleanenv as "
    _refuse_secrets(text, fix + "APPTAINERENV_{name}")
    return text


def _interface(text: str) -> str:
    if not re.fullmatch(r"[\w.,:^=-]+", text, re.ASCII):
        fix = "such as ib0; NCCL also takes =ib0,ib1 for exact names, and ^docker0,lo for those that it may not take"
        raise PydanticCustomError("interface", "is no list of network interfaces", {"fix": fix})
    return text


Word = Annotated[str, Field(min_length=1, pattern=patterns.WORD)]
Seconds = Annotated[int | None, BeforeValidator(seconds)]
Memory = Annotated[str, BeforeValidator(_as_text), Field(pattern=patterns.MEMORY)]
SetupLine = Annotated[str, AfterValidator(_setup_line)]
ContainerOption = Annotated[Word, AfterValidator(_container_option)]
Interface = Annotated[str, AfterValidator(_interface)]


class AnyLauncher(Settings):
    """time_limit: seconds that a stage may take, its retries included."""

    time_limit: Seconds = execution()

    def layout(self, *names: str, distributed: bool) -> tuple[int, int]:
        """Nodes of a stage, and its processes on each. names: of its settings, and its own. distributed: whether it
        can use several."""
        return 1, 1

    def time_to_work(self, *names: str) -> float | None:
        """Seconds after which a stage is to have stopped by itself; None: any."""
        return self.time_limit


class LocalLauncher(AnyLauncher):
    """One process on this machine."""

    kind: Literal["local"] = execution()


class TorchrunLauncher(AnyLauncher):
    """Several processes under torchrun, for the stages that train: on this machine, or on several joined by hand.

    join_s: seconds that machines wait for each other.
    """

    kind: Literal["torchrun"] = execution()
    processes: int = execution(ge=1)
    nodes: int = execution(ge=1)
    rank: int = execution(ge=0)
    head: Annotated[str, Field(pattern=patterns.ADDRESS)] | None = execution()
    join_s: int = execution(ge=1)

    def layout(self, *names: str, distributed: bool) -> tuple[int, int]:
        return (self.nodes, self.processes) if distributed else (1, 1)


class Resources(AnyLauncher):
    """What the job of one stage asks SLURM for."""

    nodes: int = execution(ge=1)
    processes: int = execution(ge=1)
    gpus_per_node: int | None = execution(ge=0)
    cpus_per_process: int | None = execution(ge=1)
    memory: Memory | None = execution()
    partition: Word | None = execution()
    account: Word | None = execution()
    qos: Word | None = execution()
    constraint: Word | None = execution()
    exclude: Word | None = execution()
    comment: Word | None = execution()

    def of_one_process(self) -> Resources:
        """What a stage asks for that cannot use more: one process, and one GPU if any are asked for."""
        gpus = self.gpus_per_node if self.gpus_per_node is None else min(1, self.gpus_per_node)
        return self.model_copy(update={"nodes": 1, "processes": 1, "gpus_per_node": gpus})


class Container(Settings):
    """What the stages' processes run in. enroot: by SLURM's plugin Pyxis."""

    kind: Literal["apptainer", "enroot"] = execution()
    image: Word = execution()
    options: list[ContainerOption] = execution()


def _askable(key: str) -> str:
    """The nearest of what a stage may ask for, or all of it."""
    near = difflib.get_close_matches(key, [*(known := Resources.model_fields)], 1, 0.5)
    if near and near[0] != key:
        return f"did you mean `{near[0]}`?"
    return f"what a stage may ask for: {', '.join(known)}"


class SlurmLauncher(Resources):
    """A job for each stage. stages: node or stage of the pipeline -> what its job asks for instead."""

    kind: Literal["slurm"] = execution()
    stages: dict[str, dict[str, Any]] = execution()
    max_parallel: int | None = execution(ge=1)
    grace: int = execution(ge=10, le=LONGEST_GRACE)
    max_restarts: int = execution(ge=0)
    setup: list[SetupLine] = execution()
    python: Word | None = execution()
    container: Container | None = execution()
    interface: Interface | None = execution()
    options: dict[Annotated[str, Field(pattern=patterns.OPTION)], Word | int | bool] = execution()
    probe: bool = execution()

    def resources(self, *names: str, distributed: bool) -> Resources:
        """Of a stage. names: its own and its settings', the more special one last. Raises ValidationError.

        Where a process has a GPU each, and a stage that trains is given other processes, so it has there.
        """
        given = {name: getattr(self, name) for name in Resources.model_fields}
        usual = Resources.model_construct(**given)
        base = usual if distributed else usual.of_one_process()
        asked = {key: value for name in names for key, value in self.stages.get(name, {}).items()}
        if distributed and "processes" in asked and usual.gpus_per_node == usual.processes:
            asked = {"gpus_per_node": asked["processes"], **asked}
        return Resources.model_validate({**dict(base), **asked})

    def layout(self, *names: str, distributed: bool) -> tuple[int, int]:
        asked = self.resources(*names, distributed=distributed)
        return (asked.nodes, asked.processes) if distributed else (1, 1)

    def time_to_work(self, *names: str) -> float | None:
        limit = self.resources(*names, distributed=True).time_limit
        return None if limit is None else limit - self.grace

    @model_validator(mode="after")
    def _stages_ask_for_resources(self) -> SlurmLauncher:
        for name in self.stages:
            try:
                self.resources(name, distributed=True)
            except ValidationError as error:
                fault = error.errors()[0]
                key = ".".join(map(str, fault["loc"]))
                what = {"at": f"stages.{name}.{key}", "what": fault["msg"], "fix": _askable(key)}
                if fault["type"] == "extra_forbidden":
                    what["what"] = "no such key"
                raise PydanticCustomError("stages", "asks for what cannot be: `launcher.{at}`: {what}", what) from None
        return self

    @model_validator(mode="after")
    def _leaves_room_to_save(self) -> SlurmLauncher:
        if self.time_limit is not None and self.time_limit <= self.grace:
            what = "has a time_limit of {limit} s, of which grace={grace} s are for saving"
            raise PydanticCustomError("grace", what, {"limit": self.time_limit, "grace": self.grace})
        return self

    @field_validator("options")
    @classmethod
    def _hold_no_secrets(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name, given in value.items():
            if isinstance(given, str):
                _refuse_secrets(f"{name}={given}", "export {name} before the command: jobs get its environment")
        return value

    @field_validator("options")
    @classmethod
    def _are_not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        said = {*OURS, "time", "mem", *(key.replace("_", "-") for key in Resources.model_fields)}
        for name in value:
            # sbatch takes beginnings of its options, too
            if "clusters".startswith(name):
                fix = "give the command on that cluster's login node: what follows asks the one that it is given on"
                raise PydanticCustomError("options", "names another cluster", {"fix": fix})
            if name != "gpus" and any(ours.startswith(name) for ours in said):  # gpus is one of its own
                fix = f"a key of conf/launcher/slurm.yaml says it, or jobs cannot do without: --{name}"
                raise PydanticCustomError("options", "names what is not for it to say", {"fix": fix})
        return value
