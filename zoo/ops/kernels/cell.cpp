// Single steps of whole layers, without gradients: everything between the projection in and the projection out.
//
// States are read and written in place. `row` is what the projection gives of a token.
#include <cmath>

#include "kernel.h"
#include "steps.h"

namespace {

using zoo::convolve;
using zoo::Head;
using zoo::room;

inline float squares(const float* x, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    return sum;
}

void normalise(float* x, int64_t n, float eps, float divisor = 1) {
    const float r = 1 / std::sqrt(squares(x, n) / divisor + eps);
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) x[i] *= r;
}

inline float softplus(float x) { return -zoo::log_sigmoid(-x); }

// o (n), in `parts` norms, with the gate silu(z) before or after; weight of all n numbers, or of one part for all.
void finish(float* o, const float* z, const float* weight, int64_t n, int64_t parts, bool gate_first, bool shared,
            float eps) {
    if (z && gate_first)
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) o[i] *= z[i] * zoo::sigmoid(z[i]);
    const int64_t m = n / parts;
    for (int64_t part = 0; weight && part < parts; ++part) {
        float* x = o + part * m;
        const float *w = shared ? weight : weight + part * m;
        const float r = 1 / std::sqrt(squares(x, m) / static_cast<float>(m) + eps);
#pragma GCC ivdep
        for (int64_t i = 0; i < m; ++i) x[i] = w[i] * (x[i] * r);
    }
    if (z && !gate_first)
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) o[i] *= z[i] * zoo::sigmoid(z[i]);
}

// y (n) += x (m) W (m, n).
void add_product(const float* x, const float* weight, int64_t m, int64_t n, float* y) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
        const float *w0 = weight + i * n, *w1 = w0 + n, *w2 = w1 + n, *w3 = w2 + n;
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) y[j] += x[i] * w0[j] + x[i + 1] * w1[j] + x[i + 2] * w2[j] + x[i + 3] * w3[j];
    }
    for (; i < m; ++i)
#pragma GCC ivdep
        for (int64_t j = 0; j < n; ++j) y[j] += x[i] * weight[i * n + j];
}

}  // namespace

// A layer over heads with a memory (H, K, V): short convolution and activation of the `channels` numbers of a row from
// `conv_at` on, among which q, k and v stand; the delta rule where there is a beta, else linear attention; norm and gate.
//
// weight (channels, W), bias (channels); A_log, dt_bias (H): log decays -exp(A_log) dt with dt = softplus(row[dt_at] +
// dt_bias); skip (H): o += skip v; norm (V) for all heads, or with n_parts (H V); all of them may be null. Places of a
// row that it does not have are -1. q_norm is the epsilon of the norms |q|, |k|, below 0 for none. beta is
// sigmoid(row[beta_at]) beta_range. With v_times_dt the memory is given dt v.
extern "C" void heads_cell_step(const float* rows, const float* weight, const float* bias, const float* A_log,
                                const float* dt_bias, const float* skip, const float* norm, float* window,
                                float* memory, float* o, int64_t B, int64_t threads, int64_t width, int64_t conv_at,
                                int64_t channels, int64_t W, int64_t silu, int64_t q_at, int64_t k_at, int64_t v_at,
                                int64_t beta_at, int64_t dt_at, int64_t gate_at, int64_t G, int64_t H, int64_t K,
                                int64_t V, int64_t v_times_dt, int64_t n_parts, int64_t gate_first, double q_norm,
                                double beta_range, double scale, double norm_eps) {
    zoo::FlushDenormals flush;
    float *mixed = room(channels + H * V), *scaled = mixed + channels;
    for (int64_t b = 0; b < B; ++b, rows += width, o += H * V) {
        float* past = window + b * std::max<int64_t>(W - 1, 0) * channels;
        convolve(rows + conv_at, weight, bias, past, past, mixed, channels, W, silu);
        if (q_norm >= 0)
            for (int64_t group = 0; group < G; ++group) {
                normalise(mixed + q_at + group * K, K, static_cast<float>(q_norm));
                normalise(mixed + k_at + group * K, K, static_cast<float>(q_norm));
            }
        zoo::share(H, 3 * H * K * V, threads, [&](int64_t first, int64_t end) {
            zoo::FlushDenormals flush;
            for (int64_t h = first; h < end; ++h) {
                const int64_t group = h / (H / G);
                Head head{K, V, mixed + q_at + group * K, mixed + k_at + group * K, mixed + v_at + h * V, nullptr,
                          nullptr, nullptr, 1, 1, static_cast<float>(scale), beta_at < 0 ? zoo::LINEAR : zoo::DELTA};
                if (beta_at >= 0) head.beta = zoo::sigmoid(rows[beta_at + h]) * static_cast<float>(beta_range);
                if (dt_at >= 0) {
                    const float dt = softplus(rows[dt_at + h] + dt_bias[h]);
                    head.decay = zoo::exp(-zoo::exp(A_log[h]) * dt);
                    if (v_times_dt) {
                        for (int64_t i = 0; i < V; ++i) scaled[h * V + i] = dt * head.v[i];
                        head.v = scaled + h * V;
                    }
                }
                float *S = memory + (b * H + h) * K * V, *out = o + h * V;
                zoo::step_of(head, S, S, out);
                for (int64_t i = 0; skip && i < V; ++i) out[i] += skip[h] * mixed[v_at + h * V + i];
            }
        });
        finish(o, gate_at < 0 ? nullptr : rows + gate_at, norm, H * V, n_parts > 0 ? n_parts : H, gate_first,
               n_parts <= 0, static_cast<float>(norm_eps));
    }
}
ZOO_EXPORT(heads_cell_step)

