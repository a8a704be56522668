// The liquid time-constant cell over a sequence, forward and backward (zoo/ops/_ltc.py has the equations).
//
// Nearly all the time goes into one sigmoid per synapse and unfold. They are never stored: the backward pass computes
// them again from the potentials, which are. Synapses are laid out in panels of one vector of targets, so that
// parameters stream through once per unfold and sums over sources stay in registers. Rows of the batch go in parallel.
#include <vector>

#include "kernel.h"
#include "matmul.h"

namespace {

using zoo::LANES;
constexpr int64_t FLUSH = 16;  // steps whose gradients are summed before they join the total: keeps float sums exact

enum Part { MU = 0, SIGMA = 1, WEIGHT = 2, PULL = 3, PARTS = 4 };  // PULL = weight times reversal potential

// (PARTS, n_from, n_to) as panels (n_to / LANES, n_from, PARTS, LANES), missing targets zero.
struct Synapses {
    int64_t n_from, n_to, n_panels;
    std::vector<float> data;
    Synapses(int64_t n_from, int64_t n_to, const float* parts)
        : n_from(n_from), n_to(n_to), n_panels((n_to + LANES - 1) / LANES), data(n_panels * n_from * PARTS * LANES) {
        for (int64_t part = 0; part < PARTS; ++part)
            for (int64_t p = 0; p < n_from; ++p)
                for (int64_t n = 0; n < n_to; ++n) data[at(n, p, part)] = parts[(part * n_from + p) * n_to + n];
    }
    int64_t at(int64_t n, int64_t p, int64_t part) const {
        return (((n / LANES) * n_from + p) * PARTS + part) * LANES + n % LANES;
    }
    void add_to(const std::vector<float>& panels, float* parts) const {
        for (int64_t part = 0; part < PARTS; ++part)
            for (int64_t p = 0; p < n_from; ++p)
                for (int64_t n = 0; n < n_to; ++n) parts[(part * n_from + p) * n_to + n] += panels[at(n, p, part)];
    }
};

// pull[n] += sum_p PULL s, open[n] += sum_p WEIGHT s with s = sigmoid(SIGMA (v[p] - MU)); pull, open whole panels.
void forward_sums(const Synapses& synapses, const float* v, float* pull, float* open) {
    const float* from = synapses.data.data();
    for (int64_t panel = 0; panel < synapses.n_panels; ++panel) {
        float num[LANES] = {}, den[LANES] = {};
        for (int64_t p = 0; p < synapses.n_from; ++p, from += PARTS * LANES) {
            const float v_p = v[p];
            for (int l = 0; l < LANES; ++l) {
                const float e = zoo::exp(from[SIGMA * LANES + l] * (from[MU * LANES + l] - v_p));
                const float s = 1.0f / (1.0f + e);
                num[l] += from[PULL * LANES + l] * s;
                den[l] += from[WEIGHT * LANES + l] * s;
            }
        }
        for (int l = 0; l < LANES; ++l) {
            pull[panel * LANES + l] += num[l];
            open[panel * LANES + l] += den[l];
        }
    }
}

// d_v[p] += gradient; d_panels += gradients of the parts. spread (n_from, LANES) is scratch.
void backward_sums(const Synapses& synapses, const float* v, const float* d_pull, const float* d_open, float* d_v,
                   float* d_panels, float* spread) {
    const float* from = synapses.data.data();
    std::memset(spread, 0, synapses.n_from * LANES * sizeof(float));
    for (int64_t panel = 0; panel < synapses.n_panels; ++panel) {
        float d_num[LANES], d_den[LANES];
        std::memcpy(d_num, d_pull + panel * LANES, sizeof(d_num));
        std::memcpy(d_den, d_open + panel * LANES, sizeof(d_den));
        for (int64_t p = 0; p < synapses.n_from; ++p, from += PARTS * LANES, d_panels += PARTS * LANES) {
            const float v_p = v[p];
            float* d_p = spread + p * LANES;
            for (int l = 0; l < LANES; ++l) {
                const float over = v_p - from[MU * LANES + l], sigma = from[SIGMA * LANES + l];
                const float e = zoo::exp(-sigma * over), s = 1.0f / (1.0f + e);
                const float d_s = from[PULL * LANES + l] * d_num[l] + from[WEIGHT * LANES + l] * d_den[l];
                const float d_x = d_s * e * s * s;  // 1 - s = e s, without cancellation
                d_p[l] += d_x * sigma;
                d_panels[MU * LANES + l] -= d_x * sigma;
                d_panels[SIGMA * LANES + l] += d_x * over;
                d_panels[WEIGHT * LANES + l] += s * d_den[l];
                d_panels[PULL * LANES + l] += s * d_num[l];
            }
        }
    }
    for (int64_t p = 0; p < synapses.n_from; ++p) {
        float sum = 0;
        for (int l = 0; l < LANES; ++l) sum += spread[p * LANES + l];
        d_v[p] += sum;
    }
}

void add_and_clear(std::vector<float>& part, std::vector<float>& total) {
    for (size_t i = 0; i < part.size(); ++i) {
        total[i] += part[i];
        part[i] = 0;
    }
}

}  // namespace

