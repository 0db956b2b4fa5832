"""Secrets are removed by name and by look; what only resembles one stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import alignment
from alignment.config.redact import run_command, without_secrets

HEX40 = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    "name", ["token", "hf_token", "hub-token", "api_key", "apiKey", "key", "client_secret", "password", "password_file"]
)
def test_a_value_under_a_name_of_secrets_is_removed(name: str) -> None:
    assert without_secrets({"a": {name: "anything"}}) == {"a": {name: "[removed]"}}


@pytest.mark.parametrize(
    "value",
    [
        "hf_AbCdEfGhIjKlMnOpQrStUvWx",
        HEX40,
        f"local-{HEX40}",
        f"WANDB_API_KEY={HEX40}",
        "wandb_v1_AbCdEfGhIjKlMnOpQrSt",
        "ghp_" + "a1B2" * 9,
        "sk-proj-" + "a1B2" * 9,
        "https://me:hunter2@example.org/x",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4",
    ],
)
def test_a_value_that_looks_like_a_secret_is_removed_wherever_it_is(value: str) -> None:
    assert without_secrets({"note": value, "list": ["ok", value]}) == {"note": "[removed]", "list": ["ok", "[removed]"]}


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("export DB_PASSWORD=hunter2", "export DB_PASSWORD=[removed]"),
        ("export A=1 PGPASSWORD='my \"own\" one'x B=2", "export A=1 PGPASSWORD=[removed] B=2"),
        ('apiKey="one\\" two" token=three', "apiKey=[removed] token=[removed]"),
        ('export DB_PASSWORD="no end to it', "export DB_PASSWORD=[removed]"),
        ("--env=API_TOKEN=abc --api-key=abc", "--env=API_TOKEN=[removed] --api-key=[removed]"),
        ("export DB_PASSWORD+=hunter2", "export DB_PASSWORD+=[removed]"),
        ("https://example.org/?token=abc", "https://example.org/?token=[removed]"),
        ('export TOKEN=$MINE API_KEY="${OTHER}"', None),
        ("export TOKENIZERS_PARALLELISM=false PAD_TOKEN=x A=B", None),
        ("export DB_PASSWORD=", None),
        ("settings are written key=value", None),
    ],
)
def test_a_value_that_a_text_gives_to_a_name_of_secrets_is_removed(text: str, left: str | None) -> None:
    assert without_secrets({"setup": [text]}) == {"setup": [left or text]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key", "a" * 64),
        ("key", "0123456789abcdef"),
        ("eos_token", "<|im_end|>"),
        ("pad_token", None),
        ("max_new_tokens", 64),
        ("tokens_per_micro_batch", 2048),
        ("revision", HEX40),
        ("path", f"/home/me/hub/snapshots/{HEX40}/model"),
        ("archive_sha256", "b" * 64),
        ("keyboard", "qwerty"),
        ("beta", 0.1),
        ("token", None),
        ("limit", None),
        ("gradient_checkpointing", False),
    ],
)
def test_what_only_resembles_a_secret_stays(name: str, value: object) -> None:
    assert without_secrets({name: value}) == {name: value}


def test_no_shipped_setting_is_taken_for_a_secret() -> None:
    files = sorted((Path(alignment.__file__).parent / "conf").rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        assert "[removed]" not in str(without_secrets(yaml.safe_load(file.read_text()))), file


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["-m", "hydra.sweeper.storage=postgresql://me:pw@db/optuna"], "-m 'hydra.sweeper.storage=[removed]'"),
        (["+data.more.token=abc", "seed=1"], "'+data.more.token=[removed]' seed=1"),
        (["launcher.setup=['export DB_PASSWORD=hunter2']"], "'launcher.setup=[removed]'"),
        ([f"model.source.revision={HEX40},{HEX40[::-1]}"], None),
        (["hydra.sweeper.storage=sqlite:///study.db", "--config-dir", "here"], None),
        (["model.eos_token=end", "hydra.sweeper.storage=null"], None),
    ],
)
def test_a_command_is_kept_without_its_secrets(arguments: list[str], left: str | None) -> None:
    assert run_command(arguments) == "alignment run " + (left or " ".join(arguments))
