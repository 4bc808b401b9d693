"""Optimizers that are declared and are none."""

from __future__ import annotations

import pytest

import nestloop as nl
from nestloop.errors import (
    CoefficientError,
    IllegalScheduleError,
    MissingPartError,
    MomentError,
    SideEffectError,
    SignatureError,
    TransformError,
    UnknownNameError,
    UnreadDeclarationError,
)
from tests.errors.squares import Squares, layer_of
from tests.refusals import refused

EVERY = "lr, transform, gradient_transform, scale, decay, log_decay, decay_order, momentum, window, restore"


def layer_with(optimizer, **parts):
    """A layer of `Squares` with an optimizer, on a schedule that takes any."""
    return layer_of(Squares.loss, **{"schedule": nl.FullBatch(2), **parts}, optimizer=optimizer)


class Rule(nl.Optimizer):
    """What a step makes of a gradient is given where it is made."""

    v = nl.moment()
    beta = nl.coefficient()

    def update(self, w, g, s):
        return s.beta * g, {"v": g}


@pytest.mark.parametrize(
    "returned, given, need",
    [
        (lambda s, g: g, "[8, 8]", "the update, and a dict of the moments"),
        (lambda s, g: None, "nothing", "the update, and a dict of the moments"),
        (lambda s, g: (g, {}), "moments none", "every moment that it declares, and no other: v"),
        (lambda s, g: (g, {"v": g, "m": g}), "moments v, m", "every moment that it declares, and no other: v"),
        (lambda s, g: (g, {"v": g.sum()}), "v: []", "v: [8, 8], one number for every element"),
        (lambda s, g: (g, {"v": 0.5}), "v: a float", "v: [8, 8], one number for every element"),
    ],
)
def test_an_update_returns_its_step_and_every_moment(returned, given, need):
    class Averages(nl.Optimizer):
        v = nl.moment()

        def update(self, w, g, s):  # HERE
            return returned(s, g)

    def step():
        layer_with(Averages(0.1))

    with pytest.raises(MomentError) as caught:
        step()
    error = caught.value
    assert error.what == "The update of Averages does not return what it has to."
    assert (error.given, error.need, error.fix) == (given, need, 'write return step, {"v": v}')
    assert error.where is not None and error.where.text == "def update(self, w, g, s):  # HERE"


def test_an_update_is_as_large_as_its_gradient():
    class Sums(nl.Optimizer):
        def update(self, w, g, s):
            return g.sum(-1)

    def step():
        layer_with(Sums(0.1))  # HERE

    refused(
        step,
        TransformError,
        "The update of Sums changes the shape of a gradient.",
        given="[8]",
        need="[8, 8], the shape of the fast weight",
        fix="return one number for every element; reduce with keepdim=True inside",
    )


def test_an_update_is_declared_as_it_is_called():
    def none():
        class Nothing(nl.Optimizer):
            v = nl.moment()

        layer_with(Nothing(0.1))  # HERE

    def arguments():
        class Short(nl.Optimizer):
            def update(self, g):  # type: ignore[override]  # HERE
                return g

    def value():
        class Plain(nl.Optimizer):  # HERE
            update = 3  # type: ignore[assignment]

    def effect():
        class Storing(nl.Optimizer):
            v = nl.moment()

            def update(self, w, g, s):
                s.v = g  # HERE
                return g, {"v": s.v}

    refused(
        none,
        SignatureError,
        "The optimizer Nothing has no update.",
        given="no method update",
        need="what a step makes of a gradient: a method update(self, w, g, s)",
        fix="add def update(self, w, g, s): return g, {}",
    )
    refused(
        arguments,
        SignatureError,
        "The update of Short does not take (w, g, s).",
        given="update(self, g)",
        need="update(self, w, g, s): a fast weight, its gradient, what is kept of it",
        fix="write def update(self, w, g, s): return ...",
    )
    refused(
        value,
        SignatureError,
        "The update of Plain is not a function.",
        given="a int",
        need="a method update(self, w, g, s)",
        fix="write def update(self, w, g, s): return ..., without a decorator",
    )
    refused(
        effect,
        SideEffectError,
        "test_an_update_is_declared_as_it_is_called.<locals>.effect.<locals>.Storing.update has a side effect: "
        "it stores into the attribute s.v.",
        given="s.v",
        need="a body that only computes its result: it is traced once, so the effect would happen once, at compile "
        "time",
        fix="compute with local names and return the result; inner losses are an output of the op (return_losses=True)",
    )


