"""Every line of the doctor's report, for installations this machine does not have."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from nestloop import doctor
from nestloop.doctor import Check


def test_this_installation_is_whole():
    checks = {check.name: check for check in doctor.run()}
    assert [check for check in checks.values() if check.level == "broken"] == []
    assert list(checks) == ["python", *doctor.TESTED, "pair", "gpu", "compiler", "cache"]
    assert checks["torch"].found.endswith("(tested with 2.11 to 2.13)")


def test_the_tested_releases_are_the_pinned_ones(root: Path):
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (root / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: tested.pin for name, tested in doctor.TESTED.items()} == {n: pins[n] for n in doctor.TESTED}


def test_the_oldest_triton_is_tested(root: Path):
    (version,) = re.findall(r"^OLDEST_TRITON := (\S+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert doctor.release(version) == doctor.TESTED["triton"].oldest


@pytest.mark.parametrize(
    ("version", "release"), [("2.13.0+cpu", (2, 13)), ("1.0.31", (1, 0)), ("2.12.0a0+git1", (2, 12))]
)
def test_release(version: str, release: tuple[int, int]):
    assert doctor.release(version) == release


@pytest.mark.parametrize(
    ("name", "version", "check"),
    [
        (
            "torch",
            None,
            Check("torch", "broken", "not installed (tested with 2.11 to 2.13)", "pip install torch==2.13.0"),
        ),
        (
            "torch",
            "2.9.1",
            Check("torch", "broken", "2.9.1, too old (tested with 2.11 to 2.13)", "pip install torch==2.13.0"),
        ),
        (
            "torch",
            "2.17.0",
            Check(
                "torch",
                "note",
                "2.17.0, newer than tested (tested with 2.11 to 2.13)",
                "pip install torch==2.13.0",
            ),
        ),
        (
            "timm",
            None,
            Check(
                "timm",
                "note",
                "not installed; needed for timm.create_model and its augmentations",
                "pip install timm==1.0.31",
            ),
        ),
        ("timm", "1.0.31", Check("timm", "ok", "1.0.31 (tested with 1.0)")),
    ],
)
def test_a_distribution(monkeypatch: pytest.MonkeyPatch, name: str, version: str | None, check: Check):
    monkeypatch.setattr(doctor, "PIP", "pip install")
    assert doctor.check_distribution(name, version) == check


@pytest.mark.parametrize(
    ("cuda", "check"),
    [
        (False, Check("triton", "ok", "not installed; only CUDA builds of torch use it")),
        (
            True,
            Check(
                "triton",
                "note",
                "not installed; needed for backend='triton', and torch.compile on a GPU",
                "pip install triton==3.7.1",
            ),
        ),
    ],
)
def test_triton_is_missed_only_where_torch_uses_it(monkeypatch: pytest.MonkeyPatch, cuda: bool, check: Check):
    monkeypatch.setattr(doctor, "PIP", "pip install")
    monkeypatch.setattr(doctor, "cuda_build", lambda: cuda)
    assert doctor.check_distribution("triton", None) == check


def test_a_package_that_does_not_import(monkeypatch: pytest.MonkeyPatch):
    def fail(name: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(doctor, "PIP", "pip install")
    monkeypatch.setattr(doctor, "_import", fail)
    assert doctor.check_distribution("numpy", "2.4.6") == Check(
        "numpy",
        "broken",
        "2.4.6, does not import (OSError: libcudart.so.13: cannot open shared object file)",
        "pip install --force-reinstall numpy==2.4.6",
    )


def test_fixes_use_this_python():
    assert doctor.PIP == f"{sys.executable} -m pip install"


def test_torchvision_must_match_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "PIP", "pip install")
    assert doctor.check_pair("2.11.0", "0.26.0").level == "ok"
    assert doctor.check_pair("2.13.0+cpu", "0.29.2") == Check(
        "pair",
        "broken",
        "torchvision 0.29 with torch 2.13, which needs torchvision 0.28",
        "pip install torch==2.13.0 torchvision==0.28.0",
    )


def test_python():
    assert doctor.check_python((3, 10)).fix == "rm -r .venv && make PYTHON=python3.11 install"
    assert [doctor.check_python((3, minor)).level for minor in (10, 11, 12, 13)] == [
        "broken",
        "ok",
        "ok",
        "note",
    ]


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert doctor.check_compiler() == Check(
        "compiler",
        "note",
        "none of c++, g++ and clang++; needed for backend='cpp', the fast one on a CPU",
        "sudo apt install g++",
    )
    monkeypatch.setenv("CXX", "g++-99")
    found = doctor.check_compiler().found
    assert found == "CXX=g++-99 does not exist; needed for backend='cpp', the fast one on a CPU"


def test_a_cache_that_others_can_read_is_closed_to_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    tmp_path.chmod(0o755)
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))
    assert doctor.check_cache() == Check("cache", "ok", f"{tmp_path} (mode 0700)")


def test_a_cache_of_somebody_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path))
    monkeypatch.setattr(os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    check = doctor.check_cache()
    assert check.level == "broken" and f"{tmp_path} with owner" in check.found and "needs a folder" in check.found
    assert check.fix == "name another folder with NESTLOOP_CACHE"


def test_a_cache_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NESTLOOP_CACHE", str(tmp_path / "file" / "cache"))
    check = doctor.check_cache()
    assert check.level == "broken" and "Not a directory" in check.found
    assert check.fix == 'export NESTLOOP_CACHE="$(mktemp -d)"'


@pytest.mark.parametrize("level", ["note", "broken"])
def test_report_and_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str):
    checks = [Check("torch", "ok", "2.13.0"), Check("triton", level, "not installed", "pip install triton")]
    monkeypatch.setattr(doctor, "run", lambda: iter(checks))
    status = int(level == "broken")
    assert doctor.main(False, Console(width=40)) == status
    assert capsys.readouterr().out.splitlines() == [
        "ok     torch        2.13.0",
        f"{level:<7}triton       not installed; fix: pip install triton",
    ]
    assert doctor.main(True, Console()) == status
    assert json.loads(capsys.readouterr().out)[1]["fix"] == "pip install triton"


def test_an_unknown_cache():
    def fail() -> Path:
        raise ImportError("No module named 'torch'")

    assert doctor.check_cache(fail) == Check("cache", "note", "unknown: No module named 'torch'")
