// The matrix LSTM, chunk by chunk, one batch row and group at a time: forward, and a backward pass that recomputes what
// is inside a chunk from the states before each. The equations are those of zoo/ops/_mlstm.py, whose names are kept.
//
// All arrays are row-major: q, k (B, T, G, K); v, h (B, T, H, V); gates, m, norm (B, T, H); states (B, H, n, K, V).
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "matmul.h"

namespace {

constexpr int64_t C = 64, PANEL = 32;  // steps a chunk; rows of a triangle that are multiplied at once

struct Sizes {
    int64_t T, G, R, K, V, n;
    int64_t H() const { return G * R; }
};

// What the gates of one chunk of one head come to; steps lie `stride` apart.
struct Gates {
    int64_t L;
    int64_t first[C];  // the first step of the chunk that step i sees
    double sums[C], row[C], column[C];
    float since[C], until[C], floor[C], shrink[C], total;
    float pairs[C * C];

    // `m` holds the stabilisers of these steps, `before` the one before them.
    void set(int64_t length, const float* log_i, const float* log_f, const float* m, const bool* resets, int64_t stride,
             float before, float scale, float eps) {
        L = length;
        double sum = 0;
        int64_t start = -1;
        for (int64_t i = 0; i < L; ++i) {
            if (resets && resets[i]) start = i;
            first[i] = start;
            sum += log_f[i * stride];
            sums[i] = sum;
            const float mi = m[i * stride], positive = std::max(mi, 0.0f);
            row[i] = sum - positive;
            column[i] = log_i[i * stride] - sum;
            since[i] = start < 0 ? scale * zoo::exp(static_cast<float>(row[i] + before)) : 0.0f;
            floor[i] = zoo::exp(-positive);
            shrink[i] = eps * zoo::exp(std::min(mi, 0.0f));
        }
        const double after = m[(L - 1) * stride];
        for (int64_t i = 0; i < L; ++i)
            until[i] = i >= start ? zoo::exp(static_cast<float>(column[i] + (sum - after))) : 0.0f;
        total = start < 0 ? zoo::exp(static_cast<float>(sum + before - after)) : 0.0f;
        for (int64_t i = 0; i < L; ++i) {
            float* out = pairs + i * C;
            const int64_t low = std::max<int64_t>(first[i], 0), end = std::min(L, (i / PANEL + 1) * PANEL);
            for (int64_t j = 0; j < end; ++j) out[j] = zoo::exp(static_cast<float>(row[i] + column[j]));
            for (int64_t j = 0; j < end; ++j) out[j] = j >= low && j <= i ? scale * out[j] : 0.0f;
        }
    }
};

// out (L, L) = a (L, n) b (n, L), its lower triangle by panels; columns beyond a panel are left alone.
void lower_product(int64_t L, int64_t n, const float* a, int64_t lda, const float* b, float* out) {
    for (int64_t p = 0; p < L; p += PANEL) {
        const int64_t rows = std::min(PANEL, L - p);
        zoo::product(rows, p + rows, n, a + p * lda, lda, b, C, out + p * C, C);
    }
}

// out (L, n) += lower (L, L) b (L, n).
void lower_times(int64_t L, int64_t n, const float* lower, const float* b, int64_t ldb, float* out, int64_t ldo) {
    for (int64_t p = 0; p < L; p += PANEL) {
        const int64_t rows = std::min(PANEL, L - p);
        zoo::product<true>(rows, n, p + rows, lower + p * C, C, b, ldb, out + p * ldo, ldo);
    }
}

// out (L, n) += lower^T b.
void upper_times(int64_t L, int64_t n, const float* lower, const float* b, int64_t ldb, float* out, int64_t ldo) {
    for (int64_t p = 0; p < L; p += PANEL) {
        const int64_t columns = std::min(PANEL, L - p);
        zoo::product_tn<true>(columns, n, L - p, lower + p * C + p, C, b + p * ldb, ldb, out + p * ldo, ldo);
    }
}

// out (L, n) = x, each row times its factor.
void scaled(int64_t L, int64_t n, const float* x, int64_t ldx, const float* factor, float* out) {
    for (int64_t i = 0; i < L; ++i)
        for (int64_t d = 0; d < n; ++d) out[i * n + d] = factor[i] * x[i * ldx + d];
}

float dot(int64_t n, const float* a, const float* b) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
    return sum;
}

