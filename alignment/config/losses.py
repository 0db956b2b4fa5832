"""The losses of preference pairs by name: what each reads of the settings, and what it needs. No torch is imported.

The functions are in alignment/training/losses/pairs.py, the settings in stages/preference.py; docs/algorithms.md says
which is for what.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Traits:
    """uses: settings of the stage that it reads. reference: it compares with the reference model. scores: through the
    chosen divergence. whole: it looks at the whole global batch before it can weigh a pair, which costs a forward.
    means: it raises a mean over tokens."""

    uses: tuple[str, ...]
    reference: bool = True
    scores: bool = False
    whole: bool = False
    means: bool = False


PAIR_LOSSES: dict[str, Traits] = {
    "sigmoid": Traits(("beta", "label_smoothing"), scores=True),
    "hinge": Traits(("beta",), scores=True),
    "ipo_sum": Traits(("beta",), scores=True),
    "ipo_mean": Traits(("beta",), scores=True),
    "sigmoid_norm": Traits(("beta",), scores=True),
    "robust": Traits(("beta", "label_smoothing"), scores=True),
    "exo_pair": Traits(("beta", "label_smoothing"), scores=True),
    "discopop": Traits(("beta", "discopop_tau"), scores=True),
    "dpop": Traits(("beta", "dpop_lambda"), scores=True),
    "cal_dpo": Traits(("beta",)),
    "rdpo": Traits(("beta", "length_penalty"), scores=True),
    "nca_pair": Traits(("beta",)),
    "bco_pair": Traits(("beta",)),
    "sppo_hard": Traits(("beta",)),
    "apo_zero": Traits(("beta",)),
    "apo_down": Traits(("beta",)),
    "aot": Traits(("beta", "label_smoothing"), whole=True),
    "aot_unpaired": Traits(("beta", "label_smoothing"), whole=True),
    "beta_dpo": Traits(("beta", "beta_dpo_alpha", "beta_dpo_keep", "beta_dpo_momentum"), scores=True, whole=True),
    "simpo": Traits(("beta", "simpo_gamma", "label_smoothing"), reference=False, means=True),
    "cpo": Traits(("beta", "label_smoothing", "cpo_alpha"), reference=False),
    "orpo": Traits(("beta",), reference=False, means=True),
    "nll": Traits((), reference=False),
    "sft": Traits((), reference=False),
}
COEFFICIENTS = sorted({name for traits in PAIR_LOSSES.values() for name in traits.uses})
