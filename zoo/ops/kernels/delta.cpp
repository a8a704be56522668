// The recurrences S' = diag(exp g) S + c0 u^T + c1 v^T that write what they have read, chunk by chunk, and their
// gradients: the delta rule (one kind of write, c0 = k, u = beta (v + S^T r), r = -exp(g) k) and DPLR (two, c0 = b,
// u = S^T a, c1 = k).
//
// Inside a chunk with D_ij the decay from step j to step i, E_i that since the chunk's start and X_j that until its end
//   reads   AQ_ij = q_i^T D_ij c_j (j <= i),  AR_ij = r_i^T D_ij c_j (j < i); DPLR reads before it decays: D_{i-1,j}
//   solve   w = [v or AR1 v] + (E r)^T S + AR0 u,  u = beta w, by blocks of STEPS steps
//   o = (E q)^T S + AQ0 u + AQ1 v;   S' = diag(E_last) S + (X c0)^T u + (X c1)^T v.
// The backward pass keeps one state a chunk, forms everything else again, and goes back with P, the gradient of S'.
//
// A decay is a product of numbers in [0, 1] or the exponential of a sum, never a quotient or that of a difference: any
// decay, zero included, is exact to a few roundings. The gradient of a log decay is a sum over all pairs of steps with
// that decay between them, without subtractions.
//
// All blocks in memory are filled up with zeros to multiples of STEPS rows and columns.
#include "blocks.h"
#include "kernel.h"

namespace {

using zoo::at;
using zoo::dot;
using zoo::Lanes;
using zoo::padded;
using zoo::product;
using zoo::product_tn;
using zoo::sum;
using zoo::transposed;

constexpr int64_t STEPS = zoo::BLOCK_LANES;
constexpr float GONE = -1e4f;  // log of a decay that is zero in float, also beside others

inline void zero(float* x, int64_t n) { std::memset(x, 0, n * sizeof(float)); }

// Rows of the unit matrix, and ones left of the diagonal.
struct Masks {
    float one[STEPS][STEPS] = {}, below[STEPS][STEPS] = {};
    constexpr Masks() {
        for (int i = 0; i < STEPS; ++i) {
            one[i][i] = 1;
            for (int j = 0; j < i; ++j) below[i][j] = 1;
        }
    }
};
constexpr Masks MASKS;

// out = (I - lower diag(beta))^-1 for the strictly lower triangular block of STEPS steps.
[[gnu::noinline]] void unit_inverse(const float* lower, int64_t ld, const float* beta, float* out) {
    Lanes x[STEPS];
#pragma GCC unroll 16
    for (int i = 0; i < STEPS; ++i) x[i] = at(MASKS.one[i]);
#pragma GCC unroll 16
    for (int j = 0; j < STEPS; ++j) {
#pragma GCC unroll 16
        for (int i = j + 1; i < STEPS; ++i) x[i] += (lower[i * ld + j] * beta[j]) * x[j];
    }
    for (int i = 0; i < STEPS; ++i) at(out + i * STEPS) = x[i];
}

// Scores of one block of STEPS steps with itself, one decay a channel; ct (K, STEPS) is left decayed to its end.
template <bool SHIFTED>
[[gnu::noinline]] void block_scores(int64_t K, const float* q, const float* r, const float* a, float* ct, int64_t ldt,
                                    float* AQ, float* AR, int64_t ld) {
    constexpr int HALF = STEPS / 2;
    for (int half = 0; half < 2; ++half) {
        const int from = half * HALF;
        Lanes reads_q[HALF] = {}, reads_r[HALF] = {};
        for (int64_t d = 0; d < K; ++d) {
            const Lanes raw = at(ct + d * ldt);
            Lanes y = half ? raw * at(MASKS.below[HALF]) : Lanes{};
#pragma GCC unroll 8
            for (int i = 0; i < HALF; ++i) {
                const int64_t here = (from + i) * K + d;
                if (SHIFTED) reads_r[i] += r[here] * y;
                y = a[here] * y + raw * at(MASKS.one[from + i]);
                if (!SHIFTED) reads_r[i] += r[here] * y;
                reads_q[i] += q[here] * y;
            }
            at(ct + d * ldt) = half ? y : y + raw * (1.0f - at(MASKS.below[HALF]));
        }
        for (int i = 0; i < HALF; ++i) {
            at(AQ + (from + i) * ld) = reads_q[i];
            at(AR + (from + i) * ld) = reads_r[i] * at(MASKS.below[from + i]);
        }
    }
}

// The gradients of `block_scores`, added to dq, dr, dc and dg (STEPS, K).
template <bool SHIFTED>
[[gnu::noinline]] void block_scores_backward(int64_t K, const float* q, const float* r, const float* c, const float* a,
                                             const float* dAQ, const float* dAR, int64_t ld, float* dq, float* dr,
                                             float* dc, float* dg) {
    for (int64_t d = 0; d < K; d += STEPS)
        for (int j = 0; j < STEPS; ++j) {
            Lanes y[STEPS];
            y[j] = at(c + j * K + d);
            at(dq + j * K + d) += dAQ[j * ld + j] * y[j];
            for (int i = j + 1; i < STEPS; ++i) {
                const int64_t here = i * K + d;
                y[i] = y[i - 1] * at(a + here);
                at(dq + here) += dAQ[i * ld + j] * y[i];
                at(dr + here) += dAR[i * ld + j] * y[SHIFTED ? i - 1 : i];
            }
            Lanes z{};
            for (int i = STEPS - 1; i > j; --i) {
                const int64_t here = i * K + d;
                z += dAQ[i * ld + j] * at(q + here);
                if (!SHIFTED) z += dAR[i * ld + j] * at(r + here);
                at(dg + here) += z * y[i];
                z *= at(a + here);
                if (SHIFTED) z += dAR[i * ld + j] * at(r + here);
            }
            at(dc + j * K + d) += z + dAQ[j * ld + j] * at(q + j * K + d);
        }
}

// What one call gives and wants. Absent: null. Gradients of q and k have `parts` times G groups, to be summed.
struct Call {
    const float *q, *k, *v, *a, *b, *beta, *g, *state;
    const bool* resets;
    float *o, *last, *states;
    const float *kept, *d_o, *d_last;  // kept: `states` of the forward pass
    float *d_q, *d_k, *d_v, *d_a, *d_b, *d_beta, *d_g, *d_state;
    int64_t B, T, G, H, K, V, C, parts, spans;
    float scale;
    int64_t chunks() const { return (T + C - 1) / C; }
};

// One head at a time. CHANNEL: one decay a channel, else one a head or none. DPLR: see above (with CHANNEL only).
template <bool CHANNEL, bool DPLR>
struct Head {
    static constexpr int WRITES = DPLR ? 2 : 1;
    const Call& call;
    const int64_t K, V, C;  // filled up
    int64_t b = 0, h = 0, from = 0, steps = 0, n = 0;  // the chunk: its first step, its steps, the same filled up
    int64_t next_from = 0, next_h = 0;                 // the chunk that is entered after it
    zoo::Scratch scratch;

