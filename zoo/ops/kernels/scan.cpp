// h_t = a_t * h_{t-1} + b_t, elementwise, on (B, T, D): every block of channels runs through time on its own.
//
// The running value is kept in double, so that a decay near 1 gathers no rounding over a long sequence; reading and
// writing memory takes longer than that costs.
#include <algorithm>

#include "kernel.h"
#include "elementary.h"

namespace {

constexpr int64_t BLOCK = 64, SMALL = 16384;  // channels; elements that one thread is done with before others wake

template <typename T>
void forward(const T* a, const T* b, const T* state, T* h, T* last, int64_t B, int64_t steps, int64_t D) {
    const int64_t blocks = (D + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) if (B * steps * D > SMALL)
    for (int64_t row = 0; row < B; ++row)
        for (int64_t block = 0; block < blocks; ++block) {
            zoo::FlushDenormals flush;
            const int64_t from = block * BLOCK, n = std::min(BLOCK, D - from);
            double running[BLOCK];
            for (int64_t j = 0; j < n; ++j) running[j] = state[row * D + from + j];
            for (int64_t t = 0; t < steps; ++t) {
                const int64_t at = (row * steps + t) * D + from;
                for (int64_t j = 0; j < n; ++j) {
                    running[j] = a[at + j] * running[j] + b[at + j];
                    h[at + j] = static_cast<T>(running[j]);
                }
            }
            for (int64_t j = 0; j < n; ++j) last[row * D + from + j] = static_cast<T>(running[j]);
        }
}

// With g_t = d_h_t + a_{t+1} g_{t+1}: d_b = g, d_a_t = g_t h_{t-1}.
template <typename T>
void backward(const T* a, const T* h, const T* state, const T* d_h, const T* d_last, T* d_a, T* d_b, T* d_state,
              int64_t B, int64_t steps, int64_t D) {
    const int64_t blocks = (D + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) if (B * steps * D > SMALL)
    for (int64_t row = 0; row < B; ++row)
        for (int64_t block = 0; block < blocks; ++block) {
            zoo::FlushDenormals flush;
            const int64_t from = block * BLOCK, n = std::min(BLOCK, D - from);
            double running[BLOCK];
            for (int64_t j = 0; j < n; ++j) running[j] = d_last[row * D + from + j];
            for (int64_t t = steps - 1; t >= 0; --t) {
                const int64_t at = (row * steps + t) * D + from;
                const T* before = t ? h + at - D : state + row * D + from;
                for (int64_t j = 0; j < n; ++j) {
                    const double g = running[j] + d_h[at + j];
                    d_b[at + j] = static_cast<T>(g);
                    d_a[at + j] = static_cast<T>(g * before[j]);
                    running[j] = g * a[at + j];
                }
            }
            for (int64_t j = 0; j < n; ++j) d_state[row * D + from + j] = static_cast<T>(running[j]);
        }
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                          \
    extern "C" void scan_forward_##NAME(const T* a, const T* b, const T* state, T* h, T* last, int64_t B, int64_t steps, \
                                   int64_t D) {                                                                     \
        forward(a, b, state, h, last, B, steps, D);                                                                 \
    }                                                                                                               \
    ZOO_EXPORT(scan_forward_##NAME)                                                                                 \
    extern "C" void scan_backward_##NAME(const T* a, const T* h, const T* state, const T* d_h, const T* d_last, T* d_a,  \
                                    T* d_b, T* d_state, int64_t B, int64_t steps, int64_t D) {                      \
        backward(a, h, state, d_h, d_last, d_a, d_b, d_state, B, steps, D);                                         \
    }                                                                                                               \
    ZOO_EXPORT(scan_backward_##NAME)
FUNCTIONS(float, float)
FUNCTIONS(double, double)
