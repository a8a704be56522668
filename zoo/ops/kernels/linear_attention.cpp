// S_t = diag(exp g_t) S_{t-1} + k_t v_t^T, o_t = scale S_t^T q_t, forward and backward, block by block.
//
// With E_i the decay since the block's start, X_j that until its end, D_ij that from j to i and S the state before,
//   A_ij = D_ij q_i . k_j ;  o_i = S^T (E_i q_i) + sum_{j <= i} A_ij v_j ;  S' = E_C S + sum_j (X_j k_j) v_j^T,
// and with dS' the gradient of the state after the block, dA_ij = do_i . v_j (i >= j), dP = D dA:
//   dv = A^T do + X k dS' ;  dq = dP k + E do S^T ;  dk = dP^T q + X v dS'^T ;  dS = E_C dS' + (E q)^T do.
// The gradient of log_decay at step t gathers every product that contains its decay: A_ij dA_ij with j < t <= i, the
// reads of S at i >= t, the writes to S' at j < t, and <E_C S, dS'>. They are summed as they are, without differences.
//
// A unit is a share of the heads of one group: q k^T is formed once for its heads where the decay is one a head, and the
// gradients of q and k are summed over them. A task is a span of adjacent units in one row of the batch, all of which go
// through a block of steps before the next one: what lies side by side in memory is read at one time. (Head by head, the
// rows of a block lie H K numbers apart, and a forward pass with K = 32 and H = 8 took half as long again.) The backward
// pass goes over segments of blocks, each from its saved state.
#include "decays.h"
#include "kernel.h"

namespace {

using namespace zoo;

struct Shape {
    int64_t B, T, G, H, K, V;
    int64_t parts;    // units a group is cut into
    int64_t spans;    // tasks a row is cut into
    int64_t segment;  // steps between saved states, a multiple of a block
    int64_t q_row, q_step, k_row, k_step, v_row, v_step;  // strides of the batch and of time; heads lie close together
    float scale;

