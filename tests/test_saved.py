"""Saved ops: a program that was exported runs in a process that has neither called nor imported its loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import nestloop as nl
from nestloop import saved, zoo
from nestloop.errors import SavedOpsError, StaleOpsError

pytestmark = pytest.mark.usefixtures("quick_builds")


class Own(zoo.MTTTMLP):
    """A loop of a module that the other process does not have."""


LOOPS = (Own, zoo.MTTTMLPSGD4, zoo.TTTLinear, zoo.Atlas)  # with two forms, an order, a state, a window


def exported(loop: type[nl.Loop], folder: Path) -> tuple[Any, Any]:
    """A layer and its program, which is saved in the folder, beside what it makes and its gradients."""
    torch.manual_seed(0)
    model, x = nl.Layer(loop, 16, 2).eval(), torch.randn(2, 20, 16)
    several = torch.export.Dim("N", min=8, max=4096)
    program = torch.export.export(model, (x,), dynamic_shapes=({1: several},))
    torch.export.save(program, folder / "layer.pt2")
    nl.save_ops(program, folder / "layer.ops")
    x = torch.randn(2, 37, 16)
    z = model(x)
    z.square().sum().backward()
    assert z.isfinite().all()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.save((x, z.detach(), gradients), folder / "wanted.pt")
    return model, program


LOAD = """
import torch, nestloop as nl
x, wanted, gradients = torch.load(f"{folder}/wanted.pt")
names = nl.load_ops(f"{folder}/layer.ops")
assert nl.load_ops(f"{folder}/layer.ops") == names  # what is there stays
program = torch.export.load(f"{folder}/layer.pt2").module()
z = program(x)
torch.testing.assert_close(z, wanted)
z.square().sum().backward()
found = dict(program.named_parameters())
assert gradients
for name, gradient in gradients.items():
    torch.testing.assert_close(found[name].grad, gradient)
nl.save_ops(torch.export.load(f"{folder}/layer.pt2"), f"{folder}/again.ops")
assert open(f"{folder}/again.ops").read() == open(f"{folder}/layer.ops").read()
"""


def elsewhere(code: str, folder: Path) -> None:
    """Run code, for which `folder` is one, in another process, which has a cache of its own."""
    settings = {**os.environ, "NESTLOOP_CACHE": str(folder / "cache")}
    code = f"folder = {str(folder)!r}\n{code}"
    result = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_programs_run_in_another_process(tmp_path: Path):
    code = ""
    for loop in LOOPS:
        folder = tmp_path / loop.__name__
        folder.mkdir()
        exported(loop, folder)
        code += f"folder = {str(folder)!r}\n{LOAD}"
    elsewhere(code, tmp_path)


def test_a_layer_of_the_same_loop_takes_the_loaded_op(tmp_path: Path):
    exported(zoo.TTTLinear, tmp_path)
    elsewhere(
        LOAD + "from nestloop import zoo\nlayer = nl.Layer(zoo.TTTLinear, 16, 2).eval()\n"
        "layer.load_state_dict(program.state_dict())\ntorch.testing.assert_close(layer(x), wanted)\n"
        "assert list(layer.op._names.values()) == names\n",
        tmp_path,
    )


@pytest.mark.slow
def test_a_package_of_aotinductor_runs_in_another_process(tmp_path: Path):
    _, program = exported(zoo.TTTLinear, tmp_path)
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "package.pt2"))
    elsewhere(
        "import torch, nestloop as nl\n"
        "x, wanted, _ = torch.load(f'{folder}/wanted.pt')\nnl.load_ops(f'{folder}/layer.ops')\n"
        "found = torch._inductor.aoti_load_package(f'{folder}/package.pt2')(x)\n"
        "torch.testing.assert_close(found, wanted)\n",
        tmp_path,
    )


def test_a_program_without_ops_has_none_to_save(tmp_path: Path):
    program = torch.export.export(torch.nn.Linear(3, 3), (torch.randn(2, 3),))
    nl.save_ops(program, tmp_path / "none.ops")
    assert nl.load_ops(tmp_path / "none.ops") == []


def test_only_a_graph_has_ops_to_save(tmp_path: Path):
    with pytest.raises(SavedOpsError) as caught:
        nl.save_ops("layer", tmp_path / "layer.ops")
    assert str(caught.value) == (
        "Ops can be saved of a graph alone.\n"
        "  given: 'layer'\n"
        "  need:  a program of torch.export.export, or a torch.fx.GraphModule\n"
        "  fix:   program = torch.export.export(layer, (x,)), then nl.save_ops(program, path)"
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("\0", "Expecting value: line 1 column 1 (char 0)"),
        ('{"format": 0}', "format 0"),
        ('{"format": 4}', "no 'tiles'"),
        ('{"format": 4, "tiles": "TILES", "ops": [{"name": "op"}]}', "no 'origin'"),
    ],
)
def test_a_file_that_is_none_is_refused(text: str, why: str, tmp_path: Path):
    path = tmp_path / "layer.ops"
    path.write_text(text.replace("TILES", saved._tiles()))
    with pytest.raises(SavedOpsError) as caught:
        nl.load_ops(path)
    assert str(caught.value) == (
        "A file of saved ops cannot be read.\n"
        f"  given: {path}: {why}\n"
        "  need:  what nl.save_ops writes, format 4\n"
        "  fix:   nl.save_ops(program, path) where the program was exported"
    )


def test_a_program_whose_ops_are_not_loaded_names_them(tmp_path: Path):
    """It is PyTorch that refuses it; what it says is in the documentation of `load_ops`."""
    exported(zoo.TTTLinear, tmp_path)
    assert nl.load_ops.__doc__ is not None and "We failed to resolve torch.ops.nestloop" in nl.load_ops.__doc__
    code = f"import torch, nestloop\ntorch.export.load({str(tmp_path / 'layer.pt2')!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode and "We failed to resolve torch.ops.nestloop.tttlinear_scan_" in result.stderr


RECORDED = """
import gzip, io, json
from pathlib import Path
import torch, nestloop as nl
from nestloop import saved
from tests.recorded.__main__ import run
found = torch.load(io.BytesIO(gzip.decompress(Path(recorded).read_bytes())))
path = Path(folder, "recorded.ops")
path.write_text(json.dumps(json.loads(found["ops"]) | {"tiles": saved._tiles()}))
assert nl.load_ops(path) == [name for name, *_ in found["calls"]]
for name, args, outputs, gradients in found["calls"]:
    for mine, recorded in zip(run(name, args), (outputs, gradients), strict=True):
        torch.testing.assert_close(mine, recorded)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="some of the ops are in Triton")
def test_recorded_ops_of_this_format_run(tmp_path: Path):
    """In PyTorch, C++ and Triton. Where they do not after a change, it is another format: record its ops."""
    recorded = Path(__file__).parent / "recorded" / f"format_{saved.FORMAT}.pt.gz"
    elsewhere(f"recorded = {str(recorded)!r}\n{RECORDED}", tmp_path)


def test_ops_of_another_version_are_refused(tmp_path: Path):
    path = tmp_path / "layer.ops"
    path.write_text(json.dumps({"format": 4, "tiles": "0123", "ops": []}))
    with pytest.raises(StaleOpsError) as caught:
        nl.load_ops(path)
    assert str(caught.value) == (
        "The saved ops are of another version of nestloop.\n"
        f"  given: {path}: its code calls functions on tiles with digest 0123\n"
        f"  need:  those of the version that runs here, {saved._tiles()}\n"
        "  fix:   export the program again with this version, and save its ops again; or install that version"
    )
