// Linear attention with a decay a channel, the delta rule and DPLR over whole sequences without gradients, FEW steps at a
// time: S_t = diag(exp g_t) S_{t-1} + what is written, o_t = scale S_t^T q_t. Linear attention writes k v^T, the delta rule
// k u^T with u = beta (v - k^T of the decayed S), DPLR, which reads before it decays, b u^T + k v^T with u = a^T S.
//
// The state of a head stays in the nearest caches. FEW steps read it at once, settle among themselves what they write,
// and write it at once. Where states are small, that is less work than the products of `delta.cpp` and
// `linear_attention.cpp`, whose chunks are longer, and its results have a quarter of the roundings of single steps.
//
// A task is a span of heads in one row of the batch, which take turns block by block, so that what lies side by side in
// memory is read at one time.
#include "blocks.h"
#include "kernel.h"

namespace {

using zoo::at;
using zoo::Lanes;
using zoo::LANES;
using zoo::load;
using zoo::splat;
using zoo::store;
using zoo::Vec;

enum Kind { LINEAR, DELTA, DPLR };

constexpr int64_t STEPS = 16, FEW = 4;  // of a block, and at once
#if defined(__AVX512F__)
constexpr int WIDEST = 2;  // vectors of columns at a time
#else
constexpr int WIDEST = 1;
#endif

struct Call {
    const float *q, *k, *v, *beta, *a, *b, *g, *state;
    const bool* resets;
    float *o, *last;
    int64_t B, T, G, H, K, V, spans, per_channel;
    int64_t q_row, q_step, k_row, k_step, v_row, v_step;  // strides of the batch and of time; heads lie close together
    float scale;
};

// FEW steps of one head: q and what they read the state for, r, (FEW, wide), decayed since the first one began; what they
// write to, c (b, or k where there is no b) and k, until the last one ends; `total` (wide) the decays of all.
struct Few {
    int64_t K, wide, width;  // rows of the state, the same filled up, columns filled up
    const float *q, *r, *c, *k, *v, *total, *beta;
    float *o, scale;
    // What step i reads for q (j <= i) at [i][j] and for r (j < i) at [j][i] of what step j wrote to c, and to k.
    alignas(64) float of_c[FEW][FEW], of_k[FEW][FEW];
};

// exp(g) rounded to a float. What rounding took away is left in `carry` for the next step's: the product of many decays
// would else be off by a rounding for each, all in one direction where they are equal. Fast ones are soon forgotten.
ZOO_INLINE Vec carried_exp(Vec g, Vec& carry) {
    Vec p = g * (1.0f / 5040) + 1.0f / 720;
    p = p * g + 1.0f / 120;
    p = p * g + 1.0f / 24;
    p = p * g + 1.0f / 6;
    p = p * g + 0.5f;
    p = p * g + 1.0f;
    const Vec rest = p * g + carry;  // exp(g) - 1
    const Vec slow = rest + 1.0f, left = rest - (slow - 1.0f);
    const Vec fast = g < -87.0f ? Vec{} : zoo::exp(g);
    const auto is_slow = g > -0.34f;
    carry = is_slow ? left : Vec{};
    return is_slow ? slow : fast;
}

// Decays what FEW steps write to, (FEW, wide), until the last one ends, and sets what they read of each other's.
template <Kind KIND>
void decay_written(const float* q, const float* r, const float* decays, float* c, int64_t wide, float* scores) {
    alignas(64) Lanes sums[FEW * FEW] = {};
    for (int64_t d = 0; d < wide; d += zoo::BLOCK_LANES) {
        Lanes written[FEW];
        for (int i = 0; i < FEW; ++i) {
            const Lanes decay = at(decays + i * wide + d), for_q = at(q + i * wide + d);
            for (int j = 0; j < i; ++j) {
                const Lanes before = written[j];
                written[j] *= decay;
                if (KIND != LINEAR) sums[j * FEW + i] += at(r + i * wide + d) * (KIND == DPLR ? before : written[j]);
            }
            written[i] = at(c + i * wide + d);
            for (int j = 0; j <= i; ++j) sums[i * FEW + j] += for_q * written[j];
        }
        for (int j = 0; j < FEW; ++j) at(c + j * wide + d) = written[j];
    }
    zoo::row_sums(reinterpret_cast<const float*>(sums), scores);
}

// Decays what FEW steps read the state for, likewise since the first one began, and multiplies their decays.
template <Kind KIND>
void decay_read(float* q, float* r, const float* decays, float* total, int64_t wide) {
    for (int64_t d = 0; d < wide; d += zoo::BLOCK_LANES) {
        Lanes since = splat<Lanes>(1.0f);
        for (int64_t i = d; i < FEW * wide; i += wide) {
            const Lanes before = since;
            since *= at(decays + i);
            at(q + i) *= since;
            if (KIND != LINEAR) at(r + i) *= KIND == DPLR ? before : since;
        }
        at(total + d) = since;
    }
}

// N vectors of columns of the state S (K, width) through FEW steps.
template <Kind KIND, int N>
[[gnu::noinline]] void columns(const Few& in, float* S, int64_t from) {
    const int64_t K = in.K, wide = in.wide, width = in.width;
    S += from;
    Vec o[FEW][N] = {}, u[FEW][N] = {}, v[FEW][N];
    for (int64_t i = 0; i < K; ++i)
        for (int c = 0; c < N; ++c) {
            const Vec s = load(S + i * width + c * LANES);
            for (int j = 0; j < FEW; ++j) {
                o[j][c] += in.q[j * wide + i] * s;
                if (KIND != LINEAR) u[j][c] += in.r[j * wide + i] * s;
            }
        }
    for (int i = 0; i < FEW; ++i)
        for (int c = 0; c < N; ++c) {
            v[i][c] = load(in.v + i * width + from + c * LANES);
            for (int j = 0; KIND != LINEAR && j < i; ++j) {
                u[i][c] += in.of_c[j][i] * u[j][c];
                if (KIND == DPLR) u[i][c] += in.of_k[j][i] * v[j][c];
            }
            if (KIND == LINEAR) u[i][c] = v[i][c];
            if (KIND == DELTA) u[i][c] = in.beta[i] * (v[i][c] + u[i][c]);
            for (int j = 0; j <= i; ++j) {
                o[i][c] += in.of_c[i][j] * u[j][c];
                if (KIND == DPLR) o[i][c] += in.of_k[i][j] * v[j][c];
            }
            store(in.o + i * width + from + c * LANES, in.scale * o[i][c]);
        }
    for (int64_t i = 0; i < K; ++i)
        for (int c = 0; c < N; ++c) {
            float* to = S + i * width + c * LANES;
            Vec written = in.c[i] * u[0][c];
            for (int j = 1; j < FEW; ++j) written += in.c[j * wide + i] * u[j][c];
            for (int j = 0; KIND == DPLR && j < FEW; ++j) written += in.k[j * wide + i] * v[j][c];
            store(to, in.total[i] * load(to) + written);
        }
}

template <Kind KIND>
void all_columns(const Few& in, float* S) {
    int64_t from = 0;
    for (; from + WIDEST * LANES <= in.width; from += WIDEST * LANES) columns<KIND, WIDEST>(in, S, from);
    for (; from < in.width; from += LANES) columns<KIND, 1>(in, S, from);
}

// The heads of a span in one row, block by block.
template <Kind KIND>
struct Span {
    const Call& call;
    const int64_t R, K, V, most;  // heads of a group; rows and columns of a state, and heads of a span, filled up
    zoo::Scratch scratch;
    float *states, *carries, *decay, *beta, *decays, *total, *q, *k, *v, *a, *b, *o, *q_head, *k_head;