    float *q, *r, *c[WRITES], *v, *beta;        // (C, K), (C, V), (C): as given, q scaled
    float *q_start, *r_start, *ct_end[WRITES];  // (C, K) decayed since the chunk's start; (K, C) until its end
    float *AQ[WRITES], *AR[WRITES];             // (C, C)
    float *total;                               // (K)
    float *D, *E, *X;                           // one a head: (C, C), (C), (C)
    float *a, *e, *x, *q_block, *r_block;       // one a channel: (C, K), since and until the ends of blocks of STEPS
    float *before, *through;                    // and from block to block: (C / STEPS + 1, K), (C / STEPS, K)
    float *inverse, *w, *u, *right, *out, *S;   // (C, STEPS), (C, V) four times, (K, V)
    bool decays_known = false;

    // The backward pass alone.
    float *P, *d_o, *y, *z, *ut, *St, *Pt;  // (K, V), (C, V) three times, transposes of u, S and P
    float *dAQ[WRITES], *dAR[WRITES], *d_q_start, *d_r_start, *d_c_end[WRITES];  // as above, d_c_end (C, K)
    float *d_q, *d_r, *d_c[WRITES], *d_g, *along_total, *stages, *d_through, *d_q_block, *d_r_block;

    static int64_t size(int64_t K, int64_t V, int64_t C) {
        return 26 * C * K + 10 * C * V + 10 * C * C + 5 * K * V + C / STEPS * C * K + 64 * (K + V + C + STEPS);
    }

