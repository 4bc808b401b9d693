// Tile operations that generated C++ calls: matrix products, elementary functions, tokens in and out of tiles.
//
// A tile is a row-major array in scratch memory. Everything is written for S, the compute type (float or double), with
// the compiler's own vector types, so one text serves every machine; sizes that are no multiple of a vector are computed
// on padded copies.
#pragma once

#include <sched.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#ifndef SCALAR
#define SCALAR float
#endif
typedef SCALAR S;

#define INLINE static inline __attribute__((always_inline))

namespace {

// ---- Vectors -------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, BLOCK_VECTORS = 4;  // 32 registers: 6 x 4 sums, 4 of b
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, BLOCK_VECTORS = 2;  // 16 registers: 6 x 2 sums, 2 of b
#elif defined(__aarch64__)
constexpr int VECTOR_BYTES = 16, BLOCK_VECTORS = 4;
#else
constexpr int VECTOR_BYTES = 16, BLOCK_VECTORS = 2;
#endif
constexpr long LANES = VECTOR_BYTES / sizeof(S);
constexpr int BLOCK_ROWS = 6;

typedef S Vector __attribute__((vector_size(VECTOR_BYTES)));
typedef S Anywhere __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(S)), may_alias));  // at any address

// ---- Matrix products -----------------------------------------------------------------------------------------------

// Rows x VECTORS vectors of c (+)= alpha a b, the sums in registers. a is [rows, k], or [k, rows] where TRANSPOSED.
template <int ROWS, int VECTORS, bool TRANSPOSED>
void block(long k, const S* a, long lda, const S* b, long ldb, S* c, long ldc, S alpha, bool add) {
    Vector sum[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) sum[i][j] = Vector{};
    for (long p = 0; p < k; p++) {
        Vector row[VECTORS];
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) row[j] = *(const Anywhere*)(b + p * ldb + j * LANES);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; i++) {
            const S factor = TRANSPOSED ? a[p * lda + i] : a[i * lda + p];
#pragma GCC unroll 8
            for (int j = 0; j < VECTORS; j++) sum[i][j] += factor * row[j];
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 8
        for (int j = 0; j < VECTORS; j++) {
            Anywhere* to = (Anywhere*)(c + i * ldc + j * LANES);
            *to = add ? *to + alpha * sum[i][j] : alpha * sum[i][j];
        }
}

// All m rows of VECTORS vectors of columns, in blocks of 6 and 5 rows: shorter blocks have too few sums in flight, and
// any m of 20 or more, and 15 to 18, is made of these two. Narrow blocks are twice as tall for the same reason.
template <int VECTORS, bool TRANSPOSED>
void column_block(long m, long k, const S* a, long lda, const S* b, long ldb, S* c, long ldc, S alpha, bool add) {
    constexpr int TALL = 2 * BLOCK_ROWS;
    const long step = TRANSPOSED ? 1 : lda;
    const long fitting = (6 - m % 6) % 6;
    const long fives = 5 * fitting <= m ? fitting : m % 6 == 5;
    const long sixes = (m - 5 * fives) / 6;
    long i = 0;
    if (VECTORS < BLOCK_VECTORS)
        for (; i + TALL <= 6 * sixes; i += TALL)
            block<TALL, VECTORS, TRANSPOSED>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, alpha, add);
    for (; i < 6 * sixes; i += 6)
        block<6, VECTORS, TRANSPOSED>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, alpha, add);
    for (long five = 0; five < fives; five++, i += 5)
        block<5, VECTORS, TRANSPOSED>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, alpha, add);
    for (; i + 2 <= m; i += 2)
        block<2, VECTORS, TRANSPOSED>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, alpha, add);
    if (i < m) block<1, VECTORS, TRANSPOSED>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, alpha, add);
}

