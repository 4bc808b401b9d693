"""What generated Triton calls on tiles: the counterpart of tiles.h. Imported by generated modules only."""

import triton
import triton.language as tl

from nestloop.lowering.emit.elements import above_one, exp


@triton.jit
def dot(a, b, S: tl.constexpr, PRODUCT: tl.constexpr):
    """a [M, K] b [K, N] in the compute dtype S; factors in `PRODUCT`: "bf16", "fp16", or a precision of `tl.dot`."""
    if PRODUCT == "bf16":
        product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), out_dtype=tl.float32)
    elif PRODUCT == "fp16":
        product = tl.dot(a.to(tl.float16), b.to(tl.float16), out_dtype=tl.float32)
    else:
        product = tl.dot(a, b, input_precision=PRODUCT, out_dtype=S)
    return product


@triton.jit
def dot_of_column(a, b, S: tl.constexpr, PRODUCT: tl.constexpr):
    """a [M, K] b [K], as a product of tiles: b is the first of as many columns as that takes."""
    first = tl.arange(0, 16)[None, :] == 0
    product = dot(a, tl.where(first, b[:, None], 0.0), S, PRODUCT)
    return tl.sum(tl.where(first, product, 0.0), 1)


@triton.jit
def factor(x, S: tl.constexpr, PRODUCT: tl.constexpr):
    """x as `dot` takes it."""
    if PRODUCT == "bf16":
        x = x.to(tl.bfloat16)
    elif PRODUCT == "fp16":
        x = x.to(tl.float16)
    else:
        x = x.to(S)
    return x


@triton.jit
def exact_dot(a, b, S: tl.constexpr):
    """a [M, K] b [K, N] in the compute dtype S, and no less: for what low precision is not for.

    Float32 factors are three bfloat16 terms each, of which six products matter: matrix units take them, of NVIDIA and
    of AMD. They take none of "ieee", for which each thread holds whole rows and columns.
    """
    PRECISION: tl.constexpr = "ieee" if S == tl.float64 else "bf16x6"
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=S)


@triton.jit
def dot_of_whole(a, b, S: tl.constexpr, WHOLE: tl.constexpr):
    """The same where a ("left") or b ("right") has nothing but whole numbers up to 256, which are one term each."""
    if S == tl.float64:
        product = exact_dot(a, b, S)
    elif WHOLE == "left":
        whole = a.to(tl.bfloat16)
        first, second, third = terms(b)
        product = tl.dot(whole, first, tl.dot(whole, second, tl.dot(whole, third)))
    else:
        whole = b.to(tl.bfloat16)
        first, second, third = terms(a)
        product = tl.dot(first, whole, tl.dot(second, whole, tl.dot(third, whole)))
    return product