// x (B, T, P); sensory (4, P, N) and inner (4, N, N); leak, rest, capacity (N). saved (B, T, unfolds, 3, N) or null:
// the potentials before each unfold, and their sums of pull and open over all synapses.
extern "C" void ltc_forward(const float* x, const float* sensory, const float* inner, const float* leak,
                            const float* rest, const float* capacity, const float* state, const float* spans,
                            const int64_t* steps, const bool* resets, float* out, float* last, float* saved, int64_t B,
                            int64_t T, int64_t P, int64_t N, int64_t unfolds, double epsilon) {
    const Synapses outer(P, N, sensory), between(N, N, inner);
    const int64_t padded = outer.n_panels * LANES;
    const float eps = static_cast<float>(epsilon);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < B; ++b) {
        zoo::FlushDenormals flush;
        std::vector<float> sums(4 * padded);
        float *pull = sums.data(), *open = pull + padded, *pull_x = open + padded, *open_x = pull_x + padded;
        float* v = last + b * N;
        std::memcpy(v, state + b * N, N * sizeof(float));
        for (int64_t t = 0; t < T; ++t) {
            const int64_t at = b * T + t;
            float* o = out + at * N;
            if (steps && t >= steps[b]) {
                std::memset(o, 0, N * sizeof(float));
                if (saved) std::memset(saved + at * unfolds * 3 * N, 0, unfolds * 3 * N * sizeof(float));
                continue;
            }
            if (resets && resets[at]) std::memset(v, 0, N * sizeof(float));
            const float dt = (spans ? spans[at] : 1.0f) / unfolds;
            std::memset(pull_x, 0, 2 * padded * sizeof(float));
            forward_sums(outer, x + at * P, pull_x, open_x);
            for (int64_t k = 0; k < unfolds; ++k) {
                std::memcpy(pull, pull_x, 2 * padded * sizeof(float));
                forward_sums(between, v, pull, open);
                if (saved) {
                    float* keep = saved + (at * unfolds + k) * 3 * N;
                    std::memcpy(keep, v, N * sizeof(float));
                    std::memcpy(keep + N, pull, N * sizeof(float));
                    std::memcpy(keep + 2 * N, open, N * sizeof(float));
                }
                for (int64_t n = 0; n < N; ++n)
                    v[n] = (capacity[n] * v[n] + dt * (leak[n] * rest[n] + pull[n])) /
                           (capacity[n] + dt * (leak[n] + open[n] + eps));
            }
            std::memcpy(o, v, N * sizeof(float));
        }
    }
}
ZOO_EXPORT(ltc_forward)

