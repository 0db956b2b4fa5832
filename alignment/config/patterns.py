"""How some settings are written, and the same in words."""

from __future__ import annotations

SHA256 = r"^[0-9a-f]{64}$"
COMMIT = r"^([0-9a-f]{40}|\?\?\?)$"  # ??? = not given; refused where the source is used
NAME = r"^[a-z][a-z0-9_]*$"
RUN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
ADDRESS = r"^[^\s:/]+:[0-9]{1,5}$"
MEMORY = r"^[0-9]+[KMGT]?$"
OPTION = r"^[a-z][a-z-]*$"
IDENTIFIER = r"^[A-Za-z_][A-Za-z0-9_]*$"
WORD = r"^[^\n\r\"'\\`$]+$"  # it stands on a line of its own in a script
VISIBLE = r"\S"

IN_WORDS = {
    SHA256: "64 hexadecimal digits, in small letters",
    COMMIT: "the 40 hexadecimal digits of a commit",
    NAME: "small letters, digits and _, a letter first",
    RUN: "letters, digits, `.`, `_` and `-`, a letter or digit first",
    ADDRESS: "host:port",
    MEMORY: "a whole number, of MB or with K, M, G or T: 64G; 0 is all of a node",
    IDENTIFIER: "letters, digits and _, no digit first",
    OPTION: "a long option of sbatch, without the --",
    VISIBLE: "more than white space",
    WORD: "one line without quotes, $, ` and \\",
}
