// z_t = p_t (z_{t-1} + b_t) - q_t y_{t-1} ; y_t = y_{t-1} + r_t z_t, on b (B, T, copies, P) and coefficients (P), or
// (B, T, P) where `varying`, that all copies share. Nothing passes a step with a reset. The steps from lengths[row] on
// are padding: the state (B, 2, copies, P) stays, y and z are zero. The running values are kept in double.
#include <algorithm>

#include "kernel.h"
#include "elementary.h"

namespace {

constexpr int64_t BLOCK = 64, SMALL = 16384;  // channels; elements that one thread is done with before others wake

struct Sizes {
    int64_t B, steps, copies, P;
};

// The n channels from `from` of one copy in one row.
struct Span {
    int64_t n, state, at, coefficients, step, coefficient_step;  // the last five are offsets
    Span(const Sizes& s, int64_t row, int64_t copy, int64_t from, bool varying)
        : n(std::min(BLOCK, s.P - from)),
          state((row * 2 * s.copies + copy) * s.P + from),
          at((row * s.steps * s.copies + copy) * s.P + from),
          coefficients(varying ? row * s.steps * s.P + from : from),
          step(s.copies * s.P),
          coefficient_step(varying ? s.P : 0) {}
};

template <typename T>
void forward(const T* b, const T* p, const T* q, const T* r, const T* state, const bool* resets, const int64_t* lengths,
             T* y, T* last, T* z, Sizes s, bool varying) {
    const int64_t blocks = (s.P + BLOCK - 1) / BLOCK, half = s.copies * s.P;
#pragma omp parallel for collapse(3) if (s.B * s.steps * half > SMALL)
    for (int64_t row = 0; row < s.B; ++row)
        for (int64_t copy = 0; copy < s.copies; ++copy)
            for (int64_t block = 0; block < blocks; ++block) {
                zoo::FlushDenormals flush;
                const Span span(s, row, copy, block * BLOCK, varying);
                const int64_t n = span.n, valid = lengths ? lengths[row] : s.steps;
                double speed[BLOCK], place[BLOCK];
                for (int64_t j = 0; j < n; ++j) speed[j] = state[span.state + j], place[j] = state[span.state + half + j];
                for (int64_t t = 0; t < valid; ++t) {
                    const int64_t at = span.at + t * span.step, c = span.coefficients + t * span.coefficient_step;
                    if (resets && resets[row * s.steps + t]) {
                        std::fill(speed, speed + n, 0.0);
                        std::fill(place, place + n, 0.0);
                    }
                    for (int64_t j = 0; j < n; ++j) {
                        speed[j] = p[c + j] * (speed[j] + b[at + j]) - q[c + j] * place[j];
                        place[j] += r[c + j] * speed[j];
                        y[at + j] = static_cast<T>(place[j]);
                    }
                    if (z)
                        for (int64_t j = 0; j < n; ++j) z[at + j] = static_cast<T>(speed[j]);
                }
                for (int64_t t = valid; t < s.steps; ++t) {
                    const int64_t at = span.at + t * span.step;
                    std::fill(y + at, y + at + n, T(0));
                    if (z) std::fill(z + at, z + at + n, T(0));
                }
                for (int64_t j = 0; j < n; ++j) {
                    last[span.state + j] = static_cast<T>(speed[j]);
                    last[span.state + half + j] = static_cast<T>(place[j]);
                }
            }
}

// From the last step back, with u and v the gradients of z and y: v += d_y ; u += r v ; d_r += v z ;
// d_p += u (z_{t-1} + b) ; d_q -= u y_{t-1} ; d_b = p u ; then v -= q u and u = p u. Gradients of coefficients that are
// the same at all steps are those of each row.
template <bool VARYING, typename T>
void backward(const T* b, const T* p, const T* q, const T* r, const T* state, const bool* resets, const int64_t* lengths,
              const T* y, const T* z, const T* d_y, const T* d_last, T* d_b, T* d_p, T* d_q, T* d_r, T* d_state, Sizes s) {
    const int64_t blocks = (s.P + BLOCK - 1) / BLOCK, half = s.copies * s.P;
#pragma omp parallel for collapse(2) if (s.B * s.steps * half > SMALL)
    for (int64_t row = 0; row < s.B; ++row)
        for (int64_t block = 0; block < blocks; ++block) {
            zoo::FlushDenormals flush;
            const int64_t valid = lengths ? lengths[row] : s.steps;
            const T nothing[BLOCK] = {};
            double sums[3][BLOCK] = {};
            int64_t n = 0;
            for (int64_t copy = 0; copy < s.copies; ++copy) {  // the first writes what later ones add to
                const Span span(s, row, copy, block * BLOCK, VARYING);
                n = span.n;
                double u[BLOCK], v[BLOCK];
                for (int64_t j = 0; j < n; ++j) u[j] = d_last[span.state + j], v[j] = d_last[span.state + half + j];
                for (int64_t t = s.steps - 1; t >= valid; --t) {
                    const int64_t at = span.at + t * span.step, c = span.coefficients + t * span.coefficient_step;
                    std::fill(d_b + at, d_b + at + n, T(0));
                    if (VARYING && !copy)
                        for (T* d : {d_p, d_q, d_r}) std::fill(d + c, d + c + n, T(0));
                }
                for (int64_t t = valid - 1; t >= 0; --t) {
                    const int64_t at = span.at + t * span.step, c = span.coefficients + t * span.coefficient_step;
                    const bool fresh = resets && resets[row * s.steps + t];
                    const T* speed = fresh ? nothing : t ? z + at - span.step : state + span.state;
                    const T* place = fresh ? nothing : t ? y + at - span.step : state + span.state + half;
                    double g[3][BLOCK];
                    for (int64_t j = 0; j < n; ++j) {
                        const double of_y = v[j] + d_y[at + j], of_z = u[j] + r[c + j] * of_y, back = p[c + j] * of_z;
                        g[0][j] = of_z * (static_cast<double>(speed[j]) + b[at + j]);
                        g[1][j] = -of_z * place[j];
                        g[2][j] = of_y * z[at + j];
                        d_b[at + j] = static_cast<T>(back);
                        u[j] = back;
                        v[j] = of_y - q[c + j] * of_z;
                    }
                    if (fresh) {
                        std::fill(u, u + n, 0.0);
                        std::fill(v, v + n, 0.0);
                    }
                    T* const to[3] = {d_p + c, d_q + c, d_r + c};
                    for (int k = 0; k < 3; ++k) {
                        if (!VARYING)
                            for (int64_t j = 0; j < n; ++j) sums[k][j] += g[k][j];
                        else if (copy)
                            for (int64_t j = 0; j < n; ++j) to[k][j] += static_cast<T>(g[k][j]);
                        else
                            for (int64_t j = 0; j < n; ++j) to[k][j] = static_cast<T>(g[k][j]);
                    }
                }
                for (int64_t j = 0; j < n; ++j) {
                    d_state[span.state + j] = static_cast<T>(u[j]);
                    d_state[span.state + half + j] = static_cast<T>(v[j]);
                }
            }
            if (!VARYING) {
                T* const to[3] = {d_p, d_q, d_r};
                for (int k = 0; k < 3; ++k)
                    for (int64_t j = 0; j < n; ++j) to[k][row * s.P + block * BLOCK + j] = static_cast<T>(sums[k][j]);
            }
        }
}

}  // namespace

