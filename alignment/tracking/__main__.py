"""Body of the process that uploads one log file, see alignment.tracking.upload: `python -m alignment.tracking FILE`."""

from __future__ import annotations

import os
import sys
import threading
import time

ORPHAN_SECONDS = 3.0  # how long the upload outlives a training process that was killed


def upload(log_file: str) -> None:
    """W&B's live sync, which by itself would wait for ever for a writer that was killed, or for a server that died."""

    def leave_when_told() -> None:
        if not os.read(0, 1):  # the training process has ended, in whatever way; a byte says: at once
            time.sleep(ORPHAN_SECONDS)
        connection = wandb_setup.singleton()._connection
        if connection is not None and connection._proc is not None:
            connection._proc._process.kill()  # wandb's helper would go on trying for many minutes
        os._exit(1)

    from wandb.cli.cli import cli
    from wandb.sdk import wandb_setup

    threading.Thread(target=leave_when_told, daemon=True).start()
    cli(["beta", "sync", "--live", log_file])


upload(sys.argv[1])
