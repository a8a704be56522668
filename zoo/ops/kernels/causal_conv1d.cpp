// y_t = activation(bias + sum_l weight[:, W - 1 - l] x_{t - l}), depthwise over the last W steps, forward and backward
// in one pass over memory each, row after row of channels.
//
// A tap l belongs to step t where no reset lies in (t - l, t]. Steps before the first are those of the state.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int64_t BLOCK = 8;         // steps, or taps, whose sums are in registers at once
constexpr int64_t STRETCH = 32;      // steps of the backward pass whose gradients are kept at hand; whole blocks
constexpr int64_t CHANNELS = 1024;   // of a task at most, so that its rows stay in the nearest cache

struct Shape {
    int64_t B, T, D, W, x_row, x_step, silu;
};

using Rows = std::vector<const float*>;

// sum = base + taps[0] rows[0] + taps[1] rows[1] + ..., on n channels; taps lie `stride` apart.
void add_taps(const float* base, const float* taps, int64_t stride, const float* const* rows, int64_t count, int64_t n,
              float* sum) {
    const float *t0 = taps, *t1 = t0 + stride, *t2 = t1 + stride, *t3 = t2 + stride;
    if (count >= 4) {
        const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
#pragma GCC ivdep
        for (int64_t d = 0; d < n; ++d) sum[d] = base[d] + t0[d] * r0[d] + t1[d] * r1[d] + t2[d] * r2[d] + t3[d] * r3[d];
        if (count > 4) add_taps(sum, taps + 4 * stride, stride, rows + 4, count - 4, n, sum);
        return;
    }
    if (count == 0) std::copy(base, base + n, sum);
    for (int64_t l = 0; l < count; ++l, base = sum)
#pragma GCC ivdep
        for (int64_t d = 0; d < n; ++d) sum[d] = base[d] + taps[l * stride + d] * rows[l][d];
}

// The same sums of BLOCK rows, each of whose first inputs lies `step` after that of the row before, and whose inputs lie
// `apart`, the n channels a register at a time. Every sum adds its products in the order of `add_taps`, to the bit.
template <typename V>
ZOO_INLINE void add_taps_of_block(const float* base, const float* taps, int64_t stride, const float* first, int64_t apart,
                                  int64_t step, int64_t count, float* sums, int64_t sums_step) {
    V s[BLOCK];
    for (int64_t j = 0; j < BLOCK; ++j) std::memcpy(&s[j], base, sizeof(V));
    for (int64_t l = 0; l < count; ++l, taps += stride, first += apart) {
        V tap, input;
        std::memcpy(&tap, taps, sizeof(V));
        for (int64_t j = 0; j < BLOCK; ++j) std::memcpy(&input, first + j * step, sizeof(V)), s[j] += tap * input;
    }
    for (int64_t j = 0; j < BLOCK; ++j) std::memcpy(sums + j * sums_step, &s[j], sizeof(V));
}
void add_taps_of_block(const float* base, const float* taps, int64_t stride, const float* first, int64_t apart,
                       int64_t step, int64_t count, int64_t n, float* sums, int64_t sums_step) {
    int64_t d = 0;
    for (; d + zoo::LANES <= n; d += zoo::LANES)
        add_taps_of_block<zoo::Vec>(base + d, taps + d, stride, first + d, apart, step, count, sums + d, sums_step);
    for (; d < n; ++d)
        add_taps_of_block<float>(base + d, taps + d, stride, first + d, apart, step, count, sums + d, sums_step);
}

