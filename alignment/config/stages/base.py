"""What every stage declares of itself."""

from __future__ import annotations

from typing import ClassVar, Literal

from alignment.config.settings import Settings

REWARD_MODEL = "reward_model"  # roles of a stage with a reward that begin so: reward models for its terms
Reads = dict[str, Literal["heldout", "prompts"]]


class Stage(Settings):
    """makes: what its result is. inputs: role -> what the parent in that role must make; some may be left out.

    open_inputs: roles may have any name, and each parent must make this. ordering: roles that only say "after": what
    fills them cannot change the result, and is not in its key. reads: role -> the split of that parent's rows without
    which it cannot work. groups: config groups it also depends on; who has a reward may have reward models as parents.
    """

    makes: ClassVar[str]
    inputs: ClassVar[dict[str, str]] = {}
    optional_inputs: ClassVar[dict[str, str]] = {}
    open_inputs: ClassVar[str | None] = None
    ordering: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[Reads] = {}
    groups: ClassVar[tuple[str, ...]] = ()
    distributed: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ()

    @property
    def compares(self) -> bool:
        """Whether it asks its reward which of two answers is better, not what each is worth."""
        return False

    def takes(self, role: str) -> str | None:
        """What a parent in this role must make; None: a stage of this kind has no such role."""
        if "reward" in self.groups and role.startswith(REWARD_MODEL):
            return "a reward model"
        return self.open_inputs or {**self.inputs, **self.optional_inputs}.get(role)

    def needless(self) -> frozenset[str]:
        """Roles of `ordering` that these settings have no use for: a node that only fills such roles is left out."""
        return frozenset()
