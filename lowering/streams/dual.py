"""The dual form: a chunk's weights W_t are never built; each product with one is corrected by a product of tokens.

    x_t W_t = beta_t (x_t W_0) - sum_o f_t,o (x_t S_o) - sum_{s <= t} C[t, s] (x_t . u_s) delta_s

A local rewrite of the products in the read-out, whatever the learner around them (arXiv 2407.04620, appendix A).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from nestloop.lang.declare import Gate
from nestloop.lowering.axes import type_axes
from nestloop.lowering.derivative import grad
from nestloop.lowering.recorder import call
from nestloop.lowering.streams.coefficients import Coefficients, before, coefficients, last, last_row, of_rows
from nestloop.lowering.streams.halves import Halves
from nestloop.lowering.streams.step import VALID, Step, Tensors, causal, momentum_names
from nestloop.lowering.streams.uses import Matrix, NotAffine, Uses, Vector, is_matrix, weight_users


@dataclass
class Gradients:
    """Every row's gradient of every fast weight, at the anchor.

    Attributes:
        pairs: for a matrix [a, b] its (u [r, a], delta [r, b]): G_s = sum of u_s^T delta_s.
        vectors: for others G_s itself, [r, *dims].
        losses: each row's loss [r].
    """

    pairs: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    vectors: Tensors = field(default_factory=dict)
    losses: Any = None


def gradients(step: Step, at: Tensors, slow: Tensors, keys: Tensors) -> Gradients:
    """Taps on every use of a fast weight in the loss: inputs u, and cotangents delta."""
    spec, loss = step.spec, step.captured.loss
    assert loss is not None
    axes = type_axes(spec, loss).axes
    rows = next(iter(keys.values())).shape[0]
    nodes = weight_users(loss, spec)
    shapes = {node: node.meta["val"].shape[1] for node in nodes}
    like = next(iter(keys.values()))

    def tapped(taps: dict[Any, Tensor]) -> tuple[Tensor, Any]:
        found: list[tuple[fx.Node, Matrix, Tensor]] = []

        def product(x: Tensor, matrix: Matrix, node: fx.Node) -> Tensor:
            found.append((node, matrix, x))
            weight = at[matrix.name]
            return x @ (weight.mT if matrix.flipped else weight) + taps[node]

        values: dict[str, Any] = {}
        for name in spec.fast:
            if is_matrix(spec, name):
                values[name] = Matrix(name)
            else:
                values[name] = Vector(name, at[name].unsqueeze(0) + taps[name])
        given = step.loss_inputs(values, at, slow, keys)
        losses = call(loss, given, Uses(loss, axes, product))
        return losses.sum(), (losses, [(node, m, x) for node, m, x in found])

    taps: dict[Any, Tensor] = {node: like.new_zeros(rows, size) for node, size in shapes.items()}
    for name in spec.fast:
        if not is_matrix(spec, name):
            taps[name] = like.new_zeros(rows, *at[name].shape)
    kept: dict[str, Any] = {}

    def objective(taps: dict[Any, Tensor]) -> tuple[Tensor, Any]:
        total, (losses, found) = tapped(taps)
        kept["uses"] = [(node, matrix) for node, matrix, _ in found]
        return total, (losses, [x for _, _, x in found])

    made, (losses, inputs) = grad(objective, has_aux=True)(taps)
    result = Gradients(losses=losses)
    for (node, matrix), x in zip(kept["uses"], inputs, strict=True):
        delta = made[node]
        pair = (delta, x) if matrix.flipped else (x, delta)
        result.pairs.setdefault(matrix.name, []).append(pair)
    result.vectors = {name: made[name] for name in spec.fast if not is_matrix(spec, name)}
    return result


def rated(step: Step, found: Gradients, slow: Tensors, keys: Tensors) -> Gradients:
    """The gradients times their learning rates."""
    spec, value = step.spec, step.value(keys, slow)
    made = Gradients(losses=found.losses)
    for name, weight in spec.fast.items():
        part = spec.optimizer.rate_of(name)
        rate = value(weight, part)
        per_row = isinstance(part, Gate)
        if name in found.vectors:
            spread = per_row and not part.dims
            made.vectors[name] = found.vectors[name] * (rate.reshape(-1, *[1] * len(weight.dims)) if spread else rate)
            continue
        made.pairs[name] = [_scaled_pair(u, d, rate, per_row) for u, d in found.pairs.get(name, [])]
    return made


def _scaled_pair(u: Tensor, delta: Tensor, rate: Any, per_row: bool) -> tuple[Tensor, Tensor]:
    if not isinstance(rate, Tensor):
        return u, delta if rate == 1.0 else delta * rate
    shape = rate.shape[1:] if per_row else rate.shape
    if not shape or all(size == 1 for size in shape):
        return u, delta * (rate.reshape(-1, 1) if per_row else rate.reshape(()))
    along_u, along_delta = (rate.select(-1, 0), None) if shape[-1] == 1 else (None, rate.select(-2, 0))
    if shape[-1] != 1 and shape[-2] != 1:
        raise NotAffine("a learning rate for every element of a matrix")
    return (u * along_u, delta) if along_u is not None else (u, delta * along_delta)


def valid(found: Gradients, rows: Tensor) -> Gradients:
    """The gradients of rows that hold a token, 0 for others."""
    pairs = {n: [(u, delta * rows.unsqueeze(1)) for u, delta in every] for n, every in found.pairs.items()}
    vectors = {n: g * rows.reshape(-1, *[1] * (g.ndim - 1)) for n, g in found.vectors.items()}
    return Gradients(pairs, vectors, found.losses)


@dataclass
class Read:
    """What the weights of each token are, for reading: `Coefficients` of rows, and what they mix.

    Attributes:
        scale: the factor on all that was taken from W since the anchor [m, *c], or None.
    """

    coefficients: Coefficients
    base: Tensor
    momenta: list[Tensor]
    scale: Any = None
    update: Tensor | None = None


def product(x: Tensor, read: Read, pairs: list[tuple[Tensor, Tensor]], flipped: bool) -> Tensor:
    """x_t W_t for every row of x [m, a]: [m, b]; W_t^T where `flipped`."""
    c = read.coefficients

    def turned(value: Tensor | None) -> Tensor | None:
        return value.mT if value is not None and flipped and value.ndim > 1 else value

    made = weighed(x, _flip(c.base, flipped, 1), _required(turned(read.base)))
    for factor, momentum in zip(c.momenta, read.momenta, strict=True):
        made = made - weighed(x, _flip(factor, flipped, 1), _required(turned(momentum)))
    taken: Tensor | None = None
    for u, delta in pairs:
        one = mixed(x, delta if flipped else u, u if flipped else delta, _flip_mix(c.mix, flipped))
        taken = one if taken is None else taken + one
    if read.update is not None:
        waiting = x @ _required(turned(read.update))
        taken = waiting if taken is None else taken + waiting
    if taken is None:
        return made
    if read.scale is not None:
        taken = taken * read.scale
    return made - taken


def _required(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _flip(value: Tensor | None, flipped: bool, lead: int) -> Tensor | None:
    return value.mT if value is not None and flipped and value.ndim > lead else value


def _flip_mix(mix: Tensor | Halves, flipped: bool) -> Tensor | Halves:
    if isinstance(mix, Halves):
        return mix.with_channels(lambda factor: factor.mT) if flipped else mix
    return mix.mT if flipped and mix.ndim > 2 else mix


def weighed(x: Tensor, factor: Tensor | None, weight: Tensor) -> Tensor:
    """x_t (factor_t W): factor [m], [m, a, 1] or [m, 1, b]."""
    if factor is None:
        return x @ weight
    if factor.ndim == 1:
        return (x @ weight) * factor.unsqueeze(1)
    if factor.shape[-1] == 1:
        return (x * factor.squeeze(-1)) @ weight
    if factor.shape[-2] == 1:
        return (x @ weight) * factor.squeeze(-2)
    raise NotAffine("a coefficient for every element of a matrix")


def mixed(x: Tensor, u: Tensor, delta: Tensor, mix: Tensor | Halves) -> Tensor:
    """sum_s mix[t, s] (x_t . u_s) delta_s: mix [m, r], [m, r, a, 1] or [m, r, 1, b]."""
    if isinstance(mix, Halves):
        *_, rows, columns = mix.tail.shape
        if columns == 1:
            return mix.scores(x, u) @ delta
        if rows == 1:
            return mix.with_channels(lambda factor: factor.squeeze(-2)).mixed(x @ u.mT, delta)
        raise NotAffine("a coefficient for every element of a matrix")
    if mix.ndim == 2:
        return ((x @ u.mT) * mix) @ delta
    if mix.shape[-1] == 1:
        return scores(x, u, mix) @ delta
    if mix.shape[-2] == 1:
        return ((x @ u.mT).unsqueeze(-1) * mix.squeeze(-2) * delta.unsqueeze(0)).sum(1)
    raise NotAffine("a coefficient for every element of a matrix")


def scores(x: Tensor, u: Tensor, mix: Tensor | Halves) -> Tensor:
    """[m, r] of x_t . u_s, weighed by mix: [m, r] or, along the contracted axis, [m, r, a, 1]."""
    *_, columns = mix.tail.shape if isinstance(mix, Halves) else mix.shape[2:] or (1,)
    if columns != 1:
        raise NotAffine("scores of their own for every column")
    if isinstance(mix, Halves):
        return mix.scores(x, u)
    if mix.ndim == 2:
        return (x @ u.mT) * mix
    return (x.unsqueeze(1) * mix.squeeze(-1) * u.unsqueeze(0)).sum(-1)


def vector(read: Read, rows: Tensor, count: Any) -> Tensor:
    """The value of a weight that is no matrix, for every row: [m, *dims]."""
    c, rank = read.coefficients, read.base.ndim

    def factor(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * rank) if value.ndim == 1 else value

    base = read.base.unsqueeze(0)
    made = base.expand(count, *read.base.shape) if c.base is None else factor(c.base) * base
    for f, momentum in zip(c.momenta, read.momenta, strict=True):
        made = made - factor(f) * momentum.unsqueeze(0)
    taken = summed(c.mix, rows)
    if read.update is not None:
        taken = taken + read.update.unsqueeze(0)
    if read.scale is not None:
        taken = taken * read.scale.reshape(-1, *[1] * rank)
    return made - taken


def summed(mix: Tensor | Halves, rows: Tensor) -> Tensor:
    """sum_s mix[t, s] G_s."""
    if isinstance(mix, Halves):
        return mix.mixed(None, rows)
    if mix.ndim == 2:
        return (mix @ rows.reshape(rows.shape[0], math.prod(rows.shape[1:]))).reshape(mix.shape[0], *rows.shape[1:])
    return (mix * rows.unsqueeze(0)).sum(1)


def gathered(mix: Tensor | None, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """sum_s mix[s] u_s^T delta_s: mix [r], [r, a, 1] or [r, 1, b]; None for 1."""
    total: Tensor | None = None
    for u, delta in pairs:
        if mix is None:
            one = u.mT @ delta
        elif mix.ndim == 1:
            one = u.mT @ (delta * mix.unsqueeze(1))
        elif mix.shape[-1] == 1:
            one = (u * mix.squeeze(-1)).mT @ delta
        else:
            one = u.mT @ (delta * mix.squeeze(-2))
        total = one if total is None else total + one
    return _required(total)


def finish(
    step: Step,
    carried: Tensors,
    slow: Tensors,
    keys: Tensors,
    tokens: Tensors,
    found: Gradients,
    every: dict[str, Coefficients],
) -> tuple[Tensor, ...]:
    """Read-out and state, given each row's rated gradient and the coefficients."""
    spec, readout = step.spec, step.captured.readout
    axes = type_axes(spec, readout).axes
    queries = step.queries(tokens)
    count = next(iter(queries.values())).shape[0]
    reads = {name: _reader(step, name, carried, slow, keys, every[name]) for name in spec.fast}

    def of_product(x: Tensor, matrix: Matrix, node: fx.Node) -> Tensor:
        return product(x, reads[matrix.name], found.pairs.get(matrix.name, []), matrix.flipped)

    values: dict[str, Any] = {}
    for name in spec.fast:
        if is_matrix(spec, name):
            values[name] = Matrix(name)
        else:
            values[name] = Vector(name, vector(reads[name], found.vectors[name], count))
    micro = {name: value for name, value in tokens.items() if name not in queries}
    z = call(readout, {**values, **slow, **queries, **micro}, Uses(readout, axes, of_product))
    made: Tensors = {}
    for name in spec.fast:
        mixed = _mixed(found.vectors.get(name), found.pairs.get(name, []), every[name], carried[name])
        made |= ends(step, name, carried, slow, keys, every[name], mixed)
    return (step.with_halo(z), *[made[name] for name in step.left], step.token_losses(found.losses))


