"""What nothing would read is refused: parts under other names, in another class, or assigned too late."""

import copy
import pickle
from typing import Any

import pytest

import nestloop as nl
from nestloop.errors import (
    UnreadDeclarationError,
)
from tests.lang.squares import Linear, Squares
from tests.refusals import refused


def test_optimizers_and_schedules_under_names_that_nothing_reads():
    def optimizer():
        class Loop(Squares):
            learner = Linear
            optim = nl.SGD(lr=0.1)  # HERE

    def schedule():
        class Loop(Squares):  # HERE
            learner = Linear
            order = nl.Causal(4)

    def without_learner():
        class Loop(Squares):
            sgd = nl.SGD(lr=0.1)  # HERE

    what = "No loop reads the name '{}', under which {} has its {}."
    for step, name, part, made in (
        (optimizer, "optim", "optimizer", "nl.SGD(...)"),
        (schedule, "order", "schedule", "nl.Causal(...)"),
        (without_learner, "sgd", "optimizer", "nl.SGD(...)"),
    ):
        refused(
            step,
            UnreadDeclarationError,
            what.format(name, "Loop", part),
            given=f"{name} = {made}",
            need=f"{part} = {made}",
            fix=f"write {part} = ...",
        )

    class Loop(Squares):
        learner = Linear
        slowly = nl.SGD(lr=0.1)
        optimizer = slowly

    assert Loop.spec.optimizer is Loop.slowly


def test_declarations_in_the_wrong_class():
    def fast():
        class Loop(Squares):
            learner = Linear
            u = nl.fast("d")  # HERE

    def view():
        class Wrong(Linear):
            u = nl.view("d")  # HERE

    def gate():
        class Wrong(Linear):
            u = nl.gate()  # HERE

    def optimizer():
        class Wrong(Linear):
            u = nl.SGD(lr=0.1)  # HERE

    def schedule():
        class Wrong(Linear):  # HERE
            u = nl.Online()

    refused(
        fast,
        UnreadDeclarationError,
        "The loop Loop declares a fast weight, which only a learner has.",
        given="u in Loop, a loop",
        need="a fast weight in the body of a learner",
        fix="move u = ... into the body of class Memory(nl.Learner)",
    )
    for step, kind in ((view, "a view"), (gate, "a gate"), (optimizer, "an optimizer"), (schedule, "a schedule")):
        refused(
            step,
            UnreadDeclarationError,
            f"The learner Wrong declares {kind}, which only a loop has.",
            given="u in Wrong, a learner",
            need=f"{kind} in the body of a loop",
            fix="move u = ... into the body of the loop",
        )


class Made(Squares):
    learner = Linear


PARTS = {
    **{"schedule": nl.Online(), "optimizer": nl.SGD(lr=0.5), "learner": Linear, "output": (), "heads": 2},
    **{"loss": Squares.loss, "readout": Squares.readout, "kernel": Squares.loss, "beside": Made, "k": nl.view("d")},
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_are_not_assigned_once_a_loop_is_made(name):
    def step():
        setattr(Made, name, PARTS[name])  # HERE

    refused(
        step,
        UnreadDeclarationError,
        f"Made.{name} is assigned once the class is made, and nothing would read it.",
        given=f"Made.{name} = {getattr(PARTS[name], '__name__', PARTS[name])!r}",
        need=f"{name} in the body of a class",
        fix=f"write class Other(Made): {name} = ...",
    )


def test_weights_are_not_assigned_once_a_learner_is_made():
    def step():
        Linear.b = nl.fast("d")  # HERE

    refused(
        step,
        UnreadDeclarationError,
        "Linear.b is assigned once the class is made, and nothing would read it.",
        given="Linear.b = fast weight ?[d]",
        need="b in the body of a class",
        fix="write class Other(Linear): b = ...",
    )


def test_classes_are_subclassed_copied_pickled_and_given_other_attributes():
    class Base(nl.Loop):
        k = nl.view("d")
        loss, readout = Squares.loss, Squares.readout

    Base.schedule = nl.Online()  # read by the classes made from it

    class Other(Base):
        learner, q = Linear, nl.view("d")

    Other.note = "a word"
    assert isinstance(Other.spec.schedule, nl.Online)
    named: Any = type("Named", (Made,), {"schedule": nl.Causal(4)})
    assert named.spec.schedule == nl.Causal(4)
    assert copy.deepcopy(Made) is Made and pickle.loads(pickle.dumps(Made)) is Made
