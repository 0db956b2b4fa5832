"""What a run would meet, looked at before it begins: `python -m alignment.preflight <folder>/order.json`.

No weights are read and nothing is trained: a login node can do it. Each finding is a line of JSON on stdout, as soon as
it is known: check, state (ok, warning, failed), what, where, fix. The command line shows them (alignment/checking.py).
"""

from alignment.preflight.looking import main

__all__ = ["main"]
