// y_t = activation(bias + sum_l weight[:, W - 1 - l] x_{t - l}), depthwise over the last W steps, forward and backward
// in one pass over memory each: stretches of steps, within them 16 channels at a time in registers.
//
// A tap l belongs to step t where no reset lies in (t - l, t]. Steps before the first are those of the state.
#include "decay.h"

namespace {

using namespace zoo;

constexpr int64_t STRETCH = 32;  // steps whose channels are gone through before the next ones

struct Shape {
    int64_t B, T, D, W, x_row, x_step, silu;
};

// Lanes of which only the first n are memory.
Lanes load_some(const float* p, int64_t n) {
    if (n == BLOCK_LANES) return load_lanes(p);
    Lanes x = {};
    for (int64_t i = 0; i < n; ++i) x[i] = p[i];
    return x;
}
void store_some(float* p, Lanes x, int64_t n) {
    if (n == BLOCK_LANES) return store_lanes(p, x);
    for (int64_t i = 0; i < n; ++i) p[i] = x[i];
}

Lanes sigmoid_lanes(Lanes x) {
    float out[BLOCK_LANES];
    store_lanes(out, x);
    for (int64_t i = 0; i < BLOCK_LANES; ++i) out[i] = sigmoid(out[i]);
    return load_lanes(out);
}

// One row of the batch and a range of channels.
struct Task {
    const Shape& s;
    int64_t row, from, to, steps;  // steps: the valid ones
    const float *x, *state;
    const uint8_t* resets;