    int64_t wide_k() const { return padded(K); }
    int64_t wide_v() const { return padded(V); }
    int64_t saved() const { return (T - 1) / segment; }
};

// The heads of one unit.
struct Unit {
    int64_t group, part, first, n_heads;
    Unit(const Shape& s, int64_t index) {
        group = index / s.parts, part = index % s.parts;
        const int64_t R = s.H / s.G, from = part * R / s.parts, to = (part + 1) * R / s.parts;
        first = group * R + from, n_heads = to - from;
    }
    int64_t end() const { return first + n_heads; }
};

// The units of one task, and their heads, from `first` on.
struct Task {
    int64_t row, begin, end, first, n_heads;
    Task(const Shape& s, int64_t index) {
        const int64_t units = s.G * s.parts, span = index % s.spans;
        row = index / s.spans, begin = span * units / s.spans, end = (span + 1) * units / s.spans;
        first = Unit(s, begin).first, n_heads = Unit(s, end - 1).end() - first;
    }
    static int64_t most_heads(const Shape& s) {
        return (s.G * s.parts + s.spans - 1) / s.spans * ((s.H / s.G + s.parts - 1) / s.parts);
    }
};

// Decays of either kind, as both passes use them. Factors on the rows of a block (STEPS, width) may be left out.
template <int64_t C>
struct PerHead : HeadDecays<C> {
    static constexpr int64_t STEPS = C;
    static constexpr bool CHANNEL = false;
    float* whole;       // the block's decay, for every row of the state
    int64_t width;
    bool ones = false;  // neither decay nor reset
    static int64_t floats(int64_t width) { return width; }
    PerHead(Scratch& scratch, int64_t width) : whole(scratch.take(width)), width(width) {}
    void read(const float* g, const bool* resets, const Shape& s, int64_t row, int64_t t, int64_t head, int64_t n) {
        if (ones) return;
        this->fill(g ? g + (row * s.T + t) * s.H + head : nullptr, s.H, resets ? resets + row * s.T + t : nullptr, n);
        std::fill(whole, whole + width, this->total);
        ones = !g && !resets;
    }
    void prefetch(const float*, const Shape&, int64_t, int64_t, int64_t) const {}
    const float* since(const float* x, float* out, int64_t width) const { return rows(x, this->since_start, out, width); }
    const float* until(const float* x, float* out, int64_t width) const { return rows(x, this->until_end, out, width); }
    const float* rows(const float* x, const float* factor, float* out, int64_t width) const {
        if (ones) return x;
        for (int64_t i = 0; i < C; ++i)
            for (int64_t d = 0; d < width; ++d) out[i * width + d] = factor[i] * x[i * width + d];
        return out;
    }
};

struct PerChannel : ChannelDecays {
    static constexpr int64_t STEPS = ChannelDecays::C;
    static constexpr bool CHANNEL = true;
    float* whole;
    PerChannel(Scratch& scratch, int64_t width) : ChannelDecays(scratch, width), whole(total) {}
    void read(const float* g, const bool* resets, const Shape& s, int64_t row, int64_t t, int64_t head, int64_t n) {
        fill(g + ((row * s.T + t) * s.H + head) * s.K, s.H * s.K, resets ? resets + row * s.T + t : nullptr, n, s.K);
    }
    void prefetch(const float* g, const Shape& s, int64_t row, int64_t t, int64_t head) const {
        prefetch_block(g + ((row * s.T + t) * s.H + head) * s.K, s.H * s.K, STEPS, s.K);
    }
    const float* since(const float* x, float* out, int64_t width) const { return rows(x, since_start, out, width); }
    const float* until(const float* x, float* out, int64_t width) const { return rows(x, until_end, out, width); }
    const float* rows(const float* x, const float* factor, float* out, int64_t width) const {
        for (int64_t i = 0; i < STEPS * width; ++i) out[i] = factor[i] * x[i];
        return out;
    }
};

// A = D * (q k^T) from the products q k^T of the group, or with the decays of all channels inside.
template <int64_t C>
void scores(const PerHead<C>& decays, const float* products, const float*, const float*, int64_t, float* out) {
    for (int64_t i = 0; i < C * C; i += BLOCK_LANES)
        store(out + i, load<Lanes>(decays.pair + i) * load<Lanes>(products + i));
}
void scores(const PerChannel& decays, const float*, const float* q, const float* k, int64_t width, float* out) {
    channel_scores(width, q, k, decays.step, out);
}

template <typename Decays>
void forward(const Shape& s, const float* q, const float* k, const float* v, const float* g, const float* state,
             const bool* resets, float* o, float* last, float* saved) {
    constexpr int64_t C = Decays::STEPS;
    const int64_t K = s.wide_k(), V = s.wide_v(), heads = Task::most_heads(s);
#pragma omp parallel
    {
        FlushDenormals flush;
        Scratch scratch(5 * C * K + 2 * C * V + 2 * C * C + heads * K * V + Decays::floats(K));
        float *Q = scratch.take(C * K), *Key = scratch.take(C * K), *KeyT = scratch.take(C * K);
        float *Qe = scratch.take(C * K), *Kx = scratch.take(C * K), *Val = scratch.take(C * V);
        float *O = scratch.take(C * V), *P = scratch.take(C * C), *A = scratch.take(C * C);
        float* S = scratch.take(heads * K * V);
        Decays decays(scratch, K);
        std::fill(P, P + C * C, 0.0f);
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < s.B * s.spans; ++index) {
            const Task task(s, index);
            const auto state_of = [&](int64_t head) { return S + (head - task.first) * K * V; };
            const int64_t first = task.row * s.H;  // head of the row
            for (int64_t h = task.first; h < task.first + task.n_heads; ++h)
                load_block(state_of(h), K, state + (first + h) * s.K * s.V, s.V, s.K, s.V);
            for (int64_t t = 0; t < s.T; t += C)
                for (int64_t u = task.begin; u < task.end; ++u) {
                    const Unit unit(s, u);
                    const int64_t n = std::min(C, s.T - t);
                    // what comes next: another unit of these steps, or the first one of the next
                    const bool more = u + 1 < task.end;
                    const int64_t t_next = more ? t : t + C;
                    const Unit next(s, more ? u + 1 : task.begin);
                    const float* q_block = q + task.row * s.q_row + t * s.q_step + unit.group * s.K;
                    const float* k_block = k + task.row * s.k_row + t * s.k_step + unit.group * s.K;
                    load_block(Q, C, q_block, s.q_step, n, s.K, s.scale);
                    load_block(Key, C, k_block, s.k_step, n, s.K);
                    if (!Decays::CHANNEL) {
                        transposed(C, K, Key, K, KeyT, C);
                        lower_product(C, K, Q, KeyT, P);
                    }
                    for (int64_t head = unit.first; head < unit.end(); ++head) {
                        float* Sh = state_of(head);
                        if (saved && t && t % s.segment == 0)
                            store_block(Sh, saved + ((first + head) * s.saved() + t / s.segment - 1) * s.K * s.V, s.V,
                                        s.K, s.V);
                        decays.read(g, resets, s, task.row, t, head, n);
                        const float* v_head = v + task.row * s.v_row + t * s.v_step + head * s.V;
                        float* o_head = o + ((task.row * s.T + t) * s.H + head) * s.V;
                        load_block(Val, C, v_head, s.v_step, n, s.V);
                        scores(decays, P, Q, Key, K, A);
                        prefetch_output(o_head, s.H * s.V, n, s.V);
                        const bool last_head = head + 1 == unit.end();
                        const int64_t t_ahead = last_head ? t_next : t, ahead = last_head ? next.first : head + 1;
                        prefetch_block(v + task.row * s.v_row + t_ahead * s.v_step + ahead * s.V, s.v_step, C, s.V);
                        decays.prefetch(g, s, task.row, t_ahead, ahead);
                        product(C, V, K, decays.since(Q, Qe, K), K, Sh, V, O, V);
                        product_lower<true>(C, V, A, Val, O);
                        if (last_head)
                            prefetch_block(q + task.row * s.q_row + t_next * s.q_step + next.group * s.K, s.q_step, C, s.K);
                        store_block(O, o_head, s.H * s.V, n, s.V);
                        if (last_head)
                            prefetch_block(k + task.row * s.k_row + t_next * s.k_step + next.group * s.K, s.k_step, C, s.K);
                        product_tn_kept(K, V, C, decays.until(Key, Kx, K), K, Val, V, Sh, V, decays.whole);
                    }
                }
            for (int64_t h = task.first; h < task.first + task.n_heads; ++h)
                store_block(state_of(h), last + (first + h) * s.K * s.V, s.V, s.K, s.V);
        }
    }
}

