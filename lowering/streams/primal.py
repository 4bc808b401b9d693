"""The primal form: the weights of every token are built. For bodies that read weights otherwise than by products."""

from __future__ import annotations

from torch import Tensor
from torch.func import vmap

from nestloop.lang.declare import Gate
from nestloop.lowering.derivative import grad
from nestloop.lowering.recorder import call
from nestloop.lowering.streams.coefficients import Coefficients, Rows, before, coefficients, last, last_row, strict
from nestloop.lowering.streams.dual import ends, summed, summed_rows
from nestloop.lowering.streams.halves import Halves
from nestloop.lowering.streams.step import VALID, Step, Tensors, causal, momentum_names


def token_gradients(step: Step, at: Tensors, slow: Tensors, keys: Tensors) -> tuple[Tensors, Tensor]:
    """Every row's gradient of every fast weight [r, *dims], times its learning rate; every row's loss [r]."""
    spec, loss = step.spec, step.captured.loss
    assert loss is not None

    def one(fast: Tensors, row: Tensors) -> tuple[Tensor, Tensor]:
        tile = {n: t.unsqueeze(0) for n, t in row.items()}
        value = call(loss, step.loss_inputs(fast, at, slow, tile)).reshape(())
        return value, value

    found, losses = vmap(grad(one, has_aux=True), in_dims=(None, 0))(at, keys)
    value = step.value(keys, slow)
    for name, weight in spec.fast.items():
        part = spec.optimizer.rate_of(name)
        rate = value(weight, part)
        if isinstance(rate, Tensor):
            rows = rate if isinstance(part, Gate) else rate.unsqueeze(0)
            rate = rows.reshape(rows.shape[0], *[1] * len(weight.dims)) if rows.ndim == 1 else rows
        found[name] = found[name] if isinstance(rate, float) and rate == 1.0 else found[name] * rate
    return found, losses


def primal_step(step: Step, given: Tensors, anchored: bool = True) -> tuple[Tensor, ...]:
    """One tile: inputs of `Step.inputs` by name -> `Step.results`.

    anchored: whether gradients are taken at the anchor; otherwise they depend on no fast weight.
    """
    spec = step.spec
    carried, slow, tokens, _ = step.split(given)
    keys = step.keys(tokens)
    rows = step.rows(keys, slow)
    first = step.first_only(rows)
    every = {
        name: step.windowed(coefficients(spec.optimizer, weight, rows, first), rows)
        for name, weight in spec.fast.items()
    }
    at = step.anchor(carried)
    if anchored and spec.optimizer.decays is not None and spec.optimizer.decay_order == "before":
        at = {n: w if every[n].base is None else last(every[n].base) * w for n, w in at.items()}
    found, losses = token_gradients(step, at, slow, keys)
    if step.halo:
        found = {n: g * given[VALID].reshape(-1, *[1] * (g.ndim - 1)) for n, g in found.items()}
    weights = {name: weights_of(step, name, carried, rows, found[name], every[name], slow, keys) for name in spec.fast}
    z = _read(step, weights, slow, step.queries(tokens))
    left: Tensors = {}
    for name in spec.fast:

        def mixed(mix: Tensor | Halves, rows_of: Tensor = found[name]) -> Tensor:
            return summed_rows(last_row(mix), rows_of)

        left |= ends(step, name, carried, slow, keys, every[name], mixed)
    if not anchored:
        losses = _losses(step, carried, rows, slow, keys, found, every)
    return (step.with_halo(z), *[left[name] for name in step.left], step.token_losses(losses))


def weights_of(
    step: Step, name: str, carried: Tensors, rows: Rows, found: Tensor, c: Coefficients, slow: Tensors, keys: Tensors
) -> Tensor:
    """A fast weight as each token reads it: [n, *dims]."""
    schedule = causal(step.spec)
    seen = before(rows, c) if schedule.read == "before" else c
    built = _built(step, name, carried, found, seen, slow, keys)
    if step.micro == 1:
        return built
    rows_of = built.reshape(-1, step.micro, *built.shape[1:])
    return rows_of.select(1, 0 if schedule.read == "before" else step.micro - 1)


def _built(
    step: Step, name: str, carried: Tensors, found: Tensor, c: Coefficients, slow: Tensors, keys: Tensors
) -> Tensor:
    spec, rank = step.spec, len(step.spec.fast[name].dims)

    def factor(value: Tensor) -> Tensor:
        return value.reshape(-1, *[1] * rank) if value.ndim == 1 else value

    taken = summed(c.mix, found)
    if spec.optimizer.scale is not None:
        waiting = carried.get(f"{name}.update")
        taken = taken if waiting is None else taken + waiting.unsqueeze(0)
        scale = step.row_scale(name, slow, keys).reshape(-1, *[1] * rank)
        return step.anchor(carried)[name].unsqueeze(0) - scale * taken
    base = carried[name].unsqueeze(0)
    base = base if c.base is None else factor(c.base) * base
    for f, momentum in zip(c.momenta, momentum_names(spec, name), strict=True):
        base = base - factor(f) * carried[momentum].unsqueeze(0)
    return base - taken


def _read(step: Step, weights: Tensors, slow: Tensors, queries: Tensors) -> Tensor:
    readout = step.captured.readout

    def one(fast: Tensors, row: Tensors) -> Tensor:
        return call(readout, {**fast, **slow, **{n: t.unsqueeze(0) for n, t in row.items()}}).squeeze(0)

    return vmap(one)(weights, queries)


def _losses(
    step: Step,
    carried: Tensors,
    rows: Rows,
    slow: Tensors,
    keys: Tensors,
    found: Tensors,
    every: dict[str, Coefficients],
) -> Tensor:
    """Each row's loss at the weights before its step."""
    spec, loss = step.spec, step.captured.loss
    assert loss is not None
    decays_first = spec.optimizer.decays is not None and spec.optimizer.decay_order == "before"
    weights = {}
    for name in spec.fast:
        c = every[name]
        if decays_first:
            c = strict(rows, c)
        else:
            c = before(rows, c)
        weights[name] = _built(step, name, carried, found[name], c, slow, keys)

    def one(fast: Tensors, row: Tensors) -> Tensor:
        tile = {n: t.unsqueeze(0) for n, t in row.items()}
        return call(loss, step.loss_inputs(fast, fast, slow, tile)).reshape(())

    return vmap(one)(weights, keys)
