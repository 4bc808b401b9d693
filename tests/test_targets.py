"""What the tools are given: the loops of a layer, and sizes of their dims."""

from __future__ import annotations

import re

import nestloop as nl
from nestloop import zoo


def test_explain_of_a_layer_has_the_loops_beside():
    class Second(zoo.RetNet):
        beside = zoo.LightningAttention

    class First(zoo.CausalLinearAttention):
        beside = Second

    text = nl.explain(nl.Layer(First, width=8, heads=2, dk=4, dv=4))
    assert re.findall(r"^(\w+)  \(", text, re.MULTILINE) == ["First", "Second", "LightningAttention"]