    Head(const Call& call, bool backward)
        : call(call),
          K(padded(call.K)),
          V(padded(call.V)),
          C(padded(call.C)),
          scratch(size(K, V, C)) {
        zero(scratch.take(0), size(K, V, C));
        for (float** each : {&q, &r, &q_start, &r_start}) *each = scratch.take(C * K);
        for (int i = 0; i < WRITES; ++i) {
            c[i] = scratch.take(C * K), ct_end[i] = scratch.take(K * C);
            AQ[i] = scratch.take(C * C), AR[i] = scratch.take(C * C);
        }
        for (float** each : {&v, &w, &u, &right, &out}) *each = scratch.take(C * V);
        for (float** each : {&beta, &E, &X}) *each = scratch.take(C);
        total = scratch.take(K), D = scratch.take(C * C), inverse = scratch.take(C * STEPS), S = scratch.take(K * V);
        for (float** each : {&a, &e, &x, &q_block, &r_block}) *each = CHANNEL ? scratch.take(C * K) : nullptr;
        before = scratch.take((C / STEPS + 1) * K), through = scratch.take(C / STEPS * K);
        if (!backward) return;
        for (float** each : {&d_o, &y, &z, &ut}) *each = scratch.take(C * V);
        for (float** each : {&P, &St, &Pt}) *each = scratch.take(K * V);
        for (float** each : {&d_q_start, &d_r_start, &d_q, &d_r, &d_g, &d_q_block, &d_r_block})
            *each = scratch.take(C * K);
        for (int i = 0; i < WRITES; ++i) {
            dAQ[i] = scratch.take(C * C), dAR[i] = scratch.take(C * C);
            d_c_end[i] = scratch.take(C * K), d_c[i] = scratch.take(C * K);
        }
        along_total = scratch.take(K), d_through = scratch.take(C / STEPS * K);
        stages = CHANNEL ? scratch.take(C / STEPS * C * K / 2) : nullptr;
    }

    int64_t blocks() const { return n / STEPS; }
    int64_t group() const { return h / (call.H / call.G); }
    int64_t step(int64_t i) const { return b * call.T + from + i; }

    // (steps, width) of the chunk out of x (B, T, heads, width), times `factor`, zeros below; those that come next are
    // called into the cache.
    void fetch(const float* x, int64_t heads, int64_t width, float factor, float* out, int64_t ld) const {
        const int64_t stride = heads * width, share = call.H / heads;
        const float* in = x + (step(0) * heads + h / share) * width;
        const int64_t ahead = (next_from - from) * stride + (next_h / share - h / share) * width;
        const int64_t whole = width / STEPS * STEPS;
        for (int64_t i = 0; i < steps; ++i, in += stride, out += ld) {
            for (int64_t d = 0; d < whole; d += STEPS) {
                at(out + d) = factor * at(in + d);
                __builtin_prefetch(in + ahead + d);
            }
            for (int64_t d = whole; d < ld; ++d) out[d] = d < width ? factor * in[d] : 0.0f;
        }
        zero(out, (n - steps) * ld);
    }

    template <bool ADD>
    void put(const float* in, int64_t ld, float factor, float* out, int64_t stride, int64_t width) const {
        const int64_t whole = width / STEPS * STEPS;
        for (int64_t i = 0; i < steps; ++i, in += ld, out += stride) {
            for (int64_t d = 0; d < whole; d += STEPS)
                at(out + d) = (ADD ? at(out + d) : Lanes{}) + factor * at(in + d);
            for (int64_t d = whole; d < width; ++d) out[d] = (ADD ? out[d] : 0.0f) + factor * in[d];
        }
    }

    float* of_head(float* x, int64_t width) const { return x + (step(0) * call.H + h) * width; }

    // Everything of a chunk that needs no state.
    void enter(int64_t chunk) {
        from = chunk * call.C;
        steps = call.T - from < call.C ? call.T - from : call.C;
        n = padded(steps);
        fetch(call.q, call.G, call.K, call.scale, q, K);
        fetch(call.k, call.G, call.K, 1.0f, c[WRITES - 1], K);
        fetch(call.v, call.H, call.V, 1.0f, v, V);
        if (DPLR) {
            fetch(call.a, call.H, call.K, 1.0f, r, K);
            fetch(call.b, call.H, call.K, 1.0f, c[0], K);
            for (int64_t i = 0; i < n; ++i) beta[i] = 1.0f;
        } else {
            for (int64_t i = 0; i < n * K; i += STEPS) at(r + i) = -at(c[0] + i);
            for (int64_t i = 0; i < n; ++i) beta[i] = i < steps ? call.beta[step(i) * call.H + h] : 0.0f;
        }
        for (int w = 0; w < WRITES; ++w) transposed(n, K, c[w], K, ct_end[w], C);
        if (CHANNEL)
            enter_channels();
        else
            enter_head();
    }

    bool reset(int64_t i) const { return i < steps && call.resets && call.resets[step(i)]; }

    void enter_head() {
        if (!decays_known || call.g || call.resets) find_decays();
        for (int64_t i = 0; i < n; ++i) {
            const int64_t width = i / STEPS * STEPS + STEPS;
            if (i % STEPS == 0) {
                product(STEPS, width, K, q + i * K, K, ct_end[0], C, AQ[0] + i * C, C);
                product(STEPS, width, K, r + i * K, K, ct_end[0], C, AR[0] + i * C, C);
            }
            for (int64_t j = 0; j < width; j += STEPS) {
                at(AQ[0] + i * C + j) *= at(D + i * C + j);
                at(AR[0] + i * C + j) *= at(D + i * C + j);
            }
            AR[0][i * C + i] = 0;
            for (int64_t d = 0; d < K; d += STEPS) {
                at(q_start + i * K + d) = E[i] * at(q + i * K + d);
                at(r_start + i * K + d) = E[i] * at(r + i * K + d);
            }
        }
        for (int64_t d = 0; d < K; ++d)
            for (int64_t j = 0; j < n; j += STEPS) at(ct_end[0] + d * C + j) *= at(X + j);
    }

