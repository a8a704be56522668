// What single steps share: products of a row with weights as they lie, one head of a recurrence, work for threads.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

namespace zoo {

constexpr int64_t SHARED = 1 << 17;  // multiply-adds of a call from which threads share them

// Room for numbers that lives as long as its thread: fresh pages cost time.
inline float* room(int64_t numbers) {
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < numbers) kept.resize(numbers);
    return kept.data();
}

inline float sum_of(Vec x) {
    float lanes[LANES];
    std::memcpy(lanes, &x, sizeof(x));
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// N products of rows, `stride` apart, with x, all of n numbers.
template <int N>
ZOO_INLINE void dots(const float* rows, int64_t stride, const float* x, int64_t n, float* out) {
    Vec sums[N] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Vec y = load<Vec>(x + i);
        for (int r = 0; r < N; ++r) sums[r] += load<Vec>(rows + r * stride + i) * y;
    }
    for (int r = 0; r < N; ++r) {
        float rest = 0;
        for (int64_t j = i; j < n; ++j) rest += rows[r * stride + j] * x[j];
        out[r] = sum_of(sums[r]) + rest;
    }
}

// out (count) = rows (count, n) x (n).
inline void times(const float* rows, int64_t count, const float* x, int64_t n, float* out) {
    int64_t r = 0;
    for (; r + 4 <= count; r += 4) dots<4>(rows + r * n, n, x, n, out + r);
    for (; r < count; ++r) dots<1>(rows + r * n, n, x, n, out + r);
}

// The range of `count` things that a thread of a parallel region takes, in whole fours.
template <typename Run>
void share(int64_t count, int64_t work, int64_t threads, const Run& run) {
    const int64_t parts = work < SHARED ? 1 : std::min<int64_t>(threads, (count + 3) / 4);
    if (parts <= 1) return run(0, count);
#pragma omp parallel for
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t fours = (count + 3) / 4;
        run(fours * part / parts * 4, std::min(count, fours * (part + 1) / parts * 4));
    }
}

// y[i] = activation(bias + taps of the window that ends with x); `next` is the window moved on by a step, or the same
// memory. No taps where weight is null.
inline void convolve(const float* x, const float* weight, const float* bias, const float* window, float* next, float* y,
                     int64_t n, int64_t W, bool silu) {
    if (!weight) {
        std::copy(x, x + n, y);
    } else if (W == 4) {
        const float *s0 = window, *s1 = s0 + n, *s2 = s1 + n;
#pragma GCC ivdep
        for (int64_t d = 0; d < n; ++d) {
            const float* w = weight + 4 * d;
            y[d] = (bias ? bias[d] : 0.0f) + w[0] * s0[d] + w[1] * s1[d] + w[2] * s2[d] + w[3] * x[d];
        }
    } else {
        for (int64_t d = 0; d < n; ++d) {
            float sum = (bias ? bias[d] : 0.0f) + weight[d * W + W - 1] * x[d];
            for (int64_t w = 0; w < W - 1; ++w) sum += weight[d * W + w] * window[w * n + d];
            y[d] = sum;
        }
    }
    if (weight && W > 1) {
        std::memmove(next, window + n, (W - 2) * n * sizeof(float));
        std::copy(x, x + n, next + (W - 2) * n);
    }
    if (silu)
#pragma GCC ivdep
        for (int64_t d = 0; d < n; ++d) y[d] *= sigmoid(y[d]);
}

// ---- recurrences over heads

enum Kind { LINEAR, DELTA, DPLR };

// What one head writes into its state S (K, V), and reads of it. Decays (K) or one for all; those not there are null.
struct Head {
    int64_t K, V;
    const float *q, *k, *v, *a, *b, *decays;
    float decay, beta, scale;
    Kind kind;
};

// N vectors of columns from the first on, the last of them `tail` numbers long.
template <Kind KIND, int N>
ZOO_INLINE void columns(const Head& h, const float* S, float* last, float* o, int64_t from, int64_t tail) {
    const auto in = [&](const float* row, int c) {
        return c == N - 1 && tail != LANES ? load<float>(row + c * LANES, tail) : load<Vec>(row + c * LANES);
    };
    const auto out = [&](float* row, int c, Vec x) {
        c == N - 1 && tail != LANES ? store<float>(row + c * LANES, x, tail) : store(row + c * LANES, x);
    };
    Vec v[N], u[N] = {}, read[N] = {};
    for (int c = 0; c < N; ++c) v[c] = in(h.v + from, c);
    if (KIND != LINEAR) {
        for (int64_t i = 0; i < h.K; ++i) {
            const float* row = S + i * h.V + from;
            const float factor = KIND == DPLR ? h.a[i] : h.k[i] * (h.decays ? h.decays[i] : h.decay);
            for (int c = 0; c < N; ++c) u[c] += factor * in(row, c);
        }
        if (KIND == DELTA)
            for (int c = 0; c < N; ++c) u[c] = h.beta * (v[c] - u[c]);
    }
    for (int64_t i = 0; i < h.K; ++i) {
        const float *row = S + i * h.V + from, decay = h.decays ? h.decays[i] : h.decay, k = h.k[i], q = h.q[i];
        float* to = last + i * h.V + from;
        for (int c = 0; c < N; ++c) {
            Vec s = decay * in(row, c);
            if (KIND == LINEAR) s += k * v[c];
            if (KIND == DELTA) s += k * u[c];
            if (KIND == DPLR) s += h.b[i] * u[c] + k * v[c];
            out(to, c, s);
            read[c] += q * s;
        }
    }
    for (int c = 0; c < N; ++c) out(o + from, c, h.scale * read[c]);
}

