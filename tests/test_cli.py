"""The command line: what it prints, where errors go, and its exit status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nestloop
from nestloop import cli

LOOPS = """
import nestloop as nl

class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w

class Recall(nl.Loop):
    learner = Linear
    optimizer = nl.SGD(lr=0.1)
    schedule = nl.FullBatch(steps=1)
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)
"""


@pytest.fixture
def loops(tmp_path: Path) -> Path:
    file = tmp_path / "loops.py"
    file.write_text(LOOPS)
    return file


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a command line."""
    try:
        status = cli.main([str(word) for word in words])
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    output = capsys.readouterr()
    return status, output.out, output.err


def test_inspect_prints_a_stage_of_a_loop_in_a_file(capsys, loops: Path):
    status, out, err = run(capsys, "inspect", f"{loops}:Recall", "--stage", "declare", "--shape", "B=2,H=2,N=16,d=16")
    assert (status, err) == (0, "")
    assert "Recall" in out and "Linear" in out


def test_inspect_prints_every_stage_of_a_loop_in_a_module(capsys):
    status, out, err = run(capsys, "inspect", "nestloop.zoo:MTTTLinear")
    assert (status, err) == (0, "")
    for stage in ("declare", "capture", "emit"):
        assert stage in out


def test_explain_says_what_is_fast_and_what_is_slow(capsys, loops: Path):
    status, out, err = run(capsys, "explain", f"{loops}:Recall")
    assert (status, err) == (0, "")
    assert "fast" in out and "slow" in out and "bytes" in out


def test_cost_says_which_plan_is_chosen_and_why_the_others_are_not(capsys, loops: Path):
    words = ["cost", f"{loops}:Recall", "--device", "h200", "--shape", "B=64,H=8,N=256,d=64"]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "")
    assert out.startswith(f"Recall  ({loops.name}:")
    assert "on h200 (sm_90, 132 multiprocessors), d = 64, H = 8, B = 64, N = 256, D = 512, bfloat16 views" in out
    for said in ("forward: ", "backward: ", "Triton, tiles of 16", " times as long: ", "chosen: ", "roofline"):
        assert said in out
    status, out, _ = run(capsys, *words, "--dtype", "fp16", "--json")
    found = json.loads(out)
    assert status == 0 and found["loop"] == "Recall" and found["dtype"] == "fp16"
    assert {row["plan"] for row in found["forward"]} >= {"generated PyTorch", "Triton, tiles of 64"}


def test_cost_of_an_unknown_device_fails(capsys, loops: Path):
    status, out, err = run(capsys, "cost", f"{loops}:Recall", "--device", "h300")
    assert (status, out) == (1, "") and err.startswith("nestloop: There are no figures of such a device.\n")


def test_tune_writes_a_file_beside_the_declaration(capsys, monkeypatch, loops: Path):
    pytest.importorskip("triton")
    from nestloop.lowering.runtime import offline

    def compiled(plan, kernel, device, dtype, timeout):
        return offline.Compiled(kernel, device, dtype, plan.options(kernel)["num_warps"], 128, (0, 0), 1024, 0.1, {})

    monkeypatch.setattr(offline, "compiled", compiled)
    words = ["tune", f"{loops}:Recall", "--device", "h100", "--budget", "60", "--shape", "B=4,H=2,N=64,d=16"]
    status, out, err = run(capsys, *words)
    assert (status, err) == (0, "") and out.endswith(f"written to {loops.with_suffix('.tuned.json')}\n")
    assert "no h100 is here" in out and "128 registers, 0 bytes spilled, 1,024 of shared memory" in out
    status, out, _ = run(capsys, *words, "--out", str(loops.parent / "o.json"), "--json")
    assert status == 0 and json.loads(out)["entry"]["dims"] == {"H": 2, "d": 16}


def test_list_has_a_row_for_every_loop_model_and_recipe(capsys):
    status, out, _ = run(capsys, "list")
    assert status == 0 and "MTTTMLP" in out
    status, out, _ = run(capsys, "list", "--kind", "models")
    assert status == 0 and "vit_s16_mttt_mlp" in out.split()
    status, out, _ = run(capsys, "list", "--kind", "recipes", "--json")
    known = {row["recipe"] for row in json.loads(out)}
    assert {"digits", "cifar10-patch", "cifar10-pixel", "imagenet-patch", "imagenet-pixel"} == known


def test_doctor_speaks_json(capsys):
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0
    assert {"name", "level", "found", "fix"} == set(json.loads(out)[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "zoo"], "'zoo' names no loop; write FILE.py:Name or package.module:Name"),
        (["inspect", "no/such.py:A"], "there is no file 'no/such.py' in {cwd}"),
        (
            ["explain", "no_such_module:A"],
            "there is no module 'no_such_module'; for a file write its path, as in loops.py:Name",
        ),
        (["inspect", "{file}:Rekall"], "{file} has no 'Rekall'; it declares Recall"),
        (["explain", "json:Name"], "json has no 'Name'; it declares no loop"),
        (
            ["inspect", "{file}:Recall", "--shape", "B=2,N"],
            "--shape cannot read 'N'; write NAME=SIZE,... as in --shape B=2,H=2,N=16,d=16",
        ),
        (
            ["inspect", "{file}:Recall", "--shape", "N=0"],
            "--shape cannot read 'N=0'; write NAME=SIZE,... as in --shape B=2,H=2,N=16,d=16",
        ),
        *(
            (
                ["tune", "{file}:Recall", "--budget", budget],
                f"--budget cannot read '{budget}'; write seconds, as in --budget 120",
            )
            for budget in ("-1", "0", "long", "inf")
        ),
    ],
)
def test_wrong_usage_exits_2(capsys, monkeypatch, loops: Path, words: list[str], message: str):
    monkeypatch.chdir(loops.parent)
    fill = {"file": loops, "cwd": loops.parent}
    status, out, err = run(capsys, *(word.format(**fill) for word in words))
    assert (status, out, err) == (2, "", f"nestloop: {message.format(**fill)}\n")