def test_what_an_update_reads_is_there():
    class Other(nl.Optimizer):
        v = nl.moment()

        def update(self, w, g, s):
            return g, {"v": s.m}

    class Itself(Other):
        beta = nl.coefficient(0.5)

        def update(self, w, g, s):
            return g * self.beta, {"v": g}

    class Kept(Other):
        def update(self, w, g, s):
            return g, {"v": self.v}

    for rule, what, given, need, fix in (
        (
            Other,
            "Other has no moment or coefficient 'm'.",
            "s.m",
            "one of its own: v",
            "declare m = nl.moment() in it; numbers of the optimizer are read from self",
        ),
        (
            Itself,
            "Itself reads 'beta' from itself, but what it is differs by fast weight.",
            "self.beta",
            "moments and coefficients from s, numbers from self",
            "write s.beta",
        ),
        (
            Kept,
            "Kept reads 'v' from itself, but every fast weight has its own.",
            "self.v",
            "moments and coefficients from s, numbers from self",
            "write s.v",
        ),
    ):
        with pytest.raises(UnknownNameError) as caught:
            layer_with(rule(0.1))
        error = caught.value
        assert (error.what, error.given, error.need, error.fix) == (what, given, need, fix)
        assert error.where is not None and error.where.text.startswith("return g")


def test_names_that_mean_something_else():
    def of_the_state():
        class Waiting(nl.Optimizer):
            gradient = nl.moment()  # HERE

    def of_every_optimizer():
        class Rated(nl.Optimizer):
            lr = nl.coefficient(0.1)  # HERE

    def of_the_machinery():
        class Owning(nl.Optimizer):  # HERE
            orders = (0.1, 0.2)  # type: ignore[assignment]

    def of_the_class():
        class Named(nl.Optimizer):
            moments = nl.moment()  # HERE

    def of_a_loop():
        class Gated(nl.Optimizer):
            theta = nl.gate()  # HERE

    wanted = {"need": "a name of its own"}
    what = "a name that means something else in every optimizer."
    refused(
        of_the_state,
        MomentError,
        f"Waiting has a moment 'gradient', {what}",
        given="gradient = nl.moment()",
        fix="write gradient_1 = ...",
        **wanted,
    )
    refused(
        of_every_optimizer,
        MomentError,
        f"Rated has a coefficient 'lr', {what}",
        given="lr = nl.coefficient()",
        fix="write lr_1 = ...",
        **wanted,
    )
    refused(
        of_the_machinery,
        MomentError,
        f"Owning has a part 'orders', {what}",
        given="orders = ...",
        fix="write orders_1 = ...",
        **wanted,
    )
    refused(
        of_the_class,
        MomentError,
        f"Named has a moment 'moments', {what}",
        given="moments = nl.moment()",
        fix="write moments_1 = ...",
        **wanted,
    )
    refused(
        of_a_loop,
        MomentError,
        "The optimizer Gated declares a gate, which only learners and loops have.",
        given="theta in Gated, an optimizer",
        need="moments, coefficients, numbers and an update",
        fix="write theta = nl.coefficient(), and Gated(theta=theta) where the loop declares it",
    )


def test_a_matrix_of_coefficients():
    class Turned(nl.Optimizer):
        by = nl.coefficient()

        def update(self, w, g, s):
            return s.by @ g, {}

    def step():
        p = nl.slow("d", "2*d")  # HERE
        layer_with(Turned(0.1, by=p), p=p)

    refused(
        step,
        CoefficientError,
        "The slow weight 'p' does not fit the fast weight 'w'.",
        given="slow weight p[d, 2 * d] for fast weight w[d, d]",
        need="dims that are axes of every fast weight it works on",
        fix="leave the dims out, or give each fast weight its own: nl.SGD(decay={'w': a}); an update reads it as it is "
        "where by = nl.coefficient(spread=False)",
    )


