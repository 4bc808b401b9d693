"""Every decomposition against the op it replaces: values, gradients and second derivatives, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from nestloop.lowering.ops import decompose, places, windows

aten = torch.ops.aten


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def derivatives(function: Callable[..., Any], tensors: list[Tensor]) -> list[Tensor]:
    """Values, the gradient of a weighting of them, and the gradient of a weighting of that gradient."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    values = [v for v in tree_leaves(function(*leaves)) if isinstance(v, Tensor)]
    weighted = torch.stack([(v * normal(*v.shape, seed=3)).sum() + v.square().sum() for v in values]).sum()
    gradients = torch.autograd.grad(weighted, leaves, create_graph=True)
    again = torch.stack([(g * normal(*g.shape, seed=4)).sum() + g.square().sum() for g in gradients]).sum()
    second = torch.autograd.grad(again, leaves, allow_unused=True)
    zeros = [torch.zeros_like(t) if s is None else s for s, t in zip(second, leaves, strict=True)]
    return [t.detach() for t in (*values, *gradients, *zeros)]


def assert_same(ours: Callable[..., Any], theirs: Callable[..., Any], *arguments: Any) -> None:
    """Both functions and their derivatives agree on these arguments, of which the floating tensors vary."""
    tensors = [a for a in tree_leaves(arguments) if isinstance(a, Tensor)]

    def with_tensors(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Tensor) -> Any:
            rest = iter(given)
            return function(*tree_map(lambda a: next(rest) if isinstance(a, Tensor) else a, arguments))

        return run

    found, wanted = (derivatives(with_tensors(f), tensors) for f in (ours, theirs))
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


CONVOLUTIONS = [
    # (input, weight, bias, stride, padding, dilation, groups)
    pytest.param((2, 3, 7), (4, 3, 3), True, [1], [1], [1], 1, id="1d"),
    pytest.param((1, 4, 9), (6, 2, 2), False, [2], [0], [3], 2, id="1d-grouped-strided-dilated"),
    pytest.param((2, 4, 5, 6), (4, 1, 3, 3), False, [1, 1], [1, 1], [1, 1], 4, id="2d-depthwise"),
    pytest.param((1, 3, 5, 5), (3, 1, 3, 1), True, [1, 2], [0, 1], [2, 1], 3, id="2d-depthwise-uneven"),
    pytest.param((2, 3, 5, 4), (5, 3, 3, 2), True, [2, 1], [1, 0], [1, 2], 1, id="2d-uneven"),
    pytest.param((2, 4, 6, 5), (6, 2, 1, 1), False, [1, 1], [0, 0], [1, 1], 2, id="2d-pointwise-grouped"),
    pytest.param((1, 2, 4, 3, 3), (4, 1, 2, 2, 3), True, [1, 1, 1], [1, 0, 1], [1, 1, 1], 2, id="3d-grouped"),
    pytest.param((1, 2, 3, 4, 3), (2, 1, 3, 3, 3), False, [1, 1, 1], [1, 1, 1], [1, 1, 1], 2, id="3d-depthwise"),
    pytest.param((1, 2, 5, 5), (4, 1, 3, 3), False, [1, 1], [1, 1], [1, 1], 2, id="two-channels-out-of-each"),
]