// The state before each block of a segment, turned: before (blocks, V, K), the first one given.
template <typename Decays>
void next_state(const Decays& decays, const float* before, const float* keys, const float* values, int64_t K, int64_t V,
                float* after) {
    for (int64_t e = 0; e < V; ++e)
        for (int64_t d = 0; d < K; d += BLOCK_LANES)
            store(after + e * K + d, load<Lanes>(decays.whole + d) * load<Lanes>(before + e * K + d));
    product_tn<true>(V, K, Decays::STEPS, values, V, keys, K, after, K);
}

// d_log (C, 16), its lanes to be summed, from the reads E q and writes X k with their gradients, and from the two
// states, turned (V, K).
template <int64_t C>
void log_gradient(const PerHead<C>& decays, const float* q, const float* reads, const float* k, const float* writes,
                  const float* before, const float* d_after, int64_t K, int64_t V, float* d_log) {
    Lanes sums[4] = {}, earlier = {};
    for (int64_t i = 0; i < K * V; i += 4 * BLOCK_LANES)
        for (int64_t l = 0; l < 4; ++l)
            sums[l] += load<Lanes>(before + i + l * BLOCK_LANES) * load<Lanes>(d_after + i + l * BLOCK_LANES);
    Lanes later = decays.total * ((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (int64_t t = C - 1; t >= 0; --t) {
        for (int64_t d = t * K; d < (t + 1) * K; d += BLOCK_LANES) later += load<Lanes>(q + d) * load<Lanes>(reads + d);
        store(d_log + t * BLOCK_LANES, later);
    }
    for (int64_t t = 0; t < C; ++t) {
        store(d_log + t * BLOCK_LANES, load<Lanes>(d_log + t * BLOCK_LANES) + earlier);
        for (int64_t d = t * K; d < (t + 1) * K; d += BLOCK_LANES) earlier += load<Lanes>(k + d) * load<Lanes>(writes + d);
    }
}

// The same for d_log (C, K).
void log_gradient(const PerChannel& decays, const float* q, const float* reads, const float* k, const float* writes,
                  const float* before, const float* d_after, int64_t K, int64_t V, float* d_log) {
    for (int64_t d = 0; d < K; d += BLOCK_LANES) {
        Lanes later = {}, earlier = {};
        for (int64_t e = 0; e < V; ++e) later += load<Lanes>(before + e * K + d) * load<Lanes>(d_after + e * K + d);
        later *= load<Lanes>(decays.total + d);
        for (int64_t at = (PerChannel::STEPS - 1) * K + d; at >= 0; at -= K)
            store(d_log + at, later += load<Lanes>(q + at) * load<Lanes>(reads + at));
        for (int64_t at = d; at < PerChannel::STEPS * K; at += K) {
            store(d_log + at, load<Lanes>(d_log + at) + earlier);
            earlier += load<Lanes>(k + at) * load<Lanes>(writes + at);
        }
    }
}

// The head's part of dP, and of d_log by the pairs of steps.
template <int64_t C>
void scores_backward(const PerHead<C>& decays, const float*, const float*, int64_t, const float* A, const float* d_A,
                     float* d_products, float*, float*, float* d_log) {
    for (int64_t i = 0; i < C * C; i += BLOCK_LANES)
        store(d_products + i,
                    load<Lanes>(d_products + i) + load<Lanes>(decays.pair + i) * load<Lanes>(d_A + i));
    if (!d_log) return;
    Lanes below[C / BLOCK_LANES] = {};  // of A dA, over the rows from t on
    typedef int32_t Index __attribute__((vector_size(BLOCK_LANES * sizeof(int32_t))));
    Index lane = {};
    for (int l = 0; l < BLOCK_LANES; ++l) lane[l] = l;
    for (int64_t t = C - 1; t > 0; --t) {
        Lanes sum = load<Lanes>(d_log + t * BLOCK_LANES);
        for (int64_t j = 0; j < C / BLOCK_LANES; ++j) {
            below[j] += load<Lanes>(A + t * C + j * BLOCK_LANES) * load<Lanes>(d_A + t * C + j * BLOCK_LANES);
            const Index before = lane < static_cast<int32_t>(t - j * BLOCK_LANES);
            sum += reinterpret_cast<Lanes>(reinterpret_cast<Index>(below[j]) & before);
        }
        store(d_log + t * BLOCK_LANES, sum);
    }
}

void scores_backward(const PerChannel& decays, const float* q, const float* k, int64_t K, const float*,
                     const float* d_A, float*, float* d_q, float* d_k, float* d_log) {
    channel_scores_backward(K, q, k, decays.step, d_A, d_q, d_k, d_log);
}

void add(const float* x, float* sum, int64_t n) {
    for (int64_t i = 0; i < n; ++i) sum[i] += x[i];
}

template <typename Decays>
void backward(const Shape& s, const float* q, const float* k, const float* v, const float* g, const float* state,
              const bool* resets, const float* saved, const float* d_o, const float* d_last, float* d_q, float* d_k,
              float* d_v, float* d_g, float* d_state) {
    constexpr int64_t C = Decays::STEPS;
    const int64_t K = s.wide_k(), V = s.wide_v(), heads = Task::most_heads(s), blocks = s.segment / C;
#pragma omp parallel
    {
        FlushDenormals flush;
        Scratch scratch(10 * C * K + 4 * C * V + 4 * C * C + (heads * (blocks + 1) + 1) * K * V + Decays::floats(K));
        float *Q = scratch.take(C * K), *Key = scratch.take(C * K), *KeyT = scratch.take(C * K);
        float *Qe = scratch.take(C * K), *Kx = scratch.take(C * K), *dQ = scratch.take(C * K);
        float *dK = scratch.take(C * K), *reads = scratch.take(C * K), *writes = scratch.take(C * K);
        float *d_log = scratch.take(C * K), *Val = scratch.take(C * V), *ValT = scratch.take(C * V);
        float *dO = scratch.take(C * V), *dV = scratch.take(C * V), *P = scratch.take(C * C);
        float *A = scratch.take(C * C), *dA = scratch.take(C * C), *dP = scratch.take(C * C);
        float *before = scratch.take(heads * blocks * K * V), *d_S = scratch.take(heads * K * V);
        float* turned = scratch.take(K * V);
        Decays decays(scratch, K);
        for (float* x : {P, dA}) std::fill(x, x + C * C, 0.0f);
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < s.B * s.spans; ++index) {
            const Task task(s, index);
            const int64_t first = task.row * s.H;  // head of the row
            const float* v_row = v + task.row * s.v_row;
            const auto read_keys = [&](const Unit& unit, int64_t t, int64_t n) {
                load_block(Key, C, k + task.row * s.k_row + t * s.k_step + unit.group * s.K, s.k_step, n, s.K);
            };
            const auto read_head = [&](int64_t t, int64_t n, int64_t head) {
                decays.read(g, resets, s, task.row, t, head, n);
                load_block(Val, C, v_row + t * s.v_step + head * s.V, s.v_step, n, s.V);
            };
            const auto state_before = [&](int64_t block, int64_t head) {
                return before + (block * heads + head - task.first) * K * V;
            };
            for (int64_t h = 0; h < task.n_heads; ++h)
                load_block(d_S + h * K * V, K, d_last + (first + task.first + h) * s.K * s.V, s.V, s.K, s.V);
            for (int64_t segment = s.saved(); segment >= 0; --segment) {
                const int64_t start = segment * s.segment, stop = std::min(s.T, start + s.segment);
                for (int64_t h = task.first; h < task.first + task.n_heads; ++h) {
                    const float* from = segment ? saved + ((first + h) * s.saved() + segment - 1) * s.K * s.V
                                                : state + (first + h) * s.K * s.V;
                    load_block(turned, K, from, s.V, s.K, s.V);
                    transposed(K, V, turned, V, state_before(0, h), K);
                }
                for (int64_t t = start, block = 0; t + C < stop; t += C, ++block)
                    for (int64_t u = task.begin; u < task.end; ++u) {
                        const Unit unit(s, u);
                        read_keys(unit, t, C);
                        for (int64_t head = unit.first; head < unit.end(); ++head) {
                            read_head(t, C, head);
                            next_state(decays, state_before(block, head), decays.until(Key, Kx, K), Val, K, V,
                                       state_before(block + 1, head));
                        }
                    }
                for (int64_t block = (stop - start - 1) / C; block >= 0; --block)
                    for (int64_t u = task.begin; u < task.end; ++u) {
                        const Unit unit(s, u);
                        const int64_t t = start + block * C, n = std::min(C, stop - t);
                        const float* q_unit = q + task.row * s.q_row + unit.group * s.K;
                        const float* k_unit = k + task.row * s.k_row + unit.group * s.K;
                        read_keys(unit, t, n);
                        load_block(Q, C, q_unit + t * s.q_step, s.q_step, n, s.K, s.scale);
                        if (!Decays::CHANNEL) {
                            transposed(C, K, Key, K, KeyT, C);
                            lower_product(C, K, Q, KeyT, P);
                            std::fill(dP, dP + C * C, 0.0f);
                        }
                        std::fill(dQ, dQ + C * K, 0.0f);
                        std::fill(dK, dK + C * K, 0.0f);
                        for (int64_t head = unit.first; head < unit.end(); ++head) {
                            const int64_t step = (task.row * s.T + t) * s.H + head;
                            const bool once = head == unit.first;
                            const float* S = state_before(block, head);
                            float* dS = d_S + (head - task.first) * K * V;
                            read_head(t, n, head);
                            load_block(dO, C, d_o + step * s.V, s.H * s.V, n, s.V);
                            const float *q_since = decays.since(Q, Qe, K), *k_until = decays.until(Key, Kx, K);
                            scores(decays, P, Q, Key, K, A);
                            transposed(C, V, Val, V, ValT, C);
                            prefetch_output(d_v + step * s.V, s.H * s.V, n, s.V);
                            lower_product(C, V, dO, ValT, dA);

                            prefetch_block(v_row + (t - C) * s.v_step + head * s.V, s.v_step, C, s.V);
                            product(C, V, K, k_until, K, dS, V, dV, V);
                            product_lower_t<true>(C, V, A, dO, dV);
                            store_block(dV, d_v + step * s.V, s.H * s.V, n, s.V);

                            if (once) prefetch_block(q_unit + (t - C) * s.q_step, s.q_step, C, s.K);
                            product(C, K, V, dO, V, S, K, reads, K);
                            add(decays.since(reads, reads, K), dQ, C * K);
                            transposed(K, V, dS, V, turned, K);
                            if (once) prefetch_block(k_unit + (t - C) * s.k_step, s.k_step, C, s.K);
                            product(C, K, V, Val, V, turned, K, writes, K);
                            add(decays.until(writes, writes, K), dK, C * K);
                            if (d_g) log_gradient(decays, Q, reads, Key, writes, S, turned, K, V, d_log);
                            scores_backward(decays, Q, Key, K, A, dA, dP, dQ, dK, d_g ? d_log : nullptr);
                            if (d_g && Decays::CHANNEL) store_block(d_log, d_g + step * s.K, s.H * s.K, n, s.K);
                            if (d_g && !Decays::CHANNEL) {
                                float sums[C];
                                for (int64_t i = 0; i < C; i += 16) row_sums(d_log + i * BLOCK_LANES, sums + i);
                                for (int64_t i = 0; i < n; ++i) d_g[step + i * s.H] = sums[i];
                            }

                            prefetch_block(d_o + (step - C * s.H) * s.V, s.H * s.V, C, s.V);
                            product_tn_kept(K, V, C, q_since, K, dO, V, dS, V, decays.whole);
                        }
                        const int64_t at = (((unit.part * s.B + task.row) * s.T + t) * s.G + unit.group) * s.K;
                        prefetch_output(d_q + at, s.G * s.K, n, s.K);
                        prefetch_output(d_k + at, s.G * s.K, n, s.K);
                        if (!Decays::CHANNEL) {
                            product_lower<true>(C, K, dP, Key, dQ);
                            product_lower_t<true>(C, K, dP, Q, dK);
                        }
                        for (int64_t i = 0; i < C * K; ++i) dQ[i] *= s.scale;
                        store_block(dQ, d_q + at, s.G * s.K, n, s.K);
                        store_block(dK, d_k + at, s.G * s.K, n, s.K);
                    }
            }
            for (int64_t h = 0; h < task.n_heads; ++h)
                store_block(d_S + h * K * V, d_state + (first + task.first + h) * s.K * s.V, s.V, s.K, s.V);
        }
    }
}

// o_t = scale S_t q_t, the other side of the same S, for a decay a channel: slots s of width K, keys of width V. S is
// kept turned, (V, K): o_i = E_i (q_i S) + sum_{j <= i} (q_i . k_j) D_ij s_j, where D_ij acts on the channels of s_j.
void slot_scores(const Shape& s, const float* q, const float* k, const float* slots, const float* g, const float* state,
                 const bool* resets, float* o, float* last) {
    constexpr int64_t C = PerChannel::STEPS;
    const int64_t K = s.wide_k(), V = s.wide_v();
#pragma omp parallel
    {
        FlushDenormals flush;
        Scratch scratch(3 * C * K + 3 * C * V + C * C + 2 * K * V + PerChannel::floats(K));
        float *Q = scratch.take(C * V), *Key = scratch.take(C * V), *KeyT = scratch.take(C * V);
        float *Slot = scratch.take(C * K), *Sx = scratch.take(C * K), *O = scratch.take(C * K);
        float *A = scratch.take(C * C), *S = scratch.take(K * V), *turned = scratch.take(K * V);
        PerChannel decays(scratch, K);
        std::fill(A, A + C * C, 0.0f);
#pragma omp for schedule(dynamic)
        for (int64_t index = 0; index < s.B * s.H; ++index) {
            const int64_t row = index / s.H, head = index % s.H;
            load_block(turned, K, state + index * s.K * s.V, s.V, s.K, s.V);
            transposed(K, V, turned, V, S, K);
            for (int64_t t = 0; t < s.T; t += C) {
                const int64_t n = std::min(C, s.T - t), at = (row * s.T + t) * s.H + head;
                load_block(Q, C, q + at * s.V, s.H * s.V, n, s.V, s.scale);
                load_block(Key, C, k + at * s.V, s.H * s.V, n, s.V);
                load_block(Slot, C, slots + at * s.K, s.H * s.K, n, s.K);
                decays.read(g, resets, s, row, t, head, n);
                transposed(C, V, Key, V, KeyT, C);
                lower_product(C, V, Q, KeyT, A);
                product(C, K, V, Q, V, S, K, O, K);
                decays.since(O, O, K);
                for (int64_t d = 0; d < K; d += BLOCK_LANES) {
                    Lanes out[C], step[C];
                    for (int64_t i = 0; i < C; ++i)
                        out[i] = load<Lanes>(O + i * K + d), step[i] = load<Lanes>(decays.step + i * K + d);
                    for (int64_t j = 0; j < C; ++j) {
                        Lanes decayed = load<Lanes>(Slot + j * K + d);
                        out[j] += A[j * C + j] * decayed;
                        for (int64_t i = j + 1; i < C; ++i) out[i] += A[i * C + j] * (decayed *= step[i]);
                    }
                    for (int64_t i = 0; i < C; ++i) store(O + i * K + d, out[i]);
                }
                store_block(O, o + at * s.K, s.H * s.K, n, s.K);
                next_state(decays, S, decays.until(Slot, Sx, K), Key, K, V, S);
            }
            transposed(V, K, S, K, turned, V);
            store_block(turned, last + index * s.K * s.V, s.V, s.K, s.V);
        }
    }
}

using Heads = PerHead<32>;

}  // namespace

