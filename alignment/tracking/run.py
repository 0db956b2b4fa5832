"""One stage as one Weights & Biases run. Nothing here can stop or hold the training.

The training process only ever writes W&B's own log file, offline, on its own disk. With `mode: online` a second
process uploads that file while it grows (alignment.tracking.upload). So a server that is down, refuses the key, answers
nonsense or dies in the middle costs the upload, never a step and never a row: the file is whole, and one command
uploads it later. (In W&B's own online mode the process that writes the file also talks to the server, and goes down
with it: a malformed answer crashes it.)

A restart opens a new file under the same run id. W&B would write the rows of the second file over those of the first,
so the new file begins with the rows that `metrics.jsonl` holds from before: the newest file is always the whole run,
and uploading it again changes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec

from alignment.config.redact import without_secrets
from alignment.files import program, write_text
from alignment.pipeline.store import METRICS
from alignment.tracking.upload import Upload

if TYPE_CHECKING:
    from alignment.config.execution import Tracking

RUN_ID_FILE = "wandb_run_id"
ARTIFACT_TYPE = "stage"  # one for all stages: who uses a result must name it exactly as its maker did
FLUSH_SECONDS = 1.0  # at most this much is lost to kill -9 (W&B's default: 15 s)
CLOSE_SECONDS = 10.0  # the longest that finish() waits for the log file to be closed

Warn = Callable[[str], None]
P = ParamSpec("P")


class Tracker:
    """Where a stage's metrics stream to. This one goes nowhere; `Tracker.start` gives the one that was asked for.

    run_id: the W&B id of the stage's run. sync_command: the shell command that uploads the run by hand.
    """

    run_id: str | None = None
    sync_command: str | None = None

    @staticmethod
    def start(
        tracking: Tracking | None,
        *,
        folder: Path,
        group: str,
        name: str,
        kind: str,
        config: Mapping[str, Any],
        parents: Mapping[str, tuple[str, str]],
        on_warning: Warn,
        final_folder: Path | None = None,
    ) -> Tracker:
        """Begin, or after a restart take up again, the run of one stage. Never raises for W&B's sake.

        tracking: None on all ranks but the first. folder: the stage's work folder; all that W&B writes lies in its
        `wandb`, the run's id in `wandb_run_id`. Its `metrics.jsonl` must hold the rows that are logged here
        ({"step", "time", name: value}): a restart begins with them.
        group: id of the sweep that the run belongs to, else of the run. name, kind: of the stage.
        parents: role -> (stage name, stage key).
        final_folder: where `folder` lies once its stage has succeeded, for the command that is shown.
        """
        if tracking is None or tracking.kind == "none":
            return Tracker()
        tracker = WandbTracker(folder.absolute(), (final_folder or folder).absolute(), on_warning)
        tracker._open(tracking, group, name, kind, config, parents)
        return tracker

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Send one row of the history. Steps must not go down."""

    def result(self, name: str, key: str, metrics: Mapping[str, float]) -> None:
        """Send the stage's summary, and its result (name, key) as the run's output artifact."""

    def finish(self, ok: bool) -> None:
        """Close the run as finished or failed. Returns within about 20 s, whatever the server and the disk do."""

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.finish(ok=kind is None)


