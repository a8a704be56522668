// y = W_down (silu(W_gate x) * W_up x) for many rows x, forward and backward, without leaving the caches in between.
//
// With a norm inside, y = W_down (sigmoid(g) * norm(g u)), g = W_gate x, u = W_up x: as r = (mean (g u)^2 + eps)^-1/2 is
// one number a row, y = r W_down (silu(g) u), and the sum that its gradient takes over the hidden numbers is d_y . y / r.
//
// Rows go in blocks of ROWS: a block's hidden activations stay in the second cache, from the registers of the first two
// products through the gate to the third. Everything is counted in units of 32 bits: one float, or two bfloat16 that lie
// next to each other along the summed axis (what vdpbf16ps multiplies). Right-hand sides are packed in panels of PANEL
// columns, [panel][unit of the summed axis][column]; left-hand sides are read by broadcast.
//
// Widths: K of x and y, H hidden; both padded with zeros: K to whole units, H to whole panels of half the columns. Rows may lie along the
// last axis of x or along the one before it ("outer" blocks of "inner" rows, element (row, k) at row * row_stride + k *
// column_stride).
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernel.h"
#include "matmul.h"

namespace {

using zoo::exp;
using zoo::LANES;
using zoo::Vec;

constexpr int WIDEST = 16;  // lanes: what is padded is so on every CPU, as the caller counts on
constexpr int TILE = LANES == 16 ? 6 : 3, PANEL = 4 * LANES;
constexpr int64_t ROWS = 96;  // of a block; even, so that pairs of rows stay together

struct Single {
    using Number = float;
    static constexpr int PAIR = 1;
    static ZOO_INLINE Vec multiplied(Vec sum, Vec a, Vec b) { return sum + a * b; }
    static ZOO_INLINE Vec load(const float* p) { return zoo::load(p); }
    static ZOO_INLINE void store(float* p, Vec x) { zoo::store(p, x); }
    static ZOO_INLINE float narrow(float x) { return x; }
    static ZOO_INLINE float widened(float x) { return x; }
    static ZOO_INLINE Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp(-x)); }
    static ZOO_INLINE void store_pair(float* p, Vec x, Vec) { zoo::store(p, x); }
};

#if defined(__AVX512BF16__)
struct Half {
    using Number = uint16_t;
    static constexpr int PAIR = 2;
    static ZOO_INLINE Vec multiplied(Vec sum, Vec a, Vec b) {
        return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
    static ZOO_INLINE __m512i words(const uint16_t* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static ZOO_INLINE __m256i narrowed(Vec x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }
    static ZOO_INLINE Vec load(const uint16_t* p) { return (Vec)_mm512_slli_epi32(words(p), 16); }
    static ZOO_INLINE void store(uint16_t* p, Vec x) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(x));
    }
    static ZOO_INLINE uint16_t narrow(float x) { return zoo::Brief(x).number; }
    static ZOO_INLINE float widened(uint16_t x) { return zoo::bits<float>(static_cast<uint32_t>(x) << 16); }
    static ZOO_INLINE Vec sigmoid(Vec x) {  // to 2^-13, finer than its use: 1 / (1 + 2^n 2^r), |r| <= 1/2, a cubic for 2^r
        const __m512 t = _mm512_range_ps((__m512)(x * -1.44269504088896341f), _mm512_set1_ps(200.0f), 2);  // |t| <= 200
        const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const Vec r = (Vec)t - (Vec)n;
        Vec p = 0.055174150f * r + 0.24261054f;
        p = p * r + 0.69326098f;
        p = p * r + 0.99992807f;
        return (Vec)_mm512_rcp14_ps((__m512)(1.0f + (Vec)_mm512_scalef_ps((__m512)p, n)));
    }
    static ZOO_INLINE void store_pair(float* p, Vec low, Vec high) {
        const __m512i l = _mm512_cvtepu16_epi32(narrowed(low)), h = _mm512_cvtepu16_epi32(narrowed(high));
        _mm512_storeu_si512(p, _mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
    }
};
#endif

struct Shape {
    int64_t outer, inner, outer_stride, row_stride, column_stride, width, hidden;
};

int64_t rounded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class E>
struct Sizes {
    Shape s;
    int64_t units, columns, line, hidden, blocks_each, blocks;  // units of K; padded K, in numbers and units; padded H

