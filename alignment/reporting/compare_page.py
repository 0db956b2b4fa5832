from pathlib import Path
from typing import Any


def write_page(content: dict[str, Any], folder: Path) -> Path:
    return folder / "compare.html"
