"""Which optimizer goes with which schedule: everything that can be refused before a size is known."""

from __future__ import annotations

import inspect
import math
from types import FunctionType
from typing import TYPE_CHECKING, Any

from nestloop.errors import (
    CoefficientError,
    IllegalScheduleError,
    LearningRateError,
    TransformError,
    ViewError,
)
from nestloop.lang import coefficient
from nestloop.lang.declare import Declaration, Gate, Slow
from nestloop.lang.dims import DimExpr
from nestloop.lang.maps import chunk_period
from nestloop.lang.schedule import BatchSchedule, Causal, Chunked, Online, Program, Schedule, Sliding, Stream
from nestloop.lang.state import averaged_gates
from nestloop.lang.transforms import GlobalClip, global_clip, newton_schulz, restore_norm, soft_clip

if TYPE_CHECKING:
    from nestloop.lang.loop import LoopSpec

# What makes a function of the optimizer, with arguments for it.
_MAKERS: dict[Any, str] = {soft_clip: "-2", global_clip: "1.0", newton_schulz: "", restore_norm: "-1"}


def check_optimizer(spec: LoopSpec) -> None:
    """Refuse coefficients that are not the loop's, or do not fit its fast weights, and parts its schedule has no room
    for."""
    _check_coefficients(spec)
    _check_functions(spec)
    if isinstance(spec.schedule, BatchSchedule):
        _check_batch(spec)
    elif isinstance(spec.schedule, Causal):
        _check_causal(spec)
    elif isinstance(spec.schedule, (Chunked, Program)):
        _check_one_step(spec)
    if isinstance(spec.schedule, Stream):
        _check_stream(spec)
    _check_micro(spec)


def coefficients_of(spec: LoopSpec) -> list[tuple[str, Any]]:
    """What the optimizer calls each of its coefficients, and its value."""
    optimizer = spec.optimizer
    found = [(name, getattr(optimizer, name)) for name in ("lr", "scale", "decay", "log_decay")]
    return [*found, *[("momentum", order) for order in optimizer.momentum or ()], *optimizer.own.items()]


def _check_coefficients(spec: LoopSpec) -> None:
    declared: dict[str, Declaration] = {**spec.slow, **spec.gates}
    for name, value in coefficients_of(spec):
        what = called(name)
        error = LearningRateError if name == "lr" else CoefficientError
        coefficient.check_declared(value, what, spec.name, declared, error, spec.optimizer.written())
        if isinstance(value, dict) and not set(value) <= set(spec.fast):
            (unknown,) = list(set(value) - set(spec.fast))[:1]
            raise CoefficientError(
                f"The {what} of {spec.name} names a fast weight that its learner does not have.",
                where=spec.optimizer.where,
                given=repr(unknown),
                need=f"one of {', '.join(spec.fast)}",
                fix=f"write {name}={{{next(iter(spec.fast))!r}: ...}}",
            )
        for weight in spec.fast.values():
            one = coefficient.of(value, weight.name)
            if isinstance(one, (Slow, Gate)) and spec.optimizer.spreads(name):
                own = f"; an update reads it as it is where {name} = nl.coefficient(spread=False)"
                coefficient.along(one, weight, own if name in spec.optimizer.own else "")


def called(coefficient: str) -> str:
    """A coefficient in a sentence."""
    return "learning rate" if coefficient == "lr" else coefficient


def _check_functions(spec: LoopSpec) -> None:
    optimizer = spec.optimizer
    for name, given in optimizer.functions.items():
        if isinstance(given, FunctionType) and given in _MAKERS:
            made = f"nl.{given.__name__}({_MAKERS[given]})"
            raise TransformError(
                f"The {name.replace('_', ' ')} of {spec.name}'s optimizer is not called.",
                where=optimizer.where,
                given=f"{name}=nl.{given.__name__}",
                need=f"what it makes, {made}",
                fix=f"write {optimizer.written()}(lr=1.0, {name}={made})",
            )
        if callable(given) or (isinstance(given, GlobalClip) and name != "restore"):
            _check_axes(spec, name, given)
            continue
        takes = "(W, initial W) to the weights" if name == "restore" else "one fast weight's gradient to its update"
        fix = "restore=nl.restore_norm(-1)" if name == "restore" else f"{name}=nl.soft_clip(-2)"
        raise TransformError(
            f"The {name.replace('_', ' ')} of {spec.name}'s optimizer is not a function.",
            where=optimizer.where,
            given=repr(given),
            need=f"a function from {takes}, or None",
            fix=f"write {optimizer.written()}(lr=1.0, {fix})",
        )