    explicit Sizes(const Shape& shape) : s(shape) {
        units = rounded(s.width, E::PAIR) / E::PAIR;
        columns = rounded(s.width, WIDEST), line = columns / E::PAIR;
        hidden = rounded(s.hidden, 2 * WIDEST);
        blocks_each = (s.inner + ROWS - 1) / ROWS;
        blocks = s.outer * blocks_each;
    }
    int64_t rows(int64_t block) const { return std::min(ROWS, s.inner - block % blocks_each * ROWS); }
    int64_t offset(int64_t block) const {
        return block / blocks_each * s.outer_stride + block % blocks_each * ROWS * s.row_stride;
    }
};

// ---- products

template <class E, int R, int V>
ZOO_INLINE void tile(int64_t k, const float* a, int64_t row, int64_t col, const float* b, int64_t ldb, Vec (&sums)[R][V]) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = Vec{};
    for (int64_t p = 0; p < k; ++p) {
        Vec x[V];
        for (int v = 0; v < V; ++v) x[v] = zoo::load(b + p * ldb + v * LANES);
        for (int r = 0; r < R; ++r) {
            const Vec y = zoo::splat_bits(a + r * row + p * col);
            for (int v = 0; v < V; ++v) sums[r][v] = E::multiplied(sums[r][v], y, x[v]);
        }
    }
}

// Calls f(std::integral_constant<int, R>(), first row) for tiles of R rows that cover m.
template <class F>
ZOO_INLINE void row_tiles(int64_t m, const F& f) {
    int64_t i = 0;
    for (; i + TILE <= m; i += TILE) f(std::integral_constant<int, TILE>(), i);
    if (i + 4 <= m) f(std::integral_constant<int, 4>(), i), i += 4;
    if (i + 2 <= m) f(std::integral_constant<int, 2>(), i), i += 2;
    if (i < m) f(std::integral_constant<int, 1>(), i);
}

// Calls f(std::integral_constant<int, V>(), first column) for panels that cover `columns`, a multiple of the lanes.
template <class F>
ZOO_INLINE void panels(int64_t columns, const F& f) {
    int64_t j = 0;
    for (; j + PANEL <= columns; j += PANEL) f(std::integral_constant<int, 4>(), j);
    switch ((columns - j) / LANES) {
        case 3: f(std::integral_constant<int, 3>(), j); break;
        case 2: f(std::integral_constant<int, 2>(), j); break;
        case 1: f(std::integral_constant<int, 1>(), j); break;
        default: break;
    }
}

// ---- packing

// Right-hand side (k, n): element (p, j) is at(p, j), zero outside. out: [panel][unit][PANEL] with narrower last panel.
template <class E, class At>
void pack(int64_t k, int64_t n, int64_t units, int64_t columns, float* out, const At& at) {
    auto* numbers = reinterpret_cast<typename E::Number*>(out);
#pragma omp parallel for
    for (int64_t j0 = 0; j0 < columns; j0 += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, columns - j0);
        auto* panel = numbers + j0 * units * E::PAIR;
        for (int64_t j = 0; j < width; ++j)
            for (int64_t p = 0; p < units * E::PAIR; ++p)
                panel[(p / E::PAIR * width + j) * E::PAIR + p % E::PAIR] =
                    E::narrow(p < k && j0 + j < n ? at(p, j0 + j) : 0.0f);
    }
}

// Rows of a block into (rows, columns), contiguous, zero beyond K.
template <class E>
void gather(const Sizes<E>& z, const typename E::Number* x, int64_t block, typename E::Number* to) {
    const int64_t n = z.rows(block), K = z.s.width, ld = z.columns;
    const auto* from = x + z.offset(block);
    if (z.s.column_stride == 1) {
        for (int64_t r = 0; r < n; ++r) std::memcpy(to + r * ld, from + r * z.s.row_stride, K * sizeof(*x));
    } else {
        for (int64_t k0 = 0; k0 < K; k0 += 16)
            for (int64_t r = 0; r < n; ++r)
                for (int64_t k = k0; k < std::min(K, k0 + 16); ++k) to[r * ld + k] = from[r + k * z.s.column_stride];
    }
    if (ld > K)
        for (int64_t r = 0; r < n; ++r) std::memset(to + r * ld + K, 0, (ld - K) * sizeof(*x));
}