    // D, E, X and total, by blocks of STEPS steps: inside a block and from its ends running products, and from block to
    // block the exponential of a sum.
    void find_decays() {
        float start = 1.0f;
        for (int64_t m = 0; m < n; m += STEPS) {
            float g[STEPS], sum = 0;
            for (int64_t i = 0; i < STEPS; ++i) {
                g[i] = call.g && m + i < steps ? call.g[step(m + i) * call.H + h] : 0.0f;
                if (reset(m + i) || g[i] < GONE) g[i] = GONE;
                sum += g[i];
            }
            for (int64_t i = 0; i < STEPS; ++i) g[i] = zoo::exp(g[i]);
            const float whole = zoo::exp(sum);
            Lanes inside{};
            float since = 1.0f;
            for (int64_t i = 0; i < STEPS; ++i) {
                float* row = D + (m + i) * C;
                inside = g[i] * inside + at(MASKS.one[i]), since *= g[i];
                for (int64_t j = 0; j < m; j += STEPS) at(row + j) = since * at(X + j);
                at(row + m) = inside;
                E[m + i] = start * since;
            }
            for (int64_t j = 0; j < m; j += STEPS) at(X + j) *= whole;
            at(X + m) = inside;
            start *= whole;
        }
        for (int64_t d = 0; d < K; d += STEPS) at(total + d) = zoo::splat<Lanes>(start);
        decays_known = n == C;
    }

    // By blocks of STEPS steps: decays since the block's start and until its end are running products; from block to
    // block the writes of all earlier steps are decayed on, so that they always stand at the end of the block before.
    void enter_channels() {
        fetch(call.g, call.H, call.K, 1.0f, a, K);
        for (int64_t d = 0; d < K; ++d) before[d] = 1.0f;
        for (int64_t m = 0; m < blocks(); ++m) {
            float *here = a + m * STEPS * K, *whole = through + m * K;
            for (int64_t d = 0; d < K; d += STEPS) {
                Lanes sum{};
                for (int64_t i = 0; i < STEPS; ++i) {
                    const Lanes g = at(here + i * K + d);
                    sum += at(here + i * K + d) = reset(m * STEPS + i) ? zoo::splat<Lanes>(GONE) : g < GONE ? zoo::splat<Lanes>(GONE) : g;
                }
                at(whole + d) = sum;
            }
            for (int64_t d = 0; d < K; ++d) whole[d] = zoo::exp(whole[d]);
            for (int64_t i = 0; i < STEPS * K; ++i) here[i] = zoo::exp(here[i]);
            for (int64_t d = 0; d < K; d += STEPS) {
                Lanes since = zoo::splat<Lanes>(1.0f), last{};
                const Lanes start = at(before + m * K + d);
                for (int64_t i = m * STEPS; i < (m + 1) * STEPS; ++i) {
                    last = since, since *= at(a + i * K + d);
                    at(e + i * K + d) = since;
                    at(q_block + i * K + d) = since * at(q + i * K + d);
                    at(r_block + i * K + d) = (DPLR ? last : since) * at(r + i * K + d);
                    at(q_start + i * K + d) = start * at(q_block + i * K + d);
                    at(r_start + i * K + d) = start * at(r_block + i * K + d);
                }
                at(before + (m + 1) * K + d) = start * at(whole + d);
            }
            for (int w = 0; w < WRITES; ++w) {
                const int64_t row = m * STEPS * K, square = m * STEPS * C, corner = square + m * STEPS;
                block_scores<DPLR>(K, q + row, r + row, a + row, ct_end[w] + m * STEPS, C, AQ[w] + corner,
                                   AR[w] + corner, C);
                product(STEPS, m * STEPS, K, q_block + row, K, ct_end[w], C, AQ[w] + square, C);
                product(STEPS, m * STEPS, K, r_block + row, K, ct_end[w], C, AR[w] + square, C);
                for (int64_t d = 0; d < K; ++d)
                    for (int64_t j = 0; j < m * STEPS; j += STEPS) at(ct_end[w] + d * C + j) *= whole[d];
            }
        }
        std::memcpy(total, before + blocks() * K, K * sizeof(float));
    }

