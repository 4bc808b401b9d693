"""What plans are expected to take on a GPU, as lines and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nestloop.costs import DIRECTIONS, LONGEST, NOTE, Costs, Row, costs_of, roofline
from nestloop.lowering.schedule.roofline import ATTENTION, DTYPES
from nestloop.targets import check_dims, loops_of

_HEAD = ("plan", "warps", "GFLOP", "MB", "FLOP/B", "registers", "spills", "shared", "programs", "held", "waves", "us")


def cost(loop: Any, device: str = "h200", dtype: str = "bf16", **dims: int) -> str:
    """What every plan of a loop is expected to take on a GPU, forward and backward, and why one is chosen.

    Args:
        loop: a declared loop, `nl.compile(...)` of one, or a layer.
        device: "h200", "h100", "b200", "a100" or "mi300x"; none need be there.
        dtype: of the views: "bf16", "fp16" or "fp32".
        dims: sizes; those not given are small ones (d = 16, H = 2, B = 2, N = 16).

    Raises:
        UnknownDimError, UnknownDeviceError, UnknownDtypeError: no such dim, device or dtype.
        NoPlanError: the loop is a program of operations, or a window of keys, which no kernel of its own runs.
        CompileError: a body cannot be compiled.
    """
    check_dims(loop, dims)
    return "\n\n".join(text(costs_of(spec.cls, {**sizes, **dims}, device, dtype)) for spec, sizes, _ in loops_of(loop))


def text(costs: Costs) -> str:
    """All of it as lines."""
    spec, device, sizes = costs.spec, costs.device, costs.sizes
    lines = [
        f"{spec.name}  ({spec.where.short})",
        f"on {device.name} ({device.arch}, {device.multiprocessors} multiprocessors), "
        f"{', '.join(f'{n} = {s}' for n, s in sizes.items())}, {DTYPES[costs.dtype]} views",
        NOTE,
    ]
    for direction in DIRECTIONS:
        rows = costs.rows[direction]
        cells = [(*_HEAD, "bound by; why not"), *[_cells(row, direction) for row in rows]]
        widths = [max(len(row[i]) for row in cells if len(row) == len(cells[0])) for i in range(len(_HEAD))]
        lines += ["", f'{direction}: (* chosen, + what backend="triton" takes untuned)']
        for row in cells:
            if len(row) == 2:
                lines.append(f"  {row[0]:<{widths[0]}}  {row[1]}")
                continue
            aligned = [row[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(row[1:-1], widths[1:], strict=True)]]
            lines.append(f"  {'  '.join(aligned)}  {row[-1]}".rstrip())
    return "\n".join([*lines, "", *_summary(costs)])


def _cells(row: Row, direction: str) -> tuple[str, ...]:
    mark = " *" if not row.why else ""
    mark += " +" if row.candidate.by_default and row.warps == row.candidate.default_warps(direction) else ""
    expected = row.expected
    if expected is None:
        return row.candidate.name, row.why
    flops, moved = f"{expected.flops / 1e9:,.2f}", f"{expected.traffic / 1e6:,.1f}"
    own = [
        str(row.warps or "-"),
        flops,
        moved,
        f"{expected.intensity:.1f}",
        str(expected.registers or "-"),
        f"{expected.spilled:,}" if expected.programs else "-",
        "-" if expected.shared is None else f"{expected.shared:,}",
        f"{expected.programs:,}" if expected.programs else "-",
        str(expected.resident or "-"),
        str(expected.waves or "-"),
        f"{expected.seconds * 1e6:,.1f}",
    ]
    return (row.candidate.name + mark, *own, row.why or expected.bound)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.3g} us"


def _summary(costs: Costs) -> list[str]:
    sizes = costs.sizes
    taken, bound = costs.at(sizes["N"]), roofline(costs)
    warps = f", {costs.warps[0]} and {costs.warps[1]} warps" if costs.chosen.is_triton else ""
    lines = [
        f"chosen: {costs.chosen.name}{warps}: {_seconds(taken)} forward and backward",
        f"the machine's roofline for that work: {_seconds(bound)}, {bound / taken:.0%} of it",
    ]
    if costs.chosen.is_triton and not costs.device.is_nvidia:
        lines.append('"auto" runs generated PyTorch there, where Triton has not been timed; backend="triton" runs it')
    return [*lines, *_against_attention(costs)]


def _against_attention(costs: Costs) -> list[str]:
    if costs.chosen.plan is None or costs.chosen.plan.form == "attention":
        return []
    if costs.chosen.plan.tokens is not None:
        return ["softmax attention: not compared over lengths, since its graphs hold for one"]
    overtakes = costs.overtakes()
    half = ", half of that where no token sees a later one" if costs.spec.streams else ""
    if overtakes is None:
        said = f"at no length up to {LONGEST:,} tokens"
    else:
        said = "at any length" if overtakes == 1 else f"from N = {overtakes:,} tokens on"
    return [
        f"overtakes softmax attention {said}; at N = {costs.sizes['N']:,} that takes "
        f"{_seconds(costs.attention_at(costs.sizes['N']))}",
        f"  (4 N^2 d FLOPs a head forward and 2.5 times that backward{half}, d = {costs.width}, at {ATTENTION:.0%} of "
        "the vendor's rate)",
    ]


def as_json(costs: Costs) -> dict[str, Any]:
    """The same as JSON takes it; times in seconds."""
    fixed = costs.chosen.plan is None or costs.chosen.plan.tokens is not None or costs.chosen.plan.form == "attention"
    return {
        "loop": costs.spec.name,
        "note": NOTE,
        "device": asdict(costs.device),
        "dtype": costs.dtype,
        "dims": dict(costs.sizes),
        **{d: [_row(row, d) for row in costs.rows[d]] for d in DIRECTIONS},
        "chosen": {
            "plan": costs.chosen.name,
            "warps": list(costs.warps),
            "seconds": costs.at(costs.sizes["N"]),
        },
        "roofline_seconds": roofline(costs),
        "attention_seconds": costs.attention_at(costs.sizes["N"]),
        "overtakes_attention_at": None if fixed else costs.overtakes(),
    }


def _row(row: Row, direction: str) -> dict[str, Any]:
    default = row.candidate.by_default and row.warps == row.candidate.default_warps(direction)
    found = {"plan": row.candidate.name, "warps": row.warps, "default": default}
    if row.expected is None:
        return {**found, "exists": False, "why": row.why}
    expected = asdict(row.expected)
    more = {"bound": row.expected.bound, "intensity": row.expected.intensity}
    return {**found, "exists": True, "chosen": not row.why, **expected, **more, "why": row.why}