// Rows (rows, columns) of float into their places; `scratch` has room for as many.
template <class E>
void scatter(const Sizes<E>& z, const float* rows, int64_t block, typename E::Number* x, float* scratch) {
    const int64_t n = z.rows(block), K = z.s.width;
    auto* to = x + z.offset(block);
    const bool across = z.s.column_stride != 1;
    if (across) zoo::transposed(n, z.columns, rows, z.columns, scratch, ROWS);
    const float* from = across ? scratch : rows;
    const int64_t lines = across ? K : n, width = across ? n : K, ld = across ? ROWS : z.columns;
    const int64_t stride = across ? z.s.column_stride : z.s.row_stride;
    for (int64_t r = 0; r < lines; ++r) {
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) E::store(to + r * stride + c, zoo::load(from + r * ld + c));
        for (; c < width; ++c) to[r * stride + c] = E::narrow(from[r * ld + c]);
    }
}

// Pairs of rows as units of a right-hand side whose summed axis is the rows: [panel][units of rows][PANEL].
template <class E>
void interleave(const Sizes<E>& z, const typename E::Number* rows, int64_t n, float* out, int64_t all_units, int64_t first) {
    const int64_t ld = z.columns;
    for (int64_t j0 = 0; j0 < ld; j0 += PANEL) {
        const int64_t width = std::min<int64_t>(PANEL, ld - j0);
        float* panel = out + j0 * all_units + first * width;
        for (int64_t r = 0; r < n; r += E::PAIR, panel += width)
            for (int64_t j = 0; j < width; j += LANES) {
                const Vec low = E::load(rows + r * ld + j0 + j);
                E::store_pair(panel + j, low, E::PAIR == 2 && r + 1 < n ? E::load(rows + (r + 1) * ld + j0 + j) : Vec{});
            }
    }
}

// C (n rows of `columns`) = A (n, k units) B, B packed; each row times its number in `scales`, where there are any.
template <class E>
void product_rows(int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t columns, float* c,
                  const float* scales = nullptr) {
    panels(columns, [&](auto vectors, int64_t j) {
        constexpr int V = decltype(vectors)::value;
        const float* panel = b + j * k;
        row_tiles(n, [&](auto rows, int64_t i) {
            constexpr int R = decltype(rows)::value;
            Vec sums[R][V];
            tile<E, R, V>(k, a + i * lda, lda, 1, panel, V * LANES, sums);
            for (int r = 0; r < R; ++r) {
                const float scale = scales ? scales[i + r] : 1.0f;
                for (int v = 0; v < V; ++v) zoo::store(c + (i + r) * columns + j + v * LANES, sums[r][v] * scale);
            }
        });
    });
}

ZOO_INLINE float total(Vec x) {
    float sum = 0;
    for (int l = 0; l < LANES; ++l) sum += x[l];
    return sum;
}

// ---- forward

// inverse: (blocks, ROWS), r of each row, where there is a norm inside, else null.
template <class E, bool NORM>
void forward(const Shape& shape, const typename E::Number* x, const float* gate_up, const float* down,
             typename E::Number* y, typename E::Number* saved, float* inverse, float eps) {
    using Number = typename E::Number;
    const Sizes<E> z(shape);
    constexpr int HALF = PANEL / 2;  // columns of the gate, as many of up
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> input(ROWS * z.line), hidden(ROWS * z.hidden / E::PAIR), output(2 * ROWS * z.columns);
        auto *in = reinterpret_cast<Number*>(input.data()), *h = reinterpret_cast<Number*>(hidden.data());
        Vec squares[NORM ? ROWS : 1];
#pragma omp for schedule(dynamic)
        for (int64_t block = 0; block < z.blocks; ++block) {
            const int64_t n = z.rows(block);
            gather(z, x, block, in);
            Number* kept = saved ? saved + block * ROWS * 2 * z.hidden : nullptr;
            float* scales = NORM ? inverse + block * ROWS : nullptr;
            if (NORM) std::fill(squares, squares + n, Vec{});
            for (int64_t j = 0; j < z.hidden; j += HALF) {
                const float* panel = gate_up + 2 * j * z.units;
                row_tiles(n, [&](auto rows, int64_t i) {
                    constexpr int R = decltype(rows)::value;
                    Vec sums[R][4];
                    tile<E, R, 4>(z.units, input.data() + i * z.line, z.line, 1, panel, PANEL, sums);
                    for (int r = 0; r < R; ++r)
                        for (int v = 0; v < 2; ++v) {
                            const Vec gate = sums[r][v], up = sums[r][v + 2];
                            if (NORM) squares[i + r] += gate * up * (gate * up);
                            E::store(h + (i + r) * z.hidden + j + v * LANES, gate * E::sigmoid(gate) * up);
                            if (kept) {
                                Number* at = kept + (i + r) * 2 * z.hidden + j + v * LANES;
                                E::store(at, gate), E::store(at + z.hidden, up);
                            }
                        }
                });
            }
            if (NORM)
                for (int64_t i = 0; i < n; ++i)
                    scales[i] = 1 / std::sqrt(total(squares[i]) / static_cast<float>(z.s.hidden) + eps);
            product_rows<E>(n, z.hidden / E::PAIR, hidden.data(), z.hidden / E::PAIR, down, z.columns, output.data(), scales);
            scatter(z, output.data(), block, y, &output[ROWS * z.columns]);
        }
    }
}