def _check_axes(spec: LoopSpec, name: str, given: Any) -> None:
    """Refuse a function of axes that a fast weight does not have."""
    least = getattr(given, "axes", 0)
    for weight in spec.fast.values():
        if len(weight.dims) < least:
            raise TransformError(
                f"The {name.replace('_', ' ')} of {spec.name}'s optimizer does not fit the fast weight "
                f"'{weight.name}'.",
                where=spec.optimizer.where,
                given=f"{given} for {weight!r}",
                need=f"fast weights of {least} axes or more",
                fix=f"write a function that takes [{', '.join(map(str, weight.dims))}] too, or join the weight to "
                'another: w = nl.fast("d + 1", "d"), on x with a column of ones',
            )


def _illegal(spec: LoopSpec, what: str, given: str, need: str, fix: str) -> IllegalScheduleError:
    return IllegalScheduleError(f"{spec.name}: {what}", where=spec.optimizer.where, given=given, need=need, fix=fix)


def _shown(spec: LoopSpec) -> str:
    return f"schedule {type(spec.schedule).__name__}"


def _check_batch(spec: LoopSpec) -> None:
    optimizer, schedule = spec.optimizer, spec.schedule
    assert isinstance(schedule, BatchSchedule)
    _check_one_step(spec)
    if spec.grid is not None and schedule.needs_order:
        raise _illegal(
            spec,
            "a token grid is whole, a shuffled batch has some of its tokens.",
            f"nl.grid(); {_shown(spec)}",
            "a schedule whose steps see all tokens, in their order",
            f"write schedule = nl.FullBatch({schedule.steps})",
        )
    lr = optimizer.lr
    if isinstance(lr, tuple) and len(lr) != schedule.steps:
        raise IllegalScheduleError(
            f"{spec.name} has one learning rate per step, but not as many as steps.",
            where=optimizer.where,
            given=f"rates: {len(lr)}, steps: {schedule.steps}",
            need=f"rates: {schedule.steps}",
            fix=f"write {optimizer.written()}(lr={(1.0,) * schedule.steps}), or one number for all steps",
        )
    for name, value in coefficients_of(spec):
        each = list(value.values()) if isinstance(value, dict) else [value]
        if value is lr and not isinstance(value, dict):
            each = [part for part in each if isinstance(part, Gate)]  # of numbers and text, any
        for part in each:
            _check_of_batches(spec, name, part)


def _check_of_batches(spec: LoopSpec, name: str, part: Any) -> None:
    """Refuse a coefficient that is no number before the batch, and a learning rate of one fast weight that changes from
    step to step."""
    what = called(name)
    if isinstance(part, Gate) and (name != "lr" or part.dims):
        each = "token and channel" if part.dims else "token"
        raise _illegal(
            spec,
            f"its {what} is a number for each {each}, but a step of a batch schedule is one on all its tokens.",
            f"{part!r}; {_shown(spec)}",
            "a number, text or a slow weight; as a learning rate, a gate without dims too",
            f"declare {part.name} = nl.slow(), or step chunk by chunk, with the mean of each chunk's gates: "
            "schedule = nl.Chunked(64)",
        )
    if isinstance(part, tuple) or (isinstance(part, DimExpr) and {"N", "n"} & set(part.names)):
        raise _illegal(
            spec,
            f"its {what} changes with the step or its tokens, as that of all fast weights alone may.",
            f"{part}; {_shown(spec)}",
            "a number, text without N and n, a slow weight",
            f'write {spec.optimizer.written()}(lr="1/N") or one number per step, the same for all fast weights',
        )


def _check_stream(spec: LoopSpec) -> None:
    for name, value in coefficients_of(spec):
        if any(isinstance(part, tuple) for part in (value.values() if isinstance(value, dict) else [value])):
            raise _illegal(
                spec,
                "one learning rate per step belongs to a batch schedule.",
                f"lr={value}; {_shown(spec)}",
                "a number, text, a slow weight or a gate",
                f"declare eta = nl.gate() and write {spec.optimizer.written()}(lr=eta)",
            )
        for part in coefficient.parts(value):
            if isinstance(part, DimExpr) and {"N", "n"} & set(part.names):
                raise _illegal(
                    spec,
                    f"its {called(name)} depends on how many tokens there are.",
                    f"{part}; {_shown(spec)}",
                    "sizes that are the same wherever a sequence is split",
                    "write it without N and n, or make it a gate",
                )
    if spec.grid is not None:
        raise _illegal(
            spec,
            "a token grid is whole from the start, a stream is not.",
            f"nl.grid(); {_shown(spec)}",
            "a batch schedule",
            "write schedule = nl.FullBatch(1)",
        )