def _reader(step: Step, name: str, carried: Tensors, slow: Tensors, keys: Tensors, c: Coefficients) -> Read:
    spec, rows = step.spec, step.rows(keys, slow)
    if causal(spec).read == "before":
        c = _first_of_token(step, before(rows, c))
    else:
        c = _of_tokens(step, c)
    momenta = [carried[n] for n in momentum_names(spec, name)]
    scale = spec.optimizer.scale
    if scale is None:
        return Read(c, carried[name], momenta)
    factor = step.row_scale(name, slow, keys)
    return Read(c, step.anchor(carried)[name], momenta, factor, carried.get(f"{name}.update"))


def _of_tokens(step: Step, c: Coefficients) -> Coefficients:
    """Of rows for micro-steps, those after each token's last."""
    if step.micro == 1:
        return c
    return of_rows(c, step.read_rows)


def _first_of_token(step: Step, c: Coefficients) -> Coefficients:
    """Of rows for micro-steps, those before each token's first."""
    if step.micro == 1:
        return c

    def first(value: Tensor) -> Tensor:
        return value.reshape(-1, step.micro, *value.shape[1:]).select(1, 0)

    return of_rows(c, first)


def _mixed(
    vectors: Tensor | None, pairs: list[tuple[Tensor, Tensor]], c: Coefficients, weight: Tensor
) -> Callable[[Tensor | Halves], Tensor]:
    """The last row of a mix, over every row's gradient of a fast weight: as vectors, as pairs, or none."""

    def of(mix: Tensor | Halves) -> Tensor:
        row = None if mix is c.mix and c.plain else last_row(mix)
        if vectors is not None:
            return vectors.sum(0) if row is None else summed_rows(row, vectors)
        return gathered(row, pairs) if pairs else weight.new_zeros(weight.shape)

    return of