// ---- backward

// What a chunk of blocks leaves for the gradients of the weights: right-hand sides whose summed axis is the rows.
template <class E>
struct Chunk {
    float *x, *d_y, *gates[3];  // gates: d_gate, d_up and the hidden activations
    Chunk(const Sizes<E>& z, int64_t blocks, float* scratch) {
        const int64_t most = blocks * ROWS / E::PAIR;
        x = scratch, d_y = x + most * z.columns, gates[0] = d_y + most * z.columns;
        for (int i = 1; i < 3; ++i) gates[i] = gates[i - 1] + most * z.hidden;
    }
};

// Rows of one tile, a vector of each, as units of pairs of rows in a panel of `width` columns.
template <class E, int R>
ZOO_INLINE void store_pairs(const Vec (&rows)[R], int width, float* panel) {
    for (int r = 0; r < R; r += E::PAIR)
        E::store_pair(panel + r / E::PAIR * width, rows[r], E::PAIR == 2 && r + 1 < R ? rows[r + 1] : Vec{});
}

// d_y . y of the rows of a block.
template <class E>
void row_dots(const Sizes<E>& z, const typename E::Number* d_y, const typename E::Number* y, int64_t block, float* dots) {
    const int64_t n = z.rows(block), K = z.s.width, across = z.s.column_stride;
    const auto *d = d_y + z.offset(block), *out = y + z.offset(block);
    if (across == 1) {
        for (int64_t r = 0; r < n; ++r, d += z.s.row_stride, out += z.s.row_stride) {
            Vec sum{};
            int64_t k = 0;
            for (; k + LANES <= K; k += LANES) sum += E::load(d + k) * E::load(out + k);
            dots[r] = total(sum);
            for (; k < K; ++k) dots[r] += E::widened(d[k]) * E::widened(out[k]);
        }
        return;
    }
    std::fill(dots, dots + n, 0.0f);
    for (int64_t k = 0; k < K; ++k, d += across, out += across) {
        int64_t r = 0;
        for (; r + LANES <= n; r += LANES) zoo::store(dots + r, zoo::load(dots + r) + E::load(d + r) * E::load(out + r));
        for (; r < n; ++r) dots[r] += E::widened(d[r]) * E::widened(out[r]);
    }
}

// What a norm inside leaves for the backward pass: y, and r of each row.
template <class E>
struct Normed {
    const typename E::Number* y;
    const float* inverse;
};

