// The RNN with matrix-valued states, one head of one row at a time, so that its state and its weight stay in the cache.
// The equations are those of zoo/ops/_m2rnn.py, whose names are kept.
//
// q, k (B, T, G, K); v, outputs (B, T, H, V); kept, written (B, T, H); weight (H, V, V); states (B, H, K, V). In the
// scratch, rows of V numbers are filled up with zeros to whole vectors.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "matmul.h"

namespace {

using zoo::LANES;
using zoo::Vec;

struct Sizes {
    int64_t B, T, G, H, K, V;
    int64_t width() const { return (V + LANES - 1) / LANES * LANES; }
    int64_t cells() const { return K * width(); }
    int64_t squares() const { return (K + LANES - 1) / LANES * LANES; }  // rows in whole squares
    int64_t group(int64_t h) const { return h / (H / G); }
    int64_t keys(int64_t b, int64_t t, int64_t g) const { return ((b * T + t) * G + g) * K; }
    int64_t gate(int64_t b, int64_t t, int64_t h) const { return (b * T + t) * H + h; }
};

void widen(int64_t rows, int64_t V, const float* from, float* to, int64_t width) {
    for (int64_t r = 0; r < rows; ++r) {
        std::copy(from + r * V, from + (r + 1) * V, to + r * width);
        std::fill(to + r * width + V, to + (r + 1) * width, 0.0f);
    }
}
void narrow(int64_t rows, int64_t V, const float* from, int64_t width, float* to) {
    for (int64_t r = 0; r < rows; ++r) std::copy(from + r * width, from + r * width + V, to + r * V);
}

// tanh(H W + k v^T).
void candidate(const Sizes& s, const float* k, const float* v, const float* h, const float* W, float* out) {
    const int64_t width = s.width();
    for (int64_t r = 0; r < s.K; ++r)
        for (int64_t j = 0; j < width; j += LANES) zoo::store(out + r * width + j, k[r] * zoo::load(v + j));
    zoo::product<true>(s.K, width, s.V, h, width, W, width, out, width);
    for (int64_t i = 0; i < s.K * width; i += LANES) zoo::store(out + i, zoo::tanh(zoo::load(out + i)));
}

void blend(int64_t n, float kept, float written, const float* __restrict candidates, float* __restrict h) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) h[i] = kept * h[i] + written * candidates[i];
}

inline float total(Vec x) {
    float sum = 0;
    for (int l = 0; l < LANES; ++l) sum += x[l];
    return sum;
}

// to[r] += the sum of the lanes of sums[r], for n rows; there are whole squares of rows.
void add_totals(int64_t n, const float* sums, float* to) {
    float square[LANES * LANES];
    for (int64_t r = 0; r < n; r += LANES) {
        zoo::transposed_square(sums + r * LANES, LANES, square, LANES);
        Vec all = zoo::load(square);
        for (int l = 1; l < LANES; ++l) all += zoo::load(square + l * LANES);
        const int64_t here = std::min<int64_t>(LANES, n - r);
        zoo::store<float>(to + r, zoo::load<float>(to + r, here) + all, here);
    }
}

// What one step leaves: gradients by its inputs, added to what is there for d_q and d_k.
struct StepGradients {
    float *q, *k, *v, *kept, *written;
};

// Backward through one step but for the products with W: G (K, V) is the gradient of H_t; it becomes kept * G, and P that
// of what tanh was taken of.
void step_backward(const Sizes& s, const float* q, const float* k, const float* v, float kept, float written,
                   const float* d_y, const float* before, const float* candidates, float limit, float* G, float* P,
                   float* sums, StepGradients d) {
    const int64_t width = s.width();
    float* key_sums = sums + s.squares() * LANES;
    Vec d_kept{}, d_written{};
    std::fill(d.v, d.v + width, 0.0f);
    for (int64_t r = 0; r < s.K; ++r) {
        Vec read{}, key{};
        for (int64_t j = 0; j < width; j += LANES) {
            const int64_t at = r * width + j;
            const Vec h0 = zoo::load(before + at), c = zoo::load(candidates + at), dy = zoo::load(d_y + j);
            read += (kept * h0 + written * c) * dy;
            Vec g = zoo::load(G + at) + q[r] * dy;
            g = g > limit ? Vec{} + limit : g;
            g = g < -limit ? Vec{} - limit : g;
            d_kept += g * h0;
            d_written += g * c;
            const Vec p = written * g * (1.0f - c * c);
            key += p * zoo::load(v + j);
            zoo::store(d.v + j, zoo::load(d.v + j) + k[r] * p);
            zoo::store(P + at, p);
            zoo::store(G + at, kept * g);
        }
        zoo::store(sums + r * LANES, read);
        zoo::store(key_sums + r * LANES, key);
    }
    add_totals(s.K, sums, d.q);
    add_totals(s.K, key_sums, d.k);
    *d.kept = total(d_kept);
    *d.written = total(d_written);
}

}  // namespace

