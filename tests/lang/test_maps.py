"""Maps of views, gates and read-outs: what they compute, what they are called, and how they are refused."""

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop import zoo
from nestloop.errors import (
    IllegalScheduleError,
    InputError,
    MissingPartError,
    ShapeMismatchError,
    TokenMixingError,
    ViewError,
)
from nestloop.lang.init import alibi_slopes, fill
from tests.lang.test_declarations import Linear, Squares
from tests.refusals import refused

B, N, D, H, d = 2, 6, 8, 2, 4


def views_of(**declared):
    """A layer of a loop with these views or gates beside k and q, x, and what it makes of it."""

    class Loop(Squares):
        learner = Linear
        schedule = nl.Causal(4)
        optimizer = nl.SGD(lr=0.1)

    torch.manual_seed(0)
    layer = nl.Layer(type("Made", (Loop,), declared), D, H, backend="reference").double()
    x = torch.randn(B, N, D, dtype=torch.float64)
    return layer, x, layer.make_views(x)


def heads(flat):
    return flat.unflatten(-1, (H, -1)).transpose(1, 2)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_shared_projection_convolutions_and_activations():
    qk = nl.project()
    layer, x, made = views_of(
        qk=qk, k=nl.view("d", of=qk, make=[nl.conv(3), F.silu]), q=nl.view("d", of=qk, make=[nl.conv(2, bias=False)])
    )
    state = layer.state_dict()
    assert {n: list(t.shape) for n, t in state.items() if n.startswith(("views", "shared"))} == {
        "shared.qk.weight": [D, D],
        "views.k.conv.weight": [D, 1, 3],
        "views.k.conv.bias": [D],
        "views.q.conv.weight": [D, 1, 2],
    }
    flat = (x @ state["shared.qk.weight"].T).mT
    padded = F.conv1d(F.pad(flat, (2, 0)), state["views.k.conv.weight"], state["views.k.conv.bias"], groups=D).mT
    close(made["k"], heads(F.silu(padded)))
    close(made["q"], heads(F.conv1d(F.pad(flat, (1, 0)), state["views.q.conv.weight"], groups=D).mT))


