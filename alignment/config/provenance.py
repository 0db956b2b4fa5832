"""Which file and line set a key. Only asked when an error is to be explained, so it may be slow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from alignment.config.paths import CONF

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """What a config is composed from: the command line's overrides, and folders of files besides conf/."""

    overrides: tuple[str, ...]
    folders: tuple[Path, ...] = ()

    @classmethod
    def of(cls, hydra: Any, *, as_typed: bool = False) -> Origin:
        """As Hydra itself notes it in the config it has composed. as_typed: with no interpolation followed."""
        sources = (Path(source.path) for source in hydra.runtime.config_sources if source.schema == "file")
        given: Any = OmegaConf.to_container(hydra.overrides, resolve=False) if as_typed else hydra.overrides
        overrides = (*given["hydra"], *given["task"])
        return cls(overrides, tuple(folder for folder in sources if folder != CONF))

    def where(self, *keys: str) -> str:
        """'command line', or 'conf/<file>:<line>' of the last file that sets the key or a part above it.

        Several keys that contradict each other: the command line if it sets or chooses any of them, else the first's.
        """
        if any(self._is_typed(key, choices=len(keys) > 1) for key in keys):
            return COMMAND_LINE
        return self._file(keys[0])

    def chosen(self, group: str, choice: str) -> str:
        """Where the group's choice, or a list with it, was made. Of one that is not there Hydra tells no more, so the
        files are searched for it."""
        if any(override.split("=")[0].split("@")[0].lstrip("+~") == group for override in self.overrides):
            return COMMAND_LINE
        made = re.compile(rf"\b{re.escape(group)}(@\S*)?: *(\[[^]]*)?\b{re.escape(choice)}\b")
        for file in (file for folder in (*self.folders, CONF) for file in sorted(folder.rglob("*.yaml"))):
            lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
            if number := next((number for number, line in lines if made.search(line)), 0):
                return f"{self.show(file)}:{number}"
        return COMMAND_LINE

    def search_path(self) -> list[str]:
        """The override that has Hydra read the folders too."""
        folders = ",".join(quoted(f"file://{folder}") for folder in self.folders)
        return [f"hydra.searchpath=[{folders}]"] if folders else []

    def show(self, file: Path) -> str:
        return f"conf/{file.relative_to(CONF)}" if file.is_relative_to(CONF) else str(file)

    def file_of(self, config_path: str) -> Path | None:
        """The file behind a name such as engine/zero2; conf/ is searched first, as Hydra does."""
        files = (folder / f"{config_path}.yaml" for folder in (CONF, *self.folders))
        return next((file.resolve() for file in files if file.is_file()), None)

    def listed(self, group: str) -> list[tuple[Path, str]]:
        """(file, package) of what conf/config.yaml's choice for the group has come to, in the order of merging."""
        chosen = (one for one in self._defaults() if one.parent == "config" and one.config_path.startswith(f"{group}/"))
        return [(file, one.package or "") for one in chosen if (file := self.file_of(one.config_path))]

    def _is_typed(self, key: str, *, choices: bool) -> bool:
        """Whether the command line sets the key, a part above or below it, or (choices) chooses its group's file."""
        for override in self.overrides:
            name = override.split("=", 1)[0].lstrip("+~").split("@")[0]
            is_choice = any((folder / name).is_dir() for folder in (CONF, *self.folders))
            if (choices or not is_choice) and (f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.")):
                return True
        return False

    def _file(self, key: str) -> str:
        best, found = 0, "conf/config.yaml"
        for file, package in self._files():
            depth, line = _line(file, package, key)
            if depth >= best and depth > 0:
                best, found = depth, f"{self.show(file)}:{line}"
        return found

    def _files(self) -> Iterator[tuple[Path, str]]:
        """(file, package) in the order in which they are merged."""
        for default in self._defaults():
            if default.config_path and (file := self.file_of(default.config_path)):
                yield file, default.package or ""

    def _defaults(self) -> list[Any]:
        if GlobalHydra.instance().is_initialized():
            return self._loaded([])
        with initialize_config_dir(str(CONF), version_base="1.3"):
            defaults = self._loaded(self.search_path())
        GlobalHydra.instance().clear()
        return defaults

    def _loaded(self, search_path: list[str]) -> list[Any]:
        loader = GlobalHydra.instance().config_loader()
        # The mode that also takes the overrides of a sweep: they choose no file.
        return list(loader.compute_defaults_list("config", [*search_path, *self.overrides], RunMode.MULTIRUN).defaults)


def quoted(value: str) -> str:
    """A text as Hydra reads it back from an override, whatever is in it."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: 2 * m[1] + (m[2] and "\\'"), value) + "'"


def _line(file: Path, package: str, key: str) -> tuple[int, int]:
    """How many parts of the key the file sets (below its package), and on which line the deepest stands."""
    parts, above = key.split("."), [p for p in package.split(".") if p and p != "_global_"]
    if parts[: len(above)] != above:
        return 0, 0
    try:
        node: Any = yaml.compose(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:
        return 0, 0
    depth, line = 0, 0
    for part in parts[len(above) :]:
        entries = node.value if isinstance(node, yaml.MappingNode) else []
        entry = next(((k, v) for k, v in entries if k.value == part), None)
        if entry is None:
            break
        depth, line, node = depth + 1, entry[0].start_mark.line + 1, entry[1]
    if parts == above:  # the file is all that the key has
        return len(above), 1
    return (depth + len(above) if depth else 0), line