template <Kind KIND>
void all_columns(const Head& h, const float* S, float* last, float* o) {
    int64_t from = 0;
    for (; from + 4 * LANES <= h.V; from += 4 * LANES) columns<KIND, 4>(h, S, last, o, from, LANES);
    for (; from < h.V; from += LANES) columns<KIND, 1>(h, S, last, o, from, std::min<int64_t>(LANES, h.V - from));
}

inline void step_of(const Head& h, const float* S, float* last, float* o) {
    if (h.kind == DPLR) return all_columns<DPLR>(h, S, last, o);
    h.kind == DELTA ? all_columns<DELTA>(h, S, last, o) : all_columns<LINEAR>(h, S, last, o);
}

// ---- attention

// Cosines (n) and sines (n) of the angles position * frequencies, times `amplitude`.
inline void angles(int64_t position, const double* frequencies, int64_t n, double amplitude, float* turns) {
    for (int64_t i = 0; i < n; ++i) {
        const double angle = static_cast<double>(position) * frequencies[i];
        turns[i] = static_cast<float>(std::cos(angle) * amplitude);
        turns[n + i] = static_cast<float>(std::sin(angle) * amplitude);
    }
}

// y = x (K) with its first 2 n channels turned, in pairs of neighbours where `interleaved`, else of i and i + n; y may
// be x.
inline void rotate(const float* x, const float* turns, int64_t K, int64_t n, bool interleaved, float* y) {
    const int64_t ahead = interleaved ? 2 : 1, apart = interleaved ? 1 : n;
    for (int64_t i = 0; i < n; ++i) {
        const float a = x[i * ahead], b = x[i * ahead + apart];
        y[i * ahead] = a * turns[i] - b * turns[n + i];
        y[i * ahead + apart] = b * turns[i] + a * turns[n + i];
    }
    if (x != y) std::copy(x + 2 * n, x + K, y + 2 * n);
}

// Keys (B, N, G, K) and values (B, N, G, V), `length` (B) of which have been written, row p % N at position p.
struct Cache {
    float *keys, *values;
    int64_t* length;
    int64_t N, G, K, V;
};

// o (H, V): the queries q (H, K) of a row against a cache, into which k (G, K) and v (G, V) are written first. sinks
// (H) or null; a cap of 0 is none.
inline void attend(const Cache& cache, int64_t row, const float* q, const float* k, const float* v, const float* sinks,
                   float* o, int64_t H, int64_t threads, float scale, float cap) {
    const int64_t N = cache.N, G = cache.G, K = cache.K, V = cache.V, R = H / G;
    const int64_t before = std::max<int64_t>(cache.length[row], 0), at = before % N, held = std::min(before + 1, N);
    cache.length[row] = before + 1;
    float *keys = cache.keys + row * N * G * K, *values = cache.values + row * N * G * V;
    std::copy(k, k + G * K, keys + at * G * K);
    std::copy(v, v + G * V, values + at * G * V);
    static thread_local std::vector<float> kept;
    if (static_cast<int64_t>(kept.size()) < H * held) kept.resize(H * held);
    float* scores = kept.data();  // (H, held)
    const int64_t parts = held * H * (K + V) < SHARED ? 1 : std::min(threads, G);
#pragma omp parallel for if (parts > 1)
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t first = G * part / parts, end = G * (part + 1) / parts;
        for (int64_t j = 0; j < held; ++j)  // rows as they lie in memory
            for (int64_t g = first; g < end; ++g)
                for (int64_t h = g * R; h < (g + 1) * R; ++h)
                    dots<1>(keys + (j * G + g) * K, 0, q + h * K, K, scores + h * held + j);
        for (int64_t h = first * R; h < end * R; ++h) {
            float *s = scores + h * held, highest = sinks ? sinks[h] : -INFINITY, total = 0;
            for (int64_t j = 0; j < held; ++j) s[j] *= scale;
            for (int64_t j = 0; cap > 0 && j < held; ++j) s[j] = cap * tanh(s[j] / cap);
            for (int64_t j = 0; j < held; ++j) highest = std::max(highest, s[j]);
#pragma GCC ivdep
            for (int64_t j = 0; j < held; ++j) s[j] = exp(s[j] - highest);
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < held; ++j) total += s[j];
            if (sinks) total += exp(sinks[h] - highest);
            const float share = 1 / total;
            for (int64_t j = 0; j < held; ++j) s[j] *= share;
            std::fill(o + h * V, o + (h + 1) * V, 0.0f);
        }
        for (int64_t j = 0; j < held; ++j)
            for (int64_t g = first; g < end; ++g) {
                const float* from = values + (j * G + g) * V;
                for (int64_t h = g * R; h < (g + 1) * R; ++h) {
                    const float p = scores[h * held + j];
                    float* to = o + h * V;
#pragma GCC ivdep
                    for (int64_t d = 0; d < V; ++d) to[d] += p * from[d];
                }
            }
    }
}

}  // namespace zoo
