"""Which file and line set a key. Only asked when an error is to be explained, so it may be slow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode


def source_of(key: str, overrides: list[str], conf: Path, config_dirs: tuple[Path, ...] = ()) -> str:
    """'command line', or 'conf/<file>:<line>' of the last file that sets the key or a part above it."""
    for override in overrides:
        name = override.split("=", 1)[0].lstrip("+~").split("@")[0]
        if key == name or key.startswith(name + "."):
            return "command line"
    best, found = -1, "conf/config.yaml"
    for file, package in _files(overrides, conf, config_dirs):
        depth, line = _line(file, package, key)
        if depth >= best and depth > 0:
            shown = f"conf/{file.relative_to(conf)}" if file.is_relative_to(conf) else str(file)
            best, found = depth, f"{shown}:{line}"
    return found


def search_path(config_dirs: tuple[Path, ...]) -> list[str]:
    """The override that adds folders to Hydra's search path."""
    return ["hydra.searchpath=[" + ",".join(f"file://{folder}" for folder in config_dirs) + "]"] if config_dirs else []


def _files(overrides: list[str], conf: Path, config_dirs: tuple[Path, ...]) -> list[tuple[Path, str]]:
    """(file, package) in the order in which they are merged."""
    if GlobalHydra.instance().is_initialized():
        loader = GlobalHydra.instance().config_loader()
        defaults = loader.compute_defaults_list("config", overrides, RunMode.RUN).defaults
    else:
        with initialize_config_dir(str(conf), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list(
                "config", search_path(config_dirs) + overrides, RunMode.RUN
            ).defaults
        GlobalHydra.instance().clear()
    out = []
    for default in defaults:
        for folder in (*config_dirs, conf):
            file = folder / f"{default.config_path}.yaml"
            if default.config_path and file.is_file():
                out.append((file.resolve(), default.package or ""))
                break
    return out


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
    return (depth + len(above) if depth else 0), line
