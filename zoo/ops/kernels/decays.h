// Decays inside a block of steps, for kernels over heads; steps that are missing at the end are blank (a decay of 1).
//
// Nothing is ever divided: decays between two steps are products of numbers in [0, 1], or exponentials of sums that
// start between the two. A step of decay exactly zero (a reset) is no special case.
#pragma once
#include "blocks.h"

namespace zoo {

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
            for (int64_t i = 0; i < C; ++i) sum += load<Lanes>(step + i * width + d);
            store(total + d, sum);
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
                store(since_start + i * width + d, product *= load<Lanes>(step + i * width + d));
            product = Lanes{} + 1.0f;
            for (int64_t i = C - 1; i >= 0; --i) {
                store(until_end + i * width + d, product);
                product *= load<Lanes>(step + i * width + d);
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
    for (int64_t i = 0; i < C; ++i) store(scores + i * C, sums[i]);
}

// The gradients of `channel_scores`, added to d_rows, d_columns and d_log_step; d_scores is read for i >= j alone.
inline void channel_scores_backward(int64_t width, const float* rows, const float* columns, const float* step,
                                    const float* d_scores, float* d_rows, float* d_columns, float* d_log_step) {
    constexpr int64_t C = ChannelDecays::C;
    for (int64_t d = 0; d < width; d += BLOCK_LANES) {
        const auto row = [&](const float* x, int64_t i) { return load<Lanes>(x + i * width + d); };
        Lanes a[C], r[C], d_r[C], d_log[C];
        for (int64_t i = 0; i < C; ++i) a[i] = row(step, i), r[i] = row(rows, i), d_r[i] = Lanes{}, d_log[i] = Lanes{};
        for (int64_t j = 0; j < C; ++j) {
            Lanes decayed[C];  // the column at step i
            decayed[j] = row(columns, j);
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
            store(d_columns + j * width + d, row(d_columns, j) + adjoint);
        }
        for (int64_t i = 0; i < C; ++i) {
            store(d_rows + i * width + d, row(d_rows, i) + d_r[i]);
            store(d_log_step + i * width + d, row(d_log_step, i) + d_log[i]);
        }
    }
}

}  // namespace zoo