// c [m, n] = alpha a b, or c += alpha a b where `add`. a is [m, k], or [k, m] where TRANSPOSED; b is [k, n].
template <bool TRANSPOSED>
__attribute__((noinline)) void product(long m, long n, long k, const S* a, long lda, const S* b, long ldb, S* c,
                                       long ldc, S alpha, bool add) {
    long j = 0;
    for (; j + BLOCK_VECTORS * LANES <= n; j += BLOCK_VECTORS * LANES)
        column_block<BLOCK_VECTORS, TRANSPOSED>(m, k, a, lda, b + j, ldb, c + j, ldc, alpha, add);
    if (BLOCK_VECTORS > 2 && j + 2 * LANES <= n) {
        column_block<2, TRANSPOSED>(m, k, a, lda, b + j, ldb, c + j, ldc, alpha, add);
        j += 2 * LANES;
    }
    if (j + LANES <= n) {
        column_block<1, TRANSPOSED>(m, k, a, lda, b + j, ldb, c + j, ldc, alpha, add);
        j += LANES;
    }
    if (j == n) return;
    // The last columns, fewer than a vector holds: b's are copied beside zeros, a slice of k at a time.
    constexpr long SLICE = 128, HIGH = 2 * BLOCK_ROWS;
    alignas(VECTOR_BYTES) S narrow[SLICE * LANES];
    alignas(VECTOR_BYTES) S result[HIGH * LANES];
    const long columns = n - j;
    for (long from = 0; from < k || from == 0; from += SLICE) {
        const long depth = k - from < SLICE ? k - from : SLICE;
        for (long p = 0; p < depth; p++) {
            for (long q = 0; q < columns; q++) narrow[p * LANES + q] = b[(from + p) * ldb + j + q];
            for (long q = columns; q < LANES; q++) narrow[p * LANES + q] = 0;
        }
        for (long i = 0; i < m; i += HIGH) {
            const long rows = m - i < HIGH ? m - i : HIGH;
            const S* left = TRANSPOSED ? a + from * lda + i : a + i * lda + from;
            column_block<1, TRANSPOSED>(rows, depth, left, lda, narrow, LANES, result, LANES, alpha, false);
            for (long r = 0; r < rows; r++)
                for (long q = 0; q < columns; q++) {
                    S* to = c + (i + r) * ldc + j + q;
                    *to = (add || from > 0 ? *to : S(0)) + result[r * LANES + q];
                }
        }
    }
}

typedef std::conditional<sizeof(S) == 4, std::int32_t, std::int64_t>::type Lane;
typedef Lane Lanes __attribute__((vector_size(VECTOR_BYTES)));

// Of rows i and i + DISTANCE of a square: exchange the first one's lanes with that bit set, and the other's without.
template <int DISTANCE, int... I>
INLINE void exchange(Vector& a, Vector& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
    const Vector low = __builtin_shufflevector(a, b, (I & DISTANCE ? (int)LANES + I - DISTANCE : I)...);
    b = __builtin_shufflevector(a, b, (I & DISTANCE ? (int)LANES + I : I + DISTANCE)...);
#else
    const Lanes first = {(I & DISTANCE ? (Lane)LANES + I - DISTANCE : I)...};
    const Lanes second = {(I & DISTANCE ? (Lane)LANES + I : I + DISTANCE)...};
    const Vector low = __builtin_shuffle(a, b, first);
    b = __builtin_shuffle(a, b, second);
#endif
    a = low;
}

template <int DISTANCE>
INLINE void exchanges(Vector* row) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & DISTANCE)) exchange<DISTANCE>(row[i], row[i + DISTANCE], std::make_integer_sequence<int, LANES>());
    if constexpr (DISTANCE > 1) exchanges<DISTANCE / 2>(row);
}

// to [columns, rows] = the transpose of from [rows, columns], by squares in registers.
__attribute__((noinline)) void transpose(long rows, long columns, const S* from, long ld, S* to) {
    for (long i = 0; i < rows; i += LANES)
        for (long j = 0; j < columns; j += LANES) {
            if (i + LANES <= rows && j + LANES <= columns) {
                Vector row[LANES];
#pragma GCC unroll 16
                for (int p = 0; p < LANES; p++) row[p] = *(const Anywhere*)(from + (i + p) * ld + j);
                exchanges<LANES / 2>(row);
#pragma GCC unroll 16
                for (int p = 0; p < LANES; p++) *(Anywhere*)(to + (j + p) * rows + i) = row[p];
                continue;
            }
            for (long p = i; p < rows && p < i + LANES; p++)
                for (long q = j; q < columns && q < j + LANES; q++) to[q * rows + p] = from[p * ld + q];
        }
}

