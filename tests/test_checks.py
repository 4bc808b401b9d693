"""`nl.check`: that a right loop passes, and that each property and each stress can fail."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestloop as nl
from nestloop import zoo
from nestloop.checks import Certificate, Row
from nestloop.checks.properties import PROPERTIES, STEPS
from nestloop.checks.stress import STRESSES
from nestloop.checks.subject import Subject
from nestloop.cli import main
from nestloop.compiled import CompiledLoop
from nestloop.errors import (
    InputError,
    ShapeMismatchError,
    UnknownBackendError,
    UnknownDeviceError,
    UnknownDtypeError,
)

STREAM, BATCH = {"dk": 4, "dv": 3}, {"d": 4}
ONE_LENGTH = {**STREAM, "N": 9}


class Leaky(zoo.CausalLinearAttention):
    """Linear attention with gates that may close or open, one of them a log decay."""

    beta, g = nl.gate(), nl.gate()
    optimizer = nl.SGD(lr=beta, log_decay=g)


class Fitted(zoo.MTTTLinear):
    """A batch schedule of two steps."""

    schedule = nl.FullBatch(steps=2)


class Held(zoo.DeltaNet):
    """A read-out that nothing flows back from into the queries."""

    def readout(self, f, t):
        return f(t.q.detach())


def checked(loop: type[nl.Loop], sizes: dict[str, int], **options: Any) -> Certificate:
    given: dict[str, Any] = {"backends": ("torch",), "dtypes": ("float32",), **options, **sizes}
    return nl.check(loop, **given)


@pytest.mark.parametrize("loop, sizes", [(Leaky, STREAM), (Fitted, BATCH)], ids=["Leaky", "Fitted"])
def test_a_right_loop_holds(loop, sizes):
    found = checked(loop, sizes, stress=True)
    assert found.holds and not found.failed
    names = {row.check.split(",")[0] for row in found.rows}
    missing = {"from a state"} if loop is Leaky else {"splits", "causality"}
    assert names == {*PROPERTIES, "stress"} - missing
    assert all(row.error is not None and 0 <= row.error <= row.bound < 1e-3 for row in found.rows)
    assert {row.tokens for row in found.rows if row.check == "agreement"} >= {1, 7, 101}


def test_it_covers_backends_dtypes_and_the_given_length(quick_builds):
    found = checked(Leaky, ONE_LENGTH, backends=None, dtypes=("float32", "bfloat16"))
    assert found.holds
    rows = [row for row in found.rows if row.check == "agreement"]
    assert {(row.backend, row.dtype) for row in rows} == {
        (backend, dtype) for backend in ("torch", "cpp") for dtype in ("float64", "float32", "bfloat16")
    }
    assert {row.tokens for row in found.rows} == {9}
    assert any((row.error or 0) > 1e-5 for row in rows if row.dtype == "bfloat16")  # which has been used


def test_generated_triton_is_interpreted():
    pytest.importorskip("triton")
    found = nl.check(Leaky, backends=("triton",), dtypes=("float32",), dk=16, dv=16, N=5, B=1, H=1)
    assert found.holds
    assert {row.backend for row in found.rows} == {"triton", "reference"}


def test_the_same_seed_draws_the_same():
    once, again, other = (checked(Leaky, ONE_LENGTH, seed=seed) for seed in (3, 3, 4))
    state = torch.random.get_rng_state()
    assert once.rows == again.rows != other.rows
    checked(Leaky, ONE_LENGTH)
    assert torch.equal(torch.random.get_rng_state(), state)  # a caller's own numbers are left alone


def test_what_holds_values_constant_is_not_compared_with_differences():
    (row,) = [row for row in checked(Held, ONE_LENGTH).rows if row.check == "definition"]
    assert row.error is None and row.holds and "constant" in row.worst


def test_a_backend_without_code_says_why():
    found = nl.check(zoo.SelfAttention, backends=("cpp",), d=4, N=9)
    assert found.rows[0].worst == "no code: a kernel estimator has no steps to walk"
    assert found.holds


class Halves(zoo.MTTTLinear):
    """Batches whose halves have losses of their own: of one token there is C++, of any number there is none."""

    schedule = nl.Shuffled(2)

    def readout(self, f, t):
        return torch.cat([f(t.q)[: self.n // 2], 2 * f(t.q)[self.n // 2 :]])


def test_a_backend_with_code_for_one_token_alone_says_why():
    found = nl.check(Halves, dtypes=(), d=4)
    reason = "no code: a size is (n//2), no whole polynomial in the number of tokens"
    assert [row.worst for row in found.rows if row.backend == "cpp"] == [reason]
    assert found.holds


class Pairs(zoo.MTTTLinear):
    """A loss of pairs of tokens, which sequences of odd length have not."""

    def loss(self, f, t):
        k, q = (x.unflatten(0, (-1, 2)).mean(1) for x in (t.k, t.q))
        return (f(k) - q).square().mean(-1).repeat_interleave(2, 0)


def test_lengths_that_the_definition_refuses_are_left_out():
    found = checked(Pairs, BATCH)
    assert found.holds
    refused = [row for row in found.rows if row.error is None]
    assert {row.tokens for row in refused} >= {1, 7, 101}
    assert all(row.worst.startswith("not defined: unflatten: Provided sizes [-1, 2]") for row in refused)
    assert {row.tokens for row in found.rows if row.check == "agreement"} == {2, 8, 64}
    assert checked(Pairs, {**BATCH, "N": 10}).holds


class Quantiles(zoo.TTTLinear):
    """A loss with a kink in every feature, which some cross when products are rounded."""

    def loss(self, f, t):
        error = t.v - f(t.k)
        return torch.maximum(0.9 * error, -0.1 * error).sum(-1)


def test_kinks_that_rounding_crosses_widen_the_bound_of_their_row_alone(quick_builds):
    found = nl.check(Quantiles, dtypes=("bfloat16",), backends=("torch",), d=16)
    (row,) = [row for row in found.rows if row.dtype == "bfloat16" and row.check == "agreement"]
    assert found.holds and row.error is not None and 0.1 < row.error < row.bound
    assert {row.bound for row in found.rows if row.check == "agreement" and row.dtype == "float64"} == {1e-9}


class Bent(zoo.MTTTMLP):
    """A step that bends within a hundred thousandth of zero."""

    optimizer = nl.SGD(lr=0.01, transform=lambda g: g / (g.abs() + 1e-5))


def test_differences_are_taken_closer_where_the_loop_bends(monkeypatch):
    assert checked(Bent, BATCH).holds
    monkeypatch.setattr("nestloop.checks.properties.FINER", STEPS[:1])
    failed = [row.check for row in checked(Bent, BATCH).rows if not row.holds]
    assert failed == ["definition"]


class Normed(zoo.MTTTLinear):
    """Keys normalised over the tokens, which PyTorch refuses for one of them by a ValueError."""

    def loss(self, f, t):
        k = F.instance_norm(t.k.T[None])[0].T
        return (f(k) - t.q).square().mean(-1)


def test_a_length_that_pytorch_refuses_by_its_own_checks_is_left_out():
    found = checked(Normed, BATCH)
    assert found.holds
    refused = [row for row in found.rows if row.error is None]
    assert [(row.tokens, row.worst[:42]) for row in refused] == [(1, "not defined: Expected more than 1 spatial ")]


def test_a_body_that_holds_for_no_length_is_an_error():
    class Never(Pairs):
        def readout(self, f, t):
            return f(t.q) @ t.k

    with pytest.raises(ShapeMismatchError, match="In the readout of Never, matmul got axes that do not fit"):
        checked(Never, BATCH)


# ---- Faults: each is seen by the property of its name ----------------------------------------------------------------

Fault = Callable[[dict[str, Any], Tensor], Tensor]


class Faulty:
    """A compiled loop whose read-out a fault changes; it knows what the call was given."""

    def __init__(self, op: CompiledLoop, fault: Fault) -> None:
        self.op, self.fault, self.spec, self.renamed = op, fault, op.spec, op.renamed

    def __call__(self, views: Any, weights: Any, state: Any = None, order: Any = None, **options: Any) -> Any:
        z, *rest = self.op(views, weights, state, order, **options)
        return (self.fault({"views": views, "state": state, **options}, z), *rest)


class WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, cotangent):
        return 1.01 * cotangent


def when(condition: Callable[[dict[str, Any]], bool]) -> Fault:
    return lambda given, z: z * 1.01 if condition(given) else z


FAULTS: dict[str, Fault] = {
    "definition": lambda given, z: WrongSlope.apply(z),
    "agreement": lambda given, z: WrongSlope.apply(z),
    "from a state": when(lambda given: given["state"] is not None),
    "splits": when(lambda given: given["state"] is not None),
    "packed": when(lambda given: given.get("cu_seqlens") is not None),
    "a sequence alone": when(lambda given: len(given["views"]["q"]) == 1),
    "strides": when(lambda given: not given["views"]["q"].is_contiguous()),
    "causality": lambda given, z: z + 1e-3 * z.mean(2, keepdim=True),
    "determinism": lambda given, z: z + 1e-6 * torch.rand_like(z),
}


def with_fault(monkeypatch: pytest.MonkeyPatch, backend: str, fault: Fault) -> None:
    op = Subject.op

    def faulty(self: Subject, name: str) -> Any:
        return Faulty(op(self, name), fault) if name == backend else op(self, name)

    monkeypatch.setattr(Subject, "op", faulty)


@pytest.mark.parametrize("name", PROPERTIES)
def test_every_property_can_fail(name, monkeypatch):
    with_fault(monkeypatch, "reference" if name == "definition" else "torch", FAULTS[name])
    loop, sizes = (Fitted, {**BATCH, "N": 9}) if name == "from a state" else (Leaky, ONE_LENGTH)
    failed = checked(loop, sizes).failed
    assert name in {row.check.split(",")[0] for row in failed}


@pytest.mark.parametrize("name", STRESSES)
def test_every_stress_can_fail(name, monkeypatch):
    """Of code that makes no number under it, and of code that is not close."""
    for fault in (lambda given, z: z / 0 * 0, lambda given, z: z * 1.01 + 1e-3):
        with monkeypatch.context() as patch:
            with_fault(patch, "torch", fault)
            failed = {row.check: row for row in checked(Leaky, ONE_LENGTH, stress=True).failed}
        assert f"stress, {name}" in failed
    assert "nan" not in str(failed[f"stress, {name}"].error)


def test_a_definition_that_is_not_finite_is_told_apart():
    class Exploding(zoo.CausalLinearAttention):
        def readout(self, f, t):
            return f(t.q).exp().exp().exp()

    found = checked(Exploding, ONE_LENGTH, stress=True)
    (row,) = [row for row in found.rows if row.check == "stress, large tokens"]
    assert row.error is None and row.backend == "reference"
    assert row.worst.startswith("the definition is not finite there: z[") and row.worst.endswith("is inf")


@pytest.mark.parametrize("wide", [1e30, 1e300], ids=["in float32", "in float64"])
def test_a_declaration_that_diverges_is_not_code_that_is_wrong(wide):
    class Diverging(zoo.CausalLinearAttention):
        def readout(self, f, t):
            return f(t.q) * wide * wide

    found = checked(Diverging, ONE_LENGTH)
    told = [row for row in found.rows if row.error is None]
    assert found.holds and {"agreement", "determinism"} <= {row.check for row in found.rows}
    assert all(re.match("(the definition is not|neither is) finite there: ", row.worst) for row in told)
    assert {(row.check, row.dtype) for row in told} >= {("agreement", "float32")}
    assert (("agreement", "float64") in {(row.check, row.dtype) for row in told}) == (wide > 1e100)


def test_code_that_is_not_finite_where_the_definition_is_does_not_hold(monkeypatch):
    with_fault(monkeypatch, "torch", lambda given, z: z / 0 * 0)
    failed = checked(Leaky, ONE_LENGTH).failed
    assert "agreement" in {row.check for row in failed} and all(row.error is not None for row in failed)


# ---- Text, JSON, the command -----------------------------------------------------------------------------------------

ROWS = [
    Row("agreement", "torch", "float64", 1, 0.0, 1e-9, "z"),
    Row("agreement", "torch", "float64", 7, 2e-10, 1e-9, "gradient of q"),
    Row("agreement", "torch", "float32", 7, float("nan"), 2e-5, "z"),
    Row("agreement", "cpp", "-", 0, None, 0.0, "no code: so it is"),
    Row("determinism", "torch", "float32", 7, 0.0, 0.0, "z"),
    Row("agreement", "torch", "bfloat16", 7, 2.0, 30.0, "z"),
    Row("stress, zeros", "torch", "bfloat16", 7, 0.25, float("inf"), "z"),
]


def test_as_text():
    certificate = Certificate(zoo.DeltaNet.spec, {"dk": 4, "B": 2}, "cpu", 3, ROWS)
    assert str(certificate).splitlines()[1:] == [
        "dk = 4, B = 2; on cpu, seed 3",
        "check          backend  dtype     tokens    error    bound  where it is largest",
        "agreement      torch    float64     1, 7  2.0e-10  1.0e-09  gradient of q at 7 tokens",
        "agreement      torch    float32        7      nan  2.0e-05  z   <- does not hold",
        "agreement      cpp      -                       -        -  no code: so it is",
        "determinism    torch    float32        7  0.0e+00  0.0e+00  the same bits",
        "agreement      torch    bfloat16       7  2.0e+00  3.0e+01  "
        "z   (tells nothing: the definition itself has no digit left)",
        "stress, zeros  torch    bfloat16       7  2.5e-01   finite  z",
        "1 of 6 comparisons do not hold",
    ]


def test_as_json():
    made = Certificate(zoo.DeltaNet.spec, {"dk": 4}, "cpu", 3, ROWS).as_json()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert (made["loop"], made["holds"], made["dims"]) == ("DeltaNet", False, {"dk": 4})
    assert made["rows"][2]["error"] is None and made["rows"][2]["compared"] and not made["rows"][2]["holds"]
    assert not made["rows"][3]["compared"] and made["rows"][3]["holds"]


COMMAND = ["check", "nestloop.zoo:DeltaNet", "--shape", "N=5,dk=4,dv=3", "--backends", "torch", "--dtypes", "fp32"]


def test_the_command(capsys, monkeypatch):
    assert main(COMMAND) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all ")
    assert main([*COMMAND, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["holds"]
    with_fault(monkeypatch, "torch", FAULTS["agreement"])
    assert main(COMMAND) == 1
    assert "does not hold" in capsys.readouterr().out


def test_what_is_refused():
    with pytest.raises(UnknownDtypeError) as dtype:
        nl.check(zoo.DeltaNet, dtypes=("int8",))
    assert str(dtype.value).splitlines()[0] == "There is no such dtype of views."
    assert "need:  float64, float32, bfloat16, float16" in str(dtype.value)
    with pytest.raises(UnknownBackendError) as backend:
        nl.check(zoo.DeltaNet, backends=("auto",))
    assert str(backend.value).splitlines()[2:] == [
        "  given: 'auto'",
        "  need:  'torch', 'cpp', 'triton'",
        '  fix:   write backends=("torch", "cpp")',
    ]
    for call in (nl.check, nl.bench):
        with pytest.raises(UnknownDeviceError) as device:
            call(zoo.DeltaNet, device="gpu")
        what, _, given, need, fix = str(device.value).splitlines()
        assert [what, given, fix] == [
            "There is no such device to run loops on.",
            "  given: 'gpu'",
            '  fix:   write device="cpu"',
        ]
        assert need.startswith("  need:  'cpu'")

    class Beside(zoo.DeltaNet):
        beside = zoo.CausalLinearAttention

    with pytest.raises(InputError) as several:
        nl.check(nl.Layer(Beside, width=8, heads=2, dk=4, dv=4))
    assert str(several.value).splitlines()[2:] == [
        "  given: Beside and CausalLinearAttention",
        "  need:  one declared loop",
        "  fix:   write nl.check(Beside), and so for each",
    ]


@pytest.mark.gpu
def test_on_a_gpu():
    found = nl.check(zoo.DeltaNet, device="cuda", stress=True, dk=16, dv=16)
    assert found.holds, str(found)
    assert {row.backend for row in found.rows} == {"reference", "torch", "triton"}
