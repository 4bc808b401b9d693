"""The tree is one package, reached through two committed links, whatever it is reached by."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import nestloop as nl

LINKED = ["lowering", "models"]


@pytest.mark.parametrize("name", LINKED)
def test_the_package_is_a_relative_link(root: Path, name: str):
    link = root / "nestloop" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..") / name


def test_every_package_comes_from_this_checkout(root: Path):
    for name in ["nestloop", *(f"nestloop.{name}" for name in LINKED)]:
        assert Path(str(import_module(name).__file__)).resolve().is_relative_to(root)


@pytest.mark.parametrize("name", LINKED)
def test_a_linked_package_refuses_its_short_name(root: Path, name: str):
    result = subprocess.run([sys.executable, "-c", f"import {name}"], cwd=root, capture_output=True, text=True)
    assert result.returncode == 1
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ImportError") and f"{name!r}" in message and "nestloop" in message


def test_every_name_of_the_package_is_found_when_it_is_used():
    assert sorted(nl.__all__, key=str.lower) == sorted((n for names in nl._HOME.values() for n in names), key=str.lower)
    for home, names in nl._HOME.items():
        for name in names:
            assert getattr(nl, name) is getattr(import_module(home), name) and name in dir(nl)
            assert importlib.util.find_spec(f"nestloop.{name}") is None  # a module of that name would hide it
    with pytest.raises(AttributeError, match=r"^module 'nestloop' has no attribute 'Lop'$"):
        nl.Lop  # noqa: B018


def test_every_folder_of_modules_is_a_package(root: Path):
    folders = {f.parent for top in ("nestloop", *LINKED) for f in (root / top).rglob("*.py")}
    assert [str(f.relative_to(root)) for f in folders if not (f / "__init__.py").is_file()] == []


def modules(root: Path) -> set[str]:
    """The module files of the tree, by the path they must have in a wheel."""
    own = {f.relative_to(root).as_posix() for f in (root / "nestloop").rglob("*.py")}
    return own | {f"nestloop/{f.relative_to(root).as_posix()}" for name in LINKED for f in (root / name).rglob("*.py")}


@pytest.mark.slow
def test_a_wheel_holds_every_module_once_under_its_full_name(root: Path, tmp_path: Path):
    tree = tmp_path / "tree"
    for name in ("nestloop", *LINKED):
        shutil.copytree(root / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tree)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        ".",
        "./tree",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("nestloop-*.whl")
    held = zipfile.ZipFile(wheel).namelist()
    names = [n for n in held if n.endswith(".py")]
    assert len(names) == len(set(names))
    assert set(names) == modules(tree)
    assert {"nestloop/lowering/emit/tiles.h", "nestloop/inspector/page.html"} <= set(held)


def canonical(requirement: str) -> str:
    """The distribution a requirement names, as indexes spell it."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!;~]", requirement, maxsplit=1)[0]).lower()


def test_every_dependency_is_pinned(root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for rs in project["optional-dependencies"].values() for r in rs)]
    pins = dict(
        line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    assert {canonical(r) for r in wanted} - {canonical(p) for p in pins} == {"nestloop"}
    assert pins["torch"] == "2.13.0" and pins["torchvision"] == "0.28.0"  # no +cpu: the same pin fits CUDA builds


def test_continuous_integration_runs_the_readme_command(root: Path):
    lines = (root / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if line and not line.startswith("#")][-1] == "exec make test"
