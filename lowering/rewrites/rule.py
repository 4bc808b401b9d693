"""What a rewrite rule reports."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rewrite:
    """One rule, tried on one loop.

    Attributes:
        name: what people call it.
        fired: whether it applied.
        why: the precondition, and how it was met or missed.
        derivation: the equations, a line each; empty where it did not fire.
    """

    name: str
    fired: bool
    why: str
    derivation: tuple[str, ...] = ()

    def __str__(self) -> str:
        mark = "fired" if self.fired else "did not fire"
        return "\n".join([f"{self.name}: {mark}: {self.why}", *[f"    {line}" for line in self.derivation]])