@pytest.mark.parametrize(("shape", "kernel", "bias", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
def test_convolution(shape, kernel, bias, stride, padding, dilation, groups):
    settings = (stride, padding, dilation, False, [0] * len(stride), groups)
    tensors = [normal(*shape), normal(*kernel), *([normal(kernel[0])] if bias else [])]

    def of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, w, b=None: function(x, w, b, *settings)

    assert_same(of(windows.convolution), of(aten.convolution.default), *tensors)


def test_a_transposed_convolution_is_left_to_be_refused():
    arguments = (normal(1, 2, 4), normal(2, 3, 3), None, [1], [0], [1], True, [0], 1)
    assert windows.convolution(*arguments) is NotImplemented


@pytest.mark.parametrize("correction", [None, 0, 1, 2])
@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [None, [1], [-1, 0]])
def test_variance(dim, keepdim, correction):
    def of(function):
        return lambda x: function(x, dim, correction=correction, keepdim=keepdim)

    assert_same(of(decompose.var_mean), of(aten.var_mean.correction), normal(4, 5))
    assert_same(of(decompose.var), of(aten.var.correction), normal(4, 5))
    assert_same(of(decompose.std_mean), of(aten.std_mean.correction), normal(4, 5))
    assert_same(of(decompose.std), of(aten.std.correction), normal(4, 5))


@pytest.mark.parametrize("affine", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("shape", [[5], [3, 5]])
def test_layer_norm(shape, affine):
    weight, bias = (normal(*shape, seed=i) if given else None for i, given in enumerate(affine))

    def first(function):
        return lambda x, w, b: function(x, shape, w, b, 1e-5)[0]

    assert_same(
        first(decompose.native_layer_norm), first(aten.native_layer_norm.default), normal(4, 3, 5), weight, bias
    )
    ours = decompose.native_layer_norm(normal(4, 3, 5), shape, weight, bias, 1e-5)
    theirs = aten.native_layer_norm.default(normal(4, 3, 5), shape, weight, bias, 1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [None, 1e-3])
@pytest.mark.parametrize("affine", [False, True])
def test_rms_norm(affine, eps):
    weight = normal(5, seed=1) if affine else None

    def ours(x, w=None):
        return decompose.fused_rms_norm(x, [5], w, eps)[0]

    def theirs(x, w=None):
        added = torch.finfo(x.dtype).eps if eps is None else eps
        normed = x / (x.square().mean(-1, keepdim=True) + added).sqrt()
        return normed if w is None else normed * w

    tensors = [normal(4, 5), *([] if weight is None else [weight])]
    assert_same(ours, theirs, *tensors)
    torch.testing.assert_close(ours(*tensors), F.rms_norm(tensors[0], (5,), weight, eps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "pad", [[1, 2], [0, 1, 2, 0], [-1, 0], [2, -1, -1, 1], [-1, -2, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0, 1, 0]]
)
@pytest.mark.parametrize("value", [0.0, 1.5])
def test_padding(pad, value):
    assert_same(
        lambda x: decompose.constant_pad_nd(x, pad, value),
        lambda x: aten.constant_pad_nd.default(x, pad, value),
        normal(3, 4, 5),
    )


@pytest.mark.parametrize("repeats", [[2], [1, 3], [2, 1, 1], [2, 3]])
def test_repeat(repeats):
    x = normal(4) if len(repeats) == 1 else normal(3, 4)
    assert_same(lambda x: decompose.repeat(x, repeats), lambda x: aten.repeat.default(x, repeats), x)


@pytest.mark.parametrize(("sizes", "dim"), [([2, 3], 1), ([1, 1, 2], 0), ([5], -1)])
def test_split(sizes, dim):
    assert_same(
        lambda x: decompose.split_with_sizes(x, sizes, dim),
        lambda x: aten.split_with_sizes.default(x, sizes, dim),
        normal(4, 5),
    )


@pytest.mark.parametrize(
    ("shifts", "dims"), [([1], [0]), ([-2], [1]), ([7], [1]), ([1, -1], [0, 1]), ([3], []), ([0], [0]), ([-9], [-1])]
)
def test_roll(shifts, dims):
    assert_same(lambda x: decompose.roll(x, shifts, dims), lambda x: aten.roll.default(x, shifts, dims), normal(4, 5))


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize(
    ("start", "end", "step"),
    [(0, 3, 1), (1, 5, 1), (-3, -1, 1), (0, 6, 2), (1, 6, 2), (-5, 9, 3), (2, 2**63 - 1, 4), (-99, 3, 1), (2, 99, 2)],
)
def test_slice_backward(dim, start, end, step):
    shape = [6, 6]
    gradient = aten.slice.Tensor(normal(*shape), dim, start, end, step)
    assert_same(
        lambda g: decompose.slice_backward(g, shape, dim, start, end, step),
        lambda g: aten.slice_backward.default(g, shape, dim, start, end, step),
        gradient,
    )


@pytest.mark.parametrize(("dim", "index"), [(0, 0), (1, 2), (-1, -1), (0, -3)])
def test_select_backward(dim, index):
    shape = [4, 5]
    assert_same(
        lambda g: decompose.select_backward(g, shape, dim, index),
        lambda g: aten.select_backward.default(g, shape, dim, index),
        aten.select.int(normal(*shape), dim, index),
    )


@pytest.mark.parametrize("bounds", [(True, False), (False, True), (True, True)])
def test_clamp_between_tensors(bounds):
    low, high = -normal(5).abs() if bounds[0] else None, normal(5, seed=1).abs() if bounds[1] else None
    assert_same(decompose.clamp, aten.clamp.Tensor, normal(4, 5), low, high)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize(("by", "op"), [(torch.amax, aten.max.dim), (torch.amin, aten.min.dim)])
def test_the_largest_and_smallest_with_their_places(by, op, dim, keepdim):
    found = places.extreme(by)
    tied = normal(4, 5).round()
    for a, b in zip(found(tied, dim, keepdim), op(tied, dim, keepdim), strict=True):
        assert torch.equal(a, b)
    for x in (normal(4, 5), tied):
        assert_same(lambda x: found(x, dim, keepdim)[0], lambda x: op(x, dim, keepdim)[0], x)
    tied[1, 2] = tied[3, 1] = torch.nan
    tied[0, 0] = torch.inf
    for a, b in zip(found(tied, dim, keepdim), op(tied, dim, keepdim), strict=True):
        assert torch.equal(a.nan_to_num(-99), b.nan_to_num(-99))


@pytest.mark.parametrize("dim", [None, 1, [0, 1]])
def test_any_and_all(dim):
    for x in (normal(4, 5) > 0.8, normal(4, 5) > -0.8, normal(4, 5).relu()):
        arguments = () if dim is None else (dim,)
        assert torch.equal(decompose.any_of(x, *arguments), torch.any(x, *arguments))
        assert torch.equal(decompose.all_of(x, *arguments), torch.all(x, *arguments))


@pytest.mark.parametrize("keepdim", [False, True])
def test_product_along_an_axis(keepdim):
    assert_same(lambda x: decompose.product(x, 1, keepdim), lambda x: aten.prod.dim_int(x, 1, keepdim), normal(3, 4))


@pytest.mark.parametrize(("dim1", "dim2"), [(0, 1), (1, 2), (-1, -2), (2, 0)])
def test_diagonal(dim1, dim2):
    x = normal(4, 4, 4)
    assert_same(lambda x: places.diagonal(x, 0, dim1, dim2), lambda x: torch.diagonal(x, 0, dim1, dim2), x)


@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 3])
@pytest.mark.parametrize(("dim1", "dim2"), [(0, 1), (1, 2), (2, 0)])
def test_diagonals_beside_it(dim1, dim2, offset):
    x = normal(4, 5, 4)
    assert_same(lambda x: places.diagonal(x, offset, dim1, dim2), lambda x: torch.diagonal(x, offset, dim1, dim2), x)
    source = normal(*torch.diagonal(x, offset, dim1, dim2).shape)
    assert_same(
        lambda x, source: places.diagonal_scatter(x, source, offset, dim1, dim2),
        lambda x, source: torch.diagonal_scatter(x, source, offset, dim1, dim2),
        x,
        source,
    )


@pytest.mark.parametrize("offset", [-5, -2, 0, 1, 3])
@pytest.mark.parametrize("sizes", [(4, 4), (3, 5), (5, 3)])
def test_places_of_triangles(sizes, offset):
    rows, columns = sizes
    for found, wanted in (
        (places.triu_indices(rows, columns, offset), torch.triu_indices(rows, columns, offset)),
        (places.tril_indices(rows, columns, offset), torch.tril_indices(rows, columns, offset)),
    ):
        assert torch.equal(found, wanted) if wanted.numel() else found is NotImplemented


def test_inverse():
    x = normal(2, 3, 3) + 4 * torch.eye(3, dtype=torch.float64)
    assert_same(lambda x: decompose.inverse(x)[0], torch.linalg.inv, x)


def test_whole_numbers():
    ends = [-2.5, -1.5, -0.5, -0.3, -0.0, 0.0, 0.3, 0.5, 1.5, 2.5, 3.0, torch.inf, -torch.inf]
    x = torch.cat([normal(20) * 3, torch.tensor(ends, dtype=torch.float64)])
    for op in (aten.round.default, aten.trunc.default, aten.ceil.default):
        rounded = decompose.decompositions()[op]
        assert torch.equal(rounded(x), op(x))
        assert torch.equal(rounded(x).signbit(), op(x).signbit())  # of zeros, too
        counts = torch.arange(-3, 3)
        assert torch.equal(rounded(counts), counts)


@pytest.mark.parametrize("name", ["fmod", "remainder", "hypot", "log10"])
def test_functions_by_others(name):
    op = getattr(aten, name)
    x = normal(4, 5) * 3
    y = normal(5).abs() + 0.5
    if name in ("fmod", "remainder"):
        assert_same(decompose.decompositions()[op.Scalar], op.Scalar, x, 0.7)
        assert_same(decompose.decompositions()[op.Tensor], op.Tensor, x, y)
    else:
        arguments = (x, y) if name == "hypot" else (x.abs() + 0.5,)
        assert_same(decompose.decompositions()[op.default], op.default, *arguments)


# Where a square or an exponential overflows or vanishes in float32, and where branches meet.
ENDS = [0.0, 1e-30, 0.5, 1.0, 3.0, 89.0, 1e4, 1e10, 1e19, 1e30, 3e38]
AT_ENDS: dict[str, tuple[Any, Callable[[Tensor], tuple[Any, ...]]]] = {
    "celu": (aten.celu.default, lambda x: (x,)),
    "celu, steeper": (aten.celu.default, lambda x: (x, 0.5)),
    "hardswish": (aten.hardswish.default, lambda x: (x,)),
    "hypot": (aten.hypot.default, lambda x: (x, (0.3 * x).flip(0))),
    "hypot of both small": (aten.hypot.default, lambda x: (x[1:], 0.3 * x[1:])),
    "smooth L1": (aten.smooth_l1_loss.default, lambda x: (x, torch.ones_like(x), 0, 1.5)),
    "smooth L1 without a bend": (aten.smooth_l1_loss.default, lambda x: (x, torch.full_like(x, 0.3), 0, 0.0)),
}


@pytest.mark.parametrize("name", AT_ENDS)
def test_the_ends_of_float32(name: str):
    """Values and gradients as PyTorch's in float64."""
    op, arguments = AT_ENDS[name]
    ends = torch.tensor(ENDS)
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for x in (ends, -ends):
        for function, dtype, made in ((decompose.decompositions()[op], x.dtype, found), (op, torch.float64, wanted)):
            leaf = x.to(dtype).requires_grad_()
            value = function(*arguments(leaf))
            made += [t.float() for t in (value.detach(), *torch.autograd.grad(value.sum(), leaf))]
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)


@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_smooth_l1(beta: float, reduction: int):
    def of(function):
        return lambda x, y: function(x, y, reduction, beta)

    op = aten.smooth_l1_loss.default
    assert_same(of(decompose.smooth_l1_loss), of(op), normal(4, 5), normal(4, 5, seed=1))


@pytest.mark.parametrize("name", ["celu", "hardswish"])
def test_activations(name: str):
    op = getattr(aten, name).default
    assert_same(decompose.decompositions()[op], op, 4 * normal(4, 5))


def test_softmax_where_everything_is_hidden():
    x = normal(3, 4)
    assert_same(lambda x: decompose.safe_softmax(x, -1), lambda x: aten._safe_softmax.default(x, -1), x)
    x[1] = -torch.inf
    x[2, 1] = -torch.inf
    assert torch.equal(decompose.safe_softmax(x, -1), aten._safe_softmax.default(x, -1))


def test_the_table_holds_them_and_keeps_what_has_a_row():
    table = decompose.decompositions()
    assert table[aten.convolution.default] is windows.convolution
    assert table[aten.slice_backward.default] is decompose.slice_backward
    assert aten.softplus_backward.default not in table and aten.tril.default not in table