// ---- Linear systems ------------------------------------------------------------------------------------------------

// The number of a system without one solution that this thread has met, 0 for none.
thread_local int singular = 0;

// x [n, m] of a x = b, a [n, n] triangular: by rows inside blocks of 16, products between them. Never by powers of a,
// which cancel where rows of a are alike.
template <bool UPPER, bool UNIT>
__attribute__((noinline)) void solve_triangular(long n, long m, const S* a, long lda, const S* b, S* x, int number) {
    constexpr long ROWS = 16;
    if (x != b) std::memcpy(x, b, n * m * sizeof(S));
    const long blocks = (n + ROWS - 1) / ROWS;
    for (long step = 0; step < blocks; step++) {
        const long start = (UPPER ? blocks - 1 - step : step) * ROWS;
        const long stop = start + ROWS < n ? start + ROWS : n;
        const long from = UPPER ? stop : 0, known = UPPER ? n - stop : start;
        if (known) product<false>(stop - start, m, known, a + start * lda + from, lda, x + from * m, m, x + start * m,
                                  m, S(-1), true);
        for (long r = 0; r < stop - start; r++) {
            const long i = UPPER ? stop - 1 - r : start + r;
            S* row = x + i * m;
            for (long j = UPPER ? i + 1 : start; j < (UPPER ? stop : i); j++) {
                const S factor = a[i * lda + j];
                const S* other = x + j * m;
                for (long c = 0; c < m; c++) row[c] -= factor * other[c];
            }
            if (!UNIT) {
                const S pivot = a[i * lda + i];
                if (pivot == 0) singular = number;
                for (long c = 0; c < m; c++) row[c] /= pivot;
            }
        }
    }
}

// x [n, m] of a x = b by elimination with row exchanges, which leaves a [n, n] as its factors.
__attribute__((noinline)) void solve(long n, long m, S* a, long lda, const S* b, S* x, int number) {
    std::memcpy(x, b, n * m * sizeof(S));
    for (long k = 0; k < n; k++) {
        long pivot = k;
        for (long i = k + 1; i < n; i++)
            if (std::fabs(a[i * lda + k]) > std::fabs(a[pivot * lda + k])) pivot = i;
        if (pivot != k) {
            for (long j = 0; j < n; j++) std::swap(a[k * lda + j], a[pivot * lda + j]);
            for (long j = 0; j < m; j++) std::swap(x[k * m + j], x[pivot * m + j]);
        }
        for (long i = k + 1; i < n; i++) {
            const S factor = a[i * lda + k] / a[k * lda + k];
            for (long j = k + 1; j < n; j++) a[i * lda + j] -= factor * a[k * lda + j];
            for (long j = 0; j < m; j++) x[i * m + j] -= factor * x[k * m + j];
        }
    }
    solve_triangular<true, false>(n, m, a, lda, x, x, number);  // which finds a pivot that is 0
}

// ---- Elementary functions ------------------------------------------------------------------------------------------
// In float32 without branches or calls, so that loops over them become vector code; errors of 1 to 2 units in the last
// place. In float64 the C library's.

