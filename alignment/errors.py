"""Errors for people: one line with what, where and the fix; each class has its exit code."""

from __future__ import annotations

import errno
from typing import Any

# What a look before a run has found: check, state (ok, note, warning, failed; of `data show` row, lengths), what, and
# where it applies where, fix, code (the exit code), facts.
Finding = dict[str, Any]


class AlignmentError(Exception):
    """An error whose cause is known. Printed as one line; the traceback only with --debug.

    what: what is wrong, one clause. where: file, key or line. fix: what the person can do.
    retry: whether another attempt at the stage may do better; true of some classes, and of single errors.
    """

    exit_code = 1
    retry = False

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None):
        super().__init__(what)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f" ({self.fix})" if self.fix else ""
        return " ".join(f"{place}{self.what}{remedy}".split())

    def __reduce__(self) -> Any:
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(cls: type[AlignmentError], what: str, where: str | None, fix: str | None) -> AlignmentError:
    return cls(what, where=where, fix=fix)


class ConfigError(AlignmentError):
    """A setting is unknown, of the wrong type, impossible, or contradicts another."""

    exit_code = 2


class InputError(AlignmentError):
    """The data or the model given cannot be used."""

    exit_code = 3


class MachineError(AlignmentError):
    """The machine lacks something: disk, a package, a network, a library."""

    exit_code = 4


def word_of_a_job(error: AlignmentError) -> str:
    """The line with which a job of a cluster ends. It has the code, which SLURM soon forgets: who waits for the job
    ends with it. job.sbatch.jinja writes such a line, too; reporting/jobs.py reads them."""
    return f"alignment: error: {error} [code {error.exit_code}]"


def unusable(error: OSError) -> MachineError:
    """A file or folder of ours (the store, the cache) that the system refuses, in words for people."""
    where = str(error.filename) if error.filename is not None else None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = str(error.filename2) if error.filename2 is not None else where  # of a copy: not what is copied
        return MachineError(
            "no room is left", where=where, fix="make room, or a larger quota; the same command goes on"
        )
    fix = "check path and permissions; store=... and ALIGNMENT_CACHE say where results and the cache lie"
    return MachineError(f"cannot be used: {error.strerror or error}", where=where, fix=fix)


def is_out_of_memory(error: BaseException) -> bool:
    """Of Python, of PyTorch on a GPU, or of PyTorch on the CPU, which has no class for it."""
    text = str(error).lower()
    refused = "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    return isinstance(error, MemoryError) or refused


class TrainingError(AlignmentError):
    """Training went wrong in a way that makes its result worthless (NaN, a wrong reference model, ...)."""

    exit_code = 5


class LostError(AlignmentError):
    """Processes of a stage were lost: killed, crashed without a word, hung, cut off."""

    exit_code = 6
    retry = True


class PreemptedError(AlignmentError):
    """A stage was asked to stop (a signal, a time limit) and did so in order: the same command goes on from there.

    kept: whether this attempt has left anything new for the next one; None: it could not, for want of a disk.
    """

    exit_code = 75
    kept: bool | None = False


class StageFailed(AlignmentError):
    """A stage's process ended without a result and without a cause of its own; its log says more."""

    exit_code = 1


EXIT_CODES = """\
exit codes:
  0    done
  1    something unforeseen; `--debug` shows the traceback
  2    a setting or the command line is wrong
  3    the data or the model given cannot be used
  4    the machine lacks something (disk, package, network, memory)
  5    training went wrong (NaN, wrong reference model, ...)
  6    processes of a stage were lost (killed, crashed, hung), and retries did not help
  75   stopped in order: a signal or a time limit; the same command goes on from there
  130  ended at once: a run by a second signal, other commands by one"""

BY_CODE: dict[int, type[AlignmentError]] = {
    c.exit_code: c for c in (ConfigError, InputError, MachineError, TrainingError, LostError, PreemptedError)
}