void add_scaled(int64_t n, float factor, const float* x, float* out) {
    for (int64_t d = 0; d < n; ++d) out[d] += factor * x[d];
}

void multiply(int64_t n, float factor, float* x) {
    for (int64_t d = 0; d < n; ++d) x[d] *= factor;
}

}  // namespace

// C, n, m hold the state before the first step and get that after the last one. m_all and norm (n_t^T q_t) get the
// values of every step. states, norms, before: what the backward pass wants of every chunk's start, or null.
extern "C" void mlstm_forward(const float* q, const float* k, const float* v, const float* log_i, const float* log_f,
                              const bool* resets, float* memory, float* normaliser, float* m, float* h, float* m_all,
                              float* norm, float* states, float* norms, float* before, int64_t B, int64_t T, int64_t G,
                              int64_t R, int64_t K, int64_t V, double scale, double eps) {
    const Sizes z{T, G, R, K, V, (T + C - 1) / C};
    const int64_t H = z.H(), ldk = G * K, ldv = H * V;
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> scratch(K * C + C * C + 2 * C * K + C * V);
        float *kt = scratch.data(), *scores = kt + K * C, *wide = scores + C * C, *o = wide + 2 * C * K;
        std::vector<Gates> holder(1);
        Gates& gates = holder[0];
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < B; ++b)
            for (int64_t head = 0; head < H; ++head) {
                const int64_t g = head / R, at = b * H + head;
                float *S = memory + at * K * V, *N = normaliser + at * K;
                for (int64_t c = 0; c < z.n; ++c) {
                    const int64_t t = c * C, L = std::min(C, T - t), gate = (b * T + t) * H + head;
                    const float *qc = q + ((b * T + t) * G + g) * K, *kc = k + ((b * T + t) * G + g) * K;
                    const float* vc = v + ((b * T + t) * H + head) * V;
                    const bool* rc = resets ? resets + b * T + t : nullptr;
                    const float m_before = m[at];
                    if (states) {
                        std::copy(S, S + K * V, states + (at * z.n + c) * K * V);
                        std::copy(N, N + K, norms + (at * z.n + c) * K);
                        before[at * z.n + c] = m_before;
                    }
                    for (int64_t i = 0; i < L; ++i) {
                        const float kept = log_f[gate + i * H] + (rc && rc[i] ? 0.0f : m[at]);
                        m_all[gate + i * H] = m[at] = std::max(kept, log_i[gate + i * H]);
                    }
                    gates.set(L, log_i + gate, log_f + gate, m_all + gate, rc, H, m_before, scale, eps);

                    zoo::transposed(L, K, kc, ldk, kt, C);
                    lower_product(L, K, qc, ldk, kt, scores);
                    scaled(L, K, qc, ldk, gates.since, wide);
                    zoo::product(L, V, K, wide, K, S, V, o, V);
                    for (int64_t i = 0; i < L; ++i) {
                        const int64_t end = std::min(L, (i / PANEL + 1) * PANEL);
                        float sum = dot(K, wide + i * K, N);
#pragma omp simd reduction(+ : sum)
                        for (int64_t j = 0; j < end; ++j) sum += scores[i * C + j] *= gates.pairs[i * C + j];
                        norm[gate + i * H] = sum;
                    }
                    lower_times(L, V, scores, vc, ldv, o, V);
                    for (int64_t i = 0; i < L; ++i) {
                        const float size = std::fabs(norm[gate + i * H]);
                        const float factor = 1.0f / (std::max(size, gates.floor[i]) + gates.shrink[i]);
                        float* out = h + ((b * T + t + i) * H + head) * V;
                        for (int64_t d = 0; d < V; ++d) out[d] = factor * o[i * V + d];
                    }
                    scaled(L, K, kc, ldk, gates.until, wide);
                    multiply(K * V, gates.total, S);
                    multiply(K, gates.total, N);
                    zoo::product_tn<true>(K, V, L, wide, K, vc, ldv, S, V);
                    for (int64_t i = 0; i < L; ++i) add_scaled(K, 1.0f, wide + i * K, N);
                }
            }
    }
}
ZOO_EXPORT(mlstm_forward)