def _check_causal(spec: LoopSpec) -> None:
    optimizer, schedule = spec.optimizer, spec.schedule
    assert isinstance(schedule, Causal)
    for name, given in optimizer.functions.items():
        raise _illegal(
            spec,
            f"its {name.replace('_', ' ')} needs a whole chunk's gradient, but each token is read with weights of "
            "its own.",
            f"{given if not callable(given) or isinstance(given, type) else _function(given)}; {_shown(spec)}",
            *_stepping_once(schedule),
        )
    if optimizer.scale is not None and (optimizer.decays is not None or optimizer.momentum is not None):
        raise _illegal(
            spec,
            "a scale on the updates since the anchor has no meaning once these decay or gather momentum.",
            f"scale with {'decay' if optimizer.decays is not None else 'momentum'}; {_shown(spec)}",
            "one or the other",
            "fold the scale into lr, a rate per token",
        )
    if any(getattr(part, "dims", ()) for part in coefficient.parts(optimizer.scale)):
        raise _illegal(
            spec,
            "its scale has a number for each channel.",
            f"scale of dims; {_shown(spec)}",
            "one number for each token and head",
            "leave the dims out, or fold them into lr",
        )
    if optimizer.scale is not None and schedule.read == "before":
        raise _illegal(
            spec,
            "a scale belongs to the token's own step, which a read-out before it has not seen.",
            f'scale; {_shown(spec)}, read = "before"',
            'read="after"',
            f"write schedule = {_call(type(schedule), schedule, read='after')}",
        )
    if optimizer.decays is not None and optimizer.decay_order == "before" and schedule.chunk > 1:
        raise _illegal(
            spec,
            "gradients at a chunk's first weights cannot be taken at the decayed ones.",
            f'decay_order="before"; {_shown(spec)}, chunk = {schedule.chunk}',
            'decay_order="after", or gradients at the current weights',
            f'write schedule = {_call(Online, spec.schedule)}, or decay_order="after"',
        )
    if optimizer.window is not None and schedule.micro > 1:
        raise _illegal(
            spec,
            "a window over tokens and micro-steps within one do not go together.",
            f"window={optimizer.window}, micro={schedule.micro}",
            "one of them",
            f"write schedule = {_call(Online, schedule, micro=1)}",
        )


def _stepping_once(schedule: Causal) -> tuple[str, str]:
    """What is needed, and the fix, where a step must have a whole gradient."""
    if schedule.chunk == schedule.micro == 1:
        call = _call(Chunked, schedule, order="update-apply" if schedule.read == "after" else "apply-update", size=1)
        return "the same steps as those of chunks of one token", f"write schedule = {call}"
    need = "a schedule that steps once a chunk: the nearest is Chunked"
    return need, f'write schedule = {_call(Chunked, schedule, order="apply-update")}, or "update-apply"'


def _call(kind: type[Schedule], like: Schedule, **changed: Any) -> str:
    """The call that makes a schedule of a kind with all that another one says of it too, but for what is changed."""
    reset = getattr(like, "reset", None)
    size = getattr(like, "period", 1)
    size = size if size > 1 else math.gcd(16, reset or 16)  # which a reset does not fall inside of
    given = {"read": "before" if getattr(like, "order", "") == "apply-update" else "after", **vars(like)}
    given |= {"size": size, "chunk": size, **changed}
    written = []
    for name, parameter in inspect.signature(kind).parameters.items():
        value = given.get(name, parameter.default)
        text = f'"{value}"' if isinstance(value, str) else str(value)
        if name in ("size", "chunk") or (name == "order" and name in changed):
            written.append(text)
        elif value != parameter.default:
            written.append(f"{name}={text}")
    return f"nl.{kind.__name__}({', '.join(written)})"


def _function(given: Any) -> str:
    return getattr(given, "__name__", str(given))


