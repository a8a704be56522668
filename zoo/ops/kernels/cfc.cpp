// The closed-form continuous-time cell over a sequence, forward and backward (zoo/ops/_cfc.py has the equations).
//
// One step is a chain of small layers that each need the one before, so nothing is gained by cutting time. Rows of the
// batch go through a layer together and blocks of rows go in parallel; weights are laid out once, in the order in which
// they are read. Products that do not wait for the recurrence (the inputs' part, the weights' gradients) are the
// caller's, one matmul each.
#include <vector>

#include "kernel.h"
#include "matmul.h"

namespace {

constexpr int64_t PANEL = 4 * zoo::LANES;
enum Mode { DEFAULT = 0, NO_GATE = 1, PURE = 2 };
enum Activation { LECUN_TANH = 0, TANH = 1, RELU = 2, SILU = 3, GELU = 4 };

// B (k, n) with element (p, j) at from[p * row + j * col], as panels of PANEL columns, each one block of memory.
struct Panels {
    int64_t k, n;
    std::vector<float> data;
    Panels(int64_t k, int64_t n, const float* from, int64_t row, int64_t col) : k(k), n(n), data(k * n) {
        for (int64_t j = 0; j < n; j += PANEL) {
            const int64_t width = n - j < PANEL ? n - j : PANEL;
            float* panel = data.data() + j * k;
            for (int64_t p = 0; p < k; ++p)
                for (int64_t c = 0; c < width; ++c) panel[p * width + c] = from[p * row + (j + c) * col];
        }
    }
    // C (m, n) = or += A (m, k) B
    template <bool ADD>
    void multiply(int64_t m, const float* a, int64_t lda, float* c, int64_t ldc) const {
        for (int64_t j = 0; j < n; j += PANEL) {
            const int64_t width = n - j < PANEL ? n - j : PANEL;
            zoo::product<ADD>(m, width, k, a, lda, data.data() + j * k, width, c + j, ldc);
        }
    }
};

constexpr float LECUN_OUT = 1.7159f, LECUN_IN = 0.666f;

void activate(int64_t kind, int64_t n, const float* a, float* z) {
    switch (kind) {
        case LECUN_TANH:
            for (int64_t i = 0; i < n; ++i) z[i] = LECUN_OUT * zoo::tanh(LECUN_IN * a[i]);
            return;
        case TANH:
            for (int64_t i = 0; i < n; ++i) z[i] = zoo::tanh(a[i]);
            return;
        case RELU:
            for (int64_t i = 0; i < n; ++i) z[i] = a[i] > 0 ? a[i] : 0.0f;
            return;
        case SILU:
            for (int64_t i = 0; i < n; ++i) z[i] = a[i] * zoo::sigmoid(a[i]);
            return;
        default:
            for (int64_t i = 0; i < n; ++i) z[i] = 0.5f * a[i] * (1.0f + std::erf(0.70710678f * a[i]));
    }
}

// d *= activation'(a)
void activate_backward(int64_t kind, int64_t n, const float* a, float* d) {
    switch (kind) {
        case LECUN_TANH:
            for (int64_t i = 0; i < n; ++i) {
                const float z = zoo::tanh(LECUN_IN * a[i]);
                d[i] *= LECUN_OUT * LECUN_IN * (1.0f - z * z);
            }
            return;
        case TANH:
            for (int64_t i = 0; i < n; ++i) {
                const float z = zoo::tanh(a[i]);
                d[i] *= 1.0f - z * z;
            }
            return;
        case RELU:
            for (int64_t i = 0; i < n; ++i) d[i] = a[i] > 0 ? d[i] : 0.0f;
            return;
        case SILU:
            for (int64_t i = 0; i < n; ++i) {
                const float s = zoo::sigmoid(a[i]);
                d[i] *= s * (1.0f + a[i] * (1.0f - s));
            }
            return;
        default:
            for (int64_t i = 0; i < n; ++i) {
                const float density = 0.39894228f * zoo::exp(-0.5f * a[i] * a[i]);
                d[i] *= 0.5f * (1.0f + std::erf(0.70710678f * a[i])) + a[i] * density;
            }
    }
}

// Heads (pre-activations, overwritten by what the backward pass needs) to the next state.
void heads_forward(int64_t mode, int64_t H, float* heads, const float* span, const float* tau, const float* level,
                   float* h) {
    if (mode == PURE) {
        const float dt = span ? *span : 1.0f;
        for (int64_t i = 0; i < H; ++i) {
            const float f = heads[i];
            h[i] = level[i] - level[i] * zoo::exp(-dt * (std::fabs(tau[i]) + std::fabs(f))) * f;
        }
        return;
    }
    float *f = heads, *g = heads + H, *s = heads + (span ? 3 : 2) * H;
    const float* rate = span ? heads + 2 * H : nullptr;
    const float dt = span ? *span : 0.0f;
    const float keep = mode == DEFAULT ? 1.0f : 0.0f;
    if (rate)
        for (int64_t i = 0; i < H; ++i) s[i] += rate[i] * dt;
    for (int64_t i = 0; i < H; ++i) {
        f[i] = zoo::tanh(f[i]);
        g[i] = zoo::tanh(g[i]);
        s[i] = zoo::sigmoid(s[i]);
        h[i] = f[i] * (1.0f - keep * s[i]) + s[i] * g[i];
    }
}

// Gradient of the next state to those of the heads' pre-activations d, of the time span (returned), of tau and level.
float heads_backward(int64_t mode, int64_t H, const float* heads, const float* span, const float* tau,
                     const float* level, const float* dh, float* d, float* d_tau, float* d_level) {
    float d_span = 0;
    if (mode == PURE) {
        const float dt = span ? *span : 1.0f;
        for (int64_t i = 0; i < H; ++i) {
            const float f = heads[i], rate = std::fabs(tau[i]) + std::fabs(f), e = zoo::exp(-dt * rate);
            const float back = level[i] * e * dh[i];
            d[i] = -back * (1.0f - dt * std::fabs(f));
            d_tau[i] += back * f * dt * (tau[i] > 0 ? 1.0f : (tau[i] < 0 ? -1.0f : 0.0f));
            d_level[i] += dh[i] * (1.0f - e * f);
            d_span += back * f * rate;
        }
        return d_span;
    }
    const float *f = heads, *g = heads + H, *s = heads + (span ? 3 : 2) * H;
    float* ds = d + (span ? 3 : 2) * H;
    const float keep = mode == DEFAULT ? 1.0f : 0.0f;
    for (int64_t i = 0; i < H; ++i) {
        d[i] = dh[i] * (1.0f - keep * s[i]) * (1.0f - f[i] * f[i]);
        d[H + i] = dh[i] * s[i] * (1.0f - g[i] * g[i]);
        ds[i] = dh[i] * (g[i] - keep * f[i]) * s[i] * (1.0f - s[i]);
    }
    if (!span) return 0;
    const float* rate = heads + 2 * H;
    for (int64_t i = 0; i < H; ++i) {
        d[2 * H + i] = ds[i] * *span;
        d_span += ds[i] * rate[i];
    }
    return d_span;
}

}  // namespace