// d_memory, d_normaliser, d_m hold the gradients of the last state and get those of the first one; the other gradients
// are written, d_q and d_k added to.
extern "C" void mlstm_backward(const float* q, const float* k, const float* v, const float* log_i, const float* log_f,
                               const bool* resets, const float* h, const float* m_all, const float* norm,
                               const float* states, const float* norms, const float* before, const float* d_h,
                               float* d_memory, float* d_normaliser, float* d_m, float* d_q, float* d_k, float* d_v,
                               float* d_log_i, float* d_log_f, int64_t B, int64_t T, int64_t G, int64_t R, int64_t K,
                               int64_t V, double scale, double eps) {
    const Sizes z{T, G, R, K, V, (T + C - 1) / C};
    const int64_t H = z.H(), ldk = G * K, ldv = H * V, wide_size = C * std::max(K, V);
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> scratch(2 * C * C + 2 * K * V + (K + V) * C + C * V + 2 * wide_size + 4 * C);
        float *scores = scratch.data(), *d_scores = scores + C * C, *turned = d_scores + C * C;
        float *narrow = turned + 2 * K * V, *dh = narrow + (K + V) * C, *wide = dh + C * V, *other = wide + wide_size;
        float *d_norm = other + wide_size, *d_since = d_norm + C, *d_until = d_since + C, *crossing = d_until + C;
        std::vector<Gates> holder(1);
        Gates& gates = holder[0];
#pragma omp for collapse(2) schedule(dynamic, 1)
        for (int64_t b = 0; b < B; ++b)
            for (int64_t g = 0; g < G; ++g)
                for (int64_t head = g * R; head < (g + 1) * R; ++head) {
                    const int64_t at = b * H + head;
                    float *A = d_memory + at * K * V, *a = d_normaliser + at * K;
                    float carry = d_m[at];
                    for (int64_t c = z.n - 1; c >= 0; --c) {
                        const int64_t t = c * C, L = std::min(C, T - t), gate = (b * T + t) * H + head;
                        const int64_t row = ((b * T + t) * G + g) * K, vrow = gate * V;
                        const float *qc = q + row, *kc = k + row, *vc = v + vrow;
                        const float *S = states + (at * z.n + c) * K * V, *N = norms + (at * z.n + c) * K;
                        const bool* rc = resets ? resets + b * T + t : nullptr;
                        gates.set(L, log_i + gate, log_f + gate, m_all + gate, rc, H, before[at * z.n + c], scale, eps);

                        // The division: dh = d_h / divisor, then the share of the normaliser and that of eps.
                        float d_stabiliser[C];
                        for (int64_t i = 0; i < L; ++i) {
                            const float x = norm[gate + i * H], size = std::fabs(x);
                            const float factor = 1.0f / (std::max(size, gates.floor[i]) + gates.shrink[i]);
                            const float *from = d_h + vrow + i * ldv, *out = h + vrow + i * ldv;
                            for (int64_t d = 0; d < V; ++d) dh[i * V + d] = factor * from[d];
                            const float share = -dot(V, dh + i * V, out);
                            d_norm[i] = size > gates.floor[i] ? (x > 0 ? share : -share) : 0.0f;
                            d_stabiliser[i] = share * gates.shrink[i];
                        }

                        // Inside the chunk.
                        zoo::transposed(L, K, kc, ldk, narrow, C);
                        lower_product(L, K, qc, ldk, narrow, scores);
                        zoo::transposed(L, V, vc, ldv, narrow, C);
                        lower_product(L, V, dh, V, narrow, d_scores);
                        float columns[C] = {}, d_pairs[C];
                        for (int64_t i = L - 1; i >= 0; --i) {
                            const int64_t end = std::min(L, (i / PANEL + 1) * PANEL);
                            float *s = scores + i * C, *ds = d_scores + i * C;
                            const float *p = gates.pairs + i * C, dn = d_norm[i];
                            for (int64_t j = 0; j < end; ++j) {
                                const float weighted = s[j] * p[j], d = ds[j] + dn;
                                s[j] = weighted;
                                ds[j] = d * p[j];
                                columns[j] += d_pairs[j] = d * weighted;
                            }
                            float sum = 0;
#pragma omp simd reduction(+ : sum)
                            for (int64_t j = 0; j < i; ++j) sum += columns[j];
                            crossing[i] = sum;
                        }

                        // From and to the states.
                        zoo::transposed(K, V, S, V, turned, K);
                        zoo::transposed(K, V, A, V, turned + K * V, K);
                        zoo::product(L, K, V, dh, V, turned, K, wide, K);
                        zoo::product(L, K, V, vc, ldv, turned + K * V, K, other, K);
                        for (int64_t i = 0; i < L; ++i) {
                            add_scaled(K, d_norm[i], N, wide + i * K);
                            add_scaled(K, 1.0f, a, other + i * K);
                            d_since[i] = gates.since[i] * dot(K, qc + i * ldk, wide + i * K);
                            d_until[i] = gates.until[i] * dot(K, kc + i * ldk, other + i * K);
                            add_scaled(K, gates.since[i], wide + i * K, d_q + row + i * ldk);
                            add_scaled(K, gates.until[i], other + i * K, d_k + row + i * ldk);
                        }
                        const float d_total = gates.total * (dot(K * V, A, S) + dot(K, a, N));
                        lower_times(L, K, d_scores, kc, ldk, d_q + row, ldk);
                        upper_times(L, K, d_scores, qc, ldk, d_k + row, ldk);
                        scaled(L, K, kc, ldk, gates.until, wide);
                        zoo::product(L, V, K, wide, K, A, V, d_v + vrow, ldv);
                        upper_times(L, V, scores, dh, V, d_v + vrow, ldv);
                        scaled(L, K, qc, ldk, gates.since, wide);
                        multiply(K * V, gates.total, A);
                        multiply(K, gates.total, a);
                        zoo::product_tn<true>(K, V, L, wide, K, dh, V, A, V);
                        for (int64_t i = 0; i < L; ++i) add_scaled(K, d_norm[i], wide + i * K, a);

                        // The gates: what crosses a step, in sums of what it is made of.
                        float sum = 0;
                        for (int64_t i = L - 1; i >= 0; --i) {
                            sum += d_since[i];
                            d_log_f[gate + i * H] = crossing[i] + sum + d_total;
                            d_log_i[gate + i * H] = columns[i] + d_until[i];
                        }
                        const float from_state = sum + d_total;
                        sum = 0;
                        for (int64_t i = 0; i < L; ++i) {
                            d_log_f[gate + i * H] += sum;
                            sum += d_until[i];
                        }
                        if (c == z.n - 1) carry -= sum + d_total;
                        for (int64_t i = L - 1; i >= 0; --i) {
                            carry += d_stabiliser[i];
                            const bool reset = rc && rc[i];
                            const float last = i > 0 ? m_all[gate + (i - 1) * H] : before[at * z.n + c];
                            const bool kept = log_f[gate + i * H] + (reset ? 0.0f : last) > log_i[gate + i * H];
                            (kept ? d_log_f : d_log_i)[gate + i * H] += carry;
                            if (reset || !kept) carry = 0;
                        }
                        if (c == 0) carry += from_state;
                    }
                    d_m[at] = carry;
                }
    }
}
ZOO_EXPORT(mlstm_backward)

ZOO_SIZES({"C", C})
