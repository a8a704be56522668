// h_t = a h_{t-1} + x_t for every channel, and its gradients. x, h (B, T, D); a (D); state (B, D).
#include <vector>

#include "kernel.h"

// lengths, resets: null where there are none.
extern "C" void ema_forward(const float* x, const float* a, const float* state, const int64_t* lengths,
                            const bool* resets, float* h, float* last, int64_t B, int64_t T, int64_t D) {
#pragma omp parallel for
    for (int64_t b = 0; b < B; ++b) {
        float* now = last + b * D;
        for (int64_t d = 0; d < D; ++d) now[d] = state[b * D + d];
        for (int64_t t = 0; t < T; ++t) {
            const int64_t at = (b * T + t) * D;
            const bool valid = !lengths || t < lengths[b], start = resets && resets[b * T + t];
            for (int64_t d = 0; d < D; ++d) {
                if (valid) now[d] = (start ? 0.0f : a[d] * now[d]) + x[at + d];
                h[at + d] = valid ? now[d] : 0.0f;
            }
        }
    }
}
ZOO_EXPORT(ema_forward)

// d_a (B, D): to be summed over the batch.
extern "C" void ema_backward(const float* a, const float* state, const int64_t* lengths, const bool* resets,
                             const float* h, const float* d_h, const float* d_last, float* d_x, float* d_a,
                             float* d_state, int64_t B, int64_t T, int64_t D) {
#pragma omp parallel for
    for (int64_t b = 0; b < B; ++b) {
        float *g = d_state + b * D, *sum = d_a + b * D;  // g: the gradient of h_t with all that follows
        for (int64_t d = 0; d < D; ++d) g[d] = d_last[b * D + d], sum[d] = 0;
        for (int64_t t = T - 1; t >= 0; --t) {
            const int64_t at = (b * T + t) * D;
            const bool valid = !lengths || t < lengths[b], start = resets && resets[b * T + t];
            const float* before = t ? h + at - D : state + b * D;
            for (int64_t d = 0; d < D; ++d) {
                if (valid) g[d] += d_h[at + d];
                d_x[at + d] = valid ? g[d] : 0.0f;
                if (!valid) continue;
                if (!start) sum[d] += g[d] * before[d];
                g[d] *= start ? 0.0f : a[d];
            }
        }
    }
}
ZOO_EXPORT(ema_backward)
