// Decays inside a block of steps, for kernels over heads: blocks lie in rows padded to whole vectors, steps that are
// missing at the end are blank (zero, and a decay of 1).
//
// Nothing is ever divided: decays between two steps are products of numbers in [0, 1], or exponentials of sums that
// start between the two. A step of decay exactly zero (a reset) is no special case.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "matmul.h"

namespace zoo {

constexpr int64_t BLOCK_LANES = 16;
typedef float Lanes __attribute__((vector_size(BLOCK_LANES * sizeof(float)), aligned(4), may_alias));

inline Lanes load_lanes(const float* p) { return *reinterpret_cast<const Lanes*>(p); }
inline void store_lanes(float* p, Lanes x) { *reinterpret_cast<Lanes*>(p) = x; }
inline int64_t padded(int64_t n) { return (n + BLOCK_LANES - 1) / BLOCK_LANES * BLOCK_LANES; }

// Memory for blocks, handed out piece by piece.
class Scratch {
    float *memory, *next;

  public:
    explicit Scratch(int64_t floats)
        : memory(static_cast<float*>(std::aligned_alloc(64, (floats + 16) / 16 * 16 * sizeof(float)))), next(memory) {
        if (!memory) std::abort();
    }
    ~Scratch() { std::free(memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* take(int64_t floats) {
        float* piece = next;
        next += padded(floats);
        return piece;
    }
};

// block (steps, padded(width)) = factor * rows of x, `stride` apart; zeros beyond n rows and beyond the width.
inline void load_block(float* block, int64_t steps, const float* x, int64_t stride, int64_t n, int64_t width,
                       float factor = 1.0f) {
    const int64_t whole = padded(width);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t d = 0; d < width; ++d) block[i * whole + d] = factor * x[i * stride + d];
        for (int64_t d = width; d < whole; ++d) block[i * whole + d] = 0;
    }
    std::fill(block + n * whole, block + steps * whole, 0.0f);
}

// Rows that will be read soon: they lie too far apart for the hardware to foresee. Called before some long arithmetic.
inline void prefetch_block(const float* x, int64_t stride, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(x + i * stride + d);
}

// Rows that will be written soon.
inline void prefetch_output(float* x, int64_t stride, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(x + i * stride + d, 1);
}

inline void store_block(const float* block, float* x, int64_t stride, int64_t n, int64_t width) {
    const int64_t whole = padded(width);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < width; ++d) x[i * stride + d] = block[i * whole + d];
}

// out (16) = sums of the rows of x (16, 16).
inline void row_sums(const float* x, float* out) {
    float turned[BLOCK_LANES * BLOCK_LANES];
    transposed(BLOCK_LANES, BLOCK_LANES, x, BLOCK_LANES, turned, BLOCK_LANES);
    Lanes sums = {};
    for (int64_t i = 0; i < BLOCK_LANES; ++i) sums += load_lanes(turned + i * BLOCK_LANES);
    store_lanes(out, sums);
}

// C (steps, n) = or += A B where A (steps, steps) is zero above the diagonal; steps a multiple of 16.
template <bool ADD>
inline void product_lower(int64_t steps, int64_t n, const float* a, const float* b, float* c) {
    for (int64_t i = 0; i < steps; i += 16) product<ADD>(16, n, i + 16, a + i * steps, steps, b, n, c + i * n, n);
}

// C (steps, n) = or += A^T B for the same A.
template <bool ADD>
inline void product_lower_t(int64_t steps, int64_t n, const float* a, const float* b, float* c) {
    for (int64_t i = 0; i < steps; i += 16)
        product_tn<ADD>(16, n, steps - i, a + i * steps + i, steps, b + i * n, n, c + i * n, n);
}

// C (steps, steps) = A (steps, k) B (k, steps) on and below the diagonal, in squares of 16; the rest is left as it was.
inline void lower_product(int64_t steps, int64_t k, const float* a, const float* b, float* c) {
    for (int64_t i = 0; i < steps; i += 16) product(16, i + 16, k, a + i * k, k, b, steps, c + i * steps, steps);
}

// One decay a head over a block of C steps.
template <int64_t C>
struct HeadDecays {
    alignas(64) float pair[C * C];  // from step j to step i >= j, zero above the diagonal
    alignas(64) float since_start[C], until_end[C];
    float total;

    // Where a reset is marked all before it is forgotten; g null for no decay, resets null for none.
    void fill(const float* g, int64_t stride, const bool* resets, int64_t n) {
        float sums[C] = {}, start = 0;  // of g over j + 1 .. i, and from the block's first step to i
        for (int64_t i = 0; i < C; ++i) {
            float step = i < n && g ? g[i * stride] : 0.0f;
            if (i < n && resets && resets[i]) step = -1e30f;
            for (int64_t j = 0; j < C; ++j) sums[j] = j < i ? sums[j] + step : 0.0f;
            start += step;
            since_start[i] = start;
            float* row = pair + i * C;
            for (int64_t j = 0; j < C; ++j) row[j] = exp(sums[j]);
            for (int64_t j = i + 1; j < C; ++j) row[j] = 0;
        }
        for (int64_t i = 0; i < C; ++i) since_start[i] = exp(since_start[i]);
        for (int64_t j = 0; j < C; ++j) until_end[j] = pair[(C - 1) * C + j];
        total = since_start[C - 1];
    }
};

