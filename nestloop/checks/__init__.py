"""Whether what is generated from a declaration can be relied on: compared with the definition, here and now."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nestloop.checks.certificate import Certificate, Row
from nestloop.checks.properties import PROPERTIES
from nestloop.checks.stress import stress as under_stress
from nestloop.checks.subject import Subject, check_backends, check_dtypes, lengths_of
from nestloop.targets import check_dims, one_loop, trial_sizes

__all__ = ["Certificate", "Row", "check"]


def check(
    loop: Any,
    *,
    stress: bool = False,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    backends: Sequence[str] | None = None,
    device: str = "cpu",
    seed: int = 0,
    **dims: int,
) -> Certificate:
    """Compare what is generated from a loop with its definition, on random inputs: a certificate, whose text says all.

    That its gradients are derivatives; that every backend gives the values, states, inner losses and gradients of the
    reference, in float64 and in `dtypes`; that any split of a sequence, a packed one, one alone, and views in other
    layouts give the same; that no later token is seen where none may be; that calls repeat bit for bit.

    Args:
        loop: a declared loop, `nl.compile(...)` of one, or a layer of one, whose sizes are then taken.
        stress: also on inputs at which layers go wrong: zeros, large, small and equal tokens, closed and open gates,
            many tokens.
        dtypes: of the views, beside float64: "float32", "bfloat16", "float16".
        backends: "torch", "cpp", "triton"; by default those that run on the device at full speed (on a CPU the first
            two: Triton is interpreted there).
        device: "cpu", "cuda".
        seed: of the inputs.
        dims: sizes; those not given are small ones (d = 16, H = 2, B = 2). Without N, several lengths of at most 101
            tokens: one, seven, one less and one more than a chunk (or than a batch schedule's steps), and 101. Those
            that the declaration is not defined for are left out, a row each, and then 8 and 64 are among them.

    Raises:
        UnknownDimError, UnknownDtypeError, UnknownBackendError, UnknownDeviceError: no such dim, dtype, backend or
            device.
        MissingPartError, InputError: not a declared loop, or several (those of a layer with one beside).
        CompileError: a body cannot be compiled.
    """
    check_dims(loop, dims)
    spec, known = one_loop(loop, "check")
    chosen = check_backends(backends, device)
    check_dtypes(dtypes)
    sizes = trial_sizes(spec, {**known, **dims})
    lengths = [dims["N"]] if "N" in dims else lengths_of(spec, sizes)
    others = [name for name in dtypes if name != "float64"]
    with torch.random.fork_rng(devices=[]):
        subject = Subject(spec, sizes, chosen, device, others, lengths, seed)
        rows = subject.leave_out_refused()
        rows += [Row("agreement", b, "-", 0, None, 0.0, f"no code: {why}") for b, why in subject.missing.items()]
        for found in PROPERTIES.values():
            rows += found(subject)
        rows += under_stress(subject) if stress else []
    return Certificate(spec, {n: s for n, s in sizes.items() if n != "N"}, device, seed, rows)
