// Single steps of a decoder, without gradients: what stands between two matrix products, in one call each.
//
// A state is read from `state` and its next value written to `last`, which may be the same memory. Rows are those of a
// batch. Work too small to be worth it is not shared out to threads.
#include "kernel.h"
#include "steps.h"

namespace {

using zoo::Head;
using zoo::room;
using zoo::share;
using zoo::times;

}  // namespace

// S' = diag(exp g) S + what is written; o = scale S'^T q. Linear attention writes k v^T, the delta rule (with beta)
// beta k (v - S^T k)^T with the decayed S, DPLR (with a and b) k v^T + b (S^T a)^T with S before its decay.
// q, k (B, G, K); v, o (B, H, V); beta (B, H); a, b (B, H, K); g (B, H) or, per_channel, (B, H, K); state (B, H, K, V).
extern "C" void heads_step(const float* q, const float* k, const float* v, const float* beta, const float* a,
                           const float* b, const float* g, const float* state, float* o, float* last, int64_t B,
                           int64_t G, int64_t H, int64_t K, int64_t V, int64_t per_channel, int64_t threads,
                           double scale) {
    share(B * H, 3 * B * H * K * V, threads, [&](int64_t first, int64_t end) {
        zoo::FlushDenormals flush;
        float* decays = room(K);
        for (int64_t row = first; row < end; ++row) {
            const int64_t group = row / H * G + row % H / (H / G);
            Head h{K, V, q + group * K, k + group * K, v + row * V, nullptr, nullptr, nullptr, 1, 1,
                   static_cast<float>(scale), a ? zoo::DPLR : beta ? zoo::DELTA : zoo::LINEAR};
            if (g && per_channel) {
                const float* from = g + row * K;
#pragma GCC ivdep
                for (int64_t i = 0; i < K; ++i) decays[i] = zoo::exp(from[i]);
                h.decays = decays;
            } else if (g) {
                h.decay = zoo::exp(g[row]);
            }
            if (beta) h.beta = beta[row];
            if (a) h.a = a + row * K, h.b = b + row * K;
            const float* S = state + row * K * V;
            float *to = last + row * K * V, *out = o + row * V;
            zoo::step_of(h, S, to, out);
        }
    });
}
ZOO_EXPORT(heads_step)

// y_t = activation(bias + sum_w weight[:, w] x_{t - W + 1 + w}); x, y (B, D); weight (D, W); state (B, W - 1, D).
extern "C" void conv_step(const float* x, const float* weight, const float* bias, const float* state, float* y,
                          float* last, int64_t B, int64_t D, int64_t W, int64_t silu) {
    for (int64_t row = 0; row < B; ++row) {
        const int64_t at = row * (W - 1) * D;
        zoo::convolve(x + row * D, weight, bias, state + at, last + at, y + row * D, D, W, silu);
    }
}
ZOO_EXPORT(conv_step)

// y = weight x (sum of squares / divisor + eps)^-1/2 in each row of x (rows, n); weight (n), or null for ones.
extern "C" void norm_step(const float* x, const float* weight, float* y, int64_t rows, int64_t n, double divisor,
                          double eps) {
    for (int64_t row = 0; row < rows; ++row, x += n, y += n) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
        const float r = 1 / std::sqrt(squares / static_cast<float>(divisor) + static_cast<float>(eps));
        if (weight)
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) y[i] = weight[i] * (x[i] * r);
        else
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) y[i] = x[i] * r;
    }
}
ZOO_EXPORT(norm_step)

// y = W_down (silu(W_gate x) * W_up x) for each row; x, y (rows, K); gate, up (H, K); down (K, H).
extern "C" void gated_mlp_step(const float* x, const float* gate, const float* up, const float* down, float* y,
                               int64_t rows, int64_t K, int64_t H, int64_t threads) {
    std::vector<float> hidden(2 * H);
    for (int64_t row = 0; row < rows; ++row, x += K, y += K) {
        float *open = hidden.data(), *value = open + H;
        share(H, 2 * H * K, threads, [&](int64_t first, int64_t end) {
            times(gate + first * K, end - first, x, K, open + first);
            times(up + first * K, end - first, x, K, value + first);
        });
#pragma GCC ivdep
        for (int64_t h = 0; h < H; ++h) open[h] *= zoo::sigmoid(open[h]) * value[h];
        share(K, H * K, threads, [&](int64_t first, int64_t end) {
            times(down + first * H, end - first, open, H, y + first);
        });
    }
}
ZOO_EXPORT(gated_mlp_step)

// y = W_down relu(W_up x)^2 for each row; x, y (rows, K); up (H, K); down (K, H).
extern "C" void squared_relu_step(const float* x, const float* up, const float* down, float* y, int64_t rows, int64_t K,
                                  int64_t H, int64_t threads) {
    std::vector<float> kept(H);
    float* hidden = kept.data();
    for (int64_t row = 0; row < rows; ++row, x += K, y += K) {
        share(H, H * K, threads, [&](int64_t first, int64_t end) {
            times(up + first * K, end - first, x, K, hidden + first);
        });
        for (int64_t h = 0; h < H; ++h) hidden[h] = hidden[h] < 0 ? 0 : hidden[h] * hidden[h];
        share(K, H * K, threads, [&](int64_t first, int64_t end) {
            times(down + first * H, end - first, hidden, H, y + first);
        });
    }
}
ZOO_EXPORT(squared_relu_step)

// x (B, H, K) with its first 2 n channels turned by the angles length * frequencies, times `amplitude`; the others as
// they are. Pairs are neighbours where `interleaved`, else channels i and i + n.
extern "C" void rotate_step(const float* x, const int64_t* length, const double* frequencies, float* y, int64_t B,
                            int64_t H, int64_t K, int64_t n, int64_t interleaved, double amplitude) {
    float* turns = room(2 * n);
    for (int64_t row = 0; row < B; ++row) {
        zoo::angles(length[row], frequencies, n, amplitude, turns);
        for (int64_t h = 0; h < H; ++h, x += K, y += K) zoo::rotate(x, turns, K, n, interleaved, y);
    }
}
ZOO_EXPORT(rotate_step)

// One query a row and head against a cache, into which its key and value are written first: at row length % N, after
// which `length` is one more. q (B, H, K); k_new (B, G, K); v_new (B, G, V); k (B, N, G, K); v (B, N, G, V); sinks (H)
// or null; o (B, H, V). A cap of 0 is none.
extern "C" void attention_step(const float* q, const float* k_new, const float* v_new, const float* sinks, float* k,
                               float* v, int64_t* length, float* o, int64_t B, int64_t N, int64_t G, int64_t H,
                               int64_t K, int64_t V, int64_t threads, double scale, double cap) {
    zoo::Cache cache{k, v, length, N, G, K, V};
    for (int64_t row = 0; row < B; ++row)
        zoo::attend(cache, row, q + row * H * K, k_new + row * G * K, v_new + row * G * V, sinks, o + row * H * V, H,
                    threads, static_cast<float>(scale), static_cast<float>(cap));
}
ZOO_EXPORT(attention_step)
