"""What the accelerators can do that a run is estimated for: no result depends on it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from alignment.config.settings import Settings, execution

AUTO = "auto"
Figure = Annotated[float, Field(gt=0)]


class Hardware(Settings):
    """One accelerator, and its ways to the others. null: unknown, and what follows from it is not estimated.

    name: as its driver says it; `auto`: what this machine has. Figures beside `auto` win over what is found.
    """

    name: str = execution(min_length=1)
    memory_gb: Figure | None = execution()
    tflops_bf16: Figure | None = execution()
    tflops_fp32: Figure | None = execution()
    memory_bandwidth_gb_s: Figure | None = execution()
    link_gb_s: Figure | None = execution()
    network_gb_s: Figure | None = execution()
    watts: Figure | None = execution()
    utilisation: Annotated[float, Field(gt=0, le=1)] | None = execution()
