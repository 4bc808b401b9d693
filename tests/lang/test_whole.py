"""Maps that see all tokens of a sequence, and rotary positions on grids and on the whole width."""

import pytest
import torch
import torch.nn.functional as F

import nestloop as nl
from nestloop.errors import UnresolvedDimError, ViewError
from tests.lang.squares import B, D, H, Linear, N, Squares, close, d, heads, no_map, views_of
from tests.refusals import refused


class OnGrid(Squares):
    """A loop that sees its tokens' grid, three rows of two."""

    learner = Linear
    rows, columns = nl.grid()


def of_grid(**declared):
    """A layer of a loop on a grid with these views, x, and the call that was made of it."""
    torch.manual_seed(0)
    layer = nl.Layer(type("Made", (OnGrid,), declared), D, H, backend="reference").double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, seen = torch.randn(B, N, D, dtype=torch.float64), {}
    layer.op.run = lambda views, *_: (seen.update(views), (views["q"], {}, None))[1]
    layer(x, rows=3, columns=2)
    return layer, x, seen


def test_a_convolution_over_the_grid_and_a_norm_over_tokens():
    layer, x, made = of_grid(
        k=nl.view("d", make=[nl.instance_norm(0.5), nl.conv2d(3, residual=True)]),
        q=nl.view("d", make=nl.conv2d(5, bias=False)),
    )
    p = layer.state_dict()
    assert list(p["views.k.conv2d.weight"].shape) == [D, 1, 3, 3] and "views.q.conv2d.bias" not in p
    k = F.instance_norm((x @ p["views.k.project.weight"].T).mT, eps=0.5).unflatten(2, (3, 2))
    k = k + F.conv2d(k, p["views.k.conv2d.weight"], p["views.k.conv2d.bias"], padding=1, groups=D)
    close(made["k"], heads(k.flatten(2).mT))
    q = (x @ p["views.q.project.weight"].T).mT.unflatten(2, (3, 2))
    close(made["q"], heads(F.conv2d(q, p["views.q.conv2d.weight"], padding=2, groups=D).flatten(2).mT))


@pytest.mark.parametrize("pairs", ["interleaved", "half"])
@pytest.mark.parametrize("over", ["head", "width"])
def test_rotary_positions_on_a_grid(pairs, over):
    layer, x, made = of_grid(k=nl.view("d", make=nl.rope(theta=100.0, pairs=pairs, grid=True, over=over)))
    flat, features = x @ layer.state_dict()["views.k.project.weight"].T, D if over == "width" else d
    flat = flat.unflatten(-1, (-1, features))
    turned = torch.empty_like(flat)
    for i in range(features // 2):
        place, j = (torch.arange(N) // 2, i) if i < features // 4 else (torch.arange(N) % 2, i - features // 4)
        angle = (place * torch.tensor(100.0) ** (-4 * j / features)).double()[:, None]
        one, other = (2 * i, 2 * i + 1) if pairs == "interleaved" else (i, i + features // 2)
        pair = torch.complex(flat[..., one], flat[..., other]) * torch.complex(angle.cos(), angle.sin())
        turned[..., one], turned[..., other] = pair.real, pair.imag
    torch.testing.assert_close(made["k"], heads(turned.flatten(2)), rtol=1e-6, atol=1e-6)


def test_rotary_positions_on_the_whole_width():
    layer, x, made = views_of(k=nl.view("d", make=nl.rope(over="width")))
    _, _, alone = views_of(k=nl.view("d", make=nl.rope()))
    flat = x @ layer.state_dict()["views.k.project.weight"].T
    angle = torch.arange(N)[:, None] * 10000.0 ** (-torch.arange(0, D, 2) / D)
    turned = torch.view_as_complex(flat.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(made["k"], heads(torch.view_as_real(turned).flatten(2)), rtol=1e-6, atol=1e-6)
    assert not torch.equal(made["k"], alone["k"])


def test_maps_of_a_grid_that_is_not_there():
    def step():
        class Loop(Squares):
            learner = Linear
            k = nl.view("d", make=nl.conv2d())  # HERE

    refused(
        step,
        ViewError,
        "A map of the view 'k' is on the token grid, of which Loop has none.",
        given="nl.conv2d(3)",
        need="the grid's two dims",
        fix="write h, w = nl.grid() in Loop",
    )


def test_maps_of_all_tokens_in_a_stream():
    def step():
        class Loop(Squares):
            learner = Linear
            schedule = nl.Causal(4)
            output = (nl.instance_norm(), nl.project())  # HERE

    refused(
        step,
        ViewError,
        "A map of the read-out sees all tokens of a sequence, of which Loop has not seen the later ones.",
        given="nl.instance_norm(); schedule Causal",
        need="a batch schedule, or a map of each token",
        fix="write schedule = nl.FullBatch(1), or leave nl.instance_norm() out",
    )


def test_tokens_that_are_no_grid_of_a_map():
    class Loop(OnGrid):
        k = nl.view("d", make=nl.conv2d())

    layer = nl.Layer(Loop, D, H, backend="reference")
    with pytest.raises(UnresolvedDimError, match=r"The 6 tokens of Loop are not a grid of rows = 2 by columns = 2\."):
        layer(torch.randn(B, N, D))


@pytest.mark.parametrize(
    "make, what, given, need, fix",
    [
        (
            lambda: nl.conv2d(4),
            "The window of a convolution over the token grid has no middle.",
            "size=4",
            "an odd number of tokens, 1 or more: as many on each side",
            "write nl.conv2d(3)",
        ),
        (
            lambda: nl.instance_norm(-1),
            "The eps of nl.instance_norm is none.",
            "eps=-1",
            "a finite number, 0 or more",
            "write nl.instance_norm()",
        ),
        (
            lambda: nl.rope(grid=True, period=4),
            "Rotary positions on a grid have no period.",
            "grid=True, period=4",
            "rows and columns of the whole grid",
            "write nl.rope(grid=True)",
        ),
        (
            lambda: nl.rope(over="heads"),
            "nl.rope does not know what to turn.",
            "over='heads'",
            '"head" for each head\'s features, "width" for all of them together',
            'write nl.rope(over="width")',
        ),
    ],
)
def test_maps_that_are_none(make, what, given, need, fix):
    no_map(make, __file__, what, given, need, fix)