// sums[l] += g[0] input[-l] + g[1] input[1 - l] + ... over the BLOCK steps, for a number of taps.
template <typename V, int64_t TAPS>
ZOO_INLINE void add_steps_of_block(const float* g, int64_t n, const float* input, int64_t step, float* sums) {
    V s[TAPS];
    for (int64_t l = 0; l < TAPS; ++l) std::memcpy(&s[l], sums + l * n, sizeof(V));
    for (int64_t t = 0; t < BLOCK; ++t) {
        V slope, seen;
        std::memcpy(&slope, g + t * n, sizeof(V));
        for (int64_t l = 0; l < TAPS; ++l) std::memcpy(&seen, input + (t - l) * step, sizeof(V)), s[l] += slope * seen;
    }
    for (int64_t l = 0; l < TAPS; ++l) std::memcpy(sums + l * n, &s[l], sizeof(V));
}
template <typename V>
ZOO_INLINE void add_steps_of_block(const float* g, int64_t n, const float* input, int64_t step, int64_t taps, float* sums) {
    int64_t l = 0;
    for (; l + BLOCK <= taps; l += BLOCK) add_steps_of_block<V, BLOCK>(g, n, input - l * step, step, sums + l * n);
    for (; l + 4 <= taps; l += 4) add_steps_of_block<V, 4>(g, n, input - l * step, step, sums + l * n);
    for (; l < taps; ++l) add_steps_of_block<V, 1>(g, n, input - l * step, step, sums + l * n);
}

// One row of the batch and n channels from the first on.
struct Task {
    const Shape& s;
    int64_t row, first, n, steps;  // steps: the valid ones
    const float *x, *state;
    const bool* resets;
    std::vector<float> taps;  // (W + 1, n): the present step's first; the bias
    mutable Rows rows;

    Task(const Shape& s, int64_t row, int64_t first, int64_t n, const float* x, const float* weight, const float* bias,
         const float* state, const bool* resets, const int64_t* lengths)
        : s(s), row(row), first(first), n(n), taps((s.W + 1) * n), rows(s.W) {
        steps = lengths ? std::max<int64_t>(0, std::min(lengths[row], s.T)) : s.T;
        this->x = x + row * s.x_row + first, this->state = state + row * (s.W - 1) * s.D + first;
        this->resets = resets ? resets + row * s.T : nullptr;
        for (int64_t l = 0; l < s.W; ++l)
            for (int64_t d = 0; d < n; ++d) taps[l * n + d] = weight[(first + d) * s.W + s.W - 1 - l];
        for (int64_t d = 0; d < n; ++d) taps[s.W * n + d] = bias ? bias[first + d] : 0;
    }
    // The input of step t, or of the state for t < 0.
    const float* input(int64_t t) const { return t < 0 ? state + (s.W - 1 + t) * s.D : x + t * s.x_step; }
    // The inputs that step t sees, the present one first.
    const Rows& window(int64_t t) const {
        rows.clear();
        do rows.push_back(input(t - static_cast<int64_t>(rows.size())));
        while (static_cast<int64_t>(rows.size()) < s.W && !starts(t + 1 - static_cast<int64_t>(rows.size())));
        return rows;
    }
    bool starts(int64_t t) const { return resets && t >= 0 && resets[t]; }
    // Whether no reset lies in (after, last].
    bool clear(int64_t after, int64_t last) const {
        return !resets || !std::memchr(resets + after + 1, 1, static_cast<size_t>(last - after));
    }
    // Whether t to t + BLOCK - 1 are steps that see W inputs each, none of them of the state.
    bool whole(int64_t t) const { return t + 1 >= s.W && t + BLOCK <= steps && clear(t + 1 - s.W, t + BLOCK - 1); }
    // Whether t to t + BLOCK - 1 are seen by W steps each.
    bool seen(int64_t t) const { return t >= 0 && t + BLOCK + s.W - 1 <= steps && clear(t, t + BLOCK + s.W - 2); }
    void before_activation_of_block(int64_t t, float* z, int64_t z_step) const {
        add_taps_of_block(taps.data() + s.W * n, taps.data(), n, input(t), -s.x_step, s.x_step, s.W, n, z, z_step);
    }
    void before_activation(int64_t t, float* z) const {
        const Rows& seen = window(t);
        add_taps(taps.data() + s.W * n, taps.data(), n, seen.data(), seen.size(), n, z);
    }
    // Input i of the last window: its step (below 0: of the state), and whether it is remembered.
    int64_t last(int64_t i) const { return steps - (s.W - 1) + i; }
    bool kept(int64_t i) const { return !steps || s.W - 2 - i < static_cast<int64_t>(window(steps - 1).size()); }
};