// d_state comes in as the gradient of the last state and leaves as that of the first. d_x (B, T, P) and d_spans (B, T)
// are zero (or null); d_sensory, d_inner and d_cell (n_blocks, 3, N: leak, rest, capacity) are zero, one set a block.
extern "C" void ltc_backward(const float* d_out, const float* x, const float* sensory, const float* inner,
                             const float* leak, const float* rest, const float* capacity, const float* spans,
                             const int64_t* steps, const bool* resets, const float* saved, float* d_state, float* d_x,
                             float* d_sensory, float* d_inner, float* d_cell, float* d_spans, int64_t B, int64_t T,
                             int64_t P, int64_t N, int64_t unfolds, double epsilon, int64_t n_blocks) {
    const Synapses outer(P, N, sensory), between(N, N, inner);
    const int64_t padded = outer.n_panels * LANES;
    const float eps = static_cast<float>(epsilon);
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n_blocks; ++block) {
        zoo::FlushDenormals flush;
        std::vector<float> outer_part(outer.data.size()), outer_total(outer.data.size());
        std::vector<float> inner_part(between.data.size()), inner_total(between.data.size());
        std::vector<float> sums(4 * padded), spread((P > N ? P : N) * LANES), d_v(N), d_old(N), cell_part(3 * N);
        float *d_pull = sums.data(), *d_open = d_pull + padded, *d_pull_x = d_open + padded,
              *d_open_x = d_pull_x + padded;
        float* d_block = d_cell + block * 3 * N;
        int64_t waiting = 0;
        for (int64_t b = block * B / n_blocks; b < (block + 1) * B / n_blocks; ++b) {
            float* carry = d_state + b * N;
            for (int64_t t = T - 1; t >= 0; --t) {
                const int64_t at = b * T + t;
                if (steps && t >= steps[b]) continue;
                const float dt = (spans ? spans[at] : 1.0f) / unfolds;
                float d_dt = 0;
                std::memset(d_pull_x, 0, 2 * padded * sizeof(float));
                for (int64_t n = 0; n < N; ++n) d_v[n] = d_out[at * N + n] + carry[n];
                for (int64_t k = unfolds - 1; k >= 0; --k) {
                    const float* v = saved + (at * unfolds + k) * 3 * N;
                    const float *pull = v + N, *open = v + 2 * N;
                    float *d_leak = cell_part.data(), *d_rest = d_leak + N, *d_capacity = d_rest + N;
                    for (int64_t n = 0; n < N; ++n) {
                        const float drive = leak[n] * rest[n] + pull[n], drain = leak[n] + open[n] + eps;
                        const float below = capacity[n] + dt * drain;
                        const float d_above = d_v[n] / below, after = (capacity[n] * v[n] + dt * drive) / below;
                        const float d_below = -d_above * after;
                        d_pull[n] = dt * d_above;
                        d_open[n] = dt * d_below;
                        d_old[n] = capacity[n] * d_above;
                        d_leak[n] += dt * (rest[n] * d_above + d_below);
                        d_rest[n] += dt * leak[n] * d_above;
                        d_capacity[n] += d_above * (v[n] - after);  // near rest the two cancel
                        d_dt += drive * d_above + drain * d_below;
                        d_pull_x[n] += d_pull[n];
                        d_open_x[n] += d_open[n];
                    }
                    backward_sums(between, v, d_pull, d_open, d_old.data(), inner_part.data(), spread.data());
                    std::memcpy(d_v.data(), d_old.data(), N * sizeof(float));
                }
                backward_sums(outer, x + at * P, d_pull_x, d_open_x, d_x + at * P, outer_part.data(), spread.data());
                if (d_spans) d_spans[at] = d_dt / unfolds;
                if (resets && resets[at])
                    std::memset(carry, 0, N * sizeof(float));
                else
                    std::memcpy(carry, d_v.data(), N * sizeof(float));
                if (++waiting == FLUSH) {
                    add_and_clear(outer_part, outer_total);
                    add_and_clear(inner_part, inner_total);
                    for (int64_t i = 0; i < 3 * N; ++i) d_block[i] += cell_part[i], cell_part[i] = 0;
                    waiting = 0;
                }
            }
        }
        add_and_clear(outer_part, outer_total);
        add_and_clear(inner_part, inner_total);
        for (int64_t i = 0; i < 3 * N; ++i) d_block[i] += cell_part[i];
        outer.add_to(outer_total, d_sensory + block * PARTS * P * N);
        between.add_to(inner_total, d_inner + block * PARTS * N * N);
    }
}
ZOO_EXPORT(ltc_backward)
