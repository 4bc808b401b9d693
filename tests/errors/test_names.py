"""Names that a body reads, and what it takes."""

import pytest

import nestloop as nl
from nestloop.errors import (
    CompileError,
    SignatureError,
    UnknownNameError,
)
from tests.errors.squares import Good, Squares, inputs, layer_of
from tests.refusals import refused


def test_names_that_nothing_declares():
    def weight():
        class Typo(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self, x):
                return x @ self.w3  # HERE

        layer_of(Squares.loss, learner=Typo)

    def slow():
        layer_of(lambda self, f, t: f(t.k).sum(-1) * self.scale)  # HERE

    def view():
        layer_of(lambda self, f, t: f(t.x).sum(-1))  # HERE

    refused(
        weight,
        UnknownNameError,
        "Typo declares no 'w3'.",
        given="w3",
        need="one of its weights and dims: D, H, N, d, n, w",
        fix='declare w3 = nl.fast("d", "d") in a learner, w3 = nl.slow("d") or w3 = nl.dim(64)',
    )
    refused(
        slow,
        UnknownNameError,
        "Loop declares no 'scale'.",
        given="scale",
        need="one of its weights and dims: D, H, N, d, n",
        fix='declare scale = nl.fast("d", "d") in a learner, scale = nl.slow("d") or scale = nl.dim(64)',
    )
    refused(
        view,
        UnknownNameError,
        "The loop declares no view 'x'.",
        given="t.x",
        need="one of its views and gates: k, q, v",
        fix='declare x = nl.view("d")',
    )


def test_names_that_another_owns():
    def view():
        layer_of(lambda self, f, t: f(self.k).sum(-1))  # HERE

    def weight():
        layer_of(lambda self, f, t: (t.k @ self.w).sum(-1))  # HERE

    def bare():
        class Plain(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self, x):
                return x @ w  # type: ignore[name-defined]  # noqa: F821  # HERE

        layer_of(Squares.loss, learner=Plain)

    refused(
        view,
        UnknownNameError,
        "Loop reads 'k' from itself, but every token has its own.",
        given="self.k",
        need="views and gates from t, weights and dims from self",
        fix="write t.k",
    )
    refused(
        weight,
        UnknownNameError,
        "Loop reads 'w' from itself, but it is its learner's.",
        given="self.w",
        need="weights of the learner from f, the loop's own from self",
        fix="write f.w",
    )
    refused(
        bare,
        UnknownNameError,
        "A body of Loop names 'w' alone.",
        given="w",
        need="names of a class body by their owner: Python looks for bare ones outside it",
        fix="write self.w in the learner, f.w in the loop",
    )


def test_an_undeclared_name_reads_the_same_on_the_reference():
    def step():
        loop = type("Loop", (Good,), {"loss": lambda self, f, t: f(t.k).sum(-1) * self.scale})  # HERE
        nl.compile(loop, backend="reference")(*inputs())

    refused(
        step,
        UnknownNameError,
        "Loop declares no 'scale'.",
        given="scale",
        need="one of its weights and dims: H, N, d, n",
        fix='declare scale = nl.fast("d", "d") in a learner, scale = nl.slow("d") or scale = nl.dim(64)',
    )


@pytest.mark.parametrize("schedule", [nl.Shuffled(2), nl.Causal(4), nl.Online()])
def test_a_body_of_a_part_of_the_tokens_does_not_know_the_length(schedule):
    def step():
        layer_of(lambda self, f, t: f(t.k).sum(-1) / self.N, schedule=schedule)  # HERE

    refused(
        step,
        UnknownNameError,
        "Loop declares no 'N'.",
        given="N",
        need="one of its weights and dims: D, H, d, n",
        fix="use self.n, the tokens of one step: under this schedule a body is compiled for every length",
    )


def test_signatures():
    def loss():
        layer_of(lambda self, f: f)  # HERE

    def readout():
        layer_of(lambda self, t: t.q, "readout")  # HERE

    def kernel():
        layer_of(lambda self, q: q, "kernel", learner=nl.KernelEstimator)  # HERE

    def fit():
        layer_of(lambda self, weight, t: weight @ t.v, "fit", learner=nl.KernelEstimator, kernel=pairs)  # HERE

    def pairs(self, q, k):
        return (q @ k.T).exp()

    what = "The {} of Loop does not take ({})."
    for step, name, takes, arguments in (
        (loss, "loss", "f", "f, t"),
        (readout, "readout", "t", "f, t"),
        (kernel, "kernel", "q", "q, k"),
        (fit, "fit", "weight, t", "weight, t, s"),
    ):
        refused(
            step,
            SignatureError,
            what.format(name, arguments),
            given=f"{name}(self, {takes})",
            need=f"{name}(self, {arguments})",
            fix=f"write def {name}(self, {arguments}): return ...",
        )


def test_bodies_are_functions():
    def step():
        class Loop(Good):
            @property  # HERE
            def loss(self):
                return 0

    refused(
        step,
        SignatureError,
        "The loss of Loop is not a function.",
        given="a property",
        need="a method loss(self, f, t)",
        fix="write def loss(self, f, t): return ..., without a decorator",
    )


def test_a_forward_called_with_too_much():
    def step():
        class Pair(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self, x, y):  # type: ignore[override]
                return x @ self.w + y

        layer_of(lambda self, f, t: f(t.k).sum(-1), learner=Pair)  # HERE

    refused(
        step,
        CompileError,
        "The loss of Loop cannot be traced: TypeError.",
        given="test_a_forward_called_with_too_much.<locals>.step.<locals>.Pair.forward() missing 1 required "
        "positional argument: 'y'",
        need="plain PyTorch on tensors, numbers and the declared names",
        fix="run the body by hand on small tensors; backend='reference' calls it unchanged",
    )