def test_what_an_optimizer_is_made_with():
    def unknown():
        Rule(0.1, bta=0.3)  # HERE

    def absent():
        Rule(0.1)  # HERE

    def none():
        Rule(0.1, beta=None)  # HERE

    def partly():
        class Biased(nl.Learner):
            w, b = nl.fast("d", "d"), nl.fast("d")

            def forward(self, x):
                return x @ self.w + self.b

        layer_with(Rule(0.1, beta={"w": 0.3}), learner=Biased)  # HERE

    def gate():
        theta = nl.gate()
        layer_with(Rule(0.1, beta=theta), theta=theta)  # HERE

    def foreign():
        theta = nl.slow()  # HERE
        layer_with(Rule(0.1, beta=theta))

    def transform():
        Rule(0.1, beta=0.5, transform=nl.soft_clip(-2))  # HERE

    refused(
        unknown,
        CoefficientError,
        "Rule is made with 'bta', which it does not have.",
        given="bta=0.3",
        need=f"its own (beta), or what every optimizer takes ({EVERY})",
        fix="leave it out, or declare bta = nl.coefficient(0.9) in the class Rule",
    )
    refused(
        absent,
        CoefficientError,
        "Rule is made without its coefficient 'beta', which has no default.",
        given="no beta",
        need="a number, text in the dims, a slow weight, a gate, or a dict of these by fast weight",
        fix="write Rule(beta=0.9), or beta = nl.coefficient(0.9) in the class",
    )
    refused(
        none,
        CoefficientError,
        "The beta of Rule is not one it takes.",
        given="None",
        need='a finite number, text like "H/(N*D)", a slow weight, a gate, or a dict of these by fast weight',
        fix="write Rule(beta=0.9), or declare a = nl.gate() in the loop and write Rule(beta=a)",
    )
    refused(
        partly,
        CoefficientError,
        "The beta of Rule leaves out a fast weight, and has no default.",
        given="beta for w",
        need="one for b too",
        fix="write beta = nl.coefficient(0.9) in the class, or beta={..., 'b': 0.9}",
    )
    refused(
        gate,
        IllegalScheduleError,
        "Loop: its beta is a number for each token, but a step of a batch schedule is one on all its tokens.",
        given="gate theta[]; schedule FullBatch",
        need="a number, text or a slow weight; as a learning rate, a gate without dims too",
        fix="declare theta = nl.slow(), or step chunk by chunk, with the mean of each chunk's gates: "
        "schedule = nl.Chunked(64)",
    )
    refused(
        foreign,
        CoefficientError,
        "The beta of Loop is a slow weight that the loop does not declare.",
        given="slow weight ?[]",
        need="one of its own: it has none",
        fix="declare eta = nl.slow() (or nl.gate()) in the loop's body and write Rule(beta=eta)",
    )
    refused(
        transform,
        TransformError,
        "Rule takes no transform, in whose place its update is.",
        given="transform=",
        need="an update that does all of it",
        fix="call it on g in update, or give it as gradient_transform",
    )


@pytest.mark.parametrize(
    "settings, what, given, need, fix",
    [
        ({"betas": 0.9}, "betas", "betas=0.9", "two numbers in [0, 1)", "betas=(0.9, 0.999)"),
        ({"betas": (0.9, 1)}, "betas", "betas=(0.9, 1)", "two numbers in [0, 1)", "betas=(0.9, 0.999)"),
        ({"eps": -1e-8}, "eps", "eps=-1e-08", "a finite number, 0 or more", "eps=1e-08"),
        ({"eps_root": "no"}, "eps_root", "eps_root='no'", "a finite number, 0 or more", "eps_root=1e-16"),
    ],
)
def test_numbers_of_adam(settings, what, given, need, fix):
    def step():
        nl.Adam(0.1, **settings)  # HERE

    fix = f"write nl.Adam(lr=0.001, {fix})"
    refused(step, CoefficientError, f"The {what} of Adam is not what it takes.", given=given, need=need, fix=fix)


def test_an_optimizer_is_called():
    def step():
        layer_with(nl.Adam)  # HERE

    with pytest.raises(MissingPartError) as caught:
        step()
    assert caught.value.what == "The loop Loop: its optimizer is not one."
    assert caught.value.fix == "optimizer = nl.Adam(lr=1.0)"


@pytest.mark.parametrize(
    "schedule, need, fix",
    [
        (
            nl.Online(),
            "the same steps as those of chunks of one token",
            'write schedule = nl.Chunked(1, "update-apply")',
        ),
        (
            nl.Causal(8),
            "a schedule that steps once a chunk: the nearest is Chunked",
            'write schedule = nl.Chunked(8, "apply-update"), or "update-apply"',
        ),
    ],
    ids=["online", "causal"],
)
def test_a_step_for_each_token_has_no_update(schedule, need, fix):
    def step():
        layer_with(nl.Adam(0.1), schedule=schedule)  # HERE

    refused(
        step,
        IllegalScheduleError,
        "Loop: its update needs a whole chunk's gradient, but each token is read with weights of its own.",
        given=f"update; schedule {type(schedule).__name__}",
        need=need,
        fix=fix,
    )


def test_moments_belong_to_optimizers():
    def learner():
        class Memory(nl.Learner):
            w = nl.fast("d", "d")
            m = nl.moment()  # HERE

    def loop():
        class Other(Squares):
            beta = nl.coefficient(0.9)  # HERE

    refused(
        learner,
        UnreadDeclarationError,
        "The learner Memory declares a moment, which only an optimizer has.",
        given="m in Memory, a learner",
        need="a moment in the body of an optimizer",
        fix="move m = ... into the body of class Rule(nl.Optimizer)",
    )
    refused(
        loop,
        UnreadDeclarationError,
        "The loop Other declares a coefficient, which only an optimizer has.",
        given="beta in Other, a loop",
        need="a coefficient in the body of an optimizer",
        fix="move beta = ... into the body of class Rule(nl.Optimizer)",
    )
