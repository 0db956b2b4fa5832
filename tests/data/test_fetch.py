"""Fetching from a real package index: a folder (pip's find-links) or a web server, with archives the tests build."""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignment.config.sources import HubSource, PackageSource, PathSource
from alignment.data.fetch import fetch
from alignment.errors import InputError, MachineError
from alignment.files import sha256

MEMBERS = {"gift/data/rows.json": b"[1, 2]", "gift/data/deep/more.txt": b"more", "gift/other.txt": b"unwanted"}


def build_wheel(folder: Path, members: dict[str, bytes] = MEMBERS) -> Path:
    """gift 1.0 as a wheel: a zip with its metadata and a RECORD of digests."""
    info = {
        "gift-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: gift\nVersion: 1.0\n",
        "gift-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for name, data in {**members, **info}.items():
        code = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        record += f"{name},sha256={code},{len(data)}\n"
    path = folder / "gift-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, **info, "gift-1.0.dist-info/RECORD": record.encode()}.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def build_sdist(folder: Path, proof: Path) -> Path:
    """gift 1.0 as a source archive whose own build backend, if it ever ran, would write `proof`."""
    backend = f"open({str(proof)!r}, 'w').write('ran')\nraise SystemExit('the build backend ran')\n"
    members = {
        "PKG-INFO": b"Metadata-Version: 2.1\nName: gift\nVersion: 1.0\n",
        "pyproject.toml": b'[build-system]\nrequires = ["nowhere"]\nbuild-backend = "bad"\nbackend-path = ["."]\n',
        "bad.py": backend.encode(),
        "setup.py": backend.encode(),
        **MEMBERS,
    }
    path = folder / "gift-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(f"gift-1.0/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that pip takes for the only index there is."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def source(archive: Path, member: str, **changes: str) -> PackageSource:
    values = {"package": "gift", "version": "1.0", "archive_sha256": sha256(archive), "member": member, **changes}
    return PackageSource(kind="package", archive="wheel" if archive.suffix == ".whl" else "sdist", **values)


def test_a_file_of_a_wheel_is_fetched_once_and_alone(index: Path, private_cache: Path) -> None:
    wanted = source(wheel := build_wheel(index), "gift/data/rows.json")
    path = fetch(wanted)
    assert path.name == "rows.json"
    assert path.read_bytes() == b"[1, 2]"
    wheel.unlink()  # the second time nothing is asked of the index
    assert fetch(wanted) == path
    assert sorted(p.name for p in private_cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")) == [
        "manifest.json",
        "rows.json",
    ]


def test_a_folder_of_a_wheel_keeps_its_shape(index: Path) -> None:
    path = fetch(source(build_wheel(index), "gift/data"))
    files = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    assert files == {"rows.json": b"[1, 2]", "deep/more.txt": b"more"}


def test_a_source_archive_is_read_without_running_anything_of_it(index: Path, tmp_path: Path) -> None:
    path = fetch(source(build_sdist(index, tmp_path / "proof"), "gift-1.0/gift/data/rows.json"))
    assert path.read_bytes() == b"[1, 2]"
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_another_hash_than_the_pinned_one_is_an_error_that_names_both(
    kind: str, index: Path, tmp_path: Path, private_cache: Path
) -> None:
    archive = build_wheel(index) if kind == "wheel" else build_sdist(index, tmp_path / "proof")
    with pytest.raises(MachineError) as caught:
        fetch(source(archive, "gift/data/rows.json", archive_sha256="0" * 64))
    said = f"gift==1.0: the {kind}'s SHA-256 differs: expected {'0' * 64}, found {sha256(archive)}"
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "proof").exists()
    assert not [p for p in private_cache.rglob("*") if p.is_file() and not p.name.endswith(".lock")]


def test_a_damaged_cache_is_noticed_and_fetched_again(index: Path) -> None:
    wanted = source(build_wheel(index), "gift/data/rows.json")
    path = fetch(wanted)
    path.write_bytes(b"[1, 3]")
    assert fetch(wanted).read_bytes() == b"[1, 2]"
    path.unlink()
    assert fetch(wanted).read_bytes() == b"[1, 2]"
    (path.parent.parent / "manifest.json").write_text("{")
    assert fetch(wanted).read_bytes() == b"[1, 2]"


