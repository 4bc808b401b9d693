"""Every stage of a loop's lowering as one HTML page, each line beside the line of the declaration that it came from.

The page is one file without anything from a network: to be opened from a disk, sent, or kept with an experiment.
"""

from __future__ import annotations

import inspect
import linecache
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape
from pygments import highlight
from pygments.filter import simplefilter
from pygments.filters import TokenMergeFilter
from pygments.formatters import HtmlFormatter
from pygments.lexer import Lexer
from pygments.lexers import CppLexer, PythonLexer
from pygments.token import Comment, Keyword, Name, Number, Operator, String, Text

from nestloop.cost_table import text as cost_text
from nestloop.costs import costs_of
from nestloop.errors import NoPlanError
from nestloop.inspection import explain_text, stage_texts
from nestloop.lang.loop import LoopSpec, user_files
from nestloop.stages import STAGES
from nestloop.targets import check_dims, loops_of, sizes_text, trial_sizes

_LINE = re.compile(r"([\w.-]+\.py):(\d+)")  # how generated text names a line of the declaration
_LEXERS: Mapping[str, type[Lexer]] = {"emit": PythonLexer, "triton": PythonLexer, "cpp": CppLexer}
_COLOURED = (Comment, Keyword, Name.Builtin, Name.Class, Name.Decorator, Name.Function, Number, Operator.Word, String)
_STYLES = {"light": "friendly", "dark": "github-dark"}  # of pygments


@dataclass(frozen=True)
class Line:
    """One line of text.

    Attributes:
        html: the line, highlighted.
        at: the line of the declaration that it is of, as "file.py:8"; "" for none.
    """

    html: Markup
    at: str


@dataclass(frozen=True)
class Panel:
    """One stage: its name, what it is in a sentence, and its lines."""

    name: str
    about: str
    lines: list[Line]


@dataclass(frozen=True)
class Section:
    """One loop: its name, where it is declared, the sizes of its dims, and its stages."""

    name: str
    where: str
    sizes: str
    panels: list[Panel]


def page(loop: Any, device: str = "h200", **dims: int) -> str:
    """Every stage of a loop's lowering, `explain` and `cost` as one page of HTML, linked to the declaration's lines.

    Args:
        loop: a declared loop, `nl.compile(...)` of one, or a layer.
        device: of the costs: "h200", "h100", "b200", "a100" or "mi300x"; none need be there.
        dims: sizes; those not given are small ones (d = 16, H = 2, B = 2, N = 16).

    Raises:
        UnknownDimError, UnknownDeviceError: no such dim or device.
        CompileError: a body cannot be compiled.
    """
    check_dims(loop, dims)
    given = loops_of(loop)
    sections = [_section(spec, {**sizes, **dims}, device) for spec, sizes, _ in given]
    named = {line.at.rpartition(":")[0] for one in sections for panel in one.panels for line in panel.lines if line.at}
    files = {Path(file).name: file for spec, *_ in given for file in (spec.where.file, *sorted(user_files(spec)))}
    environment = Environment(
        loader=PackageLoader("nestloop.inspector", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    styles = {
        scheme: HtmlFormatter(style=style, classprefix="p-").get_style_defs(".code")
        for scheme, style in _STYLES.items()
    }
    return environment.get_template("page.html").render(
        title=", ".join(spec.name for spec, *_ in given),
        sections=sections,
        sources=[(name, _numbered(name, file)) for name, file in files.items() if name in named],
        start=given[0][0].where.short,
        styles={scheme: Markup(rules) for scheme, rules in styles.items()},
        versions=f"torch {torch.__version__}",
    )


def _section(spec: LoopSpec, dims: Mapping[str, int], device: str) -> Section:
    panels = [
        Panel(
            "explain",
            "What is fast, what is slow, where gradients flow, and what runs.",
            _lines("explain", explain_text(spec.cls, dims)),
        )
    ]
    for name, text in stage_texts(spec.cls, tuple(STAGES), dims).items():
        panels.append(Panel(name, inspect.getdoc(STAGES[name]) or "", _lines(name, text)))
    try:
        costs = cost_text(costs_of(spec.cls, dims, device))
    except NoPlanError as none:
        costs = str(none)
    panels.append(
        Panel("cost", "What every plan should take on a GPU, and which one is chosen.", _lines("cost", costs))
    )
    return Section(spec.name, spec.where.short, sizes_text(spec, trial_sizes(spec, dims)), panels)


def _numbered(name: str, file: str) -> list[Line]:
    """A file of the user's, each line with its own place."""
    lines = _highlighted(PythonLexer, "".join(linecache.getlines(file)))
    return [Line(html, f"{name}:{number}") for number, html in enumerate(lines, 1)]


def _lines(stage: str, text: str) -> list[Line]:
    plain = text.splitlines()
    lexer = _LEXERS.get(stage)
    html = [escape(line) for line in plain] if lexer is None else _highlighted(lexer, text)
    return [Line(one, _at(line)) for one, line in zip(html, plain, strict=True)]


def _at(line: str) -> str:
    """The line of the declaration that generated text names last."""
    found = _LINE.findall(line)
    return ":".join(found[-1]) if found else ""


@simplefilter
def _coloured(self: Any, lexer: Lexer, stream: Iterable[Any], options: Any) -> Iterator[Any]:
    """Tokens, of which those without a colour of their own are plain text: half of a page is their elements, else."""
    for kind, value in stream:
        yield (kind if any(kind in one for one in _COLOURED) else Text), value


def _highlighted(lexer: type[Lexer], text: str) -> list[Markup]:
    """The lines of a program in HTML, none of whose elements goes beyond its line."""
    filters = [_coloured(), TokenMergeFilter()]
    made = highlight(
        text, lexer(stripnl=False, ensurenl=False, filters=filters), HtmlFormatter(nowrap=True, classprefix="p-")
    )
    return [Markup(line) for line in made.removesuffix("\n").split("\n")]
