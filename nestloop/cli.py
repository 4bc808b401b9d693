"""The command `nestloop`: show what the compiler made of a loop, check the installation, train and evaluate.

Exit status: 0 done, 1 it failed (the message says why; `--trace` adds the traceback), 2 wrong usage.
Every import of torch waits until a command needs it, so `nestloop --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nestloop import __version__
from nestloop.arguments import UsageError, load_target, parse_budget, parse_names, parse_shape
from nestloop.errors import NestloopError

DTYPES = {"fp32": "float32", "fp64": "float64", "bf16": "bfloat16", "fp16": "float16"}  # as command lines have them
TARGET = "FILE.py:Name or package.module:Name of a declared loop, for example nestloop.zoo:MTTTMLP"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: this process's) and return its exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    trace = "--trace" in words
    words = [word for word in words if word != "--trace"]
    parser = build_parser()
    # What follows `train RECIPE`, `eval` and `demo` is theirs to read: their keys are the recipe's fields.
    forward = FORWARDED.get(words[0]) if words else None
    try:
        if forward is not None:
            return forward(words[1:])
        arguments = vars(parser.parse_args(words))
        return arguments.pop("run")(**arguments)
    except UsageError as error:
        parser.exit(2, f"nestloop: {error}\n")
    except BrokenPipeError:  # the reader of a pipe had enough, as in `nestloop inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (NestloopError, OSError) as error:
        if trace:
            traceback.print_exc()
        else:
            who = "nestloop: the system refuses" if isinstance(error, OSError) else "nestloop"
            print(f"{who}: {_shown(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _shown(error: Exception) -> str:
    """An error's text, without a line of this file: what was given in a command line has none."""
    where: Any = getattr(error, "where", None)
    here = where is not None and where.file == __file__
    return str(error).replace(f"\n  at:    {where}   {where.text}", "", 1) if here else str(error)


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything but what `train`, `eval` and `demo` read themselves."""
    parser = argparse.ArgumentParser(
        prog="nestloop", description="A compiler for nested learning loops.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"nestloop {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Callable[..., int] | None, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        added.set_defaults(run=run)
        return added

    inspect = command("inspect", run_inspect, "print the stages a loop goes through on its way to a kernel")
    inspect.add_argument("target", help=TARGET)
    inspect.add_argument("--stage", help="print this stage alone (default: every one that needs no compiler)")
    inspect.add_argument(
        "--device", default="sm_90", help="of the stages ttir, ttgir, ptx, sass and amdgcn: sm_80, sm_90, ..."
    )
    inspect.add_argument(
        "--html", type=Path, metavar="FILE", help="write them all, with the declaration beside, as a page"
    )
    explain = command("explain", run_explain, "say what is fast, what is slow, where gradients flow and what runs")
    explain.add_argument("target", help=TARGET)
    check = command("check", run_check, "compare what is generated from a loop with its definition, on random inputs")
    check.add_argument("target", help=TARGET)
    check.add_argument("--stress", action="store_true", help="also on inputs at which layers go wrong in training")
    check.add_argument("--dtypes", default="fp32,bf16", help="of the views, beside fp64: of fp32, bf16 and fp16")
    check.add_argument("--backends", help="of torch, cpp and triton (default: those that are fast on the device)")
    check.add_argument("--device", default="cpu", help="cpu or cuda")
    check.add_argument("--seed", type=int, default=0, help="of the inputs")
    bench = command("bench", run_bench, "time a loop's backends and softmax attention, in turn, on this machine")
    bench.add_argument("target", help=TARGET)
    bench.add_argument("--dtype", default="fp32", help="of the views: fp32, bf16, fp16 or fp64")
    bench.add_argument("--backends", help="of torch, cpp, triton and reference (default: those fast on the device)")
    bench.add_argument("--device", default="cpu", help="cpu or cuda")
    bench.add_argument("--budget", type=parse_budget, default=20, metavar="SECONDS", help="that rounds may take")
    cost = command("cost", run_cost, "say what every plan of a loop should take on a GPU, and why one is chosen")
    cost.add_argument("--device", default="h200", help="h200, h100, b200, a100 or mi300x; none need be there")
    cost.add_argument("--dtype", default="bf16", help="of the views: bf16, fp16 or fp32")
    cost.add_argument("target", help=TARGET)
    tune = command("tune", run_tune, "find a loop's fastest tiling for a GPU: time it there, or compile for it here")
    tune.add_argument("target", help=TARGET)
    tune.add_argument("--device", default="h200", help="h200, h100, b200, a100 or mi300x; none need be there")
    tune.add_argument("--dtype", default="bf16", help="of the views: bf16, fp16 or fp32")
    tune.add_argument("--budget", type=parse_budget, default=120, metavar="SECONDS", help="that it may take")
    tune.add_argument("--out", type=Path, help="the file (default: beside the declaration, as NAME.tuned.json)")
    for added in (inspect, explain, check, bench, cost, tune):
        added.add_argument("--shape", default="", metavar="B=2,H=2,N=16,d=16", help="sizes of the dims")
    catalogue = command("list", run_list, "list the loops, models and recipes that come with nestloop")
    catalogue.add_argument("--kind", choices=list(CATALOGUES), default="loops")
    doctor = command("doctor", run_doctor, "compare what is installed with what nestloop was tested with")
    for added in (check, bench, cost, tune, catalogue, doctor):
        added.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    command("train", None, "train RECIPE [--key value ...]: run a recipe, any of its fields overridden")
    command("eval", None, "eval CHECKPOINT [--key value ...]: accuracy of a checkpoint on its evaluation images")
    command("demo", None, "train four small vision transformers side by side on handwritten digits")
    for added in commands.choices.values():  # for their help: `main` reads it, wherever it stands
        added.add_argument(
            "--trace", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
    return parser


def _given(target: str, shape: str) -> tuple[Sequence[Any], dict[str, Any]]:
    """The loops that a target names, and the sizes that their dims are given."""
    loop, dims = load_target(target), parse_shape(shape)
    from nestloop.targets import check_dims

    check_dims(loop, dims)
    return loop if isinstance(loop, (tuple, list)) else (loop,), dims


def _print(found: Sequence[Any], text: Callable[[Any], str], as_json: Callable[[Any], Any] | None) -> None:
    """What was found of each loop, as text, or as JSON where that is how."""
    if as_json is None:
        print("\n\n".join(map(text, found)))
        return
    made = list(map(as_json, found))
    print(json.dumps(made if len(made) > 1 else made[0], indent=2))


def _with_version(found: Any) -> dict[str, Any]:
    return {"nestloop": __version__, **found.as_json()}


def run_inspect(target: str, stage: str | None, device: str, html: Path | None, shape: str) -> int:
    if html is not None and stage is not None:
        raise UsageError("--html writes every stage: leave --stage out")
    loop, dims = load_target(target), parse_shape(shape)
    if html is None:
        from nestloop import inspection

        print(inspection.inspect(loop, stage, device, **dims))
        return 0
    from nestloop.inspector import page
    from nestloop.lowering.runtime import cache

    sizes: dict[str, Any] = dict(dims)
    cache.put(html, page(loop, **sizes))
    print(f"written: {html}")
    return 0


def run_explain(target: str, shape: str) -> int:
    loop, dims = load_target(target), parse_shape(shape)
    from nestloop import inspection

    print(inspection.explain(loop, **dims))
    return 0


def run_check(
    target: str,
    stress: bool,
    dtypes: str,
    backends: str | None,
    device: str,
    seed: int,
    shape: str,
    as_json: bool,
) -> int:
    loops, dims = _given(target, shape)
    from nestloop import checks

    options: dict[str, Any] = {"dtypes": [DTYPES.get(name, name) for name in parse_names(dtypes)], **dims}
    options |= {"backends": None if backends is None else parse_names(backends)}
    found = [checks.check(one, stress=stress, device=device, seed=seed, **options) for one in loops]
    _print(found, str, _with_version if as_json else None)
    return 0 if all(one.holds for one in found) else 1


def run_bench(
    target: str, dtype: str, backends: str | None, device: str, budget: float, shape: str, as_json: bool
) -> int:
    loops, dims = _given(target, shape)
    from nestloop.timing import bench

    options: dict[str, Any] = {"backends": None if backends is None else parse_names(backends), **dims}
    options |= {"dtype": DTYPES.get(dtype, dtype), "device": device, "budget": budget / len(loops)}
    _print([bench(one, **options) for one in loops], str, _with_version if as_json else None)
    return 0


def run_cost(target: str, device: str, dtype: str, shape: str, as_json: bool) -> int:
    loops, dims = _given(target, shape)
    from nestloop import cost_table, costs

    found = [costs.costs_of(one, dims, device, dtype) for one in loops]
    _print(found, cost_table.text, cost_table.as_json if as_json else None)
    return 0


def run_tune(
    target: str,
    device: str,
    dtype: str,
    budget: float,
    out: Path | None,
    shape: str,
    as_json: bool,
) -> int:
    loops, dims = _given(target, shape)
    from nestloop import tuning

    found = [tuning.tune(one, dims, device, dtype, budget / len(loops), out) for one in loops]
    _print(found, lambda one: one.text, (lambda one: one.as_json) if as_json else None)
    return 0


def run_list(kind: str, as_json: bool) -> int:
    rows = CATALOGUES[kind]()
    if as_json:
        print(json.dumps(rows, indent=2, default=str))
    else:
        console().print(table(rows))
    return 0


def run_doctor(as_json: bool) -> int:
    from nestloop import doctor

    return doctor.main(as_json, console())


def run_train(words: Sequence[str]) -> int:
    if not words or words[0].startswith("-"):
        known = "\n".join(f"  {row['recipe']:<16} {row['about']}" for row in recipes())
        usage = f"usage: nestloop train RECIPE [--key value ...]\n\nrecipes:\n{known}\n\n"
        usage += "nestloop train RECIPE --help lists the keys of a recipe."
        if words and words[0] in ("-h", "--help"):
            print(usage)
            return 0
        raise UsageError(f"train needs the name of a recipe first\n{usage}")
    return importlib.import_module("nestloop.models.train").main(words[0], list(words[1:]))


def run_eval(words: Sequence[str]) -> int:
    return importlib.import_module("nestloop.models.evaluate").main(list(words))


def run_demo(words: Sequence[str]) -> int:
    return importlib.import_module("nestloop.models.demo").main(list(words))


FORWARDED = {"train": run_train, "eval": run_eval, "demo": run_demo}


def loops() -> list[dict[str, Any]]:
    """One row per declared loop of the zoo."""
    return importlib.import_module("nestloop.zoo").catalogue()


def models() -> list[dict[str, Any]]:
    """One row per named model."""
    return [{"model": name} for name in importlib.import_module("nestloop.models").names()]


def recipes() -> list[dict[str, Any]]:
    """One row per recipe: its name and the first paragraph of its docstring, read without running it."""
    import ast

    found = []
    for file in sorted((Path(__file__).parent / "models" / "recipes").glob("*.py")):
        about = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        if file.stem != "__init__":
            found.append({"recipe": file.stem.replace("_", "-"), "about": " ".join(about.partition("\n\n")[0].split())})
    return found


CATALOGUES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "loops": loops,
    "models": models,
    "recipes": recipes,
}


def console() -> Console:
    """Standard output: colour only on a terminal and without NO_COLOR; a pipe gets rows that are not cut."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Rows with equal keys as a table; the keys are the headings."""
    made = Table(*(rows[0] if rows else ()), box=None, pad_edge=False)
    for row in rows:
        made.add_row(*(str(value) for value in row.values()))
    return made
