"""The solved form: gradients at the current weights, where a cotangent is affine in the learner's output.

With delta_t = sum_i a_i,t y_i,t + c_t for products y_i,t = x_i,t W and numbers a_i,t per row, the rows of a tile are
one unit lower-triangular system (the UT transform of the delta rule, arXiv 2406.06484):

    delta_t + rate_t sum_i a_i,t sum_{s < t} C'[t, s] (x_i,t . u_s) delta_s
        = rate_t (sum_i a_i,t beta'_t (x_i,t W_0) + c_t)

C' and beta' being those of the weights that token t's gradient is taken at. With every a_i = 0 the gradients do not
depend on the weights, there is nothing to solve, and any number of tokens makes a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from nestloop.lang.declare import Gate, Slow
from nestloop.lowering import ops
from nestloop.lowering.axes import type_axes
from nestloop.lowering.derivative import grad
from nestloop.lowering.ops import Kind
from nestloop.lowering.recorder import Located, call, placeholders
from nestloop.lowering.rewrites.reach import ancestors
from nestloop.lowering.simplify import simplify
from nestloop.lowering.streams.coefficients import Coefficients, before, coefficients, strict
from nestloop.lowering.streams.dual import (
    Gradients,
    Read,
    finish,
    gradients,
    product,
    rated,
    scores,
    vector,
    weighed,
)
from nestloop.lowering.streams.step import Step, Tensors, momentum_names
from nestloop.lowering.streams.uses import Matrix, NotAffine, Uses, Vector, is_matrix, weight_users

aten = torch.ops.aten


@dataclass(frozen=True)
class Response:
    """How the gradients of a tile depend on the products with fast weights, traced once.

    Attributes:
        module: (products y by name, vectors, slow, keys) -> every delta, every u, every held x, every vector's rows.
        uses: the products that are tapped: (name of y, fast weight, flipped); held ones come after.
        held: products with weights held constant: (name of y, fast weight, flipped, index of their x in the results).
        free: whether no gradient depends on any fast weight.
    """

    module: fx.GraphModule
    uses: tuple[tuple[str, str, bool], ...]
    held: tuple[tuple[str, str, bool], ...]
    free: bool


def respond(step: Step) -> Response:
    """Trace the gradients as a function of the products.

    Raises:
        NotAffine: a fast weight enters otherwise than by a product or row by row.
    """
    spec, loss = step.spec, step.captured.loss
    assert loss is not None
    axes = type_axes(spec, loss).axes
    tapped = weight_users(loss, spec)
    held = _held_users(loss)
    tracer = step.tracer
    keys = list(spec.inputs)
    names, examples = [], []
    for node in [*tapped, *held]:
        names.append(f"y_{node.name}")
        examples.append(tracer.like(node.meta["val"]))
    for name in [*_vectors(step), *spec.slow, *keys]:
        names.append(name)
        examples.append(tracer.tile(name))
    uses: list[tuple[str, str, bool]] = []
    kept: list[tuple[str, str, bool]] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        uses.clear()
        kept.clear()
        rows = next(iter({n: given[n] for n in keys}.values())).shape[0]
        like = given[keys[0]]

        def objective(taps: dict[str, Tensor]) -> tuple[Tensor, Any]:
            found: list[Tensor] = []
            others: list[Tensor] = []

            def product(x: Tensor, matrix: Matrix, node: fx.Node) -> Tensor:
                key = f"y_{node.name}"
                if matrix.name.endswith("__held"):
                    kept.append((key, matrix.name.removesuffix("__held"), matrix.flipped))
                    others.append(x)
                    return given[key]
                uses.append((key, matrix.name, matrix.flipped))
                found.append(x)
                return taps[key]

            values: dict[str, Any] = {}
            for name in spec.fast:
                matrix = is_matrix(spec, name)
                rows_of = None if matrix else given[name].unsqueeze(0) + taps.get(name, torch.zeros(()))
                values[name] = Matrix(name) if matrix else Vector(name, rows_of)
                if spec.holds:
                    still = None if matrix else given[name].unsqueeze(0).expand(rows, *given[name].shape)
                    values[f"{name}__held"] = Matrix(f"{name}__held") if matrix else Vector(name, still)
            inputs = {**values, **{n: given[n] for n in (*spec.slow, *keys)}}
            losses = call(loss, inputs, Uses(loss, axes, product))
            return losses.sum(), (found, others)

        taps = {f"y_{node.name}": given[f"y_{node.name}"] for node in tapped}
        taps |= {name: like.new_zeros(rows, *given[name].shape) for name in _vectors(step)}
        made, (found, others) = grad(objective, has_aux=True)(taps)
        deltas = [made[key] for key, *_ in uses]
        return (*deltas, *found, *others, *[made[name] for name in _vectors(step)])

    module = simplify(tracer.trace_on(flat, examples, names))
    (results,) = next(node for node in module.graph.nodes if node.op == "output").args
    moving = {f"y_{node.name}" for node in [*tapped, *held]} | set(_vectors(step))
    sizes = {n for n in module.graph.nodes if n.op == "call_function" and ops.is_size_op(n.target)}
    below: set[str] = set()
    for result in results:
        if isinstance(result, fx.Node):
            reached = ancestors(result, sizes)
            below |= {n.meta.get("declared", n.name) for n in reached if n.op == "placeholder"}
    return Response(module, tuple(uses), tuple(kept), not below & moving)


def _vectors(step: Step) -> list[str]:
    return [name for name in step.spec.fast if not is_matrix(step.spec, name)]


def _held_users(loss: fx.GraphModule) -> list[fx.Node]:
    """Products with a held weight, in order."""
    reached = {
        n for n in loss.graph.find_nodes(op="placeholder") if str(n.meta.get("declared", n.name)).endswith("__held")
    }
    found = []
    for node in loss.graph.nodes:
        if node.op == "call_function" and node.target is aten.mm.default and node.args[1] in reached:
            found.append(node)
        elif node.op == "call_function" and node.args and node.args[0] in reached:
            reached.add(node)
    return found


@dataclass(frozen=True)
class Affine:
    """A value sum_i factors_i y_i + rest: factors are numbers or [r, 1], by name of y; `rest` None is 0; `like` has its
    shape."""

    factors: dict[str, Any]
    rest: Any
    like: Tensor


class _Affine(Located):
    """Runs the gradients with products as unknowns."""

    def __init__(self, module: fx.GraphModule, unknown: set[str]) -> None:
        super().__init__(module)
        self.unknown = unknown

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        return Affine({str(target): 1.0}, None, value) if str(target) in self.unknown else value

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not any(isinstance(a, Affine) for a in args):
            return super().run_node(n)
        if ops.is_size_op(n.target):
            return ops.call(n.target, tuple(a.like if isinstance(a, Affine) else a for a in args), kwargs)
        return _rule(n, args, kwargs)


def _rule(n: fx.Node, args: Any, kwargs: Any) -> Any:
    target = n.target
    if target in (*ops.ADD, *ops.SUB):
        sign = kwargs.get("alpha", 1) * (1 if target in ops.ADD else -1)
        like = next(a.like for a in args[:2] if isinstance(a, Affine))
        left, right = (a if isinstance(a, Affine) else Affine({}, a, like) for a in args[:2])
        factors = dict(left.factors)
        for name, factor in right.factors.items():
            factors[name] = sign * factor if name not in factors else factors[name] + sign * factor
        rest = left.rest
        if right.rest is not None:
            rest = sign * right.rest if rest is None else rest + sign * right.rest
        return Affine(factors, rest, like)
    if target is aten.neg.default:
        return _times(args[0], -1.0)
    if target in (*ops.MUL, *ops.DIV):
        value, other = args[:2]
        divides = target in ops.DIV
        if isinstance(other, Affine) and not divides and not isinstance(value, Affine):
            value, other = other, value
        if isinstance(other, Affine):
            raise NotAffine("the gradient is not affine in the learner's output")
        if isinstance(other, Tensor):
            node = n.args[1] if isinstance(args[0], Affine) else n.args[0]
            shape = node.meta["val"].shape
            if not (len(shape) == 0 or (len(shape) == 2 and isinstance(shape[1], int) and shape[1] == 1)):
                raise NotAffine("the gradient weighs the learner's outputs one by one")
        return _times(value, 1 / other if divides else other)
    if ops.row(target).kind is Kind.VIEW and list(n.meta["val"].shape) == list(n.args[0].meta["val"].shape):
        return args[0]
    raise NotAffine(f"the gradient is not affine in the learner's output: {str(target).removeprefix('aten.')}")


def _times(value: Affine, factor: Any) -> Affine:
    rest = None if value.rest is None else value.rest * factor
    return Affine({name: one * factor for name, one in value.factors.items()}, rest, value.like)


def check_solvable(step: Step, response: Response) -> None:
    """Raise `NotAffine` with the reason where the gradients are no triangular system."""
    spec, optimizer = step.spec, step.spec.optimizer
    if len(response.uses) != 1 or len(spec.fast) != 1:
        raise NotAffine("several fast weights learn at once")
    if optimizer.scale is not None or optimizer.window is not None:
        raise NotAffine("a scale or a window")
    if optimizer.momentum is not None and optimizer.decay_order == "before" and optimizer.decays is not None:
        raise NotAffine("momentum beside a decay before the gradient")
    rate = optimizer.rate_of(response.uses[0][1])
    if isinstance(rate, (Gate, Slow)) and rate.dims:
        raise NotAffine("a learning rate per channel")
    step.tracer.trace_on(lambda *g: _delta(response, g).rest, *_trial(step, response))


def _trial(step: Step, response: Response) -> tuple[list[Tensor], list[str]]:
    nodes = response.module.graph.find_nodes(op="placeholder")
    return [step.tracer.like(n.meta["val"]) for n in nodes], [n.meta.get("declared", n.name) for n in nodes]


def _delta(response: Response, values: Any) -> Affine:
    """The one delta as an affine form; `rest` is a tensor."""
    unknown = {key for key, *_ in (*response.uses, *response.held)}
    made = _Affine(response.module, unknown).run(*values)
    delta = made[0]
    for other in made[1:]:
        if isinstance(other, Affine):
            raise NotAffine("an input of the product depends on another product")
    if not isinstance(delta, Affine):
        return Affine({}, delta, delta)
    if delta.rest is None:
        return Affine(delta.factors, torch.zeros_like(delta.like), delta.like)
    return delta


def solved_step(step: Step, response: Response, given: Tensors) -> tuple[Tensor, ...]:
    """One tile of any number of tokens: inputs of `Step.inputs` by name -> `Step.results`."""
    spec, optimizer = step.spec, step.spec.optimizer
    carried, slow, tokens, _ = step.split(given)
    keys = step.keys(tokens)
    rows = step.rows(keys, slow)
    first = step.first_only(rows)
    every = {name: coefficients(optimizer, weight, rows, first) for name, weight in spec.fast.items()}
    if response.free:
        found = rated(step, gradients(step, {n: carried[n] for n in spec.fast}, slow, keys), slow, keys)
    else:
        found = _solve(step, response, carried, slow, keys, every)
    found.losses = _losses(step, carried, slow, keys, found, every)
    return finish(step, carried, slow, keys, tokens, found, every)


def _solve(
    step: Step, response: Response, carried: Tensors, slow: Tensors, keys: Tensors, every: dict[str, Coefficients]
) -> Gradients:
    spec, optimizer = step.spec, step.spec.optimizer
    ((key, name, flipped),) = response.uses
    rows = step.rows(keys, slow)
    like = next(iter(keys.values()))
    taken = _taken(step, rows, every[name])
    given = {**slow, **keys}
    nodes = {n.meta.get("declared", n.name): n for n in response.module.graph.find_nodes(op="placeholder")}
    blank = {
        one: like.new_zeros(like.shape[0], nodes[one].meta["val"].shape[1])
        for one, *_ in (*response.uses, *response.held)
    }
    names = placeholders(response.module)
    delta = _delta(response, [{**given, **blank}[n] for n in names])
    results = call(response.module, {**given, **blank})
    u, others = results[1], list(results[2 : 2 + len(response.held)])
    inputs = {key: (u, flipped)} | {one: (x, turned) for (one, _, turned), x in zip(response.held, others, strict=True)}
    if flipped or any(turned for _, turned in inputs.values()):
        raise NotAffine("the transpose of a fast weight")
    rate = step.value(keys, slow)(spec.fast[name], optimizer.rate_of(name))
    rate = rate.reshape(-1, 1) if isinstance(rate, Tensor) else rate
    right, system = delta.rest, None
    for one, factor in delta.factors.items():
        x = inputs[one][0]
        y = weighed(x, taken.base, carried[name])
        for f, momentum in zip(taken.momenta, momentum_names(spec, name), strict=True):
            y = y - weighed(x, f, carried[momentum])
        right = right + factor * y
        part = factor * scores(x, u, taken.mix)
        system = part if system is None else system + part
    right = rate * right
    if system is not None:
        right = torch.linalg.solve_triangular(rate * system, right, upper=False, unitriangular=True)
    return Gradients({name: [(u, right)]}, {}, None)


def _losses(
    step: Step,
    carried: Tensors,
    slow: Tensors,
    keys: Tensors,
    found: Gradients,
    every: dict[str, Coefficients],
) -> Tensor:
    """Each row's loss at the weights its gradient was taken at, which are built no more than those of the read-out."""
    spec, loss = step.spec, step.captured.loss
    assert loss is not None
    rows = step.rows(keys, slow)
    reads = {
        name: Read(_taken(step, rows, every[name]), carried[name], [carried[n] for n in momentum_names(spec, name)])
        for name in spec.fast
    }

    def of_product(x: Tensor, matrix: Matrix, node: fx.Node) -> Tensor:
        name = matrix.name.removesuffix("__held")
        return product(x, reads[name], found.pairs.get(name, []), matrix.flipped)

    values: dict[str, Any] = {}
    for name in spec.fast:
        for key in (name, f"{name}__held"):
            if is_matrix(spec, name):
                values[key] = Matrix(key)
            else:
                values[key] = Vector(name, vector(reads[name], found.vectors[name], rows.count))
    return call(loss, {**values, **slow, **keys}, Uses(loss, type_axes(spec, loss).axes, of_product))


def _taken(step: Step, rows: Any, after: Coefficients) -> Coefficients:
    """The coefficients of the weights that each row's gradient is taken at."""
    optimizer = step.spec.optimizer
    if optimizer.decays is not None and optimizer.decay_order == "before":
        return strict(rows, after)
    return before(rows, after)
