"""Declarations that lack a part, and what is no declaration."""

import pytest
import torch

import nestloop as nl
from nestloop.errors import (
    MissingPartError,
    SignatureError,
    UnknownBackendError,
)
from tests.errors.squares import Good, Linear, Squares, layer_of
from tests.refusals import refused

PARTS = "a learner, views, a schedule, an optimizer, and the bodies they call for"


def no_learner_class():
    class Loop(Squares):  # HERE
        learner = 3  # type: ignore[assignment]


def no_fast_weight():
    class Identity(nl.Learner):
        def forward(self, x):
            return x

    class Loop(Squares):  # HERE
        learner = Identity


def no_view():
    class Loop(nl.Loop):  # HERE
        learner = Linear


def no_loss():
    class Loop(nl.Loop):  # HERE
        learner = Linear
        k = nl.view("d")


def no_readout():
    class Loop(nl.Loop):  # HERE
        learner = Linear
        k = nl.view("d")
        loss = Squares.loss


def no_schedule():
    class Loop(Squares):  # HERE
        learner = Linear
        schedule = 4  # type: ignore[assignment]


def no_optimizer():
    class Loop(Squares):  # HERE
        learner = Linear
        optimizer = 0.1  # type: ignore[assignment]


def no_heads():
    class Loop(Squares):  # HERE
        learner = Linear
        heads = 0


def no_kernel():
    class Loop(Squares):  # HERE
        learner = nl.KernelEstimator


def no_values():
    class Loop(nl.Loop):  # HERE
        learner = nl.KernelEstimator
        q, k = nl.view("d"), nl.view("d")

        def kernel(self, q, k):
            return torch.exp(q @ k.T)


def no_keys():
    class Loop(nl.Loop):  # HERE
        learner = nl.KernelEstimator
        q, v = nl.view("d"), nl.view("d")

        def kernel(self, q, k):
            return torch.exp(q @ k.T)

        def fit(self, weight, t, s):
            return weight @ s.v


@pytest.mark.parametrize(
    "step, what, given, fix",
    [
        (no_learner_class, "learner is not a Learner class", "3", "learner = MLP, the class itself"),
        (no_fast_weight, "its learner Identity has no fast weight", "no nl.fast", 'declare w = nl.fast("d", "d")'),
        (no_view, "it has no view", "no nl.view", 'declare k = nl.view("d")'),
        (no_loss, "it has no loss", "no method loss", "add def loss(self, f, t): return ..."),
        (no_readout, "it has no readout", "no method readout", "add def readout(self, f, t): return ..."),
        (no_schedule, "its schedule is not one", "4", "schedule = nl.FullBatch(steps=1)"),
        (no_optimizer, "its optimizer is not one", "0.1", "optimizer = nl.SGD(lr=1.0)"),
        (no_heads, "its heads are not a number of them", "0", 'heads = 4, or heads = "D/64"'),
        (no_kernel, "it has no kernel", "no method kernel", "add def kernel(self, q, k): return ..."),
        (no_keys, "its kernel estimator takes views q and k", "views q, v", 'declare k = nl.view("d")'),
        (no_values, "its kernel estimator takes views q, k and v", "views q, k", 'declare v = nl.view("d")'),
    ],
)
def test_missing_parts(step, what, given, fix):
    refused(step, MissingPartError, f"The loop Loop: {what}.", given=given, need=PARTS, fix=fix)


def test_a_learner_without_forward_is_not_called():
    class Bare(nl.Learner):
        w = nl.fast("d", "d")

    def step():
        def loss(self, f, t):
            return (f(t.k) - t.q).square().mean(-1)  # HERE

        layer_of(loss, learner=Bare)

    refused(
        step,
        MissingPartError,
        "The learner Bare is called, and has no forward.",
        given="fast weights w",
        need="f(W; x) as a method, or bodies that read fast weights alone",
        fix="add def forward(self, x): return ... to it, or write x @ f.w",
    )

    def by_name(self, f, t):
        return (t.k @ f.w - t.q).square().mean(-1)

    layer_of(by_name, learner=Bare, readout=lambda self, f, t: t.q @ f.w)


def test_a_learner_whose_forward_takes_no_tokens():
    def step():
        class Weights(nl.Learner):
            w = nl.fast("d", "d")

            def forward(self):  # type: ignore[override]  # HERE
                return self.w

    refused(
        step,
        SignatureError,
        "The forward of Weights takes no tokens.",
        given="forward(self)",
        need="forward(self, x): a tile x [n, features]",
        fix="write def forward(self, x): return ...",
    )


def test_only_declared_loops_are_compiled():
    def layer():
        nl.Layer(3, 16, 2)  # type: ignore[arg-type]  # HERE

    def branches():
        nl.Layer((Good, Linear), 16, 2)  # type: ignore[arg-type]  # HERE

    for step, given in ((layer, 3), (branches, Linear)):
        refused(
            step,
            MissingPartError,
            "Only a declared loop can be compiled.",
            given=repr(given),
            need="a subclass of nl.Loop with a learner (the class, not an instance)",
            fix="write class MTTT(nl.Loop): learner = MLP; ..., then nl.compile(MTTT) or nl.Layer(MTTT, ...)",
        )


def test_a_compiled_loop_has_a_learner():
    class Bare(nl.Loop):
        k = nl.view("d")

    with pytest.raises(MissingPartError) as caught:
        nl.compile(Bare)
    assert str(caught.value).splitlines() == [
        "The loop Bare: it has no learner.",
        f"  at:    {Bare.declared_at}   class Bare(nl.Loop):",
        "  given: no learner",
        f"  need:  {PARTS}",
        "  fix:   learner = MLP, the class itself",
    ]


def test_unknown_backend():
    def step():
        nl.compile(Good, backend="cuda")  # HERE

    refused(
        step,
        UnknownBackendError,
        "There is no such backend.",
        given="'cuda'",
        need="'auto', 'reference', 'torch', 'cpp', 'triton'",
        fix='write backend="auto"',
    )
