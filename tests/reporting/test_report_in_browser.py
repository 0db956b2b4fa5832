"""The pages in a real browser: headless Chromium, driven through chromedriver's plain HTTP interface."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignment.reporting import compare_page, comparison, sweep_files, sweeps
from alignment.reporting.page import write_report
from tests.reporting.fake_sweeps import BETA, grid, write_run, write_sweep

FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
]  # fmt: skip
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TOOLS = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
pytestmark = pytest.mark.skipif(
    not all(TOOLS.values()), reason="chromium is not installed (Debian: apt-get install chromium chromium-driver)"
)

INK = """
const [encoded, done] = arguments, image = new Image();
image.onload = () => {
  const canvas = Object.assign(document.createElement("canvas"), {width: image.width, height: image.height});
  const pen = canvas.getContext("2d");
  pen.drawImage(image, 0, 0);
  const data = new Uint32Array(pen.getImageData(0, 0, image.width, image.height).data.buffer);
  const counts = new Map();
  for (const pixel of data) counts.set(pixel, (counts.get(pixel) || 0) + 1);
  done({colours: counts.size, ink: 1 - Math.max(...counts.values()) / data.length});
};
image.onerror = () => done(null);
image.src = "data:image/png;base64," + encoded;
"""


class Browser:
    """One browser session with an empty profile below home."""

    def __init__(self, port: int, home: Path) -> None:
        flags = [*FLAGS, f"--user-data-dir={home / 'profile'}"]
        self.root = f"http://127.0.0.1:{port}/session"
        options = {"binary": TOOLS["chromium"], "args": flags}
        wanted = {
            "alwaysMatch": {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
            }
        }
        self.root += "/" + self.post("", {"capabilities": wanted})["sessionId"]

    def post(self, path: str, body: dict[str, Any], method: str = "POST") -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.root + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with DIRECT.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(error.read().decode()[:2000]) from None

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, page: Path, width: int = 1400, scheme: str = "light") -> None:
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
        self.console(), self.requested()  # what earlier pages left there
        self.post("/url", {"url": page.as_uri()})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.post("/execute/sync", {"script": script, "args": list(arguments)})

    def screenshot(self, **clip: float) -> str:
        """PNG of the whole page, or of a clip (x, y, width, height) of it, in base64."""
        area = {"clip": {**clip, "scale": 1}} if clip else {}
        return self.devtools("Page.captureScreenshot", captureBeyondViewport=True, **area)["data"]

    def whole(self) -> str:
        size = self.run("const b = document.documentElement; return [b.clientWidth, b.scrollHeight]")
        return self.screenshot(x=0, y=0, width=size[0], height=size[1])

    def region(self, selector: str) -> str:
        box = self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [b.x + scrollX, b.y + scrollY, b.width, b.height]",
            selector,
        )
        return self.screenshot(x=box[0], y=box[1], width=box[2], height=box[3])

    def point_at(self, selector: str, share: float = 0.5) -> str | None:
        """Move the pointer over the element (share of its width from the left) and return the text of the tip."""
        x, y = self.run(
            "const e = document.querySelector(arguments[0]); e.scrollIntoView({block: 'center', behavior: 'instant'});"
            "const b = e.getBoundingClientRect(); return [b.x + arguments[1] * b.width, b.y + b.height / 2]",
            selector,
            share,
        )
        self.devtools("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return self.run("const t = document.getElementById('tip'); return t.hidden ? null : t.textContent")

    def console(self) -> list[str]:
        """What the console said since the page was opened, or since it was asked last."""
        return [entry["message"] for entry in self.post("/se/log", {"type": "browser"})]

    def requested(self) -> list[str]:
        """Every address asked for since the page was opened, or since it was asked last."""
        entries = [json.loads(e["message"])["message"] for e in self.post("/se/log", {"type": "performance"})]
        return [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]

    def inks(self, *selectors: str) -> dict[str, dict[str, float]]:
        """Of each region's picture: how many colours, and the share of pixels that are not the commonest colour."""
        pictures = {selector: self.region(selector) for selector in selectors}
        self.post("/url", {"url": "about:blank"})
        return {name: self.post("/execute/async", {"script": INK, "args": [png]}) for name, png in pictures.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    home = tmp_path_factory.mktemp("browser")
    driver = subprocess.Popen(
        [str(TOOLS["chromedriver"]), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert driver.stdout
        port = next(
            int(m[1]) for line in driver.stdout if (m := re.search(r"started successfully on port (\d+)", line))
        )
        session = Browser(port, home)
        yield session
        session.post("", {}, method="DELETE")
    finally:
        driver.terminate()
        driver.wait(timeout=20)


@pytest.fixture
def report(make_run: Callable[..., tuple[Path, Path]]) -> Path:
    return write_report(*make_run(states={"start": "reused", "rows": "reused"}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Four betas of three seeds, one point that failed with words like markup, one that is not there."""
    points = grid(
        tmp_path, {0.05: [0.27, 0.30, 0.29], 0.1: [0.30, 0.33, 0.31], 0.3: [0.1, 0.14, 0.11], 1.0: [0.0, 0.1, 0.0]}
    )
    states = {"dpo": "failed", "evaluate_dpo": "waiting", "verdict": "waiting"}
    error = '<script>document.title = "owned"</script>'
    write_run(tmp_path, "bad", {BETA: 1.0, "seed": 3}, {"reward": 0.0}, states=states, error=error)
    points += [{"run": run, "settings": {BETA: 1.0, "seed": 3}} for run in ("bad", "nowhere")]
    folder = write_sweep(tmp_path, points)
    told = sweep_files.read_sweep(folder)
    found = comparison.compare(told, sweeps.read_points(told, tmp_path, lambda key: False))
    return compare_page.write_page(found, folder)


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (420, "light")])
def test_the_page_is_drawn_and_nothing_goes_wrong(browser: Browser, report: Path, width: int, scheme: str) -> None:
    browser.open(report, width, scheme)
    assert browser.console() == []
    assert browser.run("return document.title") == "quickstart · report", "the sample's script did not run"
    assert browser.run("return document.documentElement.scrollWidth") == width, "nothing sticks out at the side"
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(251, 250, 247)", "dark": "rgb(19, 21, 24)"}[scheme]
    regions = ("#verdict", "#models", ".panels", "#trade figure", "#lengths figure", "article", "svg.lineage")
    for region, found in browser.inks(*regions).items():
        assert found["colours"] > 20, region
        assert found["ink"] > 0.01, region


def test_every_plot_is_there_and_has_drawn_marks(browser: Browser, report: Path) -> None:
    """SFT 6 curves, DPO 11, eight rows of intervals, reward against KL, lengths, changes; 11 boxes, 22 links."""
    browser.open(report)
    drawn = browser.run(
        """
        const long = [...document.querySelectorAll("path.line")].filter((p) => p.getTotalLength() > 50).length;
        const high = (s) => s.getBoundingClientRect().height > 20;
        const boxes = [...document.querySelectorAll("svg.plot")].filter(high).length;
        const count = (s) => document.querySelectorAll(s).length;
        return {long, boxes, points: count("#trade .point"), bars: count("#lengths .bar"), dots: count(".strip circle"),
                nodes: count(".lineage .node"), links: count(".lineage .link"), cards: count("article")}
        """
    )
    bars = drawn.pop("bars")
    assert drawn == {"long": 19, "boxes": 28, "points": 3, "dots": 60, "nodes": 11, "links": 22, "cards": 10}
    assert bars > 20


def test_the_pointer_reads_values_and_lights_up_the_lineage(browser: Browser, report: Path) -> None:
    browser.open(report)
    assert browser.point_at("#curves svg.plot", 0.999) == "step 13\n1.691"
    assert "log-ratio 9.4" in (browser.point_at("#trade g.m1") or "")
    assert browser.point_at("h1") is None
    browser.point_at('[data-node="pairs"]')
    lit = browser.run("return [...document.querySelectorAll('.node.on')].map((n) => n.dataset.node)")
    assert lit == ["start", "rows", "sft", "samples", "judged", "pairs"]
    shown = "return [...document.querySelectorAll('.node-detail.shown')].map((d) => d.id)"
    assert browser.run(shown) == ["node-dpo"]
    browser.run("document.querySelector('[data-node=\"sft\"]').dispatchEvent(new MouseEvent('click', {bubbles: true}))")
    assert browser.run(shown) == ["node-sft"]


@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (1400, "dark"), (420, "light")])
def test_the_page_of_a_sweep_is_drawn_and_nothing_goes_wrong(
    browser: Browser, sweep: Path, width: int, scheme: str
) -> None:
    browser.open(sweep, width, scheme)
    assert browser.console() == []
    assert browser.requested() == [sweep.as_uri()]
    assert browser.run("return document.title") == "beta · sweep", "the error's script did not run"
    assert browser.run("return document.documentElement.scrollWidth") == width, "nothing sticks out at the side"
    regions = ("#verdict", "#leaders", "#trade figure", "#settings figure", ".shares", ".panels", "#points")
    for region, found in browser.inks(*regions).items():
        assert found["colours"] > 20, region
        assert found["ink"] > 0.01, region


def test_every_mark_of_a_sweep_is_there_and_the_pointer_reads_it(browser: Browser, sweep: Path) -> None:
    """Means and points of four betas with 3 seeds; each of the 3 charts of curves has 4 means and 12."""
    browser.open(sweep)
    drawn = browser.run(
        """
        const count = (s) => document.querySelectorAll(s).length;
        const long = [...document.querySelectorAll(".panels path.line")].filter((p) => p.getTotalLength() > 50).length;
        return {means: count("#trade .point"), points: count("#trade .dot"), lines: count("#settings path.line"), long,
                rows: count(".leaders tbody tr"), charts: count(".leaders svg"), all: count(".every tbody tr")}
        """
    )
    assert drawn == {"means": 4, "points": 12, "lines": 4, "long": 48, "rows": 4, "charts": 4, "all": 14}
    assert "reward 0.313" in (browser.point_at("#trade g.g0[tabindex]") or "")
    assert (browser.point_at(".panels svg.plot", 0.95) or "").startswith("step 12\nbeta=0.1 ")
    assert "of the variance" in (browser.point_at(".shares li") or "")


def test_opening_the_page_asks_nothing_of_any_network(browser: Browser, tmp_path: Path, report: Path) -> None:
    """First the control: a page that does ask is caught."""
    asking = tmp_path / "asking.html"
    asking.write_text('<img src="http://203.0.113.7/picture.png">')
    browser.open(asking)
    assert browser.requested() == [asking.as_uri(), "http://203.0.113.7/picture.png"]
    assert browser.console() != []
    browser.open(report)
    assert browser.requested() == [report.as_uri()]