// RWKV's token shift: out (n, B, D), of each mu (D) the rows x + mu (before - x); x, before (B, D).
extern "C" void shift_step(const float* x, const float* before, const float* mu0, const float* mu1, const float* mu2, const float* mu3,
                           const float* mu4, const float* mu5, float* out, int64_t B, int64_t D) {
    const float* all[] = {mu0, mu1, mu2, mu3, mu4, mu5};
    for (const float* mu : all) {
        if (!mu) break;
        for (int64_t b = 0; b < B; ++b, out += D) {
            const float *now = x + b * D, *past = before + b * D;
#pragma GCC ivdep
            for (int64_t d = 0; d < D; ++d) out[d] = now[d] + mu[d] * (past[d] - now[d]);
        }
    }
}
ZOO_EXPORT(shift_step)

// RWKV-7 between its projections. x (6, B, D): of r, w, k, v, a, g; r, k (B, D); v (B, D) is mixed with `first` (B, D),
// the values of the first layer (null for none, zeros), where there is a v0. State (B, H, K, K).
extern "C" void rwkv7_step(const float* x, const float* r, const float* k, const float* first, const float* w0,
                           const float* w1, const float* w2, const float* a0, const float* a1, const float* a2,
                           const float* v0, const float* v1, const float* v2, const float* g1, const float* g2,
                           const float* k_k, const float* k_a, const float* r_k, const float* norm_weight,
                           const float* norm_bias, float* v, float* state, float* y, int64_t B, int64_t H, int64_t K,
                           int64_t w_rank, int64_t a_rank, int64_t v_rank, int64_t g_rank, double kappa_eps,
                           double norm_eps) {
    zoo::FlushDenormals flush;
    const int64_t D = H * K, rank = std::max(std::max(w_rank, a_rank), std::max(v_rank, g_rank));
    float *decay = room(7 * D + rank), *rate = decay + D, *gate = rate + D, *share = gate + D, *read = share + D;
    float *write = read + D, *key = write + D, *low = key + D;
    const auto through = [&](const float* in, const float* down, const float* up, int64_t m, float* out, auto bend) {
        std::fill(low, low + m, 0.0f);
        add_product(in, down, D, m, low);
        for (int64_t i = 0; i < m; ++i) low[i] = bend(low[i]);
        add_product(low, up, m, D, out);
    };
    const auto plain = [](float z) { return z; };
    for (int64_t b = 0; b < B; ++b, r += D, k += D, v += D, y += D) {
        const float *x_w = x + (B + b) * D, *x_v = x + (3 * B + b) * D, *x_a = x + (4 * B + b) * D;
        std::copy(w0, w0 + D, decay), std::copy(a0, a0 + D, rate), std::fill(gate, gate + D, 0.0f);
        through(x_w, w1, w2, w_rank, decay, [](float z) { return zoo::tanh(z); });
        through(x_a, a1, a2, a_rank, rate, plain);
        through(x + (5 * B + b) * D, g1, g2, g_rank, gate, [](float z) { return zoo::sigmoid(z); });
        if (v0) {
            std::copy(v0, v0 + D, share);
            through(x_v, v1, v2, v_rank, share, plain);
            for (int64_t d = 0; d < D; ++d) {
                const float part = zoo::sigmoid(share[d]);
                v[d] += part * ((first ? first[b * D + d] : 0.0f) - v[d]);
            }
        }
#pragma GCC ivdep
        for (int64_t d = 0; d < D; ++d) {
            decay[d] = zoo::exp(-0.6065306597126334f * zoo::sigmoid(decay[d]));
            rate[d] = zoo::sigmoid(rate[d]);
            read[d] = k[d] * k_k[d];
            key[d] = k[d] * (1 + (rate[d] - 1) * k_a[d]);
        }
        for (int64_t h = 0; h < H; ++h) {
            float *kappa = read + h * K, *b_h = write + h * K, *out = y + h * K, *S = state + (b * H + h) * K * K;
            const float *r_h = r + h * K, *k_h = key + h * K, *v_h = v + h * K;
            const float size = squares(kappa, K);
            const float inverse = kappa_eps > 0 ? 1 / std::sqrt(size + static_cast<float>(kappa_eps))
                                                : 1 / std::max(std::sqrt(size), 1e-12f);
            float bonus = 0, sum = 0, spread = 0;
            for (int64_t i = 0; i < K; ++i) {
                kappa[i] *= -inverse, b_h[i] = -kappa[i] * rate[h * K + i];
                bonus += r_h[i] * k_h[i] * r_k[h * K + i];
            }
            const Head head{K, K, r_h, k_h, v_h, kappa, b_h, decay + h * K, 1, 1, 1, zoo::DPLR};
            zoo::step_of(head, S, S, out);
            for (int64_t i = 0; i < K; ++i) sum += out[i];
            const float mean = sum / static_cast<float>(K);
            for (int64_t i = 0; i < K; ++i) spread += (out[i] - mean) * (out[i] - mean);
            const float scale = 1 / std::sqrt(spread / static_cast<float>(K) + static_cast<float>(norm_eps));
            for (int64_t i = 0; i < K; ++i) {
                const int64_t d = h * K + i;
                const float normed = (out[i] - mean) * scale * norm_weight[d] + norm_bias[d];
                out[i] = (normed + bonus * v_h[i]) * gate[d];
            }
        }
    }
}
ZOO_EXPORT(rwkv7_step)