template <class E, bool NORM>
void backward_block(const Sizes<E>& z, int64_t block, const typename E::Number* x, const typename E::Number* d_y,
                    const typename E::Number* saved, const Normed<E>& normed, const float* down_back,
                    const float* gate_up_back, typename E::Number* d_x, Chunk<E>& chunk, int64_t units, int64_t first, std::vector<float>& rows,
                    std::vector<float>& slopes, std::vector<float>& output) {
    using Number = typename E::Number;
    const int64_t n = z.rows(block), H = z.hidden;
    auto* in = reinterpret_cast<Number*>(rows.data());
    gather(z, x, block, in);
    interleave(z, in, n, chunk.x, units, first);
    gather(z, d_y, block, in);
    interleave(z, in, n, chunk.d_y, units, first);
    auto* slope = reinterpret_cast<Number*>(slopes.data());
    const Number* kept = saved + block * ROWS * 2 * H;
    const float* inverse = NORM ? normed.inverse + block * ROWS : nullptr;
    float shares[NORM ? ROWS : 1];  // of g u in the gradient of each of its factors: that of r
    if (NORM) {
        row_dots(z, d_y, normed.y, block, shares);
        for (int64_t r = 0; r < n; ++r) shares[r] *= -inverse[r] * inverse[r] / static_cast<float>(z.s.hidden);
    }
    panels(H, [&](auto vectors, int64_t j) {
        constexpr int V = decltype(vectors)::value;
        row_tiles(n, [&](auto rows_of, int64_t i) {
            constexpr int R = decltype(rows_of)::value;
            Vec sums[R][V];
            tile<E, R, V>(z.units, rows.data() + i * z.line, z.line, 1, down_back + j * z.units, V * LANES, sums);
            const int64_t at = j * units + (first + i / E::PAIR) * V * LANES;
            for (int v = 0; v < V; ++v) {
                Vec d_gate[R], d_up[R], h[R];
                for (int r = 0; r < R; ++r) {
                    const Number* g = kept + (i + r) * 2 * H + j + v * LANES;
                    const Vec gate = E::load(g), up = E::load(g + H), part = E::sigmoid(gate), act = gate * part;
                    const Vec d = NORM ? sums[r][v] * inverse[i + r] : sums[r][v];
                    d_gate[r] = d * up * (part + act * (1.0f - part));
                    d_up[r] = d * act;
                    h[r] = act * up;
                    if (NORM) {
                        const Vec share = shares[i + r] * gate * up;
                        d_gate[r] += share * up, d_up[r] += share * gate, h[r] *= inverse[i + r];
                    }
                    Number* to = slope + (i + r) * 2 * H + j + v * LANES;
                    E::store(to, d_gate[r]), E::store(to + H, d_up[r]);
                }
                store_pairs<E, R>(d_gate, V * LANES, chunk.gates[0] + at + v * LANES);
                store_pairs<E, R>(d_up, V * LANES, chunk.gates[1] + at + v * LANES);
                store_pairs<E, R>(h, V * LANES, chunk.gates[2] + at + v * LANES);
            }
        });
    });
    if (d_x) {
        product_rows<E>(n, 2 * H / E::PAIR, slopes.data(), 2 * H / E::PAIR, gate_up_back, z.columns, output.data());
        scatter(z, output.data(), block, d_x, &output[ROWS * z.columns]);
    }
}

// d_weight (`width` of the hidden rows, columns) = or += left^T right, summed over the rows of a chunk.
template <class E>
void backward_weight(const Sizes<E>& z, const float* left, int64_t width, const float* right, int64_t units,
                     float* d_weight, bool add, std::vector<float>& packed) {
    packed.resize(units * width);
    row_tiles(width, [&](auto rows, int64_t i) {
        constexpr int R = decltype(rows)::value;
        for (int64_t p = 0; p < units; ++p) std::memcpy(&packed[i * units + p * R], left + p * width + i, R * sizeof(float));
    });
    panels(z.columns, [&](auto vectors, int64_t j) {
        constexpr int V = decltype(vectors)::value;
        row_tiles(width, [&](auto rows, int64_t i) {
            constexpr int R = decltype(rows)::value;
            Vec sums[R][V];
            tile<E, R, V>(units, &packed[i * units], 1, R, right + j * units, V * LANES, sums);
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < V; ++v) {
                    float* at = d_weight + (i + r) * z.columns + j + v * LANES;
                    zoo::store(at, add ? zoo::load(at) + sums[r][v] : sums[r][v]);
                }
        });
    });
}

// d_gate, d_up, d_down: (padded H, columns), the last transposed.
template <class E, bool NORM>
void backward(const Shape& shape, const typename E::Number* x, const typename E::Number* d_y,
              const typename E::Number* saved, const Normed<E>& normed, const float* down_back, const float* gate_up_back,
              typename E::Number* d_x, float* d_gate, float* d_up, float* d_down, float* scratch, int64_t chunk_blocks) {
    const Sizes<E> z(shape);
    Chunk<E> chunk(z, chunk_blocks, scratch);
    float* d_weights[3] = {d_gate, d_up, d_down};
    std::vector<int64_t> first(chunk_blocks + 1);
    const int64_t hidden_panels = (z.hidden + PANEL - 1) / PANEL;
#pragma omp parallel
    {
        zoo::FlushDenormals flush;
        std::vector<float> rows(ROWS * z.line), slopes(ROWS * 2 * z.hidden / E::PAIR), output(2 * ROWS * z.columns), packed;
        for (int64_t start = 0; start < z.blocks; start += chunk_blocks) {
            const int64_t count = std::min(chunk_blocks, z.blocks - start);
#pragma omp single
            for (int64_t b = 0; b < count; ++b) first[b + 1] = first[b] + (z.rows(start + b) + E::PAIR - 1) / E::PAIR;
#pragma omp for schedule(dynamic)
            for (int64_t b = 0; b < count; ++b)
                backward_block<E, NORM>(z, start + b, x, d_y, saved, normed, down_back, gate_up_back, d_x, chunk, first[count],
                                        first[b], rows, slopes, output);
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < 3 * hidden_panels; ++task) {
                const int64_t which = task / hidden_panels, j = task % hidden_panels * PANEL;
                backward_weight(z, chunk.gates[which] + j * first[count], std::min<int64_t>(PANEL, z.hidden - j),
                                which == 2 ? chunk.d_y : chunk.x, first[count],
                                d_weights[which] + j * z.columns, start > 0, packed);
            }
        }
    }
}

