"""One process on each node of a stage: starts that node's ranks, passes on requests to stop, and ends with them.

`python -m alignment.launchers.agent <work folder> --nodes N --rank R --processes P [--meet HOST:PORT]`

SLURM signals the processes that srun has started, and by its settings only these: without one in between, torchrun
would get them, and end at once. rank: of this node; SLURM says it in SLURM_PROCID.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from alignment.launchers.local import ask, meeting, start, torchrun, worker
from alignment.signals import SIGNALS

POLL = 0.1  # seconds


class Agent:
    """Of one node. `asked`: whether its ranks are to stop in order."""

    def __init__(self, folder: Path, processes: int, rank: int):
        self._folder, self._ranks = folder, range(rank * processes, (rank + 1) * processes)
        self._told: set[int] = set()
        self.asked = False
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: object) -> None:
        self.asked = True

    def run(self, command: list[str]) -> int:
        """The exit code of the command: by a signal, 128 and its number."""
        child = start(command, stdin=subprocess.DEVNULL)
        while (code := child.poll()) is None:
            if self.asked:
                ask(self._folder, self._ranks, self._told)
            time.sleep(POLL)
        return code if code >= 0 else 128 - code


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="alignment.launchers.agent", allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--rank", type=int, default=int(os.environ.get("SLURM_PROCID", 0)))
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--meet", help="host:port where the nodes' processes meet, on node 0")
    given = parser.parse_args(arguments)
    if given.nodes * given.processes == 1:
        command = worker(given.folder)
    else:
        where = meeting(given.nodes, given.rank, given.meet or "")
        command = torchrun(given.folder, given.processes, where)
    return Agent(given.folder, given.processes, given.rank).run(command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