#define FUNCTIONS(T, NAME)                                                                                            \
    extern "C" void oscillate_forward_##NAME(const T* b, const T* p, const T* q, const T* r, const T* state,          \
                                             const bool* resets, const int64_t* lengths, T* y, T* last, T* z,         \
                                             int64_t B, int64_t steps, int64_t copies, int64_t P, int64_t varying) {  \
        forward(b, p, q, r, state, resets, lengths, y, last, z, {B, steps, copies, P}, varying != 0);                 \
    }                                                                                                                 \
    ZOO_EXPORT(oscillate_forward_##NAME)                                                                              \
    extern "C" void oscillate_backward_##NAME(                                                                        \
        const T* b, const T* p, const T* q, const T* r, const T* state, const bool* resets, const int64_t* lengths,   \
        const T* y, const T* z, const T* d_y, const T* d_last, T* d_b, T* d_p, T* d_q, T* d_r, T* d_state, int64_t B, \
        int64_t steps, int64_t copies, int64_t P, int64_t varying) {                                                  \
        const auto run = varying ? backward<true, T> : backward<false, T>;                                            \
        run(b, p, q, r, state, resets, lengths, y, z, d_y, d_last, d_b, d_p, d_q, d_r, d_state,                       \
            {B, steps, copies, P});                                                                                   \
    }                                                                                                                 \
    ZOO_EXPORT(oscillate_backward_##NAME)
FUNCTIONS(float, float)
FUNCTIONS(double, double)
