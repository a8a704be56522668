// Products of small row-major float blocks that stay in the nearest cache: C (m, n) = or += alpha * op(A) B.
//
// Columns go in vectors, TILE rows by two to four vectors at a time in registers; what is left over goes one vector,
// then one column at a time. For A B^T transpose B first (`transposed`), once for all its products.
#pragma once
#include <type_traits>
#include <utility>

#include "vectors.h"

namespace zoo {

#if defined(__AVX512F__)
constexpr int TILE = 6;
#else
constexpr int TILE = 3;
#endif

// R rows by V vectors. Element (i, k) of op(A) lies at a[i * row + k * col]. Where `keep` is given, C = keep C + ....
template <int R, int V, bool ADD>
inline __attribute__((always_inline)) void tile(int64_t k, const float* a, int64_t row, int64_t col, const float* b,
                                                int64_t ldb, float* c, int64_t ldc, float alpha,
                                                const float* keep = nullptr) {
    Vec sums[R][V];
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] = Vec{};
    for (int64_t p = 0; p < k; ++p) {
        Vec x[V];
        for (int v = 0; v < V; ++v) x[v] = load(b + p * ldb + v * LANES);
        for (int r = 0; r < R; ++r) {
            const Vec y = splat(a[r * row + p * col]);
            for (int v = 0; v < V; ++v) sums[r][v] += y * x[v];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) {
            float* at = c + r * ldc + v * LANES;
            if (keep)
                store(at, keep[r] * load(at) + sums[r][v]);
            else
                store(at, ADD ? load(at) + alpha * sums[r][v] : alpha * sums[r][v]);
        }
}

template <int V, bool ADD>
inline void column_of_tiles(int64_t m, int64_t k, const float* a, int64_t row, int64_t col, const float* b, int64_t ldb,
                            float* c, int64_t ldc, float alpha) {
    int64_t i = 0;
    for (; i + TILE <= m; i += TILE) tile<TILE, V, ADD>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, alpha);
    if (i + 4 <= m) tile<4, V, ADD>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, alpha), i += 4;
    if (i + 2 <= m) tile<2, V, ADD>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, alpha), i += 2;
    if (i < m) tile<1, V, ADD>(k, a + i * row, row, col, b, ldb, c + i * ldc, ldc, alpha), i += 1;
}

template <bool ADD>
inline void product_strided(int64_t m, int64_t n, int64_t k, const float* a, int64_t row, int64_t col, const float* b,
                            int64_t ldb, float* c, int64_t ldc, float alpha) {
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) column_of_tiles<4, ADD>(m, k, a, row, col, b + j, ldb, c + j, ldc, alpha);
    for (; j + 2 * LANES <= n; j += 2 * LANES) column_of_tiles<2, ADD>(m, k, a, row, col, b + j, ldb, c + j, ldc, alpha);
    for (; j + LANES <= n; j += LANES) column_of_tiles<1, ADD>(m, k, a, row, col, b + j, ldb, c + j, ldc, alpha);
    for (; j < n; ++j)
        for (int64_t i = 0; i < m; ++i) {
            float sum = 0;
            for (int64_t p = 0; p < k; ++p) sum += a[i * row + p * col] * b[p * ldb + j];
            c[i * ldc + j] = ADD ? c[i * ldc + j] + alpha * sum : alpha * sum;
        }
}

// C (m, n) = or += alpha * A (m, k) B (k, n); leading dimensions lda, ldb, ldc.
template <bool ADD = false>
inline void product(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
                    int64_t ldc, float alpha = 1.0f) {
    product_strided<ADD>(m, n, k, a, lda, 1, b, ldb, c, ldc, alpha);
}

// C (m, n) = or += alpha * A^T B with A (k, m), B (k, n).
template <bool ADD = false>
inline void product_tn(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                       float* c, int64_t ldc, float alpha = 1.0f) {
    product_strided<ADD>(m, n, k, a, 1, lda, b, ldb, c, ldc, alpha);
}

// C (m, n) = diag(keep) C + A^T B with A (k, m), B (k, n), keep (m): a decaying state and what is written to it.
// n is a multiple of the lanes.
inline void product_tn_kept(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
                            float* c, int64_t ldc, const float* keep) {
    const auto columns = [&](auto vectors, int64_t j) {
        constexpr int V = decltype(vectors)::value;
        int64_t i = 0;
        for (; i + TILE <= m; i += TILE)
            tile<TILE, V, true>(k, a + i, 1, lda, b + j, ldb, c + i * ldc + j, ldc, 1.0f, keep + i);
        for (; i < m; ++i) tile<1, V, true>(k, a + i, 1, lda, b + j, ldb, c + i * ldc + j, ldc, 1.0f, keep + i);
    };
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) columns(std::integral_constant<int, 4>(), j);
    for (; j < n; j += LANES) columns(std::integral_constant<int, 1>(), j);
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define ZOO_SHUFFLES 1
#endif
#endif

#if ZOO_SHUFFLES
// One round of a square's transposition: rows r and r + S exchange the lanes in which S is and is not part of the index.
template <int S, std::size_t... L>
inline __attribute__((always_inline)) void exchange(Vec& a, Vec& b, std::index_sequence<L...>) {
    const Vec x = a, y = b;
    a = __builtin_shufflevector(x, y, (int(L) & S ? LANES + int(L) - S : int(L))...);
    b = __builtin_shufflevector(x, y, (int(L) & S ? LANES + int(L) : int(L) + S)...);
}

template <int S>
inline __attribute__((always_inline)) void exchanges(Vec* rows) {
    if constexpr (S < LANES) {
        for (int r = 0; r < LANES; ++r)
            if (!(r & S)) exchange<S>(rows[r], rows[r + S], std::make_index_sequence<LANES>());
        exchanges<2 * S>(rows);
    }
}
#endif

// A square of LANES rows, in registers.
inline void transposed_square(const float* x, int64_t ldx, float* out, int64_t ldo) {
#if ZOO_SHUFFLES
    Vec rows[LANES];
    for (int r = 0; r < LANES; ++r) rows[r] = load(x + r * ldx);
    exchanges<1>(rows);
    for (int r = 0; r < LANES; ++r) store(out + r * ldo, rows[r]);
#else
    float block[LANES][LANES];
    for (int r = 0; r < LANES; ++r)
        for (int c = 0; c < LANES; ++c) block[r][c] = x[r * ldx + c];
    for (int c = 0; c < LANES; ++c)
        for (int r = 0; r < LANES; ++r) out[c * ldo + r] = block[r][c];
#endif
}

// out (n, m) = x (m, n) transposed.
inline void transposed(int64_t m, int64_t n, const float* x, int64_t ldx, float* out, int64_t ldo) {
    int64_t i = 0;
    for (; i + LANES <= m; i += LANES) {
        int64_t j = 0;
        for (; j + LANES <= n; j += LANES) transposed_square(x + i * ldx + j, ldx, out + j * ldo + i, ldo);
        for (; j < n; ++j)
            for (int64_t r = 0; r < LANES; ++r) out[j * ldo + i + r] = x[(i + r) * ldx + j];
    }
    for (; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) out[j * ldo + i] = x[i * ldx + j];
}

}  // namespace zoo