// Attention between its projections. A row is q (H, K), k (G, K), v (G, K) and the gate, of each head or of each channel
// (gates 1 or K; 0 for none). q_norm, k_norm (K): weights of an RMS norm of each head, or null; the first 2 n channels
// of q and k are turned; then as `attention_step`.
extern "C" void attention_cell_step(const float* rows, const float* q_norm, const float* k_norm,
                                    const double* frequencies, const float* sinks, float* k, float* v, int64_t* length,
                                    float* o, int64_t B, int64_t threads, int64_t N, int64_t H, int64_t G, int64_t K,
                                    int64_t n, int64_t interleaved, int64_t gates, double amplitude, double norm_eps,
                                    double scale, double cap) {
    const int64_t heads = (H + G) * K, width = (H + 2 * G) * K + H * gates;
    const zoo::Cache cache{k, v, length, N, G, K, K};
    float *turned = room(heads + 2 * n), *turns = turned + heads;
    for (int64_t b = 0; b < B; ++b, rows += width, o += H * K) {
        std::copy(rows, rows + heads, turned);
        for (int64_t h = 0; q_norm && h < H + G; ++h) {
            const float* w = h < H ? q_norm : k_norm;
            float* x = turned + h * K;
            normalise(x, K, static_cast<float>(norm_eps), static_cast<float>(K));
            for (int64_t i = 0; i < K; ++i) x[i] *= w[i];
        }
        if (n) zoo::angles(length[b], frequencies, n, amplitude, turns);
        for (int64_t h = 0; n && h < H + G; ++h) zoo::rotate(turned + h * K, turns, K, n, interleaved, turned + h * K);
        zoo::attend(cache, b, turned, turned + H * K, rows + heads, sinks, o, H, threads, static_cast<float>(scale),
                    static_cast<float>(cap));
        const float* gate = rows + heads + G * K;
        for (int64_t i = 0; gates && i < H * K; ++i) o[i] *= zoo::sigmoid(gate[gates == 1 ? i / K : i]);
    }
}
ZOO_EXPORT(attention_cell_step)
