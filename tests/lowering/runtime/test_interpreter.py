"""Kernels are interpreted within the memory that they are given: what lies beyond it, or between rows, is refused."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError

from nestloop.lowering.runtime.interpreter import interpreted


@triton.jit
def copy_rows(source, to, rows, apart_source, apart_to, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    tl.store(to + row * apart_to + column, tl.load(source + row * apart_source + column, mask=row < rows, other=0.0))


@triton.jit
def copy_one(source, to):
    tl.store(to, tl.load(source))


def run(source: Tensor, to: Tensor, programs: int, rows: int | None = None) -> None:
    arguments = {"source": source, "to": to, "rows": rows or programs, "COLUMNS": 4}
    strides = {"apart_source": source.stride(0), "apart_to": to.stride(0)}
    interpreted(copy_rows, (programs,), arguments | strides)


@triton.jit
def product(a, b, made, PRECISION: tl.constexpr):
    i = tl.arange(0, 16)
    places = i[:, None] * 16 + i[None, :]
    c = tl.dot(tl.load(a + places), tl.load(b + places), input_precision=PRECISION)
    tl.store(made + places, c)


def test_products_in_tf32_round_their_factors():
    """To 10 bits, towards zero, as matrix units do that leave out the others."""
    a, b = torch.randn(16, 16), torch.eye(16)
    made: dict[str, Tensor] = {}
    for precision in ("ieee", "tf32x3", "tf32"):
        interpreted(
            product,
            (1,),
            {"a": a, "b": b, "made": made.setdefault(precision, torch.empty(16, 16)), "PRECISION": precision},
        )
    assert torch.equal(made["ieee"], a) and torch.equal(made["tf32x3"], a)
    lost = (a - made["tf32"]) / a
    assert 0 < lost.max() < 2**-10 and lost.min() >= 0


def test_what_lies_in_the_tensors_is_read_and_written() -> None:
    rows = torch.arange(24.0).reshape(3, 8)
    made = torch.zeros(3, 4)
    run(rows[:, 2:6], made, 3)
    assert torch.equal(made, rows[:, 2:6])
    copied = torch.zeros(3, 8)
    run(rows[1:2, :4].expand(3, 4), copied[:, 4:], 3)
    assert torch.equal(copied, torch.cat([torch.zeros(3, 4), rows[1:2, :4].expand(3, 4)], 1))
    one, other = torch.tensor(3.0), torch.tensor(0.0)
    interpreted(copy_one, (1,), {"source": one, "to": other})
    assert other == 3


def test_what_lies_beyond_the_last_row_is_refused() -> None:
    with pytest.raises(InterpreterError) as raised:
        run(torch.zeros(3, 4), torch.zeros(4, 4)[:3], 4, rows=3)  # a fourth program, which reads nothing
    what = "copy_rows writes 4 of 4 elements that are in none of its tensors, the first 48 bytes from the start of to"
    assert what in str(raised.value)
    with pytest.raises(InterpreterError) as raised:
        run(torch.zeros(4, 4)[:3], torch.zeros(4, 4), 4)
    assert "copy_rows reads 4 of 4 elements that are in none of its tensors" in str(raised.value)


def test_what_lies_between_rows_is_refused() -> None:
    fused = torch.zeros(3, 8)
    with pytest.raises(InterpreterError) as raised:
        run(torch.zeros(3, 4), fused[:, :3], 3)
    what = "copy_rows writes 1 of 4 elements that are in none of its tensors, the first 12 bytes from the start of to"
    assert what in str(raised.value)
    with pytest.raises(InterpreterError):
        interpreted(copy_one, (1,), {"source": torch.zeros(0), "to": torch.zeros(1)})