@pytest.mark.parametrize("pairs", ["interleaved", "half"])
@pytest.mark.parametrize("period", [None, 4, "chunk"])
def test_rotary_positions(pairs, period):
    layer, x, made = views_of(k=nl.view("d", make=[nl.rope(theta=100.0, period=period, pairs=pairs)]))
    flat = heads(x @ layer.state_dict()["views.k.project.weight"].T)
    place = torch.arange(N) % (N if period is None else 4)
    for i in range(d // 2):
        angle = (place * torch.tensor(100.0) ** (-2 * i / d)).double()
        turned = torch.complex(angle.cos(), angle.sin())
        one, other = (2 * i, 2 * i + 1) if pairs == "interleaved" else (i, i + d // 2)
        expected = torch.complex(flat[..., one], flat[..., other]) * turned
        torch.testing.assert_close(made["k"][..., one], expected.real, rtol=1e-6, atol=1e-6)  # tables are float32
        torch.testing.assert_close(made["k"][..., other], expected.imag, rtol=1e-6, atol=1e-6)


def test_norms_scales_and_position_weights():
    store = nl.rms_norm(eps=None)
    layer, x, made = views_of(
        store=store,
        k=nl.view("d", of=store, make=[nl.l2_norm(0.1), nl.affine()]),
        q=nl.view("d", of=store, make=[nl.layer_norm(1e-3, over="width"), nl.l2_norm(0.1, outside=True)]),
        c=nl.view("2*d", make=[nl.cos_reweight(16)]),
    )
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    made, p = layer.make_views(x), layer.state_dict()
    assert list(p["views.k.affine.scale"].shape) == [H, d] and list(p["views.q.layer_norm.weight"].shape) == [D]
    normed = F.rms_norm(x, (D,), p["shared.store.weight"])
    k = heads(normed @ p["views.k.project.weight"].T)
    k = k / (k.square().sum(-1, keepdim=True) + 0.1).sqrt()
    close(made["k"], k * p["views.k.affine.scale"][:, None] + p["views.k.affine.offset"][:, None])
    q = F.layer_norm(
        normed @ p["views.q.project.weight"].T, (D,), p["views.q.layer_norm.weight"], p["views.q.layer_norm.bias"], 1e-3
    )
    close(made["q"], heads(q) / (heads(q).norm(dim=-1, keepdim=True) + 0.1))
    c, angle = heads(x @ p["views.c.project.weight"].T), (math.pi / 2 * torch.arange(1, N + 1).double() / 16)[:, None]
    close(made["c"], torch.cat([c * angle.sin(), c * angle.cos()], -1))


def test_gates_of_low_rank_of_places_and_scaled():
    layer, x, made = views_of(
        a=nl.gate(rank=3, scale="1/d"),
        tau=nl.gate(torch.relu, of=nl.per_position(offset=lambda i: 1 / (i + 1))),
        optimizer=nl.SGD(lr=0.1),
    )
    p = layer.state_dict()
    assert list(p["views.a.project.down.weight"].shape) == [3, D] and list(p["views.a.project.up.weight"].shape) == [
        H,
        3,
    ]
    low = x @ p["views.a.project.down.weight"].T
    expected = torch.sigmoid(low @ p["views.a.project.up.weight"].T + p["views.a.project.up.bias"]) / d
    close(made["a"], expected.transpose(1, 2))
    close(made["tau"], (1 / (torch.arange(N).double() % 4 + 1)).expand(B, H, N))


def test_maps_of_the_read_out():
    class Loop(Squares):
        learner = Linear
        schedule = nl.Causal(4)
        output = (nl.rms_norm(1e-5), nl.gated(F.silu, bias=True, per_head=True), nl.gated(rank=2), nl.project())

    torch.manual_seed(0)
    layer = nl.Layer(Loop, D, H, backend="reference").double()
    x = torch.randn(B, N, D, dtype=torch.float64)
    p = layer.state_dict()
    z, _ = layer.op(layer.make_views(x), {"w": p["fast.w"]})
    z = F.rms_norm(z.transpose(1, 2), (d,), p["output.rms_norm.weight"], 1e-5)
    z = z * F.silu(x @ p["output.gated.weight"].T + p["output.gated.bias"])[..., None]
    z = z.flatten(2) * torch.sigmoid(x @ p["output.gated_2.down.weight"].T @ p["output.gated_2.up.weight"].T)
    assert "out.bias" not in p
    close(layer(x), z @ p["out.weight"].T)


def test_without_a_projection_the_output_is_as_wide_as_the_input():
    class Loop(Squares):
        learner = Linear
        output = ()

    assert not [name for name in nl.Layer(Loop, D, H).state_dict() if name.startswith("out")]

    def step():
        nl.Layer(Loop, D, H, d=3)  # HERE

    refused(
        step,
        InputError,
        "The layer has no output projection, but its loop's output is not as wide as its input.",
        given="6 features, width=8",
        need="8 features",
        fix="write output = [..., nl.project()] in the loop",
    )


def test_decays_by_head():
    values = {
        init: fill(torch.empty(3), init, True).tolist() for init in ("retention", "alibi(0.5)", "lightning(0.75)")
    }
    assert values["retention"] == pytest.approx([1 - 2.0 ** (-5 - h) for h in range(3)])
    assert values["alibi(0.5)"] == pytest.approx([-0.5 * s for s in alibi_slopes(3)])
    assert values["lightning(0.75)"] == pytest.approx([0.0, -2.0, -4.0])
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(3) == [2.0**-4, 2.0**-8, 2.0**-2]


@pytest.mark.parametrize(
    "make, what, given, need, fix",
    [
        (
            lambda: nl.project(rank=0),
            "The rank of a projection is not a number of features.",
            "rank=0",
            "a whole number, 1 or more",
            "write nl.project(rank=16)",
        ),
        (
            lambda: nl.conv(0),
            "The size of a convolution is not a number of tokens.",
            "size=0",
            "a whole number, 1 or more",
            "write nl.conv(4)",
        ),
        (
            lambda: nl.rope(period="batch"),
            "The period of nl.rope is not a number of tokens.",
            "period='batch'",
            'a whole number, 1 or more, or "chunk" for the schedule\'s',
            "write nl.rope(period=16)",
        ),
        (
            lambda: nl.rope(64),
            "nl.rope takes its arguments by name.",
            "64",
            "theta=, period= or pairs=; the number of features is the view's own",
            "write nl.rope(), or nl.rope(theta=64)",
        ),
        (
            lambda: nl.rope(theta=0.0),
            "The theta of nl.rope is none.",
            "theta=0.0",
            "a finite number above 0: frequencies are theta^(-2i/f)",
            "write nl.rope(theta=10000.0)",
        ),
        (
            lambda: nl.rope(pairs="odd"),
            "Rotary positions do not know these pairs.",
            "pairs='odd'",
            '"interleaved" for features (2i, 2i + 1), or "half" for (i, i + f/2)',
            'write nl.rope(pairs="half")',
        ),
        (
            lambda: nl.l2_norm(over="tokens"),
            "nl.l2_norm does not know what to normalise over.",
            "over='tokens'",
            '"head" for each head\'s features, "width" for all of them together',
            'write nl.l2_norm(over="width")',
        ),
        *(
            (
                lambda make=make, eps=eps: make(eps),
                f"The eps of nl.{make.__name__} is none.",
                f"eps={eps!r}",
                "a number from 0 to 1 (the number of features is the view's own), or None for the dtype's epsilon",
                f"write nl.{make.__name__}()",
            )
            for make, eps in ((nl.rms_norm, 64), (nl.layer_norm, (64,)), (nl.l2_norm, -1e-6), (nl.rms_norm, math.nan))
        ),
        (
            lambda: nl.cos_reweight(0),
            "The length of cosFormer's weights is not a number of tokens.",
            "length=0",
            "the longest sequence's tokens: a whole number, 1 or more",
            "write nl.cos_reweight(2048)",
        ),
        (
            lambda: nl.view("d", make=[3]),
            "The maps of a view are not maps.",
            "[3]",
            "nl.conv, nl.rope, a norm, ..., or an elementwise function, one or a list of them",
            "write make=[nl.conv(4), F.silu]",
        ),
        (
            lambda: nl.gate(of=[nl.project(), nl.per_position(4)]),
            "The maps of a gate project twice.",
            "nl.project(), nl.per_position()",
            "one projection or one table over positions, in of=",
            "leave one out; rank=16 makes one projection a product of two",
        ),
        (
            lambda: nl.gated(of=nl.rms_norm()),
            "What a gate on a read-out sees of the token is made by shared maps.",
            "of=nl.rms_norm()",
            "maps assigned to a name in the class body",
            "write norm = nl.rms_norm() in the loop's body and of=norm",
        ),
    ],
)
def test_maps_that_are_none(make, what, given, need, fix):
    with pytest.raises(ViewError) as caught:
        make()
    assert (caught.value.what, caught.value.given, caught.value.need, caught.value.fix) == (what, given, need, fix)
    assert caught.value.where is not None and caught.value.where.file == __file__


TENSORS = "{} is a module with tensors of its own, which the layer would neither train nor move."
RANDOM = "{} draws random numbers."


@pytest.mark.parametrize(
    "make, what, given",
    [
        (
            lambda: nl.view("d", make=[torch.nn.Linear(4, 4)]),
            TENSORS.format("A map of a view"),
            "Linear with weight, bias",
        ),
        (
            lambda: nl.view("d", of=torch.nn.BatchNorm1d(4, affine=False)),
            TENSORS.format("A map of a view"),
            "BatchNorm1d with running_mean, running_var, num_batches_tracked",
        ),
        (
            lambda: nl.gate(torch.nn.PReLU()),
            TENSORS.format("The activation of a gate"),
            "PReLU with weight",
        ),
        (
            lambda: nl.gated(torch.nn.PReLU()),
            TENSORS.format("The activation of nl.gated"),
            "PReLU with weight",
        ),
        (lambda: nl.view("d", make=[torch.nn.Dropout(0.1)]), RANDOM.format("A map of a view"), "Dropout"),
        (
            lambda: nl.gated(of=torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout())),
            RANDOM.format("A map of a gate on a read-out"),
            "Dropout",
        ),
    ],
)
def test_modules_that_are_more_than_functions(make, what, given):
    with pytest.raises(ViewError) as caught:
        make()
    assert (caught.value.what, caught.value.given) == (what, given)
    random = "draws" in what
    assert caught.value.need == (
        "a function that gives the same each time: whole sequences and their pieces are to agree"
        if random
        else "a map of nestloop's, whose parameters are the layer's, or a function without any"
    )
    assert caught.value.fix == (
        "leave it out, and put nn.Dropout before or after the layer"
        if random
        else "write nl.project(), nl.conv(4), nl.rms_norm(), nl.layer_norm() or nl.affine()"
    )
    assert caught.value.where is not None and caught.value.where.file == __file__


OTHER: dict[str, Any] = {"several": lambda x, y: x, "none": lambda: 1}


@pytest.mark.parametrize(
    "make, what, given",
    [
        (
            lambda: nl.view("d", make=[F.layer_norm]),
            "A map of a view",
            "layer_norm(input, normalized_shape, weight, bias, eps)",
        ),
        (lambda: nl.gate(OTHER["several"]), "The activation of a gate", "<lambda>(x, y)"),
        (lambda: nl.gated(OTHER["none"]), "The activation of nl.gated", "<lambda>()"),
        (lambda: nl.view("d", make=[torch.nn.CosineSimilarity()]), "A map of a view", "forward(x1, x2)"),
    ],
)
def test_functions_that_take_more_than_a_view(make, what, given):
    with pytest.raises(ViewError) as caught:
        make()
    assert str(caught.value).splitlines()[2:] == [
        f"  given: {given}",
        "  need:  a function of one tensor",
        "  fix:   write a function that gives the rest, as lambda x: F.layer_norm(x, x.shape[-1:]) does",
    ]
    assert caught.value.what == f"{what} does not take x alone."
    assert caught.value.where is not None and caught.value.where.file == __file__


def test_functions_that_say_nothing_of_what_they_take():
    views_of(k=nl.view("d", make=[torch.tanh, functools.partial(F.layer_norm, normalized_shape=(4,))]))


def test_modules_that_are_functions_and_read_outs_with_modules():
    views_of(k=nl.view("d", make=[torch.nn.SiLU()]), e=nl.gate(torch.nn.Sigmoid()))

    def step():
        class Loop(Squares):  # HERE
            learner = Linear
            output = (torch.nn.LayerNorm(4, bias=False), nl.project())

    refused(
        step,
        ViewError,
        TENSORS.format("A map of a read-out"),
        given="LayerNorm with weight",
        need="a map of nestloop's, whose parameters are the layer's, or a function without any",
        fix="write nl.project(), nl.conv(4), nl.rms_norm(), nl.layer_norm() or nl.affine()",
    )


def test_a_projection_before_the_end_of_the_output():
    def step():
        class Loop(Squares):  # HERE
            learner = Linear
            output = (nl.project(), nl.rms_norm())

    refused(
        step,
        ViewError,
        "The output projection is not the last map of the read-out.",
        given="nl.project(), nl.rms_norm()",
        need="norms and gates, then nl.project(), or no projection",
        fix="write output = [nl.rms_norm(), nl.project()]",
    )


def test_chunks_where_there_are_none():
    def step():
        class Loop(Squares):
            learner = Linear
            k = nl.view("d", make=[nl.rope(period="chunk")])  # HERE

    refused(
        step,
        ViewError,
        "A map of the view 'k' counts in chunks, of which Loop has none.",
        given='period="chunk"; schedule FullBatch',
        need="a schedule with chunks, or a number of tokens",
        fix="write schedule = nl.Causal(16), or period=16",
    )


def test_pooled_gates_where_tokens_step():
    def step():
        class Loop(Squares):
            learner = Linear
            schedule = nl.Causal(4)
            eta = nl.gate(pooled=True)  # HERE
            optimizer = nl.SGD(lr=eta)

    refused(
        step,
        ViewError,
        "The gate 'eta' is made from a chunk's mean, which the tokens of the chunk cannot know.",
        given="pooled=True; schedule Causal",
        need="a decay, momentum or scale of a schedule that steps once a chunk",
        fix="leave pooled out, or write schedule = nl.Chunked(16)",
    )


def test_streams_of_kernel_estimators():
    def step():
        class Loop(zoo.SelfAttention):  # HERE
            schedule = nl.Causal(4)

    refused(
        step,
        IllegalScheduleError,
        "Loop: a kernel estimator takes no steps.",
        given="schedule Causal",
        need="nl.Sliding, a window of keys, or no schedule: every query sees every key",
        fix="write schedule = nl.Sliding(128), or leave it out",
    )


def test_what_is_beside_a_loop():
    def step():
        class Loop(Squares):  # HERE
            learner = Linear
            beside = Linear

    def wide():
        class Wide(Squares):
            learner = Linear
            heads = 1

        class Loop(Squares):  # HERE
            learner = Linear
            beside = Wide

        nl.Layer(Loop, D, H)

    refused(
        step,
        MissingPartError,
        "The loop Loop: what is beside it is not a loop.",
        given=repr(Linear),
        need="a learner, views, a schedule, an optimizer, and the bodies they call for",
        fix="beside = Window, the class itself",
    )
    refused(
        wide,
        ShapeMismatchError,
        "The outputs of Loop and Wide beside it cannot be added.",
        given="2 heads of 4, and 1 of 4",
        need="as many features from both",
        fix="choose sizes that agree",
    )


def test_a_shared_map_fits_everywhere():
    def step():
        class Loop(Squares):
            learner = Linear
            p = nl.project()  # HERE
            k, q, v = nl.view("d", of=p), nl.view("d", of=p), nl.view("2*d", of=p)

        nl.Layer(Loop, D, H)

    where = f"{__file__}:{step.__code__.co_firstlineno + 3}"
    with pytest.raises(ShapeMismatchError) as caught:
        step()
    assert caught.value.what == "The map 'p' does not fit everywhere it is used."
    assert caught.value.given == f"weight [16, 8] here, weight [8, 8] at {where}"
    assert (caught.value.need, caught.value.fix) == (
        "as many features in every place",
        "declare one map for each, under a name of its own",
    )


def layer_of(schedule, output=None, **views):
    """A layer of a loop with these views."""
    parts = {"learner": Linear, "schedule": schedule, "output": output, "optimizer": nl.SGD(lr=0.1), **views}
    return nl.Layer(type("Loop", (Squares,), parts), D, H)


ALONE = "a function of each token alone: the schedule reads a token before those after it are there"
ALONG = "let it run over the last axis, the features (axis 1 has the tokens), or write nl.conv(4)"


@pytest.mark.parametrize("schedule", [nl.Online(), nl.Causal(4), nl.Chunked(4, "apply-update")], ids=str)
@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: x.softmax(1),
        F.normalize,
        lambda x: x.cumsum(1),
        lambda x: x / len(x[0]),
        F.dropout,
        lambda x: x.view(1, 16, *x.shape[2:]),
    ],
    ids=["softmax", "normalize", "cumsum", "count", "dropout", "one length"],
)
def test_functions_that_mix_tokens_where_later_ones_are_not_there(mixing, schedule):
    def view():
        k = nl.view("d", make=[F.silu, mixing])  # HERE
        layer_of(schedule, k=k)

    def token():
        k = nl.view("d", of=mixing)  # HERE
        layer_of(schedule, k=k)

    def gate():
        e = nl.gate(mixing)  # HERE
        layer_of(schedule, e=e)

    def gated():
        output = [nl.gated(mixing), nl.project()]  # HERE
        layer_of(schedule, output)

    def gated_of():
        output = [nl.gated(of=mixing), nl.project()]  # HERE
        layer_of(schedule, output)

    what = "The {} mixes tokens, or is not the same each time."
    given = "16 tokens that come out otherwise in two pieces than at once"
    for step, called in (
        (view, "map of the view 'k'"),
        (token, "map of the view 'k'"),
        (gate, "activation of the gate 'e'"),
        (gated, "activation of nl.gated"),
        (gated_of, "map of nl.gated"),
    ):
        refused(step, TokenMixingError, what.format(called), given=given, need=ALONE, fix=ALONG)


