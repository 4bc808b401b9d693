"""Functions of elements that generated Triton calls. Imported by generated modules only.

Of float32, powers of 2 and reciprocal square roots are one instruction each on every GPU. What Triton makes of `tl.exp`
is 5 instructions, of `tl.sigmoid` 12, of `/` 8 and of `tl.log` 25, most of them for numbers that float32 can hardly
tell from 0, or for infinities. Float64 has no such instructions, and takes what Triton has.
"""

import triton
import triton.language as tl


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
def exp(x):
    if x.dtype == tl.float64:
        y = tl.exp(x)
    else:
        y = tl.exp2(x * 1.4426950408889634)
    return y


@triton.jit
def above_one(x):
    """1 / x of any x from 1 on, infinity included."""
    if x.dtype == tl.float64:
        y = 1 / x
    else:
        root = tl.rsqrt(x)
        y = root * root
    return y


@triton.jit
def sigmoid(x):
    if x.dtype == tl.float64:
        e = tl.exp(-x)
    else:  # a sign would be an instruction of its own
        e = tl.exp2(x * -1.4426950408889634)
    return above_one(1 + e)


@triton.jit
def tanh(x):
    y = x * x
    if x.dtype == tl.float64:
        # Of a large |x| the exponential overflows to infinity, and the quotient is 0.
        size = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
        far = tl.where(x < 0, -size, size)
        # Near 0 that difference cancels: Taylor's.
        r = 1.0 / 3 - y * (2.0 / 15 - y * (17.0 / 315 - y * (62.0 / 2835 - y * (1382.0 / 155925))))
        made = tl.where(tl.abs(x) < 0.04, x * (1 - y * r), far)
    else:
        far = 1 - 2 * above_one(1 + exp(2 * x))
        # Minimax, of Moshier's Cephes library (tanhf.c).
        r = 0.333332819422 - y * (0.133314422036 - y * (0.0537397155531 - y * (0.0206390887954 - y * 0.00570498872745)))
        made = tl.where(tl.abs(x) < 0.625, x - x * y * r, far)
    return made


@triton.jit
def expm1(x):
    if x.dtype == tl.float64:
        u = tl.exp(x)  # Kahan: the error of u cancels in the quotient
        below = u - 1
        exact = below * (x / tl.log(u))  # which does not overflow before u does
        y = tl.where(u == 1, x, tl.where((below == -1) | (u == float("inf")), below, exact))
    else:  # minimax near 0, of Moshier's Cephes library (expf.c)
        r = ((0.00019875691500 * x + 0.0013981999507) * x + 0.0083334519073) * x + 0.041665795894
        r = (r * x + 0.16666665459) * x + 0.50000001201
        y = tl.where(tl.abs(x) < 0.34, x + x * x * r, exp(x) - 1)
    return y


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
def upper_tail(x):
    """Of float32 x >= 0, erfc(x / sqrt(2)) / 2 within 7e-8: the share of a normal distribution beyond x.

    Its logarithm is nearly a polynomial, fitted for x < 5.5 by least squares reweighted until errors times that share
    to the power 0.7 were even. Further out, where the share is under 2e-8, it falls faster.
    """
    r = ((-1.69359615e-06 * x + 2.60746604e-05) * x - 0.000125356757) * x - 0.000276206564
    r = ((r * x + 0.00723234) * x - 0.0526014888) * x - 0.459178378
    return tl.exp2((r * x - 1.15110793) * x - 1)


@triton.jit
def erf(x):
    if x.dtype == tl.float64:
        y = tl.erf(x)
    else:
        far = 1 - 2 * upper_tail(tl.abs(x) * 1.4142135623730951)
        z = x * x  # near 0 the difference above cancels: Taylor's
        near = x * (1.1283792 - z * (0.37612639 - z * (0.11283792 - z * (0.026866171 - z * 0.0052239776))))
        y = tl.where(tl.abs(x) < 0.45, near, tl.where(x < 0, -far, far))
    return y


@triton.jit
def isnan(x):
    return x != x


@triton.jit
def truncated(x):
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def gelu(x):
    if x.dtype == tl.float64:
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    else:
        size = minimum(tl.abs(x), 12.0)  # beyond which is nothing, and none of infinity
        y = tl.maximum(x, 0.0) - size * upper_tail(size)
    return y


@triton.jit
def gelu_tanh(x):
    return x * sigmoid(1.5957691216057308 * x * (1 + 0.044715 * x * x))


@triton.jit
def softplus(x, beta, threshold):
    y = x * beta
    small = exp(-tl.abs(y))
    if x.dtype == tl.float64:
        rest = log1p(small)
    else:  # 2 atanh(t), whose t is at most 1/3
        t = small * above_one(2 + small)
        z = t * t
        r = 1.0 / 5 + z * (1.0 / 7 + z * (1.0 / 9 + z * (1.0 / 11 + z * (1.0 / 13 + z * (1.0 / 15)))))
        rest = 2 * t * (1 + z * (1.0 / 3 + z * r))
    return tl.where(y > threshold, x, (tl.maximum(y, 0.0) + rest) / beta)


@triton.jit
def softplus_backward(d, x, beta, threshold):
    return tl.where(x * beta > threshold, d, d * sigmoid(x * beta))


@triton.jit
def elu(x, alpha, scale, input_scale):
    return tl.where(x > 0, x * scale, expm1(tl.where(x > 0, 0.0, x * input_scale)) * (alpha * scale))


@triton.jit
def elu_backward(d, alpha, scale, input_scale, is_result: tl.constexpr, x):
    if is_result:
        slope = input_scale * (x + alpha * scale)
    else:
        slope = input_scale * alpha * scale * exp(tl.where(x > 0, 0.0, x * input_scale))
    return tl.where(x > 0, d * scale, d * slope)
