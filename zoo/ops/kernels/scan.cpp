// h_t = a_t * h_{t-1} + b_t, elementwise, on (B, T, D): every block of channels runs through time on its own. Complex
// numbers are pairs (re, im). Where `varying` is zero, a is (D) and the same at all steps; its gradient is that of a row.
// Nothing passes a step with a reset. The steps from lengths[row] on are padding: the state stays, h is zero.
//
// The running value is kept in double, so that a decay near 1 gathers no rounding over a long sequence; reading and
// writing memory takes longer than that costs.
#include <algorithm>

#include "kernel.h"
#include "elementary.h"

namespace {

constexpr int64_t BLOCK = 64, SMALL = 16384;  // channels; elements that one thread is done with before others wake

// The arithmetic of a block of n channels; a step's numbers lie one after the other.
struct Real {
    static constexpr int64_t PARTS = 1;
    template <typename T>
    ZOO_INLINE static void step(double* x, const T* a, const T* b, T* h, int64_t n) {
        for (int64_t j = 0; j < n; ++j) {
            x[j] = a[j] * x[j] + b[j];
            h[j] = static_cast<T>(x[j]);
        }
    }
    // g_t = x + d_h_t ; d_b = g ; d_a (+)= g h_{t-1} ; x = a g.
    template <bool VARYING, typename T>
    ZOO_INLINE static void back(double* x, double* sum, const T* a, const T* before, const T* d_h, T* d_a, T* d_b,
                                int64_t n) {
        for (int64_t j = 0; j < n; ++j) {
            const double g = x[j] + d_h[j];
            d_b[j] = static_cast<T>(g);
            if (VARYING)
                d_a[j] = static_cast<T>(g * before[j]);
            else
                sum[j] += g * before[j];
            x[j] = g * a[j];
        }
    }
};

struct Complex {
    static constexpr int64_t PARTS = 2;
    template <typename T>
    ZOO_INLINE static void step(double* x, const T* a, const T* b, T* h, int64_t n) {
        for (int64_t j = 0; j < 2 * n; j += 2) {
            const double re = a[j] * x[j] - a[j + 1] * x[j + 1] + b[j];
            const double im = a[j] * x[j + 1] + a[j + 1] * x[j] + b[j + 1];
            x[j] = re, x[j + 1] = im;
            h[j] = static_cast<T>(re), h[j + 1] = static_cast<T>(im);
        }
    }
    // As above, with the conjugates of h and a.
    template <bool VARYING, typename T>
    ZOO_INLINE static void back(double* x, double* sum, const T* a, const T* before, const T* d_h, T* d_a, T* d_b,
                                int64_t n) {
        for (int64_t j = 0; j < 2 * n; j += 2) {
            const double re = x[j] + d_h[j], im = x[j + 1] + d_h[j + 1], p = before[j], q = before[j + 1];
            d_b[j] = static_cast<T>(re), d_b[j + 1] = static_cast<T>(im);
            if (VARYING) {
                d_a[j] = static_cast<T>(re * p + im * q), d_a[j + 1] = static_cast<T>(im * p - re * q);
            } else {
                sum[j] += re * p + im * q, sum[j + 1] += im * p - re * q;
            }
            x[j] = re * a[j] + im * a[j + 1], x[j + 1] = im * a[j] - re * a[j + 1];
        }
    }
};

template <typename Numbers, typename T>
void forward(const T* a, const T* b, const T* state, const bool* resets, const int64_t* lengths, T* h, T* last, int64_t B,
             int64_t steps, int64_t D, int64_t varying) {
    constexpr int64_t P = Numbers::PARTS;
    const int64_t blocks = (D + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) if (B * steps * D > SMALL)
    for (int64_t row = 0; row < B; ++row)
        for (int64_t block = 0; block < blocks; ++block) {
            zoo::FlushDenormals flush;
            const int64_t from = block * BLOCK, n = std::min(BLOCK, D - from), valid = lengths ? lengths[row] : steps;
            double x[P * BLOCK];
            for (int64_t j = 0; j < P * n; ++j) x[j] = state[P * (row * D + from) + j];
            for (int64_t t = 0; t < valid; ++t) {
                const int64_t at = P * ((row * steps + t) * D + from);
                if (resets && resets[row * steps + t]) std::fill(x, x + P * n, 0.0);
                Numbers::step(x, a + (varying ? at : P * from), b + at, h + at, n);
            }
            for (int64_t t = valid; t < steps; ++t) {
                T* padding = h + P * ((row * steps + t) * D + from);
                std::fill(padding, padding + P * n, T(0));
            }
            for (int64_t j = 0; j < P * n; ++j) last[P * (row * D + from) + j] = static_cast<T>(x[j]);
        }
}

template <typename Numbers, bool VARYING, typename T>
void backward(const T* a, const T* h, const T* state, const bool* resets, const int64_t* lengths, const T* d_h,
              const T* d_last, T* d_a, T* d_b, T* d_state, int64_t B, int64_t steps, int64_t D) {
    constexpr int64_t P = Numbers::PARTS;
    const int64_t blocks = (D + BLOCK - 1) / BLOCK;
#pragma omp parallel for collapse(2) if (B * steps * D > SMALL)
    for (int64_t row = 0; row < B; ++row)
        for (int64_t block = 0; block < blocks; ++block) {
            zoo::FlushDenormals flush;
            const int64_t from = block * BLOCK, n = std::min(BLOCK, D - from), valid = lengths ? lengths[row] : steps;
            double x[P * BLOCK], sum[P * BLOCK] = {};
            const T nothing[P * BLOCK] = {};
            for (int64_t j = 0; j < P * n; ++j) x[j] = d_last[P * (row * D + from) + j];
            for (int64_t t = steps - 1; t >= valid; --t) {
                const int64_t at = P * ((row * steps + t) * D + from);
                std::fill(d_b + at, d_b + at + P * n, T(0));
                if (VARYING) std::fill(d_a + at, d_a + at + P * n, T(0));
            }
            for (int64_t t = valid - 1; t >= 0; --t) {
                const int64_t at = P * ((row * steps + t) * D + from);
                const bool fresh = resets && resets[row * steps + t];
                const T* before = fresh ? nothing : t ? h + at - P * D : state + P * (row * D + from);
                Numbers::template back<VARYING>(x, sum, a + (VARYING ? at : P * from), before, d_h + at,
                                                VARYING ? d_a + at : nullptr, d_b + at, n);
                if (fresh) std::fill(x, x + P * n, 0.0);
            }
            for (int64_t j = 0; j < P * n; ++j) d_state[P * (row * D + from) + j] = static_cast<T>(x[j]);
            if (!VARYING)
                for (int64_t j = 0; j < P * n; ++j) d_a[P * (row * D + from) + j] = static_cast<T>(sum[j]);
        }
}

}  // namespace