@pytest.mark.parametrize("words", [[], ["inspekt"], ["inspect"], ["list", "--kind", "dogs"], ["doctor", "--j"]])
def test_what_the_parser_does_not_know_exits_2(capsys, words: list[str]):
    status, out, err = run(capsys, *words)
    assert (status, out) == (2, "") and err.startswith("usage: nestloop")


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"nestloop {nestloop.__version__}\n", "")


def test_train_without_a_recipe_lists_them(capsys):
    status, out, err = run(capsys, "train")
    assert (status, out) == (2, "")
    assert err.startswith("nestloop: train needs the name of a recipe first\nusage: nestloop train RECIPE")
    assert "digits" in err
    assert run(capsys, "train", "--help")[0] == 0


@pytest.mark.parametrize(
    ("words", "module", "call"),
    [
        (
            ["train", "digits", "--model.depth", "3", "--lr=1e-3"],
            "train",
            ("digits", ["--model.depth", "3", "--lr=1e-3"]),
        ),
        (["train", "digits", "--help"], "train", ("digits", ["--help"])),
        (["eval", "a.safetensors", "--batch", "8"], "evaluate", (["a.safetensors", "--batch", "8"],)),
        (["demo", "--epochs", "1", "--trace"], "demo", (["--epochs", "1"],)),
    ],
)
def test_other_words_are_handed_on_as_they_are(capsys, monkeypatch, words: list[str], module: str, call: tuple):
    calls = []

    class Stub:
        @staticmethod
        def main(*arguments: object) -> int:
            calls.append(arguments)
            return 7

    monkeypatch.setitem(sys.modules, f"nestloop.models.{module}", Stub)
    assert run(capsys, *words)[0] == 7
    assert calls == [call]


def test_an_error_is_a_message_and_a_traceback_only_on_request(capsys, loops: Path):
    loops.write_text(LOOPS.replace('nl.fast("d", "d")', 'nl.fast("d", "4*e")'))
    status, out, err = run(capsys, "inspect", f"{loops}:Recall")
    assert (status, out) == (1, "")
    assert err.startswith("nestloop: ") and f"{loops}:" in err and "Traceback" not in err
    status, _, err = run(capsys, "inspect", f"{loops}:Recall", "--trace")
    assert status == 1 and err.startswith("Traceback")


@pytest.mark.parametrize("words", [["inspect"], ["explain"], ["cost"], ["tune", "--budget", "1"]], ids=lambda w: w[0])
def test_a_size_of_a_dim_that_no_loop_has_fails(capsys, loops: Path, words: list[str]):
    status, out, err = run(capsys, *words, f"{loops}:Recall", "--shape", "N=32,width=64")
    assert (status, out) == (1, "")
    assert err == (
        "nestloop: Recall has no dim 'width'.\n"
        "  given: width=64\n"
        "  need:  sizes of B, D, H, N, d, n\n"
        "  fix:   leave it out: dims are those that views, weights and the grid are declared with\n"
    )


def test_what_a_command_line_names_wrongly_is_told_without_a_line_of_nestloop(capsys, loops: Path):
    status, _, err = run(capsys, "inspect", f"{loops}:Recall", "--stage", "kernel")
    assert status == 1 and err.startswith("nestloop: There is no such stage.\n  given: 'kernel'\n")


@pytest.mark.parametrize(
    ("source", "what", "line", "given"),
    [
        (
            "import nestloop as nl\n\nclass Recall(nl.Loop:\n    pass\n",
            "SyntaxError",
            3,
            "invalid syntax (loops.py, line 3)",
        ),
        ("import nestloop as nl\n\nd = 1 / 0\n", "ZeroDivisionError", 3, "division by zero"),
        ("import no_such_package\n", "ModuleNotFoundError", 1, "No module named 'no_such_package'"),
    ],
    ids=["no Python", "raises", "imports what is not there"],
)
def test_a_file_that_cannot_be_run_is_told_with_its_line(
    capsys, loops: Path, source: str, what: str, line: int, given: str
):
    loops.write_text(source)
    status, out, err = run(capsys, "inspect", f"{loops}:Recall")
    assert (status, out) == (1, "")
    assert err == (
        f"nestloop: {loops} cannot be run: {what}.\n"
        f"  at:    {loops}:{line}   {source.splitlines()[line - 1].strip()}\n"
        f"  given: {given}\n"
        "  need:  a file that Python runs\n"
        "  fix:   mend that line; --trace shows the traceback\n"
    )
    status, _, err = run(capsys, "inspect", f"{loops}:Recall", "--trace")
    assert status == 1 and err.startswith("Traceback")


def test_help_imports_no_torch(root: Path):
    script = """
import sys
from nestloop.cli import main
try:
    main(["--help"])
except SystemExit as left:
    assert left.code == 0
assert not {"torch", "numpy", "sympy"} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    for command in ("inspect", "explain", "cost", "tune", "list", "doctor", "train", "eval", "demo"):
        assert f"    {command} " in result.stdout
    assert "\x1b" not in result.stdout


def test_a_pipe_gets_no_colour_and_may_close_early(root: Path):
    command = f"{sys.executable} -m nestloop list | head -n 1"
    result = subprocess.run(command, shell=True, cwd=root, capture_output=True, text=True, check=True)
    assert len(result.stdout.splitlines()) == 1 and "\x1b" not in result.stdout
    assert result.stderr == ""