    static int64_t floats(int64_t heads, int64_t K, int64_t V) {
        return heads * (K * V + K + STEPS * (2 + 5 * K + 2 * V)) + (2 * STEPS + 1) * K;
    }

    explicit Span(const Call& call)
        : call(call),
          R(call.H / call.G),
          K(zoo::padded(call.K)),
          V(zoo::padded(call.V)),
          most(zoo::padded((call.H + call.spans - 1) / call.spans)),
          scratch(floats(most, K, V)) {
        states = scratch.take(most * K * V), carries = scratch.take(most * K);
        for (float** each : {&decay, &beta}) *each = scratch.take(most * STEPS);
        for (float** each : {&q, &k, &a, &b, &decays}) *each = scratch.take(most * STEPS * K);
        for (float** each : {&v, &o}) *each = scratch.take(most * STEPS * V);
        for (float** each : {&q_head, &k_head}) *each = scratch.take(STEPS * K);
        total = scratch.take(K);
    }

    bool reset(int64_t row, int64_t t) const { return call.resets && call.resets[row * call.T + t]; }

    // decay and beta (heads, STEPS) of one block; steps beyond its end neither decay nor write.
    void steps_of_heads(int64_t row, int64_t t, int64_t n, int64_t first, int64_t heads) {
        std::fill(decay, decay + most * STEPS, 1.0f);
        if (n < STEPS) std::fill(beta, beta + most * STEPS, 0.0f);
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = (row * call.T + t + i) * call.H + first;
            for (int64_t h = 0; KIND == DELTA && h < heads; ++h) beta[h * STEPS + i] = call.beta[at + h];
            for (int64_t h = 0; call.g && !call.per_channel && h < heads; h += LANES) {
                const int64_t some = std::min<int64_t>(LANES, heads - h);
                Vec carry = load(carries + h);
                float lanes[LANES];
                store(lanes, carried_exp(load<float>(call.g + at + h, some), carry));
                store(carries + h, carry);
                for (int64_t l = 0; l < some; ++l) decay[(h + l) * STEPS + i] = lanes[l];
            }
        }
    }

    // decays (STEPS, K) of one head: from its log decays, or one for all channels.
    void decays_of(int64_t row, int64_t t, int64_t n, const float* one, float* decays, float* carry) {
        for (int64_t d = 0; call.per_channel && d < K; d += LANES) {
            Vec left = load(carry + d);
            for (int64_t i = d; i < STEPS * K; i += K) store(decays + i, carried_exp(load(decays + i), left));
            store(carry + d, left);
        }
        for (int64_t i = 0; i < STEPS; ++i) {
            const bool blank = i < n && reset(row, t + i);
            if (blank || !call.per_channel) std::fill(decays + i * K, decays + (i + 1) * K, blank ? 0.0f : one[i]);
        }
    }

