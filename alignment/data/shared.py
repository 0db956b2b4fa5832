"""What processes that prepare rows have in common: the one that they are forked from imports and loads it, once."""

from __future__ import annotations

import gc

from alignment.data import language, preparation

__all__ = ["preparation"]

language.load()
gc.freeze()  # a collection writes to what it looks at, and so would copy all of this in each process