INLINE float from_bits(std::int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE std::uint32_t to_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float exp_near_zero(float r) {  // |r| <= log(2) / 2
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return p * (r * r) + r + 1.0f;
}

INLINE float exp_within(float y) {  // e^y between 2^-126 and 2^127, without exp_'s care for the ends; infinite at 2^128
    const float shifted = y * 1.44269504f + 12582912.0f;  // rounds to a whole number in the lowest bits
    const float whole = shifted - 12582912.0f;
    const float r = (y - whole * 0.693359375f) - whole * -2.12194440e-4f;
    const float power = from_bits((std::int32_t)((to_bits(shifted) << 23) + (127u << 23)));  // 2^whole
    return exp_near_zero(r) * power;
}

INLINE float exp_(float x) {
    const float low = x < -104.0f ? -104.0f : x;
    const float y = low > 89.0f ? 89.0f : low;
    const float shifted = y * 1.44269504f + 12582912.0f;  // rounds to a whole number in the lowest bits
    const float whole = shifted - 12582912.0f;
    const float r = (y - whole * 0.693359375f) - whole * -2.12194440e-4f;
    const float p = exp_near_zero(r);
    const std::int32_t n = (std::int32_t)whole;
    const std::int32_t half = n >> 1;  // 2^n in two factors: a result below the normal numbers stays right
    const float result = p * from_bits((half + 127) << 23) * from_bits((n - half + 127) << 23);
    return x == x ? result : x;
}
INLINE double exp_(double x) { return std::exp(x); }

INLINE float tanh_(float x) {
    const float size = __builtin_fabsf(x);
    const float y = size > 10.0f ? 10.0f : size;
    const float far = 1.0f - 2.0f / (exp_within(2.0f * y) + 1.0f);  // far from zero
    const float z = x * x;
    float p = -5.70498872745e-3f;
    p = p * z + 2.06390887954e-2f;
    p = p * z + -5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z + -3.33332819422e-1f;
    const float near = p * z * x + x;
    const float signed_far = __builtin_copysignf(far, x);
    return size > 0.625f ? signed_far : near;  // NaN is not above: near, which is NaN too
}
INLINE double tanh_(double x) { return std::tanh(x); }

INLINE float erf_(float x) {
    const float t = __builtin_fabsf(x), s = x * x;
    float f = -1.72853470e-5f * t + 3.83197126e-4f;
    f = f * s + (-3.88396438e-3f * t + 2.42546219e-2f);
    f = f * t + -1.06777877e-1f;
    f = f * t + -6.34846687e-1f;
    f = f * t + -1.28717512e-1f;
    f = f * t - t;
    const float far = 1.0f - exp_(t > 4.0f ? -30.0f : f);
    float r = -5.96761703e-4f;
    r = r * s + 4.99119423e-3f;
    r = r * s + -2.67681349e-2f;
    r = r * s + 1.12819925e-1f;
    r = r * s + -3.76125336e-1f;
    r = r * s + 1.28379166e-1f;
    const float near = r * x + x;
    const float signed_far = x < 0.0f ? -far : far;
    return t > 0.927734375f ? signed_far : near;
}
INLINE double erf_(double x) { return std::erf(x); }

INLINE float sigmoid(float x) {
    const float low = x < -89.0f ? 89.0f : -x;  // 2^128 is an infinity, and the result zero
    const float y = low < -87.0f ? -87.0f : low;
    return 1.0f / (exp_within(y) + 1.0f);
}
INLINE double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

INLINE S sign(S x) { return x > 0 ? S(1) : x < 0 ? S(-1) : S(0); }  // of NaN, too, as PyTorch has it
INLINE S rsqrt(S x) { return S(1) / std::sqrt(x); }
INLINE S maximum(S a, S b) { return a != a ? a : a > b ? a : b; }  // NaN wins, as in PyTorch
INLINE S minimum(S a, S b) { return a != a ? a : a < b ? a : b; }
INLINE S gelu(S x) { return S(0.5) * x * (S(1) + erf_(x * S(0.70710678118654752440))); }
INLINE S gelu_tanh(S x) { return x * sigmoid(x * (x * x * S(0.07135481627260025) + S(1.5957691216057308))); }
INLINE S softplus(S x, S beta, S threshold) {
    return x * beta > threshold ? x : std::log1p(exp_(x * beta)) / beta;
}
INLINE S softplus_backward(S d, S x, S beta, S threshold) {
    return x * beta > threshold ? d : d * sigmoid(x * beta);
}
INLINE S elu(S x, S alpha, S scale, S input_scale) {
    return x > 0 ? x * scale : std::expm1(x * input_scale) * alpha * scale;
}
INLINE S elu_backward(S d, S alpha, S scale, S input_scale, bool is_result, S x) {
    const S below = is_result ? input_scale * (x + alpha * scale) : input_scale * alpha * scale * exp_(x * input_scale);
    return x <= 0 ? d * below : d * scale;
}

// ---- Along one axis ------------------------------------------------------------------------------------------------

// Over the middle axis of [outer, length, inner].
void softmax(long outer, long length, long inner, const S* x, S* y) {
    for (long o = 0; o < outer; o++)
        for (long i = 0; i < inner; i++) {
            const S* from = x + o * length * inner + i;
            S* to = y + o * length * inner + i;
            S largest = -std::numeric_limits<S>::infinity(), total = 0;
            for (long j = 0; j < length; j++) largest = maximum(from[j * inner], largest);
            for (long j = 0; j < length; j++) {
                to[j * inner] = exp_(from[j * inner] - largest);
                total += to[j * inner];
            }
            for (long j = 0; j < length; j++) to[j * inner] /= total;
        }
}

void cumsum(long outer, long length, long inner, const S* x, S* y) {
    for (long o = 0; o < outer; o++, x += length * inner, y += length * inner) {
        for (long i = 0; i < inner && length; i++) y[i] = x[i];
        for (long j = inner; j < length * inner; j += inner)  // a row at a time, in the order of memory
            for (long i = j; i < j + inner; i++) y[i] = y[i - inner] + x[i];
    }
}

// ---- Tokens in and out of tiles ------------------------------------------------------------------------------------

// A tensor [H, B, *tile] or [H, B, N, *row]: where it starts, and the distance between heads, sequences and tokens. An
// axis that is shared has distance 0.
struct Tensor {
    S* data;
    long head, sequence, token;
    S* at(long h, long b) const { return data + h * head + b * sequence; }
};

// Rows start .. start + n of the tokens, in the order given or as they come, as a tile [n, width].
void take(const S* tokens, long distance, const std::int64_t* order, long start, long n, long width, S* tile) {
    for (long i = 0; i < n; i++)
        std::memcpy(tile + i * width, tokens + (order ? order[start + i] : start + i) * distance, width * sizeof(S));
}

// A tile's rows back at their tokens, whose rows are so far apart, or added to what is there.
void put(const S* tile, const std::int64_t* order, long start, long n, long width, S* tokens, long distance, bool add) {
    for (long i = 0; i < n; i++) {
        S* to = tokens + (order ? order[start + i] : start + i) * distance;
        const S* from = tile + i * width;
        if (add)
            for (long j = 0; j < width; j++) to[j] += from[j];
        else
            std::memcpy(to, from, width * sizeof(S));
    }
}

// Rows of zeros, unless an earlier run has been there.
void clear(const std::int64_t* order, long start, long n, long width, S* tokens, long distance, bool done) {
    for (long i = 0; i < n && !done; i++)
        std::memset(tokens + (order ? order[start + i] : start + i) * distance, 0, width * sizeof(S));
}

void copy(const S* from, long count, S* to) { std::memcpy(to, from, count * sizeof(S)); }
void add_to(const S* from, long count, S* to) {
    for (long i = 0; i < count; i++) to[i] += from[i];
}
void zero(S* to, long count) { std::memset(to, 0, count * sizeof(S)); }

// Until the threads before have added to a sum: in the order of their turns, whoever is first. Not asleep, which costs
// more than the sums do, and not in the way of a thread that has no core of its own.
void await_turn(const std::atomic<long>& turn, long mine) {
    while (turn.load(std::memory_order_acquire) != mine) sched_yield();
}

// Tiles of at most `rows` tokens, as even as can be.
long tile_count(long tokens, long rows) { return (tokens + rows - 1) / rows; }
long tile_start(long tokens, long count, long index) {
    const long size = tokens / count, larger = tokens % count;
    return index * size + (index < larger ? index : larger);
}

}  // namespace