    // w and u from the state before the chunk.
    void solve() {
        product(n, V, K, r_start, K, S, V, w, V);
        for (int64_t m = 0; m < blocks(); ++m) {
            const int64_t row = m * STEPS, square = row * C;
            float *here = w + row * V, *solved = inverse + row * STEPS;
            if (DPLR)
                product<true>(STEPS, V, row + STEPS, AR[1] + square, C, v, V, here, V);
            else
                for (int64_t i = 0; i < STEPS * V; i += STEPS) at(here + i) += at(v + row * V + i);
            product<true>(STEPS, V, row, AR[0] + square, C, u, V, here, V);
            unit_inverse(AR[0] + square + row, C, beta + row, solved);
            product(STEPS, V, STEPS, solved, STEPS, here, V, right, V);
            for (int64_t i = 0; i < STEPS; ++i)
                for (int64_t d = 0; d < V; d += STEPS) {
                    const Lanes x = at(right + i * V + d);
                    at(here + i * V + d) = x, at(u + (row + i) * V + d) = beta[row + i] * x;
                }
        }
    }

    // The heads of a span take turns chunk by chunk, so that what lies side by side in memory is read at one time. `all`
    // (heads, K, V) holds their states.
    void forward(int64_t batch, int64_t first, int64_t last, float* all) {
        b = batch;
        decays_known = false;
        for (h = first; h < last; ++h)
            zoo::load_block(all + (h - first) * K * V, K, call.state + mine(), call.V, call.K, call.V);
        for (int64_t chunk = 0; chunk < call.chunks(); ++chunk)
            for (h = first; h < last; ++h) {
                S = all + (h - first) * K * V;
                next_h = h + 1 < last ? h + 1 : first;
                next_from = (h + 1 < last ? chunk : chunk + 1) * call.C;
                enter(chunk);
                if (call.states)
                    std::memcpy(call.states + ((b * call.H + h) * call.chunks() + chunk) * K * V, S,
                                K * V * sizeof(float));
                solve();
                product(n, V, K, q_start, K, S, V, out, V);
                for (int64_t m = 0; m < n; m += STEPS) {
                    product<true>(STEPS, V, m + STEPS, AQ[0] + m * C, C, u, V, out + m * V, V);
                    if (DPLR) product<true>(STEPS, V, m + STEPS, AQ[1] + m * C, C, v, V, out + m * V, V);
                }
                put<false>(out, V, 1.0f, of_head(call.o, call.V), call.H * call.V, call.V);
                decay_state(S);
                product<true>(K, V, n, ct_end[0], C, u, V, S, V);
                if (DPLR) product<true>(K, V, n, ct_end[1], C, v, V, S, V);
            }
        for (h = first; h < last; ++h)
            zoo::store_block(all + (h - first) * K * V, call.last + mine(), call.V, call.K, call.V);
    }

    // Where the head's state is among those of all.
    int64_t mine() const { return (b * call.H + h) * call.K * call.V; }

    void decay_state(float* state) const {
        for (int64_t i = 0; i < K; ++i)
            for (int64_t d = 0; d < V; d += STEPS) at(state + i * V + d) *= total[i];
    }

    // `first`: the group's gradients are written, else added to.
    void backward(int64_t batch, int64_t head, int64_t part, bool first) {
        b = batch, h = head;
        decays_known = false;
        const int64_t index = b * call.H + h, mine = index * call.K * call.V;
        for (int64_t i = 0; i < call.K; ++i)
            for (int64_t d = 0; d < call.V; ++d) P[i * V + d] = call.d_last[mine + i * call.V + d];
        next_h = h;
        for (int64_t chunk = call.chunks() - 1; chunk >= 0; --chunk) {
            next_from = (chunk - 1) * call.C;
            enter(chunk);
            std::memcpy(S, call.kept + (index * call.chunks() + chunk) * K * V, K * V * sizeof(float));
            fetch(call.d_o, call.H, call.V, 1.0f, d_o, V);
            solve();
            solve_backward();
            scores_backward();
            if (CHANNEL)
                leave_channels();
            else
                leave_head();
            store(part, first);
        }
        for (int64_t i = 0; i < call.K; ++i)
            for (int64_t d = 0; d < call.V; ++d) call.d_state[mine + i * call.V + d] = P[i * V + d];
    }