// state holds the first state and gets the last one. saved (B, chunks, H, K, V), the state at the start of every chunk of
// steps, is for the backward pass, or null.
extern "C" void m2rnn_forward(const float* q, const float* k, const float* v, const float* weight, const float* kept,
                              const float* written, const bool* resets, float* state, float* outputs, float* saved,
                              int64_t B, int64_t T, int64_t G, int64_t H, int64_t K, int64_t V, int64_t chunk) {
    const Sizes s{B, T, G, H, K, V};
    const int64_t width = s.width(), cells = s.cells(), n_chunks = (T + chunk - 1) / chunk;
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> scratch(2 * cells + (V + 2) * width);
        float *h = scratch.data(), *candidates = h + cells, *W = candidates + cells, *value = W + V * width;
        float* y = value + width;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < B * H; ++task) {
            const int64_t b = task / H, head = task % H, group = s.group(head);
            widen(V, V, weight + head * V * V, W, width);
            widen(K, V, state + task * K * V, h, width);
            for (int64_t t = 0; t < T; ++t) {
                const int64_t keys = s.keys(b, t, group), gate = s.gate(b, t, head);
                if (saved && t % chunk == 0)
                    narrow(K, V, h, width, saved + ((b * n_chunks + t / chunk) * H + head) * K * V);
                if (resets && resets[b * T + t]) std::fill(h, h + cells, 0.0f);
                widen(1, V, v + gate * V, value, width);
                candidate(s, k + keys, value, h, W, candidates);
                blend(cells, kept[gate], written[gate], candidates, h);
                zoo::product(1, width, K, q + keys, K, h, width, y, width);
                narrow(1, V, y, width, outputs + gate * V);
            }
            narrow(K, V, h, width, state + task * K * V);
        }
    }
}
ZOO_EXPORT(m2rnn_forward)

// The states inside a chunk are computed again. d_state holds the gradient of the last state and gets that of the first.
// The heads of a group are cut into `parts`: d_q, d_k (parts, B, T, G, K), zero before, are the sums over each part's
// heads; d_weight (B, H, V, V) is that of each row. Gradients of states are cut at +-limit.
extern "C" void m2rnn_backward(const float* q, const float* k, const float* v, const float* weight, const float* kept,
                               const float* written, const bool* resets, const float* saved, const float* d_outputs,
                               float* d_state, float* d_q, float* d_k, float* d_v, float* d_weight, float* d_kept,
                               float* d_written, int64_t B, int64_t T, int64_t G, int64_t H, int64_t K, int64_t V,
                               int64_t chunk, int64_t parts, double limit) {
    const Sizes s{B, T, G, H, K, V};
    const int64_t width = s.width(), cells = s.cells(), n_chunks = (T + chunk - 1) / chunk, share = H / G;
    const int64_t heads = (share + parts - 1) / parts, all_keys = B * T * G * K;
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> scratch((2 * chunk + 3) * cells + (4 * V + 3) * width + 2 * s.squares() * LANES);
        float *befores = scratch.data(), *candidates = befores + chunk * cells, *h = candidates + chunk * cells;
        float *g = h + cells, *p = g + cells, *W = p + cells, *turned = W + V * width, *d_W = turned + V * width;
        float *d_chunk = d_W + V * width, *value = d_chunk + V * width, *d_y = value + width, *d_value = d_y + width;
        float* sums = d_value + width;
#pragma omp for schedule(dynamic, 1)
        for (int64_t task = 0; task < B * G * parts; ++task) {
            const int64_t b = task / (G * parts), group = task / parts % G, part = task % parts;
            const int64_t first = group * share + part * heads, last = std::min(first + heads, (group + 1) * share);
            for (int64_t head = first; head < last; ++head) {
                const int64_t row = b * H + head;
                widen(V, V, weight + head * V * V, W, width);
                std::fill(turned, turned + V * width, 0.0f);
                zoo::transposed(V, V, weight + head * V * V, V, turned, width);
                std::fill(d_W, d_W + V * width, 0.0f);
                widen(K, V, d_state + row * K * V, g, width);
                for (int64_t c = n_chunks - 1; c >= 0; --c) {
                    const int64_t start = c * chunk, stop = std::min(T, start + chunk);
                    widen(K, V, saved + ((b * n_chunks + c) * H + head) * K * V, h, width);
                    for (int64_t t = start; t < stop; ++t) {
                        const int64_t gate = s.gate(b, t, head);
                        float* now = candidates + (t - start) * cells;
                        if (resets && resets[b * T + t]) std::fill(h, h + cells, 0.0f);
                        std::copy(h, h + cells, befores + (t - start) * cells);
                        widen(1, V, v + gate * V, value, width);
                        candidate(s, k + s.keys(b, t, group), value, h, W, now);
                        blend(cells, kept[gate], written[gate], now, h);
                    }
                    std::fill(d_chunk, d_chunk + V * width, 0.0f);
                    for (int64_t t = stop - 1; t >= start; --t) {
                        const int64_t keys = s.keys(b, t, group), gate = s.gate(b, t, head);
                        const float* before = befores + (t - start) * cells;
                        widen(1, V, v + gate * V, value, width);
                        widen(1, V, d_outputs + gate * V, d_y, width);
                        const StepGradients d{d_q + part * all_keys + keys, d_k + part * all_keys + keys, d_value,
                                              d_kept + gate, d_written + gate};
                        step_backward(s, q + keys, k + keys, value, kept[gate], written[gate], d_y, before,
                                      candidates + (t - start) * cells, static_cast<float>(limit), g, p, sums, d);
                        narrow(1, V, d_value, width, d_v + gate * V);
                        if (resets && resets[b * T + t]) {
                            std::fill(g, g + cells, 0.0f);
                            continue;  // before it is nothing
                        }
                        zoo::product<true>(K, width, V, p, width, turned, width, g, width);
                        zoo::product_tn<true>(V, width, K, before, width, p, width, d_chunk, width);
                    }
                    for (int64_t i = 0; i < V * width; ++i) d_W[i] += d_chunk[i];
                }
                narrow(K, V, g, width, d_state + row * K * V);
                narrow(V, V, d_W, width, d_weight + row * V * V);
            }
        }
    }
}
ZOO_EXPORT(m2rnn_backward)
