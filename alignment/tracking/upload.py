"""The process that uploads a run's log file while it is written, so that the one that trains never sees the network."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from alignment.config.redact import without_secrets

SEND_SECONDS = 5.0  # how often rows are sent (W&B's default: 15 s)
SILENCE_SECONDS = 20.0  # a server that has not answered by then gets a warning
DRAIN_SECONDS = 10.0  # the longest that close() waits for the last rows to be taken
FIRST_ANSWER_SECONDS = 8.0  # close() gives a server that never answered no more than this, counted from the start

_USER_SETTINGS = {  # what says where the server is and who asks; all else of WANDB_* is about other runs
    "WANDB_API_KEY",
    "WANDB_IDENTITY_TOKEN_FILE",
    "WANDB_CREDENTIALS_FILE",
    "WANDB_BASE_URL",
    "WANDB_APP_URL",
    "WANDB_CONFIG_DIR",
    "WANDB_INSECURE_DISABLE_SSL",
    "WANDB_X_EXTRA_HTTP_HEADERS",
    "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL",
}


class Upload:
    """The running upload of one log file. It ends with the file, or with this process."""

    def __init__(self, log_file: Path, folder: Path, environment: Mapping[str, str]):
        self._marker = log_file.with_name(log_file.name + ".synced")
        self._output = folder / "wandb" / "upload.log"
        self._started = time.monotonic()
        self._was_answered = False
        kept = {k: v for k, v in environment.items() if not k.startswith("WANDB_") or k in _USER_SETTINGS}
        cache = str(folder / "wandb" / "cache")
        package_root = str(Path(__file__).resolve().parents[2])
        kept.setdefault("WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL", str(SEND_SECONDS))
        kept |= {
            "WANDB_DIR": str(folder),
            "WANDB_CACHE_DIR": cache,
            "WANDB_DATA_DIR": cache,
            "WANDB_ERROR_REPORTING": "false",
            "PYTHONPATH": os.pathsep.join(filter(None, [package_root, kept.get("PYTHONPATH")])),
        }
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "alignment.tracking", str(log_file)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=kept,
                start_new_session=True,
            )

    def trouble(self) -> str | None:
        """Why nothing is being uploaded, as far as can be told while the run goes on."""
        if self._process.poll() is not None:
            return self._reason()
        if time.monotonic() - self._started > SILENCE_SECONDS and not self._answered():
            return f"the server has not answered for {SILENCE_SECONDS:.0f} s (it is tried again and again)"
        return None

    def close(self) -> str | None:
        """Wait, not long, until all is uploaded; else end the upload and say why it failed."""
        patience = DRAIN_SECONDS
        if not self._answered():
            patience = max(0.5, FIRST_ANSWER_SECONDS - (time.monotonic() - self._started))
        deadline = time.monotonic() + patience
        while self._process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        in_time = self._process.poll() is not None
        self._end()
        text = self._text()
        if in_time and self._process.returncode == 0 and "Finished syncing" in text and "ERROR" not in text:
            return None
        self._marker.unlink(missing_ok=True)  # W&B marks a failed upload as done too, and would skip it next time
        return self._reason()

    def _end(self) -> None:
        """End the process and its helper, if they have not ended by themselves."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.stdin.write(b"x")
            self._process.stdin.close()
            self._process.wait(timeout=2.0)
        self._process.kill()
        self._process.wait()

    def _reason(self) -> str:
        said = [line for line in self._text().splitlines() if "ERROR" in line or re.match(r"[\w.]*Error\b", line)]
        if said:
            message = re.sub(r"^(wandb: )?(ERROR )?(\[[^]]*\] )?([\w.]+Error: )?", "", said[-1]).replace(
                "<no message>", ""
            )
            return f"the upload failed: {without_secrets(message) or 'the server refused it without a reason'}"
        return "the server stopped answering" if self._answered() else "the server did not answer"

    def _answered(self) -> bool:
        self._was_answered = self._was_answered or "View run" in self._text()
        return self._was_answered

    def _text(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace")