void forward(const Shape& s, const Task& task, float* y, float* last) {
    const int64_t n = task.n;
    y += task.row * s.T * s.D + task.first, last += task.row * (s.W - 1) * s.D + task.first;
    for (int64_t t = 0, count; t < task.steps; t += count) {
        const bool whole = task.whole(t);
        count = whole ? BLOCK : 1;
        if (whole)
            task.before_activation_of_block(t, y + t * s.D, s.D);
        else
            task.before_activation(t, y + t * s.D);
        if (!s.silu) continue;
        for (float* out = y + t * s.D; out < y + (t + count) * s.D; out += s.D)
#pragma GCC ivdep
            for (int64_t d = 0; d < n; ++d) out[d] = out[d] * zoo::sigmoid(out[d]);
    }
    for (int64_t t = task.steps; t < s.T; ++t) std::fill(y + t * s.D, y + t * s.D + n, 0.0f);
    for (int64_t i = 0; i < s.W - 1; ++i) {
        const float* from = task.input(task.last(i));
        const bool kept = task.kept(i);
        for (int64_t d = 0; d < n; ++d) last[i * s.D + d] = kept ? from[d] : 0;
    }
}

// d_taps (W + 1, D): gradients of the weight, the present step's first, and of the bias, for one row of the batch.
void backward(const Shape& s, const Task& task, const float* d_y, const float* d_last, float* d_x, float* d_taps,
              float* d_state) {
    const int64_t n = task.n, W = s.W;
    d_y += task.row * s.T * s.D + task.first, d_last += task.row * (W - 1) * s.D + task.first;
    d_x += task.row * s.T * s.D + task.first, d_state += task.row * (W - 1) * s.D + task.first;
    d_taps += task.row * (W + 1) * s.D + task.first;
    std::vector<float> gradients((STRETCH + W) * n), sums((W + 1) * n), zeros(n);
    float* d_z = gradients.data();  // of a stretch of steps, and of the W - 1 after it
    for (int64_t l = 0; l <= W; ++l) std::fill(d_taps + l * s.D, d_taps + l * s.D + n, 0.0f);
    for (int64_t t = task.steps; t < s.T; ++t) std::fill(d_x + t * s.D, d_x + t * s.D + n, 0.0f);

    Rows later;
    const int64_t stretches = std::max<int64_t>((task.steps + STRETCH - 1) / STRETCH, 1);
    for (int64_t stretch = stretches - 1; stretch >= 0; --stretch) {
        const int64_t start = stretch * STRETCH, stop = std::min(task.steps, start + STRETCH);
        std::copy_backward(d_z, d_z + (W - 1) * n, d_z + (stop - start + W - 1) * n);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t t = start, count; t < stop; t += count) {
            const bool whole = t + BLOCK <= stop && task.whole(t);
            count = whole ? BLOCK : 1;
            float *g = d_z + (t - start) * n, *d_bias = sums.data() + W * n;
            if (whole && s.silu) task.before_activation_of_block(t, g, n);
            if (!whole && s.silu) task.before_activation(t, g);
            for (int64_t i = 0; i < count; ++i) {
                const float* from = d_y + (t + i) * s.D;
                float* to = g + i * n;
                if (s.silu) {
#pragma GCC ivdep
                    for (int64_t d = 0; d < n; ++d) {
                        const float part = zoo::sigmoid(to[d]);
                        to[d] = from[d] * (part + to[d] * part * (1 - part));
                        d_bias[d] += to[d];
                    }
                } else {
#pragma GCC ivdep
                    for (int64_t d = 0; d < n; ++d) to[d] = from[d], d_bias[d] += from[d];
                }
            }
            if (whole) {
                int64_t d = 0;
                for (; d + zoo::LANES <= n; d += zoo::LANES)
                    add_steps_of_block<zoo::Vec>(g + d, n, task.input(t) + d, s.x_step, W, sums.data() + d);
                for (; d < n; ++d) add_steps_of_block<float>(g + d, n, task.input(t) + d, s.x_step, W, sums.data() + d);
                continue;
            }
            const Rows& seen = task.window(t);
            for (int64_t l = 0; l < static_cast<int64_t>(seen.size()); ++l) {
                float* sum = sums.data() + l * n;
                const float* input = seen[l];
#pragma GCC ivdep
                for (int64_t d = 0; d < n; ++d) sum[d] += g[d] * input[d];
            }
        }
        for (int64_t l = 0; l <= W; ++l)
            for (int64_t d = 0; d < n; ++d) d_taps[l * s.D + d] += sums[l * n + d];
        for (int64_t t = start ? start : 1 - W, count; t < stop; t += count) {  // the steps that saw the input of step t
            count = 1;
            if (t + BLOCK <= stop && task.seen(t)) {
                count = BLOCK;
                add_taps_of_block(zeros.data(), task.taps.data(), n, d_z + (t - start) * n, n, n, W, n, d_x + t * s.D, s.D);
                continue;
            }
            later.clear();
            int64_t first = std::max<int64_t>(0, -t), l = first;
            for (bool seen = true; l < W && t + l < task.steps; ++l) {
                seen = seen && !(l && task.starts(t + l));
                if (!seen) break;
                later.push_back(d_z + (t + l - start) * n);
            }
            float* to = t < 0 ? d_state + (W - 1 + t) * s.D : d_x + t * s.D;
            add_taps(zeros.data(), task.taps.data() + first * n, n, later.data(), later.size(), n, to);
        }
    }
    for (int64_t i = 0; i < W - 1; ++i) {
        if (!task.kept(i)) continue;
        const int64_t t = task.last(i);
        float* to = t < 0 ? d_state + (W - 1 + t) * s.D : d_x + t * s.D;
        for (int64_t d = 0; d < n; ++d) to[d] += d_last[i * s.D + d];
    }
}