    Task(const Shape& s, int64_t index, int64_t ranges, const float* x, const float* state, const uint8_t* resets,
         const int64_t* lengths)
        : s(s), row(index / ranges) {
        const int64_t strips = padded(s.D) / BLOCK_LANES, range = index % ranges;
        from = range * strips / ranges * BLOCK_LANES;
        to = std::min(s.D, (range + 1) * strips / ranges * BLOCK_LANES);
        steps = lengths ? std::max<int64_t>(0, std::min(lengths[row], s.T)) : s.T;
        this->x = x + row * s.x_row, this->state = state + row * (s.W - 1) * s.D;
        this->resets = resets ? resets + row * s.T : nullptr;
    }
    // The input of step t, or of the state for t < 0.
    const float* input(int64_t t) const { return t < 0 ? state + (s.W - 1 + t) * s.D : x + t * s.x_step; }
    // How many taps beyond the present one belong to step t.
    int64_t reach(int64_t t) const {
        int64_t l = 0;
        if (!resets) return s.W - 1;
        while (l < s.W - 1 && t - l >= 0 && !resets[t - l]) ++l;
        return t - l < 0 ? s.W - 1 : l;
    }
    // Input i of the last window: its step (below 0: of the state), and whether it is remembered.
    int64_t last(int64_t i) const { return steps - (s.W - 1) + i; }
    bool kept(int64_t i) const { return !steps || s.W - 2 - i <= reach(steps - 1); }
};

int64_t ranges_of(const Shape& s, int64_t threads) {  // tasks that the channels are cut into
    return std::min(padded(s.D) / BLOCK_LANES, (threads + s.B - 1) / s.B);
}

void taps_of(const float* weight, const float* bias, int64_t d, int64_t n, int64_t W, float* taps) {
    for (int64_t l = 0; l < W; ++l)
        for (int64_t i = 0; i < BLOCK_LANES; ++i) taps[l * BLOCK_LANES + i] = i < n ? weight[(d + i) * W + W - 1 - l] : 0;
    for (int64_t i = 0; i < BLOCK_LANES; ++i) taps[W * BLOCK_LANES + i] = i < n && bias ? bias[d + i] : 0;
}

// bias + sum_l taps_l x_{t - l} for the channels d .. d + n.
template <typename Window>
inline __attribute__((always_inline)) Lanes before_activation(const Task& task, Window W, const float* taps, int64_t t,
                                                              int64_t d, int64_t n) {
    Lanes sum = load_lanes(taps + W * BLOCK_LANES);
    if (!task.resets && t >= W - 1) {
        const float* at = task.x + t * task.s.x_step + d;
        for (int64_t l = 0; l < W; ++l) sum += load_lanes(taps + l * BLOCK_LANES) * load_some(at - l * task.s.x_step, n);
    } else {
        const int64_t reach = task.reach(t);
        for (int64_t l = 0; l <= reach; ++l)
            sum += load_lanes(taps + l * BLOCK_LANES) * load_some(task.input(t - l) + d, n);
    }
    return sum;
}

template <typename Window>
void forward(const Shape& s, Window W, const Task& task, const float* weight, const float* bias, float* y, float* last) {
    Scratch scratch((W + 1) * BLOCK_LANES);
    float* taps = scratch.take((W + 1) * BLOCK_LANES);
    y += task.row * s.T * s.D, last += task.row * (W - 1) * s.D;
    for (int64_t start = 0; start < task.steps; start += STRETCH)
        for (int64_t d = task.from; d < task.to; d += BLOCK_LANES) {
            const int64_t n = std::min(BLOCK_LANES, s.D - d);
            taps_of(weight, bias, d, n, W, taps);
            for (int64_t t = start; t < std::min(task.steps, start + STRETCH); ++t) {
                Lanes z = before_activation(task, W, taps, t, d, n);
                if (s.silu) z *= sigmoid_lanes(z);
                store_some(y + t * s.D + d, z, n);
            }
        }
    for (int64_t t = task.steps; t < s.T; ++t) std::fill(y + t * s.D + task.from, y + t * s.D + task.to, 0.0f);
    for (int64_t i = 0; i < W - 1; ++i) {
        const float* from = task.input(task.last(i));
        for (int64_t d = task.from; d < task.to; ++d) last[i * s.D + d] = task.kept(i) ? from[d] : 0;
    }
}

// d_taps (W + 1, D): gradients of the weight, the present step's first, and of the bias, for one row of the batch.
template <typename Window>
void backward(const Shape& s, Window W, const Task& task, const float* weight, const float* bias, const float* d_y,
              const float* d_last, float* d_x, float* d_taps, float* d_state) {
    Scratch scratch((W + 1) * BLOCK_LANES + (STRETCH + W) * BLOCK_LANES + (W - 1) * padded(s.D));
    float *taps = scratch.take((W + 1) * BLOCK_LANES), *d_z = scratch.take((STRETCH + W) * BLOCK_LANES);
    float* later = scratch.take((W - 1) * padded(s.D));  // d_z of the steps after the stretch
    d_y += task.row * s.T * s.D, d_last += task.row * (W - 1) * s.D;
    d_x += task.row * s.T * s.D, d_taps += task.row * (W + 1) * s.D, d_state += task.row * (W - 1) * s.D;
    std::fill(later, later + (W - 1) * padded(s.D), 0.0f);
    for (int64_t l = 0; l <= W; ++l) std::fill(d_taps + l * s.D + task.from, d_taps + l * s.D + task.to, 0.0f);
    for (int64_t t = task.steps; t < s.T; ++t) std::fill(d_x + t * s.D + task.from, d_x + t * s.D + task.to, 0.0f);

    // The gradient of the input at step t of a stretch, from d_z.
    const auto gradient = [&](int64_t t, int64_t start) {
        Lanes sum = {};
        for (int64_t l = 0; l < W; ++l)
            if (t + l >= 0 && t + l < task.steps && (!task.resets || l <= task.reach(t + l)))
                sum += load_lanes(taps + l * BLOCK_LANES) * load_lanes(d_z + (t + l - start) * BLOCK_LANES);
        return sum;
    };
    const int64_t stretches = (task.steps + STRETCH - 1) / STRETCH;
    for (int64_t stretch = std::max<int64_t>(stretches, 1) - 1; stretch >= 0; --stretch)
        for (int64_t d = task.from; d < task.to; d += BLOCK_LANES) {
            const int64_t start = stretch * STRETCH, stop = std::min(task.steps, start + STRETCH);
            const int64_t n = std::min(BLOCK_LANES, s.D - d);
            taps_of(weight, bias, d, n, W, taps);
            float* after = later + d * (W - 1);
            std::copy(after, after + (W - 1) * BLOCK_LANES, d_z + (stop - start) * BLOCK_LANES);
            Lanes d_bias = {};
            for (int64_t t = start; t < stop; ++t) {
                Lanes g = load_some(d_y + t * s.D + d, n);
                if (s.silu) {
                    const Lanes z = before_activation(task, W, taps, t, d, n), sig = sigmoid_lanes(z);
                    g *= sig + z * sig * (1.0f - sig);
                }
                store_lanes(d_z + (t - start) * BLOCK_LANES, g);
                d_bias += g;
            }
            store_some(d_taps + W * s.D + d, load_some(d_taps + W * s.D + d, n) + d_bias, n);
            for (int64_t l = 0; l < W; ++l) {
                Lanes sum = {};
                for (int64_t t = start; t < stop; ++t)
                    if (!task.resets || l <= task.reach(t))
                        sum += load_lanes(d_z + (t - start) * BLOCK_LANES) * load_some(task.input(t - l) + d, n);
                store_some(d_taps + l * s.D + d, load_some(d_taps + l * s.D + d, n) + sum, n);
            }
            for (int64_t t = start; t < stop; ++t) {
                Lanes sum = {};
                if (!task.resets && t + W <= task.steps)
                    for (int64_t l = 0; l < W; ++l)
                        sum += load_lanes(taps + l * BLOCK_LANES) * load_lanes(d_z + (t + l - start) * BLOCK_LANES);
                else
                    sum = gradient(t, start);
                store_some(d_x + t * s.D + d, sum, n);
            }
            if (start == 0)
                for (int64_t t = 1 - W; t < 0; ++t) store_some(d_state + (W - 1 + t) * s.D + d, gradient(t, start), n);
            std::copy(d_z, d_z + (W - 1) * BLOCK_LANES, after);
        }
    for (int64_t i = 0; i < W - 1; ++i) {
        if (!task.kept(i)) continue;
        const int64_t t = task.last(i);
        float* to = t < 0 ? d_state + (W - 1 + t) * s.D : d_x + t * s.D;
        for (int64_t d = task.from; d < task.to; ++d) to[d] += d_last[i * s.D + d];
    }
}

template <typename Run>
void for_tasks(const Shape& s, int64_t threads, const Run& run) {
    const int64_t ranges = ranges_of(s, threads);
#pragma omp parallel
    {
        FlushDenormals flush;
#pragma omp for
        for (int64_t index = 0; index < s.B * ranges; ++index) run(index, ranges);
    }
}

}  // namespace