// q, k and v lie in memory with the strides q_row and so on.
extern "C" void linear_attention_forward(const float* q, const float* k, const float* v, const float* g,
                                         const float* state, const bool* resets, float* o, float* last, float* saved,
                                         int64_t B, int64_t T, int64_t G, int64_t H, int64_t K, int64_t V,
                                         int64_t parts, int64_t spans, int64_t segment, int64_t q_row, int64_t q_step,
                                         int64_t k_row, int64_t k_step, int64_t v_row, int64_t v_step, int64_t per_channel,
                                         double scale) {
    const Shape s{B, T, G, H, K, V, parts, spans, segment, q_row, q_step, k_row, k_step, v_row, v_step, float(scale)};
    (per_channel ? forward<PerChannel> : forward<Heads>)(s, q, k, v, g, state, resets, o, last, saved);
}
ZOO_EXPORT(linear_attention_forward)

// d_q and d_k (parts, B, T, G, K), to be summed.
extern "C" void linear_attention_backward(const float* q, const float* k, const float* v, const float* g,
                                          const float* state, const bool* resets, const float* saved, const float* d_o,
                                          const float* d_last, float* d_q, float* d_k, float* d_v, float* d_g,
                                          float* d_state, int64_t B, int64_t T, int64_t G, int64_t H, int64_t K,
                                          int64_t V, int64_t parts, int64_t spans, int64_t segment, int64_t q_row, int64_t q_step,
                                          int64_t k_row, int64_t k_step, int64_t v_row, int64_t v_step,
                                          int64_t per_channel, double scale) {
    const Shape s{B, T, G, H, K, V, parts, spans, segment, q_row, q_step, k_row, k_step, v_row, v_step, float(scale)};
    (per_channel ? backward<PerChannel> : backward<Heads>)(s, q, k, v, g, state, resets, saved, d_o, d_last, d_q, d_k,
                                                           d_v, d_g, d_state);
}
ZOO_EXPORT(linear_attention_backward)

// q and k (B, T, H, V), slots and g (B, T, H, K).
extern "C" void slot_scores_forward(const float* q, const float* k, const float* slots, const float* g,
                                    const float* state, const bool* resets, float* o, float* last, int64_t B, int64_t T,
                                    int64_t H, int64_t K, int64_t V, double scale) {
    const Shape s{B, T, H, H, K, V, 1, 1, 0, 0, 0, 0, 0, 0, 0, float(scale)};
    slot_scores(s, q, k, slots, g, state, resets, o, last);
}
ZOO_EXPORT(slot_scores_forward)
