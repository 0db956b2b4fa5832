"""What a run imports, imported once: the fork server of tests/forks.py loads this module."""

from __future__ import annotations

import gc
import os

os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed looks for a device, as alignment.training.engine sees to

import deepspeed
import deepspeed.ops  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import alignment.hydra_app
import alignment.pipeline.runner
import alignment.reporting.gather
import alignment.reporting.page
import alignment.reporting.terminal
import alignment.stages.dpo
import alignment.stages.grpo
import alignment.stages.import_model
import alignment.stages.kto
import alignment.stages.online_dpo
import alignment.stages.ppo
import alignment.stages.prepare
import alignment.stages.reward_model
import alignment.stages.rloo
import alignment.stages.sft
import alignment.tracking
import alignment.worker  # noqa: F401

gc.freeze()  # else each worker's imports would begin with a collection of all these
