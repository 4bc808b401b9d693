"""Ops of nestloop in programs of `torch.export` and packages of AOTInductor, for processes that never call the loop.

Such a program names its ops, and an op of nestloop is made when its loop is first called. A file beside the program
holds all that its ops are made of, generated code included: neither the declaration nor its module is needed again.

Another version of nestloop reads it as long as `FORMAT` is its own, and the functions on tiles, which generated code
calls, are the same. Whatever changes what a recipe says or how its code is called has another format:
`tests/recorded` has ops of this one, which are to run.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

from nestloop.errors import SavedOpsError, StaleOpsError, shown
from nestloop.lowering.emit import CALLED
from nestloop.lowering.runtime import cache as kept
from nestloop.lowering.runtime import tiles
from nestloop.lowering.runtime.compiler import HEADER
from nestloop.lowering.runtime.executable import batch_op
from nestloop.lowering.runtime.library import REGISTERED, NestedLoopOp
from nestloop.lowering.runtime.recipe import Recipe, remade
from nestloop.lowering.runtime.streams import stream_op

FORMAT = 4  # kernels of format 3 lack barriers


def save_ops(program: Any, path: str | os.PathLike[str]) -> None:
    """Write what the ops of nestloop in a program are made of, for `load_ops`.

    Args:
        program: a `torch.export.ExportedProgram`, or a `torch.fx.GraphModule`. It may have no such ops.
        path: the file, written whole or not at all.

    Raises:
        SavedOpsError: `program` is something else.
        OSError: the file cannot be written.
    """
    graphs = getattr(program, "graph_module", program)
    if not isinstance(graphs, torch.fx.GraphModule):
        raise SavedOpsError(
            "Ops can be saved of a graph alone.",
            given=shown(program),
            need="a program of torch.export.export, or a torch.fx.GraphModule",
            fix="program = torch.export.export(layer, (x,)), then nl.save_ops(program, path)",
        )
    ops = [{**op.recipe.kept, "name": op.name} for op in _ops_of(graphs)]
    kept.put(Path(path), json.dumps({"format": FORMAT, "tiles": _tiles(), "ops": ops}))


def load_ops(path: str | os.PathLike[str]) -> list[str]:
    """Register the ops that `save_ops` has written, before `torch.export.load` or `torch._inductor.aoti_load_package`.

    Without it, PyTorch cannot load the program: "We failed to resolve torch.ops.nestloop.... to an operator". What is
    registered already stays. Code in the file runs when the program does: load what you would import.

    Returns:
        the ops' names, in `torch.ops.nestloop`.

    Raises:
        SavedOpsError: the file is none of `save_ops`.
        StaleOpsError: a version of nestloop wrote it whose generated code calls other functions.
        NoPlanError: an op that was exported with `backend="cpp"` or `"triton"` cannot be built here.
        OSError: there is no such file, or it cannot be read.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    try:
        found = json.loads(text)
        if found["format"] != FORMAT:
            raise ValueError(f"format {found['format']}")
        called, ops = found["tiles"], found["ops"]
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from None
    if called != _tiles():
        raise StaleOpsError(
            "The saved ops are of another version of nestloop.",
            given=f"{path}: its code calls functions on tiles with digest {called}",
            need=f"those of the version that runs here, {_tiles()}",
            fix="export the program again with this version, and save its ops again; or install that version",
        )
    names = []
    for one in ops:
        try:
            name, recipe = one["name"], remade(one)
        except (ValueError, KeyError, TypeError) as error:
            raise _unreadable(path, error) from None
        names.append(_registered(name, recipe).name)
    return names


def _ops_of(graphs: torch.fx.GraphModule) -> list[NestedLoopOp]:
    """The ops of nestloop that a graph, or one inside it, calls; each once."""
    found: dict[str, NestedLoopOp] = {}
    for part in graphs.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if isinstance(node.target, OpOverload) and node.target.namespace == "nestloop":
                op = REGISTERED[node.target._opname]
                found[op.name] = op
    return list(found.values())


def _registered(name: str, recipe: Recipe) -> NestedLoopOp:
    return stream_op(recipe, name).op if recipe.plan.form == "stream" else batch_op(recipe, name)


def _unreadable(path: Any, error: Exception) -> SavedOpsError:
    return SavedOpsError(
        "A file of saved ops cannot be read.",
        given=f"{path}: {f'no {error}' if isinstance(error, KeyError) else error}",
        need=f"what nl.save_ops writes, format {FORMAT}",
        fix="nl.save_ops(program, path) where the program was exported",
    )


@cache
def _tiles() -> str:
    """The digest of nestloop's own files that generated code calls: the same wherever they are installed."""
    files = [Path(tiles.__file__), HEADER, *map(HEADER.with_name, CALLED)]
    return kept.digest("".join(f"{file.name}\n{file.read_text(encoding='utf-8')}" for file in files))