// widths (n_levels + 1): H, then the width of every level; the last holds the heads. weights: the recurrent one
// (widths[1], H), then (widths[l + 1], widths[l]) of the further levels, one behind the other; biases of the further
// levels alike. saved (B, T, sum of the levels' widths) or null: pre-activations, the last level as heads_forward leaves
// it. steps (B): valid ones. Padded steps give zeros.
extern "C" void cfc_forward(const float* inputs, const float* weights, const float* biases, const int64_t* widths,
                            const float* tau, const float* level, const float* state, const float* spans,
                            const int64_t* steps, const bool* resets, float* out, float* last, float* saved,
                            int64_t n_levels, int64_t B, int64_t T, int64_t mode, int64_t activation, int64_t n_blocks) {
    const int64_t H = widths[0];
    std::vector<Panels> layers;
    int64_t S = 0, widest = 0;
    for (int64_t l = 0; l < n_levels; ++l) {
        layers.emplace_back(widths[l], widths[l + 1], weights, 1, widths[l]);
        weights += widths[l] * widths[l + 1];
        S += widths[l + 1];
        widest = widths[l + 1] > widest ? widths[l + 1] : widest;
    }
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n_blocks; ++block) {
        zoo::FlushDenormals flush;
        const int64_t first = block * B / n_blocks, m = (block + 1) * B / n_blocks - first;
        std::vector<float> scratch(m * S), z(m * widest);
        float* h = last + first * H;
        std::memcpy(h, state + first * H, m * H * sizeof(float));
        for (int64_t t = 0; t < T; ++t) {
            float* a = saved ? saved + (first * T + t) * S : scratch.data();
            const int64_t lda = saved ? T * S : S;
            for (int64_t r = 0; r < m; ++r) {
                if (resets && resets[(first + r) * T + t]) std::memset(h + r * H, 0, H * sizeof(float));
                std::memcpy(a + r * lda, inputs + ((first + r) * T + t) * widths[1], widths[1] * sizeof(float));
            }
            layers[0].multiply<true>(m, h, H, a, lda);
            const float* bias = biases;
            for (int64_t l = 1; l < n_levels; ++l) {
                const int64_t from = widths[l], to = widths[l + 1];
                for (int64_t r = 0; r < m; ++r) {
                    activate(activation, from, a + r * lda, z.data() + r * from);
                    std::memcpy(a + r * lda + from, bias, to * sizeof(float));
                }
                a += from;
                bias += to;
                layers[l].multiply<true>(m, z.data(), from, a, lda);
            }
            for (int64_t r = 0; r < m; ++r) {
                float* o = out + ((first + r) * T + t) * H;
                if (steps && t >= steps[first + r]) {
                    std::memset(o, 0, H * sizeof(float));
                    continue;
                }
                heads_forward(mode, H, a + r * lda, spans ? spans + (first + r) * T + t : nullptr, tau, level, o);
                std::memcpy(h + r * H, o, H * sizeof(float));
            }
        }
    }
}
ZOO_EXPORT(cfc_forward)

