// sigmoid(gate) * norm(gate * up) = silu(gate) * up * r, r = (mean (gate up)^2 + eps)^-1/2 of each row, and its gradients, of
// float32 or bfloat16.
#include <algorithm>
#include <cmath>

#include "elementary.h"
#include "kernel.h"

namespace {

constexpr int64_t ROWS = 16;  // of a task

// inverse: (rows), r.
template <class T>
void forward(const T* gates, const T* ups, T* ys, float* inverse, int64_t rows, int64_t n, float eps) {
#pragma omp parallel for
    for (int64_t first = 0; first < rows; first += ROWS)
        for (int64_t row = first; row < std::min(rows, first + ROWS); ++row) {
            const T *gate = gates + row * n, *up = ups + row * n;
            T* y = ys + row * n;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; ++i) {
                const float product = float(gate[i]) * float(up[i]);
                sum += product * product;
            }
            const float r = inverse[row] = 1 / std::sqrt(sum / static_cast<float>(n) + eps);
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) {
                const float g = gate[i];
                y[i] = T(g * zoo::sigmoid(g) * float(up[i]) * r);
            }
        }
}

template <class T>
void backward(const T* gates, const T* ups, const float* inverse, const T* d_ys, T* d_gates, T* d_ups, int64_t rows,
              int64_t n) {
#pragma omp parallel for
    for (int64_t first = 0; first < rows; first += ROWS)
        for (int64_t row = first; row < std::min(rows, first + ROWS); ++row) {
            const T *gate = gates + row * n, *up = ups + row * n, *d_y = d_ys + row * n;
            T *d_gate = d_gates + row * n, *d_up = d_ups + row * n;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < n; ++i) {
                const float g = gate[i];
                sum += float(d_y[i]) * g * zoo::sigmoid(g) * float(up[i]);
            }
            const float r = inverse[row], share = -r * r * r * sum / static_cast<float>(n);  // of gate * up, that of r
#pragma GCC ivdep
            for (int64_t i = 0; i < n; ++i) {
                const float g = gate[i], u = up[i], part = zoo::sigmoid(g), act = g * part, d = float(d_y[i]) * r;
                d_gate[i] = T(d * u * (part + act * (1.0f - part)) + share * g * u * u);
                d_up[i] = T(d * act + share * g * g * u);
            }
        }
}

}  // namespace

#define FORMS(name, T, Given)                                                                                          \
    extern "C" void normed_product_forward_##name(const Given* gate, const Given* up, Given* y, float* inverse,        \
                                                  int64_t rows, int64_t n, double eps) {                               \
        forward(reinterpret_cast<const T*>(gate), reinterpret_cast<const T*>(up), reinterpret_cast<T*>(y), inverse,    \
                rows, n, static_cast<float>(eps));                                                                     \
    }                                                                                                                  \
    ZOO_EXPORT(normed_product_forward_##name)                                                                          \
    extern "C" void normed_product_backward_##name(const Given* gate, const Given* up, const float* inverse,           \
                                                   const Given* d_y, Given* d_gate, Given* d_up, int64_t rows,         \
                                                   int64_t n) {                                                        \
        backward(reinterpret_cast<const T*>(gate), reinterpret_cast<const T*>(up), inverse,                            \
                 reinterpret_cast<const T*>(d_y), reinterpret_cast<T*>(d_gate), reinterpret_cast<T*>(d_up), rows, n);  \
    }                                                                                                                  \
    ZOO_EXPORT(normed_product_backward_##name)

FORMS(float, float, float)
FORMS(bfloat16, zoo::Brief, uint16_t)