def test_a_cache_that_has_it_all_is_only_read(index: Path, private_cache: Path) -> None:
    """A shared cache may be read-only: nothing is written, no lock opened. (For root every folder can be written.)"""
    wanted = source(build_wheel(index), "gift/data/rows.json")
    fetch(wanted)
    for lock in private_cache.rglob("*.lock"):
        lock.unlink()
    there = sorted(private_cache.rglob("*"))
    for path in there:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        assert fetch(wanted).read_bytes() == b"[1, 2]"
        assert sorted(private_cache.rglob("*")) == there
    finally:
        for path in there:
            path.chmod(0o755)


def test_the_leftovers_of_a_killed_fetch_are_never_used(index: Path) -> None:
    wanted = source(build_wheel(index), "gift/data/rows.json")
    entry = fetch(wanted).parent.parent
    partial = entry.with_name(f".{entry.name}.partial")
    entry.rename(partial)
    (partial / "content" / "rows.json").write_bytes(b"half")
    assert fetch(wanted).read_bytes() == b"[1, 2]"
    assert not partial.exists()


def test_what_the_index_does_not_have_is_an_error(index: Path) -> None:
    wheel = build_wheel(index)
    with pytest.raises(MachineError, match=r"gift==9\.0: the package index has no wheel of it for this machine"):
        fetch(source(wheel, "gift/data", version="9.0"))
    with pytest.raises(InputError, match=r"has no member 'gift/dat/rows\.json' .nearest: gift/data/rows\.json"):
        fetch(source(wheel, "gift/dat/rows.json"))


