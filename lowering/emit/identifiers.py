"""Declared names as identifiers of C++."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

# C++'s keywords, then what tiles.h defines, then what generated code calls its own variables.
_USED = frozenset(
    """alignas alignof and asm auto bitand bitor bool break case catch char class compl const constexpr continue
default delete do double else enum explicit export extern false float for friend goto if inline int long mutable
namespace new noexcept not nullptr operator or private protected public register return short signed sizeof static
struct switch template this throw true try typedef typeid typename union unsigned using virtual void volatile while xor
std S H B N INLINE Tensor Vector Anywhere LANES SCALAR block column_block product transpose softmax cumsum take put
clear copy add_to zero tile_count tile_start sigmoid sign rsqrt maximum minimum gelu gelu_tanh softplus
softplus_backward elu elu_backward exp_ tanh_ erf_ from_bits to_bits
exp_near_zero
i j l m o s e n rows once scratch memory raw need enough item head sequence group groups separate threads longest given
made order orders order_head order_sequence bounds weights rates step steps start stop from tile tiles total losses
d_loss after sum weight rate forward backward
part parts ranges range items apart slot begin read descend end_step pull_read pull_update pull_gradient at_item
at_part STATE ITEM PART
index own chunks every first last states nothing exchange exchanges solve solve_triangular Lane Lanes
singular unsolved
NAN INFINITY NULL EOF HUGE_VAL HUGE_VALF HUGE_VALL M_E M_PI M_PI_2 M_PI_4 M_SQRT2 M_LN2 M_LN10 errno assert stdin stdout
stderr""".split()  # noqa: SIM905
)


def identifier(name: str) -> str:
    """A declared name as an identifier that generated C++ uses for nothing else."""
    return f"{name}_" if name in _USED else name


def identified(
    name: str,
    declared: Container[str],
    affixes: Sequence[tuple[str, str]],
    identifier: Callable[[str], str] = identifier,
) -> str:
    """A graph's name with the declared name between a prefix and a suffix made an identifier."""
    for prefix, suffix in affixes:
        plain = name.removeprefix(prefix).removesuffix(suffix)
        if name == prefix + plain + suffix and plain in declared:
            return prefix + identifier(plain) + suffix
    return name
