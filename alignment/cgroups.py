"""Control groups of this process, by which a container or a job has less than its machine."""

from __future__ import annotations

from pathlib import Path


def groups(controller: str, proc: Path, cgroup: Path) -> list[Path]:
    """Folders of this process's control groups (v2, or v1 of a controller) and those above them; a container sees its
    own group as the root. Some are not there."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    found = []
    for line in ["0::/", f":{controller}:/", *lines]:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        inside = Path(path.lstrip("/"))
        for root in (cgroup / controllers, cgroup / controller) if controllers else (cgroup,):
            found += [root / part for part in (inside, *inside.parents)]
    return list(dict.fromkeys(found))