@triton.jit
def terms(x):
    """Three bfloat16 numbers whose sum is a float32 one, the largest first; of an infinity itself, and zeros."""
    first = x.to(tl.bfloat16)
    left = tl.where(x == first.to(tl.float32), 0.0, x - first.to(tl.float32))
    second = left.to(tl.bfloat16)
    return first, second, (left - second.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def settled(x):
    """x [M, N], computed as its operands lie, and then handed to products.

    Triton takes a product's factor back to the loads that it comes from, and computes all in between in the product's
    layout, which has each element in as many threads as need it. It does not pass what depends on a position.
    """
    return tl.where(tl.arange(0, x.shape[0])[:, None] >= 0, x, 0.0)


@triton.jit
def anew(n):
    """0, in each turn of the loop that n comes from; Triton does not know that.

    It takes places, offsets and masks out of every loop in which they stay the same, even where a loop is told not to
    (LLVM alone heeds that): those of all that a kernel does would then take registers from its start to its end. LLVM
    does know. 64, since places beside one another are read together where the first is known to be aligned.
    """
    return 64 * tl.umulhi(tl.cast(n, tl.uint32), tl.cast(0, tl.uint32)).to(tl.int32)


@triton.jit
def softmax(x, axis: tl.constexpr, live):
    """Over one axis, of which `live` holds."""
    x = tl.where(live, x, float("-inf"))
    e = exp(x - tl.expand_dims(tl.max(x, axis), axis))
    return e * tl.expand_dims(above_one(tl.sum(e, axis)), axis)


@triton.jit
def cumsum(x, axis: tl.constexpr, live):
    return tl.cumsum(x, axis)


@triton.jit
def cumsum_reversed(x, axis: tl.constexpr, live):
    return tl.cumsum(tl.where(live, x, 0.0), axis, reverse=True)


@triton.jit
def solve_triangular(a, b, live, UPPER: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr, PRODUCT: tl.constexpr):
    """x [T, N] with a x = b, by inverses of blocks of 2, 4, .. rows; rows that are not `live` [T] are left out.

    Every product is one of blocks beside each other: no powers of a, which cancel where keys are correlated.
    """
    T: tl.constexpr = a.shape[0]
    EXACT: tl.constexpr = system_precision(PRODUCT)
    b = tl.where(live[:, None], b, 0.0)
    a, pivot = unit_triangle(a, live, UPPER, UNIT)
    if not UNIT:
        b = b / pivot[:, None]
    inverse = half_inverses(a, S, EXACT)
    if T == 16:
        x = dot(inverse, b, S, EXACT)
    else:  # the last two blocks need no inverse of both
        inverse = tl.reshape(doubled(inverse), (T, T))
        x = dot(inverse, b, S, EXACT)
        x = x - across(inverse, a, x, T // 2, S, EXACT)
    return x


@triton.jit
def inverse_triangular(a, live, UPPER: tl.constexpr, UNIT: tl.constexpr, S: tl.constexpr, PRODUCT: tl.constexpr):
    """The inverse of a [T, T] for several right sides, each for `solved`, in the way of `solve_triangular`."""
    T: tl.constexpr = a.shape[0]
    EXACT: tl.constexpr = system_precision(PRODUCT)
    a, pivot = unit_triangle(a, live, UPPER, UNIT)
    inverse = half_inverses(a, S, EXACT)
    if T > 16:
        inverse = tl.reshape(doubled(inverse), (T, T))
        inverse = inverse - across(inverse, a, inverse, T // 2, S, EXACT)
    return inverse if UNIT else inverse / pivot[None, :]


@triton.jit
def solved(inverse, b, live, S: tl.constexpr, PRODUCT: tl.constexpr):
    """x [T, N] with a x = b, of which rows that are not `live` [T] are left out, by the inverse of a."""
    EXACT: tl.constexpr = system_precision(PRODUCT)
    return dot(inverse, tl.where(live[:, None], b, 0.0), S, EXACT)


@triton.constexpr_function
def system_precision(product):
    """Of products with an inverse: low precision is for mm alone, and of an inverse it costs more than of a factor."""
    return "tf32" if product == "bf16" or product == "fp16" else product


@triton.jit
def unit_triangle(a, live, UPPER: tl.constexpr, UNIT: tl.constexpr):
    """a [T, T] with rows over their pivots, of which only what lies beside the diagonal, and the pivots [T]."""
    i = tl.arange(0, a.shape[0])
    pivot = tl.full((a.shape[0],), 1.0, a.dtype)
    if not UNIT:
        pivot = tl.where(live, tl.sum(tl.where(i[:, None] == i[None, :], a, 0.0), 1), 1.0)
        a = a / pivot[:, None]
    beside = i[:, None] < i[None, :] if UPPER else i[:, None] > i[None, :]
    return tl.where(beside & live[:, None] & live[None, :], a, 0.0), pivot


@triton.jit
def half_inverses(a, S: tl.constexpr, EXACT: tl.constexpr):
    """Of 1 + a [T, T], a triangle, the inverses of both halves [2, T / 2, T / 2]; of 16 rows, of the whole."""
    T: tl.constexpr = a.shape[0]
    blocks = diagonal(a, 16)
    j = tl.arange(0, 16)
    eye = tl.where(j[:, None] == j[None, :], 1.0, 0.0).to(S)
    inverse = eye - tl.where(j[:, None] // 2 == j[None, :] // 2, blocks, 0.0)
    inverse = inverse - across(inverse, blocks, inverse, 2, S, EXACT)
    inverse = inverse - across(inverse, blocks, inverse, 4, S, EXACT)
    inverse = inverse - across(inverse, blocks, inverse, 8, S, EXACT)
    if T >= 64:
        inverse = doubled(inverse)
        inverse = inverse - across(inverse, diagonal(a, 32), inverse, 16, S, EXACT)
    if T >= 128:
        inverse = doubled(inverse)
        inverse = inverse - across(inverse, diagonal(a, 64), inverse, 32, S, EXACT)
    if T >= 256:
        inverse = doubled(inverse)
        inverse = inverse - across(inverse, diagonal(a, 128), inverse, 64, S, EXACT)
    tl.static_assert(T <= 256)
    return inverse


@triton.jit
def across(left, a, right, SIZE: tl.constexpr, S: tl.constexpr, PRODUCT: tl.constexpr):
    """left c right, c being what a [.., n, n] has between the two blocks of SIZE rows of each pair of them."""
    i = tl.arange(0, a.shape[-1]) // SIZE
    between = tl.where((i[:, None] ^ 1) == i[None, :], a, 0.0)
    return dot(left, dot(between, right, S, PRODUCT), S, PRODUCT)


@triton.jit
def diagonal(a, SIZE: tl.constexpr):
    """The blocks on the diagonal of a [T, T], [T / SIZE, SIZE, SIZE]; of a single one, a itself."""
    T: tl.constexpr = a.shape[0]
    if T == SIZE:
        blocks = a
    else:
        own = (tl.arange(0, T) // SIZE)[:, None] == tl.arange(0, T // SIZE)[None, :]
        rows = tl.sum(tl.where(own[:, :, None], tl.reshape(a, (T, T // SIZE, SIZE)), 0.0), 1)
        blocks = tl.reshape(rows, (T // SIZE, SIZE, SIZE))
    return blocks


@triton.jit
def doubled(blocks):
    """Blocks [B, n, n] two by two on the diagonals of others, [B / 2, 2 n, 2 n]."""
    B: tl.constexpr = blocks.shape[0]
    n: tl.constexpr = blocks.shape[1]
    own = (tl.arange(0, B) % 2)[:, None] == tl.arange(0, 2)[None, :]
    return tl.reshape(tl.where(own[:, None, :, None], blocks[:, :, None, :], 0.0), (B // 2, 2 * n, 2 * n))


@triton.jit
def solve(a, b, n):
    """x [.., T, N] with a x = b, a system of n rows or a batch, by Gauss-Jordan elimination with row exchanges.

    The pivot is the largest of its column. Rows stay where they are till the end, when each goes to its column's place.
    """
    B: tl.constexpr = a.shape[0] if len(a.shape) == 3 else 1
    T: tl.constexpr = a.shape[-1]
    N: tl.constexpr = b.shape[-1]
    x = tl.reshape(b, (B, T, N))
    a = tl.reshape(a, (B, T, T))
    i = tl.arange(0, T)
    live = (i < n)[None, :, None]
    x = tl.where(live, x, 0.0)
    place = tl.broadcast_to(tl.where(live, -1, i[None, :, None]), (B, T, 1))
    for k in range(0, n):
        column = tl.sum(tl.where((i == k)[None, None, :], a, 0.0), 2, keep_dims=True)
        size = tl.where(place < 0, tl.abs(column), -1.0)
        if B == 1:  # numbers have no layout, which would be changed for each use
            here = i[None, :, None] == tl.argmax(tl.reshape(size, (T,)), 0)
            pivot = tl.sum(tl.where(here, column, 0.0))
        else:
            here = i[None, :, None] == tl.argmax(size, 1, keep_dims=True)
            pivot = tl.sum(tl.where(here, column, 0.0), 1, keep_dims=True)
        row = tl.sum(tl.where(here, a, 0.0), 1, keep_dims=True) / pivot
        right = tl.sum(tl.where(here, x, 0.0), 1, keep_dims=True) / pivot
        column = tl.where(live, column, 0.0)
        a = tl.where(here, row, a - column * row)
        x = tl.where(here, right, x - column * right)
        place = tl.where(here, k, place)
    pivots = tl.sum(tl.where(place == i[None, None, :], i[None, :, None], 0), 1)
    x = tl.gather(x, tl.broadcast_to(pivots[:, :, None], (B, T, N)), 1)
    return tl.reshape(x, b.shape)
