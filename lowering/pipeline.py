"""Temporary: reference only until the stages land."""
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from nestloop import reference
from nestloop.lang.binding import Binding

def prepare(spec, heads, dims, backend, inductor):
    n = 16
    sizes = dict(dims)
    if spec.grid: sizes[spec.grid[0]] = sizes[spec.grid[1]] = 4
    sizes = {**spec.default_dims, **sizes, "H": heads, "N": n, "n": n}
    with FakeTensorMode():
        v = {k: torch.empty(n, *[e.size(sizes) for e in d.dims]) for k, d in spec.inputs.items()}
        w = {k: torch.empty(*[e.size(sizes) for e in d.dims]) for k, d in {**spec.fast, **spec.slow}.items()}
        if spec.is_kernel_estimator:
            z = reference.kernel_fit(spec, sizes)(w, v)
        else:
            z = reference.token_readout(spec, sizes)({k: w[k] for k in spec.fast}, {k: w[k] for k in spec.slow}, v)
    return tuple(z.shape[1:])

def lower(spec, binding, return_losses, inductor):
    def ex(views, weights, state, order):
        return reference.run(spec, binding, dict(views), dict(weights), None if state is None else dict(state), order, return_losses)
    return ex