    // z, the gradient of u with all that it reaches, and y = beta z, that of w; those of v and beta.
    void solve_backward() {
        product_tn(n, V, K, ct_end[0], C, P, V, z, V);
        for (int64_t m = n - STEPS; m >= 0; m -= STEPS) {
            float *here = z + m * V, *solved = y + m * V;
            product_tn<true>(STEPS, V, n - m, AQ[0] + m * C + m, C, d_o + m * V, V, here, V);
            product_tn<true>(STEPS, V, n - m - STEPS, AR[0] + (m + STEPS) * C + m, C, y + (m + STEPS) * V, V, here, V);
            for (int64_t i = 0; i < STEPS; ++i)
                for (int64_t d = 0; d < V; d += STEPS) at(right + i * V + d) = beta[m + i] * at(here + i * V + d);
            product_tn(STEPS, V, STEPS, inverse + m * STEPS, STEPS, right, V, solved, V);
            if (!DPLR) product_tn<true>(STEPS, V, STEPS, AR[0] + m * C + m, C, solved, V, here, V);
        }
        float* d_v = y;
        if (DPLR) {
            d_v = out;
            product_tn(n, V, K, ct_end[1], C, P, V, d_v, V);
            for (int64_t m = 0; m < n; m += STEPS) {
                product_tn<true>(STEPS, V, n - m, AQ[1] + m * C + m, C, d_o + m * V, V, d_v + m * V, V);
                product_tn<true>(STEPS, V, n - m, AR[1] + m * C + m, C, y + m * V, V, d_v + m * V, V);
            }
        } else
            for (int64_t i = 0; i < steps; ++i) call.d_beta[step(i) * call.H + h] = dot(z + i * V, w + i * V, V);
        put<false>(d_v, V, 1.0f, of_head(call.d_v, call.V), call.H * call.V, call.V);
    }

    // The gradients of all scores, of decayed q, r and c, and of the state.
    void scores_backward() {
        transposed(K, V, S, V, St, K), transposed(K, V, P, V, Pt, K);
        product(n, K, V, d_o, V, St, K, d_q_start, K);
        product(n, K, V, y, V, St, K, d_r_start, K);
        for (int w = 0; w < WRITES; ++w) {
            const float* written = w ? v : u;
            transposed(n, V, written, V, ut, C);
            for (int64_t m = 0; m < n; m += STEPS) {
                product(STEPS, m + STEPS, V, d_o + m * V, V, ut, C, dAQ[w] + m * C, C);
                product(STEPS, m + STEPS, V, y + m * V, V, ut, C, dAR[w] + m * C, C);
                for (int64_t i = 0; i < STEPS; ++i) {
                    at(dAQ[w] + (m + i) * C + m) *= at(MASKS.below[i]) + at(MASKS.one[i]);
                    at(dAR[w] + (m + i) * C + m) *= at(MASKS.below[i]);
                }
            }
            product(n, K, V, written, V, Pt, K, d_c_end[w], K);
        }
        for (int64_t d = 0; d < K; ++d) along_total[d] = total[d] * dot(P + d * V, S + d * V, V);
        decay_state(P);
        product_tn<true>(K, V, n, q_start, K, d_o, V, P, V);
        product_tn<true>(K, V, n, r_start, K, y, V, P, V);
    }

    void leave_head() {
        if (call.d_g) {
            float whole = 0, inflow = 0, outflow = 0;  // of paths through the chunk, ending in it, starting in it
            for (int64_t d = 0; d < K; ++d) whole += along_total[d];
            zero(w, C);
            for (int64_t t = n - 1; t >= 0; --t) {
                inflow += dot(q_start + t * K, d_q_start + t * K, K) + dot(r_start + t * K, d_r_start + t * K, K);
                Lanes crossing{};  // pairs (i, j) with j < t <= i
                for (int64_t j = 0; j <= t / STEPS * STEPS; j += STEPS) {
                    const int64_t here = t * C + j;
                    at(w + j) += at(dAQ[0] + here) * at(AQ[0] + here) + at(dAR[0] + here) * at(AR[0] + here);
                    crossing += j + STEPS > t ? at(w + j) * at(MASKS.below[t - j]) : at(w + j);
                }
                d_g[t] = whole + inflow + sum(crossing);
            }
            for (int64_t t = 0; t < steps; ++t) {
                call.d_g[step(t) * call.H + h] = d_g[t] + outflow;
                outflow += X[t] * dot(c[0] + t * K, d_c_end[0] + t * K, K);
            }
        }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < i / STEPS * STEPS + STEPS; j += STEPS) {
                at(dAQ[0] + i * C + j) *= at(D + i * C + j);
                at(dAR[0] + i * C + j) *= at(D + i * C + j);
            }
        for (int64_t i = 0; i < n; ++i)
            for (int64_t d = i * K; d < (i + 1) * K; d += STEPS) {
                at(d_q + d) = E[i] * at(d_q_start + d), at(d_r + d) = E[i] * at(d_r_start + d);
                at(d_c[0] + d) = X[i] * at(d_c_end[0] + d);
            }
        for (int64_t m = 0; m < n; m += STEPS) {
            const int64_t corner = m * C + m;
            product<true>(STEPS, K, m + STEPS, dAQ[0] + m * C, C, c[0], K, d_q + m * K, K);
            product<true>(STEPS, K, m + STEPS, dAR[0] + m * C, C, c[0], K, d_r + m * K, K);
            product_tn<true>(STEPS, K, n - m, dAQ[0] + corner, C, q + m * K, K, d_c[0] + m * K, K);
            product_tn<true>(STEPS, K, n - m, dAR[0] + corner, C, r + m * K, K, d_c[0] + m * K, K);
        }
    }