template <typename Run>
void for_tasks(const Shape& s, int64_t threads, const Run& run) {
    const int64_t wanted = std::max((threads + s.B - 1) / s.B, (s.D + CHANNELS - 1) / CHANNELS);
    const int64_t lines = (s.D + 15) / 16, ranges = std::min(lines, wanted);  // of whole cache lines
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
#pragma omp for
        for (int64_t index = 0; index < s.B * ranges; ++index) {
            const int64_t range = index % ranges, first = range * lines / ranges * 16;
            run(index / ranges, first, std::min(s.D, (range + 1) * lines / ranges * 16) - first);
        }
    }
}

}  // namespace

extern "C" void causal_conv1d_forward(const float* x, const float* weight, const float* bias, const float* state,
                                      const bool* resets, const int64_t* lengths, float* y, float* last,
                                      int64_t B, int64_t T, int64_t D, int64_t W, int64_t x_row,
                                      int64_t x_step, int64_t silu, int64_t threads) {
    const Shape s{B, T, D, W, x_row, x_step, silu};
    for_tasks(s, threads, [&](int64_t row, int64_t first, int64_t n) {
        forward(s, Task(s, row, first, n, x, weight, bias, state, resets, lengths), y, last);
    });
}
ZOO_EXPORT(causal_conv1d_forward)

extern "C" void causal_conv1d_backward(const float* x, const float* weight, const float* bias, const float* state,
                                       const bool* resets, const int64_t* lengths, const float* d_y,
                                       const float* d_last, float* d_x, float* d_taps, float* d_state,
                                       int64_t B, int64_t T, int64_t D, int64_t W, int64_t x_row,
                                      int64_t x_step, int64_t silu, int64_t threads) {
    const Shape s{B, T, D, W, x_row, x_step, silu};
    for_tasks(s, threads, [&](int64_t row, int64_t first, int64_t n) {
        const Task task(s, row, first, n, x, weight, bias, state, resets, lengths);
        backward(s, task, d_y, d_last, d_x, d_taps, d_state);
    });
}
ZOO_EXPORT(causal_conv1d_backward)