def _harmless(
    method: Callable[Concatenate[WandbTracker, P], None],
) -> Callable[Concatenate[WandbTracker, P], None]:
    """Tracking that fails ends with one warning; the training goes on without it."""

    @functools.wraps(method)
    def guarded(self: WandbTracker, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # wandb raises anything from UsageError to ConnectionResetError
            self._run = None
            self._warn(
                f"W&B tracking has ended early ({type(error).__name__}: {error}). The stage goes on; "
                f"{self._folder / METRICS} holds every row."
            )

    return guarded


class WandbTracker(Tracker):
    def __init__(self, folder: Path, final_folder: Path, on_warning: Warn):
        self._folder, self._final_folder, self._on_warning = folder, final_folder, on_warning
        self._run: Any = None
        self._log_folder: Path | None = None
        self._upload: Upload | None = None
        self._upload_warned = False
        self._replayed = False
        self._finished = False

    @_harmless
    def _open(
        self,
        tracking: Tracking,
        group: str,
        name: str,
        kind: str,
        config: Mapping[str, Any],
        parents: Mapping[str, tuple[str, str]],
    ) -> None:
        self.run_id = _kept_run_id(self._folder / RUN_ID_FILE)
        user_environment = dict(os.environ)
        _keep_wandb_in(self._folder)
        import wandb

        settings = wandb.Settings(
            mode="offline",
            root_dir=str(self._folder),
            use_dot_wandb=False,
            symlink=False,
            silent=True,
            console="off",
            project=tracking.project,
            entity=tracking.entity,
            run_id=self.run_id,
            run_group=group,
            run_name=name,
            run_job_type=kind,
            reinit="create_new",
            x_transaction_log_flush_interval=FLUSH_SECONDS,
            x_disable_meta=True,  # holds the command line, where secrets may stand
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_save_requirements=False,
            x_service_wait=15.0,
        )
        wandb.setup(settings)  # silences what wandb prints before and outside of a run
        self._run = wandb.init(settings=settings, config=without_secrets(config))
        self._log_folder = Path(self._run.settings.sync_dir)
        self.sync_command = _sync_command(self._final_folder / "wandb" / self._log_folder.name)
        for role, (parent, key) in parents.items():
            # The public use_artifact refuses to work offline; this is what it does with an artifact not yet uploaded.
            # The server knows the maker's by its digest, and notes the use.
            artifact = _artifact(parent, key, role=role)
            self._run._log_artifact(artifact, aliases=[key[:16]], is_user_created=True, use_after_commit=True)
        if tracking.mode == "online":
            log_file = self._log_folder / f"run-{self.run_id}.wandb"
            self._upload = Upload(log_file, self._folder, user_environment)

    @_harmless
    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._replay(before=step)
            self._run.log(dict(metrics), step=step)
        if self._upload is not None and not self._upload_warned and (trouble := self._upload.trouble()):
            self._warn_not_uploaded(trouble, self._final_folder)

    @_harmless
    def result(self, name: str, key: str, metrics: Mapping[str, float]) -> None:
        if self._run is not None:
            self._replay()
            self._run.summary.update(dict(metrics))
            self._run.log_artifact(_artifact(name, key), aliases=["latest", key[:16]])

    @_harmless
    def finish(self, ok: bool) -> None:
        if self._finished:
            return
        self._finished = True
        self._catch_up()
        if not _close(self._run, exit_code=0 if ok else 1):
            self._warn(
                "W&B's log file could not be closed; its last rows may be missing. "
                f"{self._folder / METRICS} holds every row."
            )
        self._run = None
        folder = self._final_folder if ok else self._folder
        if self._upload is not None and (trouble := self._upload.close()):
            self._warn_not_uploaded(trouble, folder)
        elif self._log_folder is not None:
            self.sync_command = _sync_command(folder / "wandb" / self._log_folder.name)
        shutil.rmtree(self._folder / "wandb" / "cache", ignore_errors=True)  # the logs of wandb's helpers
        if self._log_folder is not None:
            (self._log_folder / "logs" / "debug-core.log").unlink(missing_ok=True)  # a link to one of them

    @_harmless
    def _catch_up(self) -> None:
        if self._run is not None:
            self._replay()

    def _replay(self, before: float = float("inf")) -> None:
        """Give the run, once, the rows of earlier attempts up to where this one goes on (repeated steps: the last)."""
        if self._replayed:
            return
        self._replayed = True
        rows: dict[int, dict[str, Any]] = {}
        path = self._folder / METRICS
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # the row that a killed process was writing
                continue
            rows[row.pop("step")] = row
        for step in sorted(step for step in rows if step < before):
            row = rows[step]
            self._run.log({"_timestamp": row.pop("time", None), **row}, step=step)

    def _warn_not_uploaded(self, trouble: str, folder: Path) -> None:
        self._upload_warned = True
        assert self._log_folder is not None
        kept = folder / "wandb" / self._log_folder.name
        self.sync_command = _sync_command(kept)
        self._warn(
            f"W&B: {trouble}. The stage goes on and nothing is lost: the run is kept in {kept}. "
            f"When the stage has ended, upload it with: {self.sync_command}"
        )

    def _warn(self, message: str) -> None:
        self._on_warning(" ".join(message.split()))


def _kept_run_id(path: Path) -> str:
    """The run id that this stage's folder has had from its first attempt on."""
    if path.exists() and (kept := path.read_text(encoding="utf-8").strip()):
        return kept
    fresh = secrets.token_hex(8)
    write_text(path, fresh + "\n")
    return fresh


def _keep_wandb_in(folder: Path) -> None:
    """Point all that wandb writes, in this process and its helper, into the stage's folder; report nothing home."""
    place = folder / "wandb"
    place.mkdir(parents=True, exist_ok=True)
    os.environ.update(
        {
            "WANDB_DIR": str(folder),
            "WANDB_CACHE_DIR": str(place / "cache"),
            "WANDB_DATA_DIR": str(place / "cache"),
            "WANDB_CONFIG_DIR": str(place / "cache"),
            "WANDB_ERROR_REPORTING": "false",
        }
    )
    os.environ.pop("WANDB_SERVICE", None)  # a helper of someone else's, with folders and a network of its own


def _artifact(name: str, key: str, **metadata: str) -> Any:
    """A stage's result as an artifact without files: one reference that says its key, so equal keys, equal digests."""
    import wandb

    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name), type=ARTIFACT_TYPE, metadata={"key": key, **metadata})
    artifact.add_reference(f"alignment-stage:{key}", name="stage", checksum=False)
    return artifact


def _sync_command(log_folder: Path) -> str:
    return f"{program('wandb')} sync {shlex.quote(str(log_folder))}"


def _close(run: Any, exit_code: int) -> bool:
    """Finish the run and end wandb's helper process; False if that failed or took too long (then it is killed)."""
    if "wandb" not in sys.modules:  # not installed: nothing was opened
        return True
    import wandb
    from wandb.sdk import wandb_setup

    connection = wandb_setup.singleton()._connection
    owned = connection._proc if connection is not None else None

    closed: list[bool] = []

    def close() -> None:
        with contextlib.suppress(BaseException):  # wandb's helper may be dead, and teardown may call sys.exit
            if run is not None:
                run.finish(exit_code=exit_code)
            closed.append(True)
        with contextlib.suppress(BaseException):
            wandb.teardown()

    closer = threading.Thread(target=close, name="wandb-close", daemon=True)
    closer.start()
    closer.join(CLOSE_SECONDS)
    if closer.is_alive() and owned is not None:
        owned._process.kill()
        closer.join(1.0)
    return bool(closed)