    // Paths from a write (or the state before) to a read (or the state after) leave gradients at both of their ends and
    // in every decay between: where they end in a block, where they start in one, and where they pass right through it.
    void leave_channels() {
        for (float* each : {d_q_block, d_r_block, d_q, d_r, d_g}) zero(each, n * K);
        for (int64_t m = 0; m < blocks(); ++m) std::memcpy(d_through + m * K, along_total, K * sizeof(float));
        for (int w = 0; w < WRITES; ++w) {
            zero(d_c[w], n * K);
            for (int64_t m = 0; m < blocks(); ++m)  // x: until the block's end
                for (int64_t d = 0; d < K; d += STEPS) {
                    Lanes until = zoo::splat<Lanes>(1.0f);
                    for (int64_t i = (m + 1) * STEPS - 1; i >= m * STEPS; --i) {
                        at(x + i * K + d) = until;
                        until *= at(a + i * K + d);
                    }
                }
            float* stage = stages;  // c decayed to the end of the block before block m, for all earlier steps
            for (int64_t m = 1; m < blocks(); ++m) {
                const int64_t old = (m - 1) * STEPS * K;
                const float* last = stage - old;
                for (int64_t i = 0; i < old; i += K)
                    for (int64_t d = 0; d < K; d += STEPS)
                        at(stage + i + d) = at(last + i + d) * at(through + (m - 1) * K + d);
                for (int64_t i = old; i < m * STEPS * K; i += STEPS) at(stage + i) = at(x + i) * at(c[w] + i);
                const int64_t row = m * STEPS;
                product<true>(STEPS, K, row, dAQ[w] + row * C, C, stage, K, d_q_block + row * K, K);
                product<true>(STEPS, K, row, dAR[w] + row * C, C, stage, K, d_r_block + row * K, K);
                stage += row * K;
            }
            for (int64_t m = blocks() - 1; m >= 0; --m) {
                const int64_t row = m * STEPS;
                stage -= row * K;
                for (int64_t d = 0; d < K; d += STEPS) {
                    Lanes passing{};
                    const Lanes decay = at(through + m * K + d);
                    for (int64_t i = d; i < row * K; i += K) {
                        at(d_c_end[w] + i) *= decay;
                        passing += at(d_c_end[w] + i) * at(stage + i);
                    }
                    at(d_through + m * K + d) += passing;
                }
                product_tn<true>(row, K, STEPS, dAQ[w] + row * C, C, q_block + row * K, K, d_c_end[w], K);
                product_tn<true>(row, K, STEPS, dAR[w] + row * C, C, r_block + row * K, K, d_c_end[w], K);
                block_scores_backward<DPLR>(K, q + row * K, r + row * K, c[w] + row * K, a + row * K,
                                            dAQ[w] + row * C + row, dAR[w] + row * C + row, C, d_q + row * K,
                                            d_r + row * K, d_c[w] + row * K, d_g + row * K);
            }
            for (int64_t m = 0; m < blocks(); ++m)
                for (int64_t d = 0; d < K; d += STEPS) {
                    Lanes starting{};
                    for (int64_t i = m * STEPS * K + d; i < (m + 1) * STEPS * K; i += K) {
                        const Lanes decayed = at(x + i) * at(d_c_end[w] + i);
                        at(d_g + i) += starting;
                        starting += at(c[w] + i) * decayed;
                        at(d_c[w] + i) += decayed;
                    }
                }
        }
        for (int64_t d = 0; d < K; d += STEPS) {
            Lanes later{};  // from the state before to all reads after this block
            for (int64_t m = blocks() - 1; m >= 0; --m) {
                const Lanes start = at(before + m * K + d), through_it = at(d_through + m * K + d) + later;
                Lanes ending{};
                for (int64_t t = (m + 1) * STEPS - 1; t >= m * STEPS; --t) {
                    const int64_t i = t * K + d;
                    const Lanes since = at(e + i), since_r = !DPLR ? since : t > m * STEPS ? at(e + i - K) : zoo::splat<Lanes>(1.0f);
                    const Lanes from_start_q = start * at(d_q_start + i), from_start_r = start * at(d_r_start + i);
                    const Lanes dq = at(d_q_block + i) + from_start_q, dr = at(d_r_block + i) + from_start_r;
                    at(d_q + i) += since * dq, at(d_r + i) += since_r * dr;
                    ending += at(q_block + i) * dq;
                    if (!DPLR) ending += at(r_block + i) * dr;
                    at(d_g + i) += through_it + ending;
                    if (DPLR) ending += at(r_block + i) * dr;
                    later += at(q_block + i) * from_start_q + at(r_block + i) * from_start_r;
                }
            }
        }
    }

