from __future__ import annotations

import sys

from alignment.preflight.looking import main

sys.exit(main(sys.argv[1:]))
