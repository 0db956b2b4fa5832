"""`python -m alignment` is the `alignment` command."""

from __future__ import annotations

import sys

from alignment.cli import main

sys.exit(main())