// One decay a channel over a block of 16 steps: all (16, width) but `total` (width), the width padded.
struct ChannelDecays {
    static constexpr int64_t C = 16;
    float *step, *since_start, *until_end, *total;

    static int64_t floats(int64_t width) { return (3 * C + 1) * width; }
    ChannelDecays(Scratch& scratch, int64_t width)
        : step(scratch.take(C * width)),
          since_start(scratch.take(C * width)),
          until_end(scratch.take(C * width)),
          total(scratch.take(width)) {}

    void fill(const float* g, int64_t stride, const bool* resets, int64_t n, int64_t K) {
        const int64_t width = padded(K);
        load_block(step, C, g, stride, n, K);
        for (int64_t d = 0; d < width; d += BLOCK_LANES) {
            Lanes sum = {};
            for (int64_t i = 0; i < C; ++i) sum += load_lanes(step + i * width + d);
            store_lanes(total + d, sum);
        }
        for (int64_t d = 0; d < width; ++d) total[d] = exp(total[d]);  // one rounding, where a product has 16
        for (int64_t d = 0; d < C * width; ++d) step[d] = exp(step[d]);
        if (resets)
            for (int64_t i = 0; i < n; ++i)
                if (resets[i]) {
                    std::fill(step + i * width, step + (i + 1) * width, 0.0f);
                    std::fill(total, total + width, 0.0f);
                }
        for (int64_t d = 0; d < width; d += BLOCK_LANES) {
            Lanes product = Lanes{} + 1.0f;
            for (int64_t i = 0; i < C; ++i)
                store_lanes(since_start + i * width + d, product *= load_lanes(step + i * width + d));
            product = Lanes{} + 1.0f;
            for (int64_t i = C - 1; i >= 0; --i) {
                store_lanes(until_end + i * width + d, product);
                product *= load_lanes(step + i * width + d);
            }
        }
    }
};

// scores (16, 16)_ij = sum_d rows_id columns_jd (decay of channel d from step j to step i) for i >= j, else zero.
// The lanes are the steps j: each channel takes its decayed columns from step to step.
inline void channel_scores(int64_t width, const float* rows, const float* columns, const float* step, float* scores) {
    constexpr int64_t C = ChannelDecays::C;
    static const struct Units {
        Lanes at[C];
        Units() {
            for (int64_t i = 0; i < C; ++i) at[i] = Lanes{}, at[i][i] = 1.0f;
        }
    } units;
    Lanes sums[C];
    for (int64_t i = 0; i < C; ++i) sums[i] = Lanes{};
    for (int64_t d = 0; d < width; ++d) {
        Lanes decayed = {};
#pragma GCC unroll 16
        for (int64_t i = 0; i < C; ++i) {
            decayed = decayed * step[i * width + d] + units.at[i] * columns[i * width + d];
            sums[i] += decayed * rows[i * width + d];
        }
    }
    for (int64_t i = 0; i < C; ++i) store_lanes(scores + i * C, sums[i]);
}

// The gradients of `channel_scores`, added to d_rows, d_columns and d_log_step; d_scores is read for i >= j alone.
inline void channel_scores_backward(int64_t width, const float* rows, const float* columns, const float* step,
                                    const float* d_scores, float* d_rows, float* d_columns, float* d_log_step) {
    constexpr int64_t C = ChannelDecays::C;
    for (int64_t d = 0; d < width; d += BLOCK_LANES) {
        const auto at = [&](const float* x, int64_t i) { return load_lanes(x + i * width + d); };
        Lanes a[C], r[C], d_r[C], d_log[C];
        for (int64_t i = 0; i < C; ++i) a[i] = at(step, i), r[i] = at(rows, i), d_r[i] = Lanes{}, d_log[i] = Lanes{};
        for (int64_t j = 0; j < C; ++j) {
            Lanes decayed[C];  // the column at step i
            decayed[j] = at(columns, j);
            d_r[j] += d_scores[j * C + j] * decayed[j];
            for (int64_t i = j + 1; i < C; ++i) {
                decayed[i] = decayed[i - 1] * a[i];
                d_r[i] += d_scores[i * C + j] * decayed[i];
            }
            Lanes adjoint = d_scores[(C - 1) * C + j] * r[C - 1];
            for (int64_t i = C - 1; i > j; --i) {
                d_log[i] += decayed[i] * adjoint;
                adjoint = adjoint * a[i] + d_scores[(i - 1) * C + j] * r[i - 1];
            }
            store_lanes(d_columns + j * width + d, at(d_columns, j) + adjoint);
        }
        for (int64_t i = 0; i < C; ++i) {
            store_lanes(d_rows + i * width + d, at(d_rows, i) + d_r[i]);
            store_lanes(d_log_step + i * width + d, at(d_log_step, i) + d_log[i]);
        }
    }
}

}  // namespace zoo
