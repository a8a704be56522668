// silu(gate) * up and its gradients, number by number, of float32 or bfloat16.
#include <algorithm>

#include "kernel.h"
#include "elementary.h"

namespace {

constexpr int64_t STRETCH = 1 << 14;  // numbers of a task

template <class T>
void forward(const T* gate, const T* up, T* y, int64_t n) {
#pragma omp parallel for
    for (int64_t at = 0; at < n; at += STRETCH)
#pragma GCC ivdep
        for (int64_t i = at; i < std::min(n, at + STRETCH); ++i)
            y[i] = T(float(gate[i]) * zoo::sigmoid(float(gate[i])) * float(up[i]));
}

template <class T>
void backward(const T* gate, const T* up, const T* d_y, T* d_gate, T* d_up, int64_t n) {
#pragma omp parallel for
    for (int64_t at = 0; at < n; at += STRETCH)
#pragma GCC ivdep
        for (int64_t i = at; i < std::min(n, at + STRETCH); ++i) {
            const float g = gate[i], part = zoo::sigmoid(g), act = g * part, d = d_y[i];
            d_gate[i] = T(d * float(up[i]) * (part + act * (1.0f - part)));
            d_up[i] = T(d * act);
        }
}

}  // namespace

#define FORMS(name, T, Given)                                                                                          \
    extern "C" void silu_product_forward_##name(const Given* gate, const Given* up, Given* y, int64_t n) {             \
        forward(reinterpret_cast<const T*>(gate), reinterpret_cast<const T*>(up), reinterpret_cast<T*>(y), n);         \
    }                                                                                                                  \
    ZOO_EXPORT(silu_product_forward_##name)                                                                            \
    extern "C" void silu_product_backward_##name(const Given* gate, const Given* up, const Given* d_y, Given* d_gate,  \
                                                 Given* d_up, int64_t n) {                                             \
        backward(reinterpret_cast<const T*>(gate), reinterpret_cast<const T*>(up), reinterpret_cast<const T*>(d_y),    \
                 reinterpret_cast<T*>(d_gate), reinterpret_cast<T*>(d_up), n);                                         \
    }                                                                                                                  \
    ZOO_EXPORT(silu_product_backward_##name)

FORMS(float, float, float)
FORMS(bfloat16, zoo::Brief, uint16_t)