def test_an_index_out_of_reach_is_an_error(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = build_wheel(index)
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # port 9: nobody listens
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(MachineError, match=r"gift==1\.0: the package index cannot be reached"):
        fetch(source(wheel, "gift/data"))


def test_a_member_that_climbs_out_of_its_folder_is_refused(index: Path, private_cache: Path) -> None:
    wheel = build_wheel(index, {"gift/data/../../../../../escaped": b"bad", **MEMBERS})
    with pytest.raises((InputError, MachineError), match="unsafe name"):
        fetch(source(wheel, "gift/data"))
    assert not list(private_cache.parent.rglob("escaped"))


def test_a_full_disk_is_an_error(index: Path, tmp_path: Path) -> None:
    wheel = build_wheel(index, {"gift/big": os.urandom(1 << 20)})
    small = tmp_path / "small"
    small.mkdir()
    code = (
        "import sys\nfrom alignment.config.sources import PackageSource\nfrom alignment.data.fetch import fetch\n"
        "from alignment.errors import MachineError\n"
        "try:\n fetch(PackageSource.model_validate_json(sys.argv[1]))\n"
        "except MachineError as error:\n print(error)"
    )
    inside = f'mount -t tmpfs -o size=512k none {small} && exec "$@"'
    fetching = [sys.executable, "-c", code, source(wheel, "gift/big").model_dump_json()]
    if (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "-rm", "sh", "-c", inside, "sh", "true"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("no small file system can be mounted here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", inside, "sh", *fetching],
        env={**os.environ, "ALIGNMENT_CACHE": str(small)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == f"{small}: no space left for the cache (free some, or set ALIGNMENT_CACHE)", (
        done.stderr
    )


class Server(http.server.ThreadingHTTPServer):
    """A package index over HTTP that counts what is asked of it."""

    def __init__(self, wheel: Path):
        self.wheel, self.asked = wheel, []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        page = f'<!DOCTYPE html><a href="/files/{self.server.wheel.name}">{self.server.wheel.name}</a>'.encode()
        wheel = self.path.startswith("/files/")
        data = self.server.wheel.read_bytes() if wheel else page
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if wheel else "text/html")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server(build_wheel(index)) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{running.server_port}/simple")
        yield running
        running.shutdown()


def test_two_processes_that_want_the_same_fetch_it_once(server: Server) -> None:
    code = (
        "import sys\nfrom alignment.config.sources import PackageSource\nfrom alignment.data.fetch import fetch\n"
        "print(fetch(PackageSource.model_validate_json(sys.argv[1])).read_text())"
    )
    wanted = source(server.wheel, "gift/data/rows.json").model_dump_json()
    command = [sys.executable, "-c", code, wanted]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["[1, 2]\n", "[1, 2]\n"]
    assert sum(path.startswith("/files/") for path in server.asked) == 1


# --- paths and hubs ---------------------------------------------------------------------------------------------------


def test_a_path_is_itself_and_must_exist(tmp_path: Path) -> None:
    assert fetch(PathSource(kind="path", path=str(tmp_path))) == tmp_path
    with pytest.raises(InputError, match="none: no such file or folder"):
        fetch(PathSource(kind="path", path=str(tmp_path / "none")))


COMMIT = "a" * 40


def hub(id: str, **changes: object) -> HubSource:
    return HubSource(**{"kind": "hub", "id": id, "revision": COMMIT, "subset": None, "split": "train", **changes})


def test_a_hub_model_comes_from_the_hub_cache_without_network(tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    code = (
        "import sys\nfrom alignment.config.sources import HubSource\nfrom alignment.data.fetch import fetch\n"
        "print(fetch(HubSource.model_validate_json(sys.argv[1])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, hub("org/tiny").model_dump_json()],
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(snapshot), done.stderr


class Hub(http.server.ThreadingHTTPServer):
    """A hub of one repository, as far as its client asks it; keeps the names of files that were fetched."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.fetched = files, list[str]()
        super().__init__(("127.0.0.1", 0), Repository)


class Repository(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(self.path.rpartition("/")[2])

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if "/resolve/" in self.path:
            self.server.fetched.append(name)
            self.wfile.write(self._answer(name))
            return
        sizes = {one: len(data) for one, data in self.server.files.items()}
        told: object = {"id": "org/tiny", "sha": COMMIT, "siblings": [{"rfilename": one} for one in sizes]}
        if "/tree/" in self.path:
            told = [{"type": "file", "path": one, "size": size, "oid": one} for one, size in sizes.items()]
        data = json.dumps(told).encode()
        self._begin(data, {})
        self.wfile.write(data)

    def _answer(self, name: str) -> bytes:
        data = self.server.files[name]
        self._begin(data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        return data

    def _begin(self, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


def test_a_look_at_a_hub_model_leaves_its_weights_where_they_are(tmp_path: Path) -> None:
    names = ("config.json", "tokenizer.json", "chat_template.jinja", "vocab.txt", "model.safetensors")
    files = {name: name.encode() for name in names}
    code = (
        "import sys\nfrom alignment.config.sources import HubSource\nfrom alignment.data.fetch import fetch\n"
        "print(fetch(HubSource.model_validate_json(sys.argv[1]), weights=sys.argv[2] == 'weights'))"
    )
    with Hub({**files, "README.md": b"no part of a model"}) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        where = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": f"http://127.0.0.1:{running.server_port}"}
        for wanted, fetched in (("", files.keys() - {"model.safetensors"}), ("weights", files.keys())):
            done = subprocess.run(
                [sys.executable, "-c", code, hub("org/tiny").model_dump_json(), wanted],
                env={**os.environ, **where, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"},
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            assert {path.name for path in Path(done.stdout.strip()).iterdir()} == fetched == set(running.fetched)
        running.shutdown()


def test_a_hub_model_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError) as caught:
        fetch(hub("org/none"))
    said = str(caught.value)
    assert said.startswith(f"org/none@{COMMIT}: cannot be fetched from the hub: ")
    assert "or pass a local copy with model=path" in said


def test_rows_of_a_hub_data_set_become_lines_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"prompt": "q", "completion": "ä"}, {"prompt": "r", "completion": "b"}]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = fetch(hub(str(folder)), what="data")
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    with pytest.raises(MachineError, match=r"cannot be fetched from the hub: .*data=path"):
        fetch(hub("org/none"), what="data")