#define FUNCTIONS(T, Numbers, NAME)                                                                                  \
    extern "C" void scan_forward_##NAME(const T* a, const T* b, const T* state, const bool* resets,                  \
                                        const int64_t* lengths, T* h, T* last, int64_t B, int64_t steps, int64_t D,  \
                                        int64_t varying) {                                                           \
        forward<Numbers>(a, b, state, resets, lengths, h, last, B, steps, D, varying);                               \
    }                                                                                                                \
    ZOO_EXPORT(scan_forward_##NAME)                                                                                  \
    extern "C" void scan_backward_##NAME(const T* a, const T* h, const T* state, const bool* resets,                 \
                                         const int64_t* lengths, const T* d_h, const T* d_last, T* d_a, T* d_b,      \
                                         T* d_state, int64_t B, int64_t steps, int64_t D, int64_t varying) {         \
        const auto run = varying ? backward<Numbers, true, T> : backward<Numbers, false, T>;                         \
        run(a, h, state, resets, lengths, d_h, d_last, d_a, d_b, d_state, B, steps, D);                              \
    }                                                                                                                \
    ZOO_EXPORT(scan_backward_##NAME)
FUNCTIONS(float, Real, float)
FUNCTIONS(double, Real, double)
FUNCTIONS(float, Complex, complex64)
FUNCTIONS(double, Complex, complex128)