def test_functions_that_mix_tokens_where_all_are_there():
    x = torch.randn(1, 6, D)
    for schedule in (nl.FullBatch(1), nl.Shuffled(2)):
        layer = layer_of(schedule, k=nl.view("d", make=[lambda x: x - x.mean(1, keepdim=True)]))
        assert layer(x).shape == x.shape
    layer_of(nl.Online(), k=nl.view("d", make=[lambda x: x.softmax(-1), torch.tanh]))
    layer_of(nl.FullBatch(1), k=nl.view("d", make=[lambda x: x.view(1, 7, 2, 4)]))  # of seven tokens alone


@pytest.mark.parametrize("schedule", [nl.FullBatch(1), nl.Online()], ids=str)
def test_functions_that_change_the_shape(schedule):
    def view():
        k = nl.view("d", make=[lambda x: torch.cat([x, x], -1)])  # HERE
        layer_of(schedule, k=k)

    def gate():
        e = nl.gate(lambda x: x.mean(-1))  # HERE
        layer_of(schedule, e=e)

    def output():
        class Loop(Squares):  # HERE
            learner = Linear
            output = (lambda x: x.shape, nl.project())

        nl.Layer(Loop, D, H)

    what = "The {} changes the shape of what it is given."
    need = "a function of [B, N, groups, features] that returns as many: views and weights have declared sizes"
    fix = "declare the view with other dims and project to them, or reshape in the loop's bodies"
    for step, called, given in (
        (view, "map of the view 'k'", "[1, 16, 2, 8] of [1, 16, 2, 4]"),
        (gate, "activation of the gate 'e'", "[1, 16, 2] of [1, 16, 2, 1]"),
        (output, "map of the read-out", "a Size"),
    ):
        refused(step, ShapeMismatchError, what.format(called), given=given, need=need, fix=fix)


def test_trying_functions_draws_from_no_generator_of_the_user_s():
    torch.manual_seed(0)
    plain = layer_of(nl.FullBatch(1), k=nl.view("d", make=[F.silu]))
    torch.manual_seed(0)
    drawing = layer_of(nl.FullBatch(1), k=nl.view("d", make=[F.dropout]))
    assert torch.equal(plain.out.weight, drawing.out.weight)