    void run(int64_t row, int64_t first, int64_t end) {
        const int64_t heads = end - first, head = row * call.H + first, size = call.K * call.V;
        const int64_t group = first / R, groups = (end - 1) / R + 1 - group;
        std::fill(carries, carries + most * K, 0.0f);
        for (int64_t h = 0; h < heads; ++h)
            zoo::load_block(states + h * K * V, K, call.state + (head + h) * size, call.V, call.K, call.V);
        for (int64_t t = 0; t < call.T; t += STEPS) {
            const int64_t n = std::min(STEPS, call.T - t), at = (row * call.T + t) * call.H + first;
            const auto rows = [&](const float* x, int64_t stride, int64_t count, int64_t width, float* blocks) {
                zoo::load_rows(x, stride, n, count, width, STEPS, blocks);
            };
            rows(call.q + row * call.q_row + t * call.q_step + group * call.K, call.q_step, groups, call.K, q);
            rows(call.k + row * call.k_row + t * call.k_step + group * call.K, call.k_step, groups, call.K, k);
            rows(call.v + row * call.v_row + t * call.v_step + first * call.V, call.v_step, heads, call.V, v);
            if (call.per_channel) rows(call.g + at * call.K, call.H * call.K, heads, call.K, decays);
            if (KIND == DPLR) rows(call.a + at * call.K, call.H * call.K, heads, call.K, a);
            if (KIND == DPLR) rows(call.b + at * call.K, call.H * call.K, heads, call.K, b);
            steps_of_heads(row, t, n, first, heads);
            for (int64_t h = 0; h < heads; ++h) {
                const int64_t mine = h * STEPS, shared = ((first + h) / R - group) * STEPS * K;
                decays_of(row, t, n, decay + mine, decays + mine * K, carries + h * K);
                for (int64_t i = 0; i < n; i += FEW)
                    few(h, i, q + shared + i * K, k + shared + i * K, decays + (mine + i) * K);
            }
            zoo::store_rows(o, STEPS, call.o + at * call.V, call.H * call.V, n, heads, call.V);
        }
        for (int64_t h = 0; h < heads; ++h)
            zoo::store_block(states + h * K * V, call.last + (head + h) * size, call.V, call.K, call.V);
    }

    // FEW steps of a head from step i of the block on. A group's q and k are decayed by each of its heads.
    void few(int64_t h, int64_t i, const float* group_q, const float* group_k, const float* decays) {
        const int64_t mine = h * STEPS + i;
        float *r = a + mine * K, *write = KIND == DPLR ? b + mine * K : k_head;
        std::copy(group_q, group_q + FEW * K, q_head);
        std::copy(group_k, group_k + FEW * K, k_head);
        for (int64_t d = 0; KIND == DELTA && d < FEW * K; ++d) r[d] = -group_k[d];
        Few in{call.K, K, V, q_head, r, write, k_head, v + mine * V, total, beta + mine, o + mine * V, call.scale, {}, {}};
        decay_written<KIND>(q_head, r, decays, write, K, in.of_c[0]);
        if (KIND == DPLR) decay_written<KIND>(q_head, r, decays, k_head, K, in.of_k[0]);
        decay_read<KIND>(q_head, r, decays, total, K);
        all_columns<KIND>(in, states + h * K * V);
    }
};

template <Kind KIND>
void forward(const Call& call) {
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        Span<KIND> span(call);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < call.B * call.spans; ++i) {
            const int64_t part = i % call.spans;
            span.run(i / call.spans, part * call.H / call.spans, (part + 1) * call.H / call.spans);
        }
    }
}

}  // namespace

// q, k (B, T, G, K) and v (B, T, H, V) with strides; beta (B, T, H) for the delta rule; a, b (B, T, H, K) for DPLR; g
// (B, T, H), per_channel (B, T, H, K), or null; state (B, H, K, V); resets (B, T), o (B, T, H, V). a is zero where a
// document starts. spans: tasks that the heads of a row are cut into.
extern "C" void heads_pass(const float* q, const float* k, const float* v, const float* beta, const float* a,
                           const float* b, const float* g, const float* state, const bool* resets, float* o,
                           float* last, int64_t B, int64_t T, int64_t G, int64_t H, int64_t K, int64_t V, int64_t spans,
                           int64_t q_row, int64_t q_step, int64_t k_row, int64_t k_step, int64_t v_row, int64_t v_step,
                           int64_t per_channel, double scale) {
    const Call call{q, k, v, beta, a, b, g, state, resets, o, last, B, T, G, H, K, V, spans, per_channel,
                    q_row, q_step, k_row, k_step, v_row, v_step, static_cast<float>(scale)};
    a ? forward<DPLR>(call) : beta ? forward<DELTA>(call) : forward<LINEAR>(call);
}
ZOO_EXPORT(heads_pass)
