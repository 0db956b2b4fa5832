"""What every class of the schema is made of: strict settings, and the side that each key declares itself to be on."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


def identity(**bounds: Any) -> Any:
    """A key that can change the result of a stage."""
    return Field(json_schema_extra={"side": "identity"}, **bounds)


def execution(**bounds: Any) -> Any:
    """A key that cannot change the result of a stage."""
    return Field(json_schema_extra={"side": "execution"}, **bounds)


class Settings(BaseModel):
    """No number is infinite or NaN: where there may be no bound, null says so."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    def idle(self) -> frozenset[str]:
        """Identity-side settings that change nothing as the others stand: they are not in the key then."""
        return frozenset()