extern "C" void causal_conv1d_forward(const float* x, const float* weight, const float* bias, const float* state,
                                      const uint8_t* resets, const int64_t* lengths, float* y, float* last,
                                      const int64_t* sizes, int64_t threads) {
    Shape s;
    std::memcpy(&s, sizes, sizeof(s));
    for_tasks(s, threads, [&](int64_t index, int64_t ranges) {
        const Task task(s, index, ranges, x, state, resets, lengths);
        if (s.W == 4)
            forward(s, std::integral_constant<int64_t, 4>(), task, weight, bias, y, last);
        else
            forward(s, s.W, task, weight, bias, y, last);
    });
}

extern "C" void causal_conv1d_backward(const float* x, const float* weight, const float* bias, const float* state,
                                       const uint8_t* resets, const int64_t* lengths, const float* d_y,
                                       const float* d_last, float* d_x, float* d_taps, float* d_state,
                                       const int64_t* sizes, int64_t threads) {
    Shape s;
    std::memcpy(&s, sizes, sizeof(s));
    for_tasks(s, threads, [&](int64_t index, int64_t ranges) {
        const Task task(s, index, ranges, x, state, resets, lengths);
        if (s.W == 4)
            backward(s, std::integral_constant<int64_t, 4>(), task, weight, bias, d_y, d_last, d_x, d_taps, d_state);
        else
            backward(s, s.W, task, weight, bias, d_y, d_last, d_x, d_taps, d_state);
    });
}
