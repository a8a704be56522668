// The scalar LSTM, one head and a few batch rows at a time, so that a head's recurrent weights stay in the cache. The
// equations are those of zoo/ops/_slstm.py, whose names are kept.
//
// Gates (B, T, 4, H, D) in the order i, f, z, o; h (B, T, H, D); states (B, H, D); weights (H, D, 4 D), or turned.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "matmul.h"

namespace {

enum Saved { INPUT, FORGET, FORGOTTEN, VALUE, OUTPUT, CELL, SIZE, N_SAVED };

// Heads and blocks of rows, so that there are about as many tasks as threads.
struct Tasks {
    int64_t B, H, rows;
    Tasks(int64_t batch, int64_t heads, int64_t threads) : B(batch), H(heads) {
        const int64_t blocks = std::min(batch, (threads + heads - 1) / heads);
        rows = (batch + blocks - 1) / blocks;
    }
    int64_t count() const { return H * ((B + rows - 1) / rows); }
    int64_t head(int64_t task) const { return task % H; }
    int64_t first(int64_t task) const { return task / H * rows; }
    int64_t last(int64_t task) const { return std::min(B, first(task) + rows); }
};

// One step of one row: D units, from the gates' sums. m is carried in double: it enters by differences alone.
template <bool KEEP>
void step(int64_t D, const float* __restrict sums, float* __restrict h, float* __restrict c, float* __restrict n,
          double* __restrict m, float* __restrict saved) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
        const bool rest = n[d] == 0.0f;
        const double input = sums[d], kept = m[d] + zoo::log_sigmoid(sums[D + d]);
        const double top = rest || input > kept ? input : kept;
        const float i = zoo::exp(static_cast<float>(input - top));
        const float f = rest ? 0.0f : zoo::exp(static_cast<float>(kept - top));
        const float z = zoo::tanh(sums[2 * D + d]), o = zoo::sigmoid(sums[3 * D + d]);
        m[d] = top;
        c[d] = f * c[d] + i * z;
        n[d] = f * n[d] + i;
        h[d] = o * c[d] / n[d];
        if (KEEP) {
            saved[INPUT * D + d] = i;
            saved[FORGET * D + d] = f;
            saved[FORGOTTEN * D + d] = zoo::sigmoid(-sums[D + d]);
            saved[VALUE * D + d] = z;
            saved[OUTPUT * D + d] = o;
            saved[CELL * D + d] = c[d];
            saved[SIZE * D + d] = n[d];
        }
    }
}

// Backward through one step: from the gradients of h, c, n, m after it to those of the gates and of c, n, m before it.
void step_backward(int64_t D, const float* __restrict saved, const float* __restrict c_before,
                   const float* __restrict n_before, const float* __restrict d_h, float* __restrict d_c,
                   float* __restrict d_n, float* __restrict d_m, float* __restrict d_sums) {
#pragma omp simd
    for (int64_t d = 0; d < D; ++d) {
        const float i = saved[INPUT * D + d], f = saved[FORGET * D + d], z = saved[VALUE * D + d];
        const float o = saved[OUTPUT * D + d], n = saved[SIZE * D + d], ratio = saved[CELL * D + d] / n;
        const float dc = d_c[d] + d_h[d] * o / n, dn = d_n[d] - d_h[d] * o * ratio / n;
        const float d_kept = f * (dc * c_before[d] + dn * n_before[d]), d_input = i * (dc * z + dn);
        const bool kept = i < 1.0f;  // m is what was kept, or else the input gate
        const float to_kept = kept ? d_m[d] - d_input : d_kept, to_input = kept ? d_input : d_m[d] - d_kept;
        d_sums[d] = to_input;
        d_sums[D + d] = to_kept * saved[FORGOTTEN * D + d];
        d_sums[2 * D + d] = dc * i * (1.0f - z * z);
        d_sums[3 * D + d] = d_h[d] * ratio * o * (1.0f - o);
        d_c[d] = dc * f;
        d_n[d] = dn * f;
        d_m[d] = f > 0.0f ? to_kept : 0.0f;
    }
}

}  // namespace