def summed_rows(row: Tensor, rows: Tensor) -> Tensor:
    """sum_s row[s] rows[s], one weight for each row [r] or for each element of it [r, *dims]."""
    return (row.reshape(-1, *[1] * (rows.ndim - 1)) * rows if row.ndim == 1 else row * rows).sum(0)


def ends(
    step: Step,
    name: str,
    carried: Tensors,
    slow: Tensors,
    keys: Tensors,
    c: Coefficients,
    mixed: Callable[[Tensor | Halves], Tensor],
) -> Tensors:
    """What the tile's last step leaves of one fast weight: the weight, its momenta, its scaled sum; `mixed` is the last
    row of a mix, over every row's gradient."""
    spec = step.spec
    momenta = momentum_names(spec, name)
    made: Tensors = {}
    for key, (starts, mix) in zip(momenta, c.kept, strict=True):
        made[key] = mixed(mix)
        for start, momentum in zip(starts, momenta, strict=False):
            made[key] = made[key] + last(start) * carried[momentum]
    if spec.optimizer.scale is not None:
        waiting = carried.get(f"{name}.update")
        total = mixed(c.mix) if waiting is None else mixed(c.mix) + waiting
        scale = last(step.row_scale(name, slow, keys)).reshape(())
        return {name: step.anchor(carried)[name] - scale * total, f"{name}.update": total}
    weight = carried[name] if c.base is None else last(c.base) * carried[name]
    for factor, momentum in zip(c.momenta, momenta, strict=True):
        weight = weight - last(factor) * carried[momentum]
    made[name] = weight - mixed(c.mix)
    return made


def dual_step(step: Step, given: Tensors) -> tuple[Tensor, ...]:
    """One chunk: inputs of `Step.inputs` by name -> `Step.results`."""
    spec = step.spec
    carried, slow, tokens, _ = step.split(given)
    keys = step.keys(tokens)
    rows = step.rows(keys, slow)
    every = {
        name: step.windowed(coefficients(spec.optimizer, weight, rows, step.first_only(rows)), rows)
        for name, weight in spec.fast.items()
    }
    at = step.anchor(carried)
    if spec.optimizer.decays is not None and spec.optimizer.decay_order == "before":
        at = {n: w if every[n].base is None else last(every[n].base) * w for n, w in at.items()}
    found = rated(step, gradients(step, at, slow, keys), slow, keys)
    if step.halo:
        found = valid(found, given[VALID])
    return finish(step, carried, slow, keys, tokens, found, every)
