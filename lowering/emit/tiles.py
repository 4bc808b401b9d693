"""What generated Triton calls on tiles: the counterpart of tiles.h. Imported by generated modules only."""

import triton
import triton.language as tl


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
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, tl.zeros_like(x)))  # 0 of NaN, too, as PyTorch has it


@triton.jit
def tanh(x):
    # Of a large |x| the exponential overflows to infinity, and the quotient is 0.
    e = tl.exp(2 * tl.abs(x))
    far = 1 - 2 / (e + 1)
    y = x * x  # near 0 the difference above cancels
    near = x * (1 - y * (1.0 / 3 - y * (2.0 / 15 - y * (17.0 / 315 - y * (62.0 / 2835 - y * (1382.0 / 155925))))))
    return tl.where(tl.abs(x) < 0.04, near, tl.where(x < 0, -far, far))


@triton.jit
def expm1(x):
    # Kahan: the error of u cancels in the quotient.
    u = tl.exp(x)
    below = u - 1
    exact = below * (x / tl.log(u))  # which does not overflow before u does
    return tl.where(u == 1, x, tl.where((below == -1) | (u == float("inf")), below, exact))


@triton.jit
def log1p(x):
    # Kahan: the error of u cancels in the quotient.
    u = 1 + x
    return tl.where((u == 1) | (u == float("inf")), x, tl.log(u) * (x / (u - 1)))


@triton.jit
def sinh(x):
    up = expm1(tl.abs(x))  # far below zero it is -1, and the quotient infinite
    far = tl.where(up == float("inf"), up, 0.5 * (up + up / (up + 1)))
    return tl.where(x < 0, -far, far)


@triton.jit
def asinh(x):
    size = tl.abs(x)
    near = log1p(size + x * x / (1 + tl.sqrt(1 + x * x)))
    far = tl.where(size > 1e9, tl.log(size) + 0.6931471805599453, near)  # whose square may overflow
    return tl.where(x < 0, -far, far)


@triton.jit
def acosh(x):
    near = tl.log(x + tl.sqrt(x - 1) * tl.sqrt(x + 1))
    return tl.where(x > 1e9, tl.log(x) + 0.6931471805599453, near)


@triton.jit
def atanh(x):
    return 0.5 * (log1p(x) - log1p(-x))


@triton.jit
def erfc(x):
    # t exp(r - z z), r a polynomial of t = 2 / (2 + z) (Press et al., Numerical Recipes, 6.2.2): no digits cancel.
    z = minimum(tl.abs(x), 30.0)
    t = 2 / (2 + z)
    u = 2 * t - 1
    r = (-1.18182903808e-07 * u + 1.64150378496e-07) * u + 8.549446451199999e-07
    r = ((r * u - 1.723317223423999e-06) * u - 2.352940777472e-06) * u + 8.966702268415998e-06
    r = ((r * u - 4.063842795519992e-07) * u - 3.0432771907584e-05) * u + 3.206559937331199e-05
    r = ((r * u + 7.150155859763198e-05) * u - 0.000174425972878336) * u - 9.376250539366399e-05
    r = ((r * u + 0.00067370905235584) * u - 0.000146242063788416) * u - 0.00234581704061376
    r = ((r * u + 0.001758933059610464) * u + 0.008824938935285152) * u - 0.00987268933950617
    r = ((r * u - 0.04689561024571256) * u + 0.04734330684133281) * u + 0.6726432239778217
    r = r * u - 0.6717940840566903
    high = z.to(tl.bfloat16).to(z.dtype)  # whose square is exact
    beyond = t * tl.exp(-high * high) * tl.exp(r - (z - high) * (z + high))
    return tl.where(x < 0, 2 - beyond, beyond)


@triton.jit
def isnan(x):
    return x != x


@triton.jit
def truncated(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    return x * tl.sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))


@triton.jit
def softplus(x, beta, threshold):
    return tl.where(x * beta > threshold, x, log1p(tl.exp(tl.where(x * beta > threshold, 0.0, x * beta))) / beta)


@triton.jit
def softplus_backward(d, x, beta, threshold):
    return tl.where(x * beta > threshold, d, d * tl.sigmoid(x * beta))


@triton.jit
def elu(x, alpha, scale, input_scale):
    return tl.where(x > 0, x * scale, expm1(tl.where(x > 0, 0.0, x * input_scale)) * (alpha * scale))


@triton.jit
def elu_backward(d, alpha, scale, input_scale, is_result: tl.constexpr, x):
    if is_result:
        slope = input_scale * (x + alpha * scale)
    else:
        slope = input_scale * alpha * scale * tl.exp(tl.where(x > 0, 0.0, x * input_scale))
    return tl.where(x > 0, d * scale, d * slope)


@triton.jit
def softmax(x, axis: tl.constexpr, live):
    """Over one axis, of which `live` holds."""
    x = tl.where(live, x, float("-inf"))
    e = tl.exp(x - tl.expand_dims(tl.max(x, axis), axis))
    return e / tl.expand_dims(tl.sum(e, axis), axis)


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