    void store(int64_t part, bool first) {
        const int64_t groups = call.G * call.parts, rows = (step(0) * groups + group() * call.parts + part) * call.K;
        if (DPLR) {
            put<false>(d_r, K, 1.0f, of_head(call.d_a, call.K), call.H * call.K, call.K);
            put<false>(d_c[0], K, 1.0f, of_head(call.d_b, call.K), call.H * call.K, call.K);
        } else
            for (int64_t i = 0; i < n * K; i += STEPS) at(d_c[0] + i) -= at(d_r + i);
        if (CHANNEL) put<false>(d_g, K, 1.0f, of_head(call.d_g, call.K), call.H * call.K, call.K);
        if (first) {
            put<false>(d_q, K, call.scale, call.d_q + rows, groups * call.K, call.K);
            put<false>(d_c[WRITES - 1], K, 1.0f, call.d_k + rows, groups * call.K, call.K);
        } else {
            put<true>(d_q, K, call.scale, call.d_q + rows, groups * call.K, call.K);
            put<true>(d_c[WRITES - 1], K, 1.0f, call.d_k + rows, groups * call.K, call.K);
        }
    }
};

template <bool CHANNEL, bool DPLR>
void forward(const Call& call) {
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        Head<CHANNEL, DPLR> head(call, false);
        zoo::Scratch states((call.H + call.spans - 1) / call.spans * head.K * head.V);
        float* all = states.take(0);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call.B * call.spans; ++i) {
            const int64_t span = i % call.spans;
            head.forward(i / call.spans, span * call.H / call.spans, (span + 1) * call.H / call.spans, all);
        }
    }
}

template <bool CHANNEL, bool DPLR>
void backward(const Call& call) {
    const int64_t tasks = call.B * call.G * call.parts, heads = call.H / (call.G * call.parts);
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        Head<CHANNEL, DPLR> head(call, true);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < tasks; ++i) {
            const int64_t b = i / (call.G * call.parts), first = i % (call.G * call.parts) * heads;
            for (int64_t h = first; h < first + heads; ++h) head.backward(b, h, i % call.parts, h == first);
        }
    }
}

}  // namespace

static Call sized(int64_t B, int64_t T, int64_t G, int64_t H, int64_t K, int64_t V, int64_t C, int64_t parts,
                  double scale) {
    Call call{};
    call.B = B, call.T = T, call.G = G, call.H = H, call.K = K, call.V = V, call.C = C, call.parts = parts;
    call.scale = static_cast<float>(scale);
    return call;
}

// C: steps a chunk; spans: tasks that the heads of a row are cut into. With a and b: DPLR, with one decay a channel.
extern "C" void delta_forward(const float* q, const float* k, const float* v, const float* beta, const float* a,
                              const float* b, const float* g, const float* state, const bool* resets, float* o,
                              float* last, float* states, int64_t B, int64_t T, int64_t G, int64_t H, int64_t K,
                              int64_t V, int64_t C, int64_t spans, int64_t per_channel, double scale) {
    Call call = sized(B, T, G, H, K, V, C, 1, scale);
    call.spans = spans;
    call.q = q, call.k = k, call.v = v, call.beta = beta, call.a = a, call.b = b, call.g = g, call.state = state;
    call.resets = resets, call.o = o, call.last = last, call.states = states;
    a ? forward<true, true>(call) : per_channel ? forward<true, false>(call) : forward<false, false>(call);
}
ZOO_EXPORT(delta_forward)

// d_q and d_k have `parts` times G groups, to be summed.
extern "C" void delta_backward(const float* q, const float* k, const float* v, const float* beta, const float* a,
                               const float* b, const float* g, const bool* resets, const float* states,
                               const float* d_o, const float* d_last, float* d_q, float* d_k, float* d_v, float* d_beta,
                               float* d_a, float* d_b, float* d_g, float* d_state, int64_t B, int64_t T, int64_t G,
                               int64_t H, int64_t K, int64_t V, int64_t C, int64_t parts, int64_t per_channel,
                               double scale) {
    Call call = sized(B, T, G, H, K, V, C, parts, scale);
    call.q = q, call.k = k, call.v = v, call.beta = beta, call.a = a, call.b = b, call.g = g, call.resets = resets;
    call.kept = states, call.d_o = d_o, call.d_last = d_last, call.d_q = d_q, call.d_k = d_k, call.d_v = d_v;
    call.d_beta = d_beta, call.d_a = d_a, call.d_b = d_b, call.d_g = d_g, call.d_state = d_state;
    a ? backward<true, true>(call) : per_channel ? backward<true, false>(call) : backward<false, false>(call);
}
ZOO_EXPORT(delta_backward)

ZOO_SIZES({"STEPS", STEPS})