// d (B, T, sum of widths): gradients of all pre-activations. d_state comes in as that of the last state and leaves as
// that of the first. d_tau, d_level (B, H) and d_spans (B, T) are zero or null.
extern "C" void cfc_backward(const float* d_out, const float* weights, const int64_t* widths,
                             const float* tau, const float* level, const float* spans, const int64_t* steps,
                             const bool* resets, const float* saved, float* d, float* d_state, float* d_tau,
                             float* d_level, float* d_spans, int64_t n_levels, int64_t B, int64_t T, int64_t mode, int64_t activation,
                             int64_t n_blocks) {
    const int64_t H = widths[0];
    std::vector<Panels> layers;
    int64_t S = 0, widest = H;
    for (int64_t l = 0; l < n_levels; ++l) {
        layers.emplace_back(widths[l + 1], widths[l], weights, widths[l], 1);
        weights += widths[l] * widths[l + 1];
        S += widths[l + 1];
        widest = widths[l + 1] > widest ? widths[l + 1] : widest;
    }
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < n_blocks; ++block) {
        zoo::FlushDenormals flush;
        const int64_t first = block * B / n_blocks, m = (block + 1) * B / n_blocks - first;
        std::vector<float> dh(H), carry(m * H);
        for (int64_t t = T - 1; t >= 0; --t) {
            int64_t at = S - widths[n_levels];
            for (int64_t r = 0; r < m; ++r) {
                const int64_t row = (first + r) * T + t;
                float* d_heads = d + row * S + at;
                if (steps && t >= steps[first + r]) {
                    std::memset(d_heads, 0, widths[n_levels] * sizeof(float));
                    continue;
                }
                for (int64_t i = 0; i < H; ++i) dh[i] = d_out[row * H + i] + d_state[(first + r) * H + i];
                const float d_span = heads_backward(
                    mode, H, saved + row * S + at, spans ? spans + row : nullptr, tau, level, dh.data(), d_heads,
                    mode == PURE ? d_tau + (first + r) * H : nullptr, mode == PURE ? d_level + (first + r) * H : nullptr);
                if (d_spans) d_spans[row] = d_span;
            }
            for (int64_t l = n_levels - 1; l > 0; --l) {
                const int64_t below = at - widths[l];
                float* d_below = d + (first * T + t) * S + below;
                layers[l].multiply<false>(m, d + (first * T + t) * S + at, T * S, d_below, T * S);
                for (int64_t r = 0; r < m; ++r)
                    activate_backward(activation, widths[l], saved + ((first + r) * T + t) * S + below,
                                      d_below + r * T * S);
                at = below;
            }
            layers[0].multiply<false>(m, d + (first * T + t) * S, T * S, carry.data(), H);
            for (int64_t r = 0; r < m; ++r) {
                if (steps && t >= steps[first + r]) continue;
                float* to = d_state + (first + r) * H;
                if (resets && resets[(first + r) * T + t])
                    std::memset(to, 0, H * sizeof(float));
                else
                    std::memcpy(to, carry.data() + r * H, H * sizeof(float));
            }
        }
    }
}
ZOO_EXPORT(cfc_backward)
