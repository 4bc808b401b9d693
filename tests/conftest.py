"""What every test runs under: quiet threads, new memory full of NaN, repeatable random numbers, a cache of its own."""

import gc
import os
import shutil
import tempfile
import zlib
from pathlib import Path

# Read by the OpenMP runtime when torch loads it: waiting threads that spin slow the other test workers down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # so that memory that nothing has written yet is NaN
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the folder: they test sharing it, too
        config.stash[_CACHE] = tempfile.mkdtemp(prefix="nestloop-tests-")
        os.environ["NESTLOOP_CACHE"] = config.stash[_CACHE]


def pytest_unconfigure(config: pytest.Config) -> None:
    if _CACHE in config.stash:
        shutil.rmtree(config.stash[_CACHE], ignore_errors=True)


_CACHE = pytest.StashKey[str]()


def pytest_collection_finish() -> None:
    """What is imported by now stays: looking through it for garbage is a sixth of the time of lowering a loop."""
    gc.collect()
    gc.freeze()


def _seed(node: pytest.Item | pytest.Collector) -> None:
    torch.manual_seed(zlib.crc32(node.nodeid.encode()))


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector: pytest.Collector) -> None:
    _seed(collector)  # for what a file draws when it is imported


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _seed(item)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _seed(item)  # again: whether a fixture that tests share drew before this one is chance


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of golden files and image samples beside the checkout; without it a test skips."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder ../shared is not here")
    return folder


@pytest.fixture
def quick_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the structure of C++ is tested and not its vector code, a third of the compile time will do."""
    monkeypatch.setenv("NESTLOOP_CXXFLAGS", "-O0")