def _check_one_step(spec: LoopSpec) -> None:
    """Refuse what a single step on many tokens has no room for."""
    optimizer = spec.optimizer
    if optimizer.window is not None:
        raise _illegal(
            spec,
            "a window belongs to a schedule that steps with every token.",
            f"window={optimizer.window}; {_shown(spec)}",
            "Causal or Online",
            f"write schedule = {_call(Causal, spec.schedule)}",
        )
    if optimizer.decays is not None and optimizer.decay_order == "before":
        raise _illegal(
            spec,
            "a step on many tokens takes its gradient before it decays.",
            f'decay_order="before"; {_shown(spec)}',
            'decay_order="after", or gradients at the current weights',
            f'write schedule = {_call(Online, spec.schedule)}, or decay_order="after"',
        )


def _check_micro(spec: LoopSpec) -> None:
    steps = getattr(spec.schedule, "micro", 1)
    found = [declared for declared in spec.inputs.values() if declared.micro]
    if steps == 1 and found:
        raise ViewError(
            f"The {found[0].kind} '{found[0].name}' is one for each micro-step, of which {spec.name} has one.",
            where=found[0].where,
            given=f"micro=True; {_shown(spec)}",
            need="a schedule with micro-steps",
            fix=f"write schedule = {_call(Online, spec.schedule, micro=2)}, or leave micro out of the {found[0].kind}",
        )
    if steps > 1 and not any(not isinstance(declared, Gate) for declared in found):
        raise ViewError(
            f"{spec.name} takes {steps} micro-steps a token, all on the same views.",
            where=spec.where,
            given=f"micro={steps}, no view with micro=True",
            need="a view for each micro-step",
            fix='declare k = nl.view("d", micro=True)',
        )
    for gate in coefficient.parts(spec.optimizer.decays):
        if isinstance(gate, Gate) and gate.micro:
            raise ViewError(
                f"The decay '{gate.name}' of {spec.name} is one for each micro-step, but a token decays once.",
                where=gate.where,
                given="micro=True",
                need="a decay for each token",
                fix="leave micro out of the gate",
            )


def check_estimator(spec: LoopSpec) -> None:
    """Refuse a stream that is none for a kernel estimator, which takes no steps."""
    if isinstance(spec.schedule, Stream) and not isinstance(spec.schedule, Sliding):
        raise IllegalScheduleError(
            f"{spec.name}: a kernel estimator takes no steps.",
            where=spec.where,
            given=_shown(spec),
            need="nl.Sliding, a window of keys, or no schedule: every query sees every key",
            fix="write schedule = nl.Sliding(128), or leave it out",
        )


def check_maps_of(spec: LoopSpec) -> None:
    """Refuse maps and pooled gates that ask for chunks, a grid or all tokens where there are none."""
    for one, of in spec.maps.items():
        if one.on_grid and spec.grid is None:
            raise ViewError(
                f"A map of {of} is on the token grid, of which {spec.name} has none.",
                where=one.where,
                given=repr(one),
                need="the grid's two dims",
                fix=f"write h, w = nl.grid() in {spec.name}",
            )
        if one.whole and spec.streams:
            raise ViewError(
                f"A map of {of} sees all tokens of a sequence, of which {spec.name} has not seen the later ones.",
                where=one.where,
                given=f"{one!r}; {_shown(spec)}",
                need="a batch schedule, or a map of each token",
                fix=f"write schedule = nl.FullBatch(1), or leave {one!r} out",
            )
    for declared in spec.inputs.values():
        if chunk_period(declared.maps) and not isinstance(spec.schedule, (Causal, Chunked)):
            raise ViewError(
                f"A map of the {declared.kind} '{declared.name}' counts in chunks, of which {spec.name} has none.",
                where=declared.where,
                given=f'period="chunk"; {_shown(spec)}',
                need="a schedule with chunks, or a number of tokens",
                fix="write schedule = nl.Causal(16), or period=16",
            )
    averaged = [] if spec.is_kernel_estimator else averaged_gates(spec)
    for gate in spec.gates.values():
        rates = coefficient.parts(spec.optimizer.lr)
        if gate.pooled and (gate not in averaged or gate in rates or not isinstance(spec.schedule, Chunked)):
            elsewhere = gate not in rates and not isinstance(spec.schedule, Chunked)
            instead = f", or write schedule = {_call(Chunked, spec.schedule)}" if elsewhere else ""
            raise ViewError(
                f"The gate '{gate.name}' is made from a chunk's mean, which the tokens of the chunk cannot know.",
                where=gate.where,
                given=f"pooled=True; {_shown(spec)}",
                need="a decay, momentum or scale of a schedule that steps once a chunk",
                fix=f"leave pooled out{instead}",
            )