// h0, c, n, m hold the first state and get the last one. saved (B, T, H, 7, D) is for the backward pass, or null.
extern "C" void slstm_forward(const float* gates, const float* weights, const int64_t* lengths, const bool* resets,
                              float* h0, float* c, float* n, float* m, float* h, float* saved, int64_t B, int64_t T,
                              int64_t H, int64_t D, int64_t threads) {
    const Tasks tasks(B, H, threads);
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> scratch(tasks.rows * 5 * D);
        std::vector<double> stabilisers(tasks.rows * D);
        float *sums = scratch.data(), *now = sums + tasks.rows * 4 * D;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks.count(); ++task) {
            const int64_t head = tasks.head(task), b0 = tasks.first(task), b1 = tasks.last(task);
            const float* R = weights + head * D * 4 * D;
            for (int64_t b = b0; b < b1; ++b) {
                const int64_t at = (b * H + head) * D;
                std::copy(h0 + at, h0 + at + D, now + (b - b0) * D);
                std::copy(m + at, m + at + D, stabilisers.data() + (b - b0) * D);
            }
            for (int64_t t = 0; t < T; ++t) {
                for (int64_t b = b0; b < b1; ++b) {
                    const int64_t at = (b * H + head) * D;
                    if (resets && resets[b * T + t] && (!lengths || t < lengths[b])) {
                        std::fill(now + (b - b0) * D, now + (b - b0 + 1) * D, 0.0f);
                        std::fill(c + at, c + at + D, 0.0f);
                        std::fill(n + at, n + at + D, 0.0f);
                        std::fill(stabilisers.begin() + (b - b0) * D, stabilisers.begin() + (b - b0 + 1) * D, 0.0);
                    }
                    for (int64_t g = 0; g < 4; ++g) {
                        const float* from = gates + (((b * T + t) * 4 + g) * H + head) * D;
                        std::copy(from, from + D, sums + ((b - b0) * 4 + g) * D);
                    }
                }
                zoo::product<true>(b1 - b0, 4 * D, D, now, D, R, 4 * D, sums, 4 * D);
                for (int64_t b = b0; b < b1; ++b) {
                    const int64_t at = (b * H + head) * D, place = (b * T + t) * H + head;
                    float *out = h + place * D, *state = now + (b - b0) * D;
                    if (lengths && t >= lengths[b]) {
                        std::fill(out, out + D, 0.0f);
                        if (saved) std::fill(saved + place * N_SAVED * D, saved + (place + 1) * N_SAVED * D, 0.0f);
                        continue;
                    }
                    float* to = saved + place * N_SAVED * D;
                    double* top = stabilisers.data() + (b - b0) * D;
                    (saved ? step<true> : step<false>)(D, sums + (b - b0) * 4 * D, state, c + at, n + at, top, to);
                    std::copy(state, state + D, out);
                }
            }
            for (int64_t b = b0; b < b1; ++b) {
                const int64_t at = (b * H + head) * D;
                std::copy(now + (b - b0) * D, now + (b - b0 + 1) * D, h0 + at);
                for (int64_t d = 0; d < D; ++d) m[at + d] = static_cast<float>(stabilisers[(b - b0) * D + d]);
            }
        }
    }
}
ZOO_EXPORT(slstm_forward)

// turned: the weights (H, 4 D, D). d_h0, d_c, d_n, d_m hold the gradients of the last state and get those of the first;
// c0, n0 are the first state's.
extern "C" void slstm_backward(const float* turned, const int64_t* lengths, const bool* resets, const float* c0,
                               const float* n0, const float* saved, const float* d_h, float* d_h0, float* d_c,
                               float* d_n, float* d_m, float* d_gates, int64_t B, int64_t T, int64_t H, int64_t D,
                               int64_t threads) {
    const Tasks tasks(B, H, threads);
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> scratch(tasks.rows * 5 * D + 2 * D);
        float *d_sums = scratch.data(), *d_now = d_sums + tasks.rows * 4 * D, *zeros = d_now + tasks.rows * D;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < tasks.count(); ++task) {
            const int64_t head = tasks.head(task), b0 = tasks.first(task), b1 = tasks.last(task);
            const float* R = turned + head * 4 * D * D;
            for (int64_t t = T - 1; t >= 0; --t) {
                for (int64_t b = b0; b < b1; ++b) {
                    const int64_t at = (b * H + head) * D, place = (b * T + t) * H + head;
                    float* sums = d_sums + (b - b0) * 4 * D;
                    if (lengths && t >= lengths[b]) {
                        std::fill(sums, sums + 4 * D, 0.0f);
                    } else {
                        const bool first = resets && resets[b * T + t];
                        const float* before = saved + (place - H) * N_SAVED * D;
                        const float* c_before = first ? zeros : t ? before + CELL * D : c0 + at;
                        const float* n_before = first ? zeros : t ? before + SIZE * D : n0 + at;
                        float* total = d_now + (b - b0) * D;
                        for (int64_t d = 0; d < D; ++d) total[d] = d_h0[at + d] + d_h[place * D + d];
                        step_backward(D, saved + place * N_SAVED * D, c_before, n_before, total, d_c + at, d_n + at,
                                      d_m + at, sums);
                    }
                    for (int64_t g = 0; g < 4; ++g)
                        std::copy(sums + g * D, sums + (g + 1) * D,
                                  d_gates + (((b * T + t) * 4 + g) * H + head) * D);
                }
                zoo::product(b1 - b0, D, 4 * D, d_sums, 4 * D, R, D, d_now, D);
                for (int64_t b = b0; b < b1; ++b) {
                    const int64_t at = (b * H + head) * D;
                    if (lengths && t >= lengths[b]) continue;
                    const bool first = resets && resets[b * T + t];
                    for (int64_t d = 0; d < D; ++d) d_h0[at + d] = first ? 0.0f : d_now[(b - b0) * D + d];
                }
            }
        }
    }
}
ZOO_EXPORT(slstm_backward)