// ---- packing of weights, float32 (H, K), (H, K) and (K, H)

template <class E>
void pack_forward(const Shape& s, const float* gate, const float* up, const float* down, float* gate_up_out, float* down_out) {
    const Sizes<E> z(s);
    const int64_t K = s.width, H = s.hidden;
    constexpr int HALF = PANEL / 2;
    // Panels of HALF columns of the gate and the same ones of up.
    pack<E>(K, 2 * z.hidden, z.units, 2 * z.hidden, gate_up_out, [=](int64_t p, int64_t c) {
        const int64_t j = c / PANEL * HALF + c % HALF;
        return j >= H ? 0.0f : (c % PANEL < HALF ? gate : up)[j * K + p];
    });
    pack<E>(H, K, z.hidden / E::PAIR, z.columns, down_out, [=](int64_t p, int64_t c) { return down[c * H + p]; });
}

template <class E>
void pack_backward(const Shape& s, const float* gate, const float* up, const float* down, float* gate_up_out, float* down_out) {
    const Sizes<E> z(s);
    const int64_t K = s.width, H = s.hidden, padded = z.hidden;
    pack<E>(2 * padded, K, 2 * padded / E::PAIR, z.columns, gate_up_out, [=](int64_t p, int64_t c) {
        const int64_t j = p % padded;
        return j >= H ? 0.0f : (p < padded ? gate : up)[j * K + c];
    });
    pack<E>(K, H, z.units, padded, down_out, [=](int64_t p, int64_t c) { return down[p * H + c]; });
}

}  // namespace

#define SHAPE                                                                                                          \
    int64_t outer, int64_t inner, int64_t outer_stride, int64_t row_stride, int64_t column_stride, int64_t width,      \
        int64_t hidden
#define GATHERED {outer, inner, outer_stride, row_stride, column_stride, width, hidden}
#define FORMS(name, E)                                                                                                 \
    extern "C" void gated_mlp_pack_##name(const float* gate, const float* up, const float* down, float* gate_up_out,   \
                                          float* down_out, SHAPE, int64_t back) {                                      \
        (back ? pack_backward<E> : pack_forward<E>)(GATHERED, gate, up, down, gate_up_out, down_out);                  \
    }                                                                                                                  \
    ZOO_EXPORT(gated_mlp_pack_##name)                                                                                  \
    extern "C" void gated_mlp_forward_##name(const E::Number* x, const float* gate_up, const float* down,              \
                                             E::Number* y, E::Number* saved, float* inverse, SHAPE, double eps) {      \
        (inverse ? forward<E, true> : forward<E, false>)(GATHERED, x, gate_up, down, y, saved, inverse,                \
                                                         static_cast<float>(eps));                                     \
    }                                                                                                                  \
    ZOO_EXPORT(gated_mlp_forward_##name)                                                                               \
    extern "C" void gated_mlp_backward_##name(                                                                         \
        const E::Number* x, const E::Number* d_y, const E::Number* saved, const E::Number* y, const float* inverse,    \
        const float* gate_up, const float* down, E::Number* d_x, float* d_gate, float* d_up, float* d_down,            \
        float* scratch, SHAPE, int64_t chunk_blocks) {                                                                 \
        (inverse ? backward<E, true> : backward<E, false>)(GATHERED, x, d_y, saved, {y, inverse}, down, gate_up, d_x,  \
                                                           d_gate, d_up, d_down, scratch, chunk_blocks);               \
    }                                                                                                                  \
    ZOO_EXPORT(gated_mlp_backward_##name)

FORMS(float, Single)
#if defined(__AVX512BF16__)
FORMS(bfloat16, Half)
constexpr int64_t BFLOAT16 = 1;
#else
constexpr int64_t BFLOAT16 = 0;
#endif

ZOO_SIZES({"WIDEST", WIDEST}, {"ROWS", ROWS})

// Whether products of bfloat16 are compiled in.
extern "C" void gated_mlp_has_bfloat16(int64_t* out) { *out = BFLOAT16; }
ZOO_EXPORT(gated_mlp_has_bfloat16)
