"""Record the ops of this format again, which no change of the format's readers needs: `python -m tests.recorded`."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nestloop as nl
from nestloop import saved


class Linear(nl.Learner):
    w = nl.fast("d", "d")

    def forward(self, x):
        return x @ self.w


class Batch(nl.Loop):
    learner, optimizer, schedule = Linear, nl.SGD(lr=0.1), nl.FullBatch(2)
    k, v, q = nl.view("d"), nl.view("d"), nl.view("d")

    def loss(self, f, t):
        return (f(t.k) - t.v).square().sum(-1)

    def readout(self, f, t):
        return f(t.q)


class Stream(Batch):
    schedule = nl.Causal(4)  # type: ignore[assignment]


class Calls(TorchDispatchMode):
    """Keeps what the forward ops of nestloop are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "nestloop" and not kwargs:
            self.found.append((func._opname, args))
        return func(*args, **(kwargs or {}))


def run(name: str, args: list[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """What an op makes, and the gradients of its sum of squares."""
    given = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    made = getattr(torch.ops.nestloop, name)(*given)
    outputs = [out for out in ([made] if isinstance(made, Tensor) else made) if out.requires_grad]
    wanted = [a for a in given if isinstance(a, Tensor) and a.requires_grad]
    squares = torch.stack([out.square().sum() for out in outputs]).sum()
    gradients = torch.autograd.grad(squares, wanted, allow_unused=True)
    return [out.detach() for out in outputs], [g for g in gradients if g is not None]


def record() -> dict[str, Any]:
    ops: dict[str, Any] = {}
    calls = []
    for loop in (Batch, Stream):
        for backend in ("torch", "cpp", "triton"):
            torch.manual_seed(0)
            layer, x = nl.Layer(loop, 8, 2, backend=backend), torch.randn(2, 10, 8)
            program = torch.export.export(layer, (x,))
            with tempfile.TemporaryDirectory() as folder:
                nl.save_ops(program, f"{folder}/ops")
                found = json.loads(Path(f"{folder}/ops").read_text())
            ops = found | {"ops": [*ops.get("ops", []), *found["ops"]]}
            with torch.no_grad(), Calls() as seen:
                program.module()(x)
            (call,) = [(name, args) for name, args in seen.found if name in {op["name"] for op in found["ops"]}]
            calls.append((call[0], list(call[1]), *run(call[0], list(call[1]))))
    return {"ops": json.dumps(ops), "calls": calls}


if __name__ == "__main__":
    kept = io.BytesIO()
    torch.save(record(), kept)
    path = Path(__file__).parent / f"format_{saved.FORMAT}.pt.gz"
    path.write_bytes(gzip.compress(kept.getvalue(), mtime=0))
    print(path.name, path.stat().st_size)
