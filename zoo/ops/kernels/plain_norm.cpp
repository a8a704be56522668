// RMS norm without weights: y = x r, r = (mean x^2 + eps)^-1/2 along the axis of length n of x (outer, n, inner), of
// float32 or bfloat16. Backward from y and r: d_x = r (d_y - y mean(d_y y)).
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernel.h"
#include "elementary.h"

namespace {

constexpr int64_t LINES = 64;  // of a task, where the axis is the last; columns, where it is not

// Calls run(first number, lines) for stretches of lines that lie next to each other.
template <class Run>
void for_lines(int64_t outer, int64_t n, int64_t inner, const Run& run) {
    const int64_t lines = inner == 1 ? outer : inner, parts = (lines + LINES - 1) / LINES;
    const int64_t tasks = inner == 1 ? parts : outer * parts;
#pragma omp parallel for
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t first = task % parts * LINES, count = std::min(LINES, lines - first);
        run(inner == 1 ? first * n : task / parts * n * inner + first, count);
    }
}

template <class T>
void forward(const T* x, T* y, float* inverse, int64_t outer, int64_t n, int64_t inner, float eps) {
    for_lines(outer, n, inner, [&](int64_t at, int64_t lines) {
        const T* from = x + at;
        T* to = y + at;
        float* r = inverse + (inner == 1 ? at / n : at / (n * inner) * inner + at % inner);
        const int64_t step = inner == 1 ? n : 1;
        if (inner == 1) {
            for (int64_t i = 0; i < lines; ++i, from += step, to += step) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < n; ++k) sum += float(from[k]) * float(from[k]);
                r[i] = 1 / std::sqrt(sum / static_cast<float>(n) + eps);
#pragma GCC ivdep
                for (int64_t k = 0; k < n; ++k) to[k] = T(float(from[k]) * r[i]);
            }
            return;
        }
        float sums[LINES] = {};
        for (int64_t k = 0; k < n; ++k)
#pragma GCC ivdep
            for (int64_t i = 0; i < lines; ++i) sums[i] += float(from[k * inner + i]) * float(from[k * inner + i]);
        for (int64_t i = 0; i < lines; ++i) r[i] = sums[i] = 1 / std::sqrt(sums[i] / static_cast<float>(n) + eps);
        for (int64_t k = 0; k < n; ++k)
#pragma GCC ivdep
            for (int64_t i = 0; i < lines; ++i) to[k * inner + i] = T(float(from[k * inner + i]) * sums[i]);
    });
}

template <class T>
void backward(const T* y, const T* d_y, const float* inverse, T* d_x, int64_t outer, int64_t n, int64_t inner) {
    for_lines(outer, n, inner, [&](int64_t at, int64_t lines) {
        const T *out = y + at, *d = d_y + at;
        T* to = d_x + at;
        const float* r = inverse + (inner == 1 ? at / n : at / (n * inner) * inner + at % inner);
        if (inner == 1) {
            for (int64_t i = 0; i < lines; ++i, out += n, d += n, to += n) {
                float sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t k = 0; k < n; ++k) sum += float(out[k]) * float(d[k]);
                const float mean = sum / static_cast<float>(n);
#pragma GCC ivdep
                for (int64_t k = 0; k < n; ++k) to[k] = T(r[i] * (float(d[k]) - float(out[k]) * mean));
            }
            return;
        }
        float sums[LINES] = {};
        for (int64_t k = 0; k < n; ++k)
#pragma GCC ivdep
            for (int64_t i = 0; i < lines; ++i) sums[i] += float(out[k * inner + i]) * float(d[k * inner + i]);
        for (int64_t i = 0; i < lines; ++i) sums[i] /= static_cast<float>(n);
        for (int64_t k = 0; k < n; ++k)
#pragma GCC ivdep
            for (int64_t i = 0; i < lines; ++i) {
                const int64_t j = k * inner + i;
                to[j] = T(r[i] * (float(d[j]) - float(out[j]) * sums[i]));
            }
    });
}

}  // namespace

#define FORMS(name, T, Given)                                                                                          \
    extern "C" void plain_norm_forward_##name(const Given* x, Given* y, float* inverse, int64_t outer, int64_t n,      \
                                              int64_t inner, double eps) {                                             \
        forward(reinterpret_cast<const T*>(x), reinterpret_cast<T*>(y), inverse, outer, n, inner,                      \
                static_cast<float>(eps));                                                                              \
    }                                                                                                                  \
    ZOO_EXPORT(plain_norm_forward_##name)                                                                              \
    extern "C" void plain_norm_backward_##name(const Given* y, const Given* d_y, const float* inverse, Given* d_x,     \
                                               int64_t outer, int64_t n, int64_t inner) {                              \
        backward(reinterpret_cast<const T*>(y), reinterpret_cast<const T*>(d_y), inverse, reinterpret_cast<T*>(d_x),   \
                 outer, n, inner);                                                                                     \
    }                                                                                                                  \
    ZOO_EXPORT(plain_norm_backward_##name)

FORMS(float, float, float)
FORMS(bfloat16, zoo::Brief, uint16_t)
