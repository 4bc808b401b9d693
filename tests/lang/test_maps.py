"""Maps of views, gates and read-outs: what they compute, what they are called, and how they are refused."""

import math

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
    ViewError,
)
from nestloop.lang.init import alibi_slopes, fill
from tests.lang.squares import B, D, H, Linear, N, Squares, close, d, heads, no_map, views_of
from tests.refusals import refused


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
        fixed=nl.gate(torch.relu, of=nl.per_position(3, offset=lambda i: i + 1, learned=False)),
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
    close(made["fixed"], (torch.arange(N).double() % 3 + 1).expand(B, H, N))
    assert not any("fixed" in name for name in p)


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
            "theta=, period=, pairs=, grid= or over=; the number of features is the view's own",
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
            lambda: nl.gate(of=nl.per_position(4, learned=False)),
            "A number for each position is neither learned nor given.",
            "learned=False, no offset",
            "one of them",
            "write nl.per_position(offset=lambda i: 1 / (i + 1), learned=False)",
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
    no_map(make, __file__, what, given, need, fix)


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


@pytest.mark.parametrize(
    ("of", "fix"),
    [("lr", "leave pooled out"), ("decay", "leave pooled out, or write schedule = nl.Chunked(4)")],
)
def test_pooled_gates_where_tokens_step(of: str, fix: str):
    def step():
        class Loop(Squares):
            learner = Linear
            schedule = nl.Causal(4)
            eta = nl.gate(pooled=True)  # HERE
            optimizer = nl.SGD(**{of: eta})

    refused(
        step,
        ViewError,
        "The gate 'eta' is made from a chunk's mean, which the tokens of the chunk cannot know.",
        given="pooled=True; schedule Causal",
        need="a decay, momentum or scale of a schedule that steps once a chunk",
        fix=fix,
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
