"""The page of a loop: whole, well formed, free of the network, every line linked to the declaration's."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

import nestloop as nl
from nestloop import zoo
from nestloop.cli import main
from nestloop.errors import UnknownDimError
from nestloop.stages import STAGES

VOID = {"meta", "link", "br", "img", "input"}


class Read(HTMLParser):
    """What a browser makes of a page: the text of each panel, and the lines that name a place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.panels: dict[str, list[str]] = {}
        self.places: dict[str, set[str]] = {"aside": set(), "main": set()}
        self.script = self.style = ""
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        assert not given.keys() & {"src", "href"}  # nothing is fetched
        if tag not in VOID:
            self.open.append((tag, given))
        if given.get("class") == "line":
            self.panels.setdefault(self._panel(), []).append("")
            if "data-at" in given:
                (half,) = {"aside", "main"} & {name for name, _ in self.open}
                self.places[half].add(str(given["data-at"]))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, tag

    def handle_data(self, data):
        if any(given.get("class") == "line" for _, given in self.open):
            self.panels[self._panel()][-1] += data
        elif self.open and self.open[-1][0] == "script":
            self.script += data
        elif self.open and self.open[-1][0] == "style":
            self.style += data

    def _panel(self) -> str:
        return next(str(given["id"]) for _, given in self.open if "id" in given)


class Marked(zoo.TTTLinear):
    """Less < than, more > than, & "quoted" <b>tags</b>."""

    def readout(self, f, t):
        return f(t.q) + 0.0 * (t.q < t.k).float()  # <script>alert(1)</script>


@pytest.fixture(scope="module")
def text() -> str:
    return nl.page(Marked, d=4)


@pytest.fixture(scope="module")
def read(text: str) -> Read:
    return Read(text)


def test_it_holds_every_stage_to_the_letter(read: Read):
    for name in STAGES:
        if name != "run":
            wanted = nl.inspect(Marked, d=4).partition(f"== {name} ==\n")[2].partition("\n\n== ")[0]
            assert read.panels[f"1-{name}"] == wanted.splitlines(), name
    assert read.panels["1-explain"] == nl.explain(Marked, d=4).splitlines()
    assert read.panels["1-cost"] == nl.cost(Marked, d=4).splitlines()
    assert list(read.panels)[-len(STAGES) - 2 :] == [f"1-{name}" for name in ("explain", *STAGES, "cost")]


def test_the_declaration_is_beside_it(read: Read):
    files = [lines for panel, lines in read.panels.items() if panel.startswith("file-")]
    assert Path(__file__).read_text().splitlines() in files
    assert Path(zoo.tttlm.__file__).read_text().splitlines() in files  # what it inherits


def test_every_line_of_a_stage_finds_its_place(read: Read):
    lines = Path(__file__).read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if "alert(1)" in line)
    assert f"test_page.py:{number}" in read.places["main"]
    assert len(read.places["main"]) > 5 and read.places["main"] <= read.places["aside"]


def test_it_needs_no_network_and_is_small(text: str, read: Read):
    assert not re.search(r"url\(|https?:|@import|fetch|import\(", read.style + read.script)
    assert len(text) < 1_000_000
    assert len(nl.page(zoo.MTTTMLP)) < 1_000_000


def test_what_is_declared_is_text_not_elements(text: str, read: Read):
    assert "<b>" not in text and "<script>alert" not in text
    assert any("<b>tags</b>" in line for line in read.panels["1-explain"])


def test_the_script_can_be_parsed(read: Read, tmp_path: Path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node here")
    (tmp_path / "page.js").write_text(read.script)
    subprocess.run([node, "--check", "page.js"], cwd=tmp_path, check=True)


def test_the_loops_of_a_layer_are_on_one_page():
    class Two(zoo.CausalLinearAttention):
        beside = zoo.RetNet

    read = Read(nl.page(nl.Layer(Two, width=8, heads=2, dk=4, dv=4)))
    assert {"1-emit", "2-emit"} <= set(read.panels)


def test_what_has_no_costs_says_why():
    class Listed(zoo.DeltaNet):
        beta = nl.slow()
        optimizer = nl.SGD(lr=beta)
        schedule = nl.Program(("update", 0, "N"), ("apply", 0, "N"))

    read = Read(nl.page(Listed))
    assert read.panels["1-cost"][0].startswith("No kernel") or "Listed" in read.panels["1-cost"][0]


def test_a_dim_that_is_not_there_is_refused():
    with pytest.raises(UnknownDimError):
        nl.page(Marked, dk=4)


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "page.html"
    assert main(["inspect", "nestloop.zoo:MTTTLinear", "--html", str(file), "--shape", "d=4"]) == 0
    assert capsys.readouterr().out == f"written: {file}\n"
    assert Read(file.read_text(encoding="utf-8")).panels["1-declare"][0].startswith("loop MTTTLinear")
    assert file.stat().st_mode & 0o044  # as open as any file of its owner's
    with pytest.raises(SystemExit) as usage:
        main(["inspect", "nestloop.zoo:MTTTLinear", "--html", str(file), "--stage", "emit"])
    assert usage.value.code == 2
    assert capsys.readouterr().err == "nestloop: --html writes every stage: leave --stage out\n"
    assert main(["inspect", "nestloop.zoo:MTTTLinear", "--html", str(tmp_path / "none" / "page.html")]) == 1
    assert "none" in capsys.readouterr().err
