// RMS norm of each of the parts of a row, with a gate silu(z) before or after it, forward and backward in one pass each.
//
// Before: u = x silu(z), y = w u r, r = (mean u^2 + eps)^-1/2. After: u = x, y = w u r silu(z). No gate where z is null.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "elementary.h"

namespace {

constexpr int64_t ROWS = 64;  // of a task

struct Shape {
    int64_t rows, width, parts, gate_first;
    float eps;
};

template <typename Run>
void for_rows(const Shape& s, const Run& run) {
    const int64_t tasks = (s.rows + ROWS - 1) / ROWS;
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> u(s.width / s.parts), gate(s.width / s.parts), slope(s.width / s.parts);
#pragma omp for
        for (int64_t task = 0; task < tasks; ++task)
            for (int64_t row = task * ROWS; row < std::min(s.rows, (task + 1) * ROWS); ++row)
                for (int64_t part = 0; part < s.parts; ++part)
                    run(task, row, part * (s.width / s.parts), u.data(), gate.data(), slope.data());
    }
}

// gate = silu(z) and its derivative; 1 and 0 without z.
void gates(const float* z, int64_t n, float* gate, float* slope) {
    if (!z) {
        std::fill(gate, gate + n, 1.0f), std::fill(slope, slope + n, 0.0f);
        return;
    }
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
        const float part = zoo::sigmoid(z[i]);
        gate[i] = z[i] * part;
        slope[i] = part + gate[i] * (1 - part);
    }
}

// u, the normalised numbers before their norm; returns r.
float normalised(const Shape& s, const float* x, const float* gate, int64_t n, float* u) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) {
        u[i] = s.gate_first ? x[i] * gate[i] : x[i];
        squares += u[i] * u[i];
    }
    return 1 / std::sqrt(squares / static_cast<float>(n) + s.eps);
}

}  // namespace

extern "C" void gated_norm_forward(const float* x, const float* z, const float* weight, float* y, int64_t rows,
                                   int64_t width, int64_t parts, int64_t gate_first, double eps) {
    const Shape s{rows, width, parts, gate_first, static_cast<float>(eps)};
    const int64_t n = width / parts;
    for_rows(s, [&](int64_t, int64_t row, int64_t from, float* u, float* gate, float* slope) {
        const int64_t at = row * width + from;
        gates(z ? z + at : nullptr, n, gate, slope);
        const float r = normalised(s, x + at, gate, n, u), *w = weight + from;
        float* out = y + at;
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] = w[i] * (u[i] * r) * (s.gate_first ? 1.0f : gate[i]);
    });
}
ZOO_EXPORT(gated_norm_forward)

// d_weight (tasks, width): a sum over the rows of each task.
extern "C" void gated_norm_backward(const float* x, const float* z, const float* weight, const float* d_y, float* d_x,
                                    float* d_z, float* d_weight, int64_t rows, int64_t width, int64_t parts,
                                    int64_t gate_first, double eps) {
    const Shape s{rows, width, parts, gate_first, static_cast<float>(eps)};
    const int64_t n = width / parts;
    for_rows(s, [&](int64_t task, int64_t row, int64_t from, float* u, float* gate, float* slope) {
        const int64_t at = row * width + from;
        gates(z ? z + at : nullptr, n, gate, slope);
        const float r = normalised(s, x + at, gate, n, u), *w = weight + from, *in = x + at, *out = d_y + at;
        float *d_in = d_x + at, *d_w = d_weight + task * width + from;
        float along = 0;  // of the gradient of u r, along u
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < n; ++i) along += out[i] * w[i] * (s.gate_first ? 1.0f : gate[i]) * u[i];
        along *= r * r / static_cast<float>(n);
        if (row % ROWS == 0) std::fill(d_w, d_w + n, 0.0f);
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) {
            const float after = s.gate_first ? 1.0f : gate[i], normed = u[i] * r;
            const float d_u = r * (out[i] * w[i] * after - u[i] * along);
            d_w[i] += out[i] * normed * after;
            d_in[i] = s.gate_first ? d_u * gate[i] : d_u;
            slope[i] *= s.gate_first ? d_u * in[i] : out[i] * w[i] * normed;
        }
        if (d_z) std::copy(slope, slope + n, d_z + at);
    });
}
ZOO_EXPORT(gated_norm_backward)

ZOO_SIZES({"ROWS", ROWS})
