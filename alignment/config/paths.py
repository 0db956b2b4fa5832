"""Where conf/ lies, in a checkout and in an installed copy alike."""

from __future__ import annotations

from pathlib import Path

from alignment.errors import ConfigError

CONF = (Path(__file__).resolve().parent.parent / "conf").resolve()
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "chat_template")
TEMPLATES = CONF / "chat_template"


def template_path(chat_template: str) -> Path:
    """A chat template's file: a name in conf/chat_template, or a path that ends in .jinja. Raises ConfigError."""
    path = Path(chat_template) if chat_template.endswith(".jinja") else TEMPLATES / f"{chat_template}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
        fix = f"keep, a path that ends in .jinja, or one of: {known}"
        raise ConfigError(f"no chat template {chat_template!r}", where="model.chat_template", fix=fix)
    return path
