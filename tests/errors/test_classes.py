"""The classes of errors: every one crosses processes whole, and says what it was given."""

import copy
import pickle

import numpy as np
import pytest
import torch

import nestloop as nl
from nestloop import errors
from nestloop.errors import (
    DimExpressionError,
    InputError,
    MissingPartError,
)
from tests.errors.squares import Good, inputs
from tests.refusals import refused


def test_messages_do_not_hold_whole_tensors_arrays_and_modules():
    def layer():
        nl.compile(nl.Layer(Good, 16, 2))  # type: ignore[arg-type]  # HERE

    def dims():
        nl.fast(torch.zeros(4, 4))  # type: ignore[arg-type]  # HERE

    with pytest.raises(MissingPartError, match=r"given: a Layer\n"):
        layer()
    refused(
        dims,
        DimExpressionError,
        "The dim expression Tensor [4, 4] is not arithmetic over dim names.",
        given="a Tensor",
        need="names, numbers, + - * / //, ** with a number up to 16, and parentheses",
        fix='write it like "d", "4*d" or "H/(N*D)"',
    )
    with pytest.raises(MissingPartError, match=r"given: a SGD\n"):
        type("Loop", (Good,), {"optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)})
    with pytest.raises(InputError, match=r"given: ndarray \[1, 2, 3, 4\]\n"):
        nl.compile(Good)(*inputs(k=np.zeros((1, 2, 3, 4))))
    assert errors.shown("x" * 500) == "a str" and errors.shown(0.5) == "0.5"


@pytest.mark.parametrize(
    "kind", [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, nl.NestloopError)]
)
def test_errors_cross_processes_whole(kind):
    assert kind.__doc__ is not None and issubclass(kind, nl.NestloopError)
    error = kind("what.", where=errors.Location(__file__, 3), given="g", need="n", fix="f")
    for twin in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(twin) is kind and str(twin) == str(error)
        assert (twin.what, twin.where, twin.given, twin.need, twin.fix) == (
            error.what,
            error.where,
            error.given,
            error.need,
            error.fix,
        )


def test_a_message_has_only_the_parts_it_was_given():
    assert str(nl.NestloopError("what.")) == "what."
    missing = errors.Location("no/such/file.py", 7)
    assert str(nl.NestloopError("what.", where=missing, fix="f")) == "what.\n  at:    no/such/file.py:7\n  fix:   f"
    assert missing.short == "file.py:7" and missing.text == ""
