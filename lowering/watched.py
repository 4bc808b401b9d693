"""A user's body while it is traced: what it calls is seen, and refused where it cannot be compiled."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestloop.errors import (
    CapturedTensorError,
    CompileError,
    DataDependentError,
    InPlaceError,
    Location,
    NestloopError,
    UnadmittedOpError,
    UnknownNameError,
)
from nestloop.lang.loop import LoopSpec, user_files
from nestloop.lowering import ops
from nestloop.lowering.draws import Generators
from nestloop.lowering.mismatch import OpFailed, about_shapes, operands
from nestloop.lowering.ops import lengths, matrices
from nestloop.lowering.recorder import Mode, noting
from nestloop.reference import composites

_LOOKS_AT_VALUES = {
    *("_local_scalar_dense", "item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__"),
    *("nonzero", "is_nonzero", "equal", "allclose", "masked_select", "unique"),
}
_ONE_PRECISION = {
    "need": "values in the compute dtype: float32, or float64 where a tensor of the call is",
    "fix": "leave it out: products of low-precision views are in that precision, sums and states in float32",
}
_INSTEAD = {
    "item": "leave .item() out: a tensor of one number is multiplied as a number is",
    "__float__": "leave float() out, and write torch.sqrt(x) for math.sqrt(x)",
    "numpy": "call PyTorch's function of that name: torch.tanh(x) for np.tanh(x)",
}
_INSTEAD["__array__"] = _INSTEAD["numpy"]
_OF_A_CALL = {"requires_grad", "is_leaf", "grad", "grad_fn", "is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu"}
_TAKEN_APART = {
    "__matmul__": ops.rows_at_once,
    "cosine_similarity": ops.cosine_similarity,
    "matmul": ops.rows_at_once,
    "pad": ops.pad,
    "quantile": ops.quantile,
    "take_along_dim": ops.take_along,
    **lengths.FUNCTIONS,
    **matrices.FUNCTIONS,
}
_BY_TAPE = (Tensor.backward, torch.autograd.backward, torch.autograd.grad)
_OURS = ("nestloop.lang", "nestloop.reference", "nestloop.lowering")
_RANDOM = {
    *("dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d", "bernoulli", "multinomial", "rrelu"),
    *("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "gumbel_softmax"),
}


@contextmanager
def unvalidated() -> Iterator[None]:
    """While `torch.distributions` do not look at the values that they are given, which a traced body has none of."""
    kind = torch.distributions.Distribution
    before = kind._validate_args
    kind.set_default_validate_args(False)
    try:
        yield
    finally:
        kind.set_default_validate_args(before)


class WatchedOps(Mode):
    """Watches a user's body while it is traced: refuses what cannot be compiled, notes each op's line.

    Attributes:
        rounded: the first conversion to a floating type other than float32, and its line.
    """

    def __init__(self, spec: LoopSpec) -> None:
        super().__init__()
        self.spec = spec
        self.rounded: tuple[torch.dtype, Location | None] | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        where = user_line(self.spec)
        name = func._schema.name.split("::")[-1]
        if name in _LOOKS_AT_VALUES:
            raise _data_dependent(self.spec, name, where)
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.device.type != "meta":
                raise _captured(self.spec, value, where)
        dtype = kwargs.get("dtype") if name == "_to_copy" else None
        if dtype is not None and dtype.is_floating_point and dtype != torch.float32 and self.rounded is None:
            self.rounded = dtype, where
        try:
            with noting(where=where, called=name):
                return func(*args, **kwargs)
        except (RuntimeError, ValueError, IndexError) as error:
            message = str(error).splitlines()[0]
            if self.rounded is not None and re.search("dtype|scalar type", message):  # of two that meet in a product
                raise rounding(self.spec, *self.rounded) from None
            if isinstance(error, NestloopError) or not about_shapes(message):
                raise
            raise OpFailed(name, operands(None, args, kwargs), message, where) from error


class WatchedCalls(TorchFunctionMode):
    """Sees the functions a body calls, before PyTorch takes them apart: refuses writes into tensors.

    Attributes:
        reads_dtype: whether the body has asked for the dtype, or used a constant of it (RMSNorm's default eps, say).
        in_doubt: whether numbers have been drawn without torch, by the body or by another thread.
    """

    def __init__(self, spec: LoopSpec, generators: Generators) -> None:
        super().__init__()
        self.spec, self.reads_dtype, self.in_doubt = spec, False, False
        self._generators, self._autocast = generators, _autocast()
        self._counted: list[Tensor] = []  # 0, 1, 2, ..

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        self.check_surroundings()
        if name == "__get__":
            if func.__self__.__name__ == "data":
                raise UnadmittedOpError(
                    f"{self.spec.name} reads x.data, which hides a value from gradients.",
                    where=user_line(self.spec),
                    given="x.data",
                    need="values that say themselves whether gradients flow through them",
                    fix="write x.detach()",
                )
            self._read(func.__self__.__name__, sys._getframe(1))
            return func(*args, **kwargs)
        plain_inplace = name.endswith("_") and not name.startswith("_") and not name.endswith("__")
        writes = plain_inplace or name in _WRITES or kwargs.get("out") is not None
        # PyTorch's own Python functions write into what they have just made; only the user's own writes count.
        writes = writes and sys._getframe(1).f_code.co_filename in user_files(self.spec)
        if writes or kwargs.get("inplace"):
            written = ops.named_shape(args[0].shape) if args and isinstance(args[0], Tensor) else "a tensor"
            raise InPlaceError(
                f"A body of {self.spec.name} writes into a tensor.",
                where=user_line(self.spec),
                given=f"{name} on {written}",
                need="values that are computed, not overwritten: the graph has no memory",
                fix="write y = x + z instead of x += z, torch.where or torch.cat instead of an assignment to x[...]",
            )
        if name == "nan_to_num":
            self.reads_dtype = True  # infinities become its largest numbers
        with self._told_of_axes(name, args, kwargs):
            made = self._instead(func, name, args, kwargs)
        if made is not NotImplemented:
            return made
        if name == "detach":
            return ops.detached(*args)
        if name == "_set_grad_enabled" and not (args[0] and torch.is_grad_enabled()):  # torch.func.grad turns them on
            raise UnadmittedOpError(
                f"{self.spec.name} turns gradients off.",
                where=user_line(self.spec),
                given="torch.no_grad or torch.set_grad_enabled(False)",
                need="values that say themselves whether gradients flow through them",
                fix="write x.detach() where nothing is to flow back, f.held(x) for the learner's weights",
            )
        if func in _BY_TAPE and not _by_functorch(self.spec):
            raise UnadmittedOpError(
                f"A body of {self.spec.name} takes a derivative of what it has recorded.",
                where=user_line(self.spec),
                given=name,
                need="derivatives of functions: a body is traced, and records nothing",
                fix="write torch.func.grad(energy)(x), where energy is a function of x that returns one number",
            )
        if name in _LOOKS_AT_VALUES:
            if isinstance(args[0], Tensor) and not torch._is_functional_tensor(args[0]):
                raise _captured(self.spec, args[0], user_line(self.spec))
            raise _data_dependent(self.spec, name, user_line(self.spec))
        if name in _RANDOM:
            if "dropout" in name and _drops_nothing(*args, **kwargs):
                return args[0] if args else kwargs["input"]
            raise _random(self.spec, name, user_line(self.spec))
        with self._told_of_axes(name, args, kwargs):
            return func(*args, **kwargs)

    @contextmanager
    def _told_of_axes(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        """What PyTorch says of axes leaves as an `OpFailed` of the function that the body called."""
        try:
            yield
        except (OpFailed, RuntimeError, ValueError, IndexError) as error:
            message = str(error).splitlines()[0] if str(error) else ""
            if isinstance(error, NestloopError) or not (isinstance(error, OpFailed) or about_shapes(message)):
                raise
            frame = user_frame(self.spec)
            raise OpFailed(name, operands(frame, args, kwargs), message, user_line(self.spec)) from error

    def check_surroundings(self) -> None:
        """Refuse numbers drawn without torch, and autocast, of both of which a graph would have nothing."""
        for name in [] if self.in_doubt else self._generators.drawn:
            if self._generators.certain:
                raise _random(self.spec, name, user_line(self.spec) or self.spec.where)
            self.in_doubt = True
        if _autocast() != self._autocast:
            raise UnadmittedOpError(
                f"A body of {self.spec.name} is under autocast.",
                where=user_line(self.spec) or self.spec.where,
                given="torch.autocast, which generated code has nothing of",
                **_ONE_PRECISION,
            )

    def _instead(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a function makes that PyTorch takes apart by looking at values or with tensors that hold some;
        NotImplemented for all else."""
        if name in ("tensor", "new_tensor", "as_tensor"):
            given, dtype = kwargs.get("data", args[-1] if args else None), kwargs.get("dtype")
            if name == "new_tensor" and dtype is None:
                self.reads_dtype, dtype = True, args[0].dtype
            return ops.literal(given, dtype)
        if name == "arange":
            made = func(*args, **kwargs)
            self._counted += [made] if len(args) == 1 and not {"start", "step", "end"} & {*kwargs} else []
            return made
        if name == "rms_norm":
            # PyTorch's own is taken apart where nothing sees it, with its eps rounded to float32.
            given = dict(zip(("input", "normalized_shape", "weight", "eps"), args, strict=False)) | kwargs
            self.reads_dtype |= given.get("eps") is None  # the default is the dtype's own
            x, shape = given["input"], list(given["normalized_shape"])
            return ops.fused_rms_norm(x, shape, given.get("weight"), given.get("eps"))[0]
        if name in composites.FUNCTIONS:
            with self:
                return composites.FUNCTIONS[name](*args, **kwargs)
        if name in _TAKEN_APART:
            return _TAKEN_APART[name](*args, **kwargs)
        if name == "__getitem__":
            x, places = args
            places = places if isinstance(places, tuple) else (places,)
            if any(isinstance(place, Tensor) and place.dtype == torch.bool for place in places):
                where = user_line(self.spec)
                raise _data_dependent(
                    self.spec, "a mask in x[...]", where, ", or a mask as a list: x[:, [True, False]]"
                )
            if len(places) == 2 and any(places[0] is counted for counted in self._counted):
                return ops.one_of_each_row(x, places[1]) if isinstance(places[1], Tensor) else x[:, places[1]]
            return ops.at_written_places(x, places)
        return NotImplemented

    def _read(self, attribute: str, frame: FrameType) -> None:
        """An attribute of a tensor is read, in a frame."""
        self.reads_dtype |= attribute == "dtype" and not frame.f_globals.get("__name__", "").startswith(_OURS)
        if attribute in _OF_A_CALL and frame.f_code.co_filename in user_files(self.spec):
            raise UnadmittedOpError(
                f"A body of {self.spec.name} asks a tensor for {attribute}, which is not the same for every call.",
                where=user_line(self.spec),
                given=f"x.{attribute}",
                need="a body that computes the same on every device, with gradients or without",
                fix="leave the question out of the body; backend='reference' asks the call's own tensors",
            )


def _autocast() -> list[bool]:
    """Whether each device's operations are under autocast."""
    return [torch.is_autocast_enabled(device) for device in ("cpu", "cuda", "xpu")]


def _drops_nothing(input: Tensor, p: float = 0.5, training: bool = True, *_: Any, **named: Any) -> bool:
    """Whether a dropout leaves all as it is."""
    return p == 0 or not named.get("train", training)


def _random(spec: LoopSpec, name: str, where: Location | None) -> UnadmittedOpError:
    return UnadmittedOpError(
        f"{spec.name} uses {name}, which draws random numbers.",
        where=where,
        given=name,
        need="a body that is a function of its tensors: backward computes it again",
        fix="leave it out of the inner loop, or draw outside and pass the numbers as a view",
    )


def rounding(spec: LoopSpec, dtype: torch.dtype, where: Location | None) -> UnadmittedOpError:
    """The error of a conversion to another floating type than the compute dtype."""
    return UnadmittedOpError(
        f"{spec.name} rounds a value to another precision.",
        where=where,
        given=f"a conversion to {dtype}",
        **_ONE_PRECISION,
    )


def _captured(spec: LoopSpec, value: Tensor, where: Location | None) -> CapturedTensorError:
    return CapturedTensorError(
        f"A body of {spec.name} uses a tensor from outside its declaration.",
        where=where,
        given=f"a tensor [{', '.join(map(str, value.shape))}]",
        need="weights and views that are declared; numbers may come from anywhere",
        fix="declare it, scale = nl.slow('d'), or write the number itself",
    )


def _data_dependent(spec: LoopSpec, name: str, where: Location | None, more: str = "") -> DataDependentError:
    return DataDependentError(
        f"A body of {spec.name} looks at the values of a tensor.",
        where=where,
        given=f"{name}, which needs them, as an if, int(), float(), .item() and .tolist() on a tensor do",
        need="control flow that depends on shapes and numbers only: the body is traced once for all values",
        fix=_INSTEAD.get(name, f"choose between values with torch.where(condition, a, b){more}"),
    )


_WRITES = {"__setitem__", *(f"__i{op}__" for op in ("add", "sub", "mul", "truediv", "div", "pow", "and", "or", "xor"))}


@contextmanager
def as_compile_error(spec: LoopSpec, user_body: str | None) -> Iterator[None]:
    """Errors inside a user's body leave as a `CompileError` at the user's line (`OpFailed` as it is)."""
    try:
        yield
    except (NestloopError, OpFailed):
        raise
    except Exception as error:
        if user_body is None:
            raise
        if isinstance(error, NameError) and not isinstance(error, UnboundLocalError):
            _name_their_owner(spec, error)
        raise CompileError(
            f"The {user_body} of {spec.name} cannot be traced: {type(error).__name__}.",
            where=line_in_traceback(spec, error),
            given=str(error).splitlines()[0] if str(error) else type(error).__name__,
            need="plain PyTorch on tensors, numbers and the declared names",
            fix="run the body by hand on small tensors; backend='reference' calls it unchanged",
        ) from error


def _by_functorch(spec: LoopSpec) -> bool:
    """Whether the body calls something of `torch.func` at the moment."""
    files = user_files(spec)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in files:
        if frame.f_globals.get("__name__", "").startswith("torch._functorch"):
            return True
        frame = frame.f_back
    return False


def _name_their_owner(spec: LoopSpec, error: NameError) -> None:
    """Raise `UnknownNameError` for a bare name of what the loop declares."""
    own = {"t": spec.inputs, "self": {**spec.slow, **spec.dims}}
    owner = next((owner for owner, declared in own.items() if error.name in declared), None)
    fix = f"write {owner}.{error.name}"
    if error.name in {**spec.learner.fast, **spec.learner.slow}:
        owner, fix = "self", f"write self.{error.name} in the learner, f.{error.name} in the loop"
    if owner is not None:
        raise UnknownNameError(
            f"A body of {spec.name} names '{error.name}' alone.",
            where=line_in_traceback(spec, error),
            given=error.name,
            need="names of a class body by their owner: Python looks for bare ones outside it",
            fix=fix,
        ) from None


def user_frame(spec: LoopSpec) -> FrameType | None:
    """The innermost frame of the user's own files on the stack."""
    files = user_files(spec)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename not in files:
        frame = frame.f_back
    return frame


def user_line(spec: LoopSpec) -> Location | None:
    """Its line."""
    frame = user_frame(spec)
    return None if frame is None else Location(frame.f_code.co_filename, frame.f_lineno)


def line_in_traceback(spec: LoopSpec, error: BaseException) -> Location:
    """The innermost line of the user's own files that an error went through."""
    files, found = user_files(spec), spec.where
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename in files:
            found = Location(traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found
