// Blocks of steps in the nearest caches, for kernels over heads: in rows padded to whole vectors, with zeros for the steps
// that are missing at the end.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <new>

#include "matmul.h"

namespace zoo {

// Memory for blocks, handed out piece by piece.
class Scratch {
    float *memory, *next;

  public:
    explicit Scratch(int64_t floats)
        : memory(static_cast<float*>(std::aligned_alloc(64, (floats + 16) / 16 * 16 * sizeof(float)))), next(memory) {
        if (!memory) std::abort();
    }
    ~Scratch() { std::free(memory); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    float* take(int64_t floats) {
        float* piece = next;
        next += padded(floats);
        return piece;
    }
};

// block (steps, padded(width)) = factor * rows of x, `stride` apart; zeros beyond n rows and beyond the width.
inline void load_block(float* block, int64_t steps, const float* x, int64_t stride, int64_t n, int64_t width,
                       float factor = 1.0f) {
    const int64_t whole = width / BLOCK_LANES * BLOCK_LANES, last = padded(width);
    float* out = block;
    for (int64_t i = 0; i < n; ++i, x += stride, out += last) {
        for (int64_t d = 0; d < whole; d += BLOCK_LANES) at(out + d) = factor * at(x + d);
        if (whole < last) {
            at(out + whole) = Lanes{};
            for (int64_t d = whole; d < width; ++d) out[d] = factor * x[d];
        }
    }
    for (; out < block + steps * last; out += BLOCK_LANES) at(out) = Lanes{};
}

// Rows that will be read soon: they lie too far apart for the hardware to foresee. Called before some long arithmetic.
inline void prefetch_block(const float* x, int64_t stride, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(x + i * stride + d);
}

// Rows that will be written soon.
inline void prefetch_output(float* x, int64_t stride, int64_t n, int64_t width) {
    for (int64_t i = 0; i < n; ++i)
        for (int64_t d = 0; d < width; d += 16) __builtin_prefetch(x + i * stride + d, 1);
}

inline void store_block(const float* block, float* x, int64_t stride, int64_t n, int64_t width) {
    const int64_t whole = width / BLOCK_LANES * BLOCK_LANES, last = padded(width);
    for (int64_t i = 0; i < n; ++i, block += last, x += stride) {
        for (int64_t d = 0; d < whole; d += BLOCK_LANES) at(x + d) = at(block + d);
        for (int64_t d = whole; d < width; ++d) x[d] = block[d];
    }
}

// Blocks (heads, steps, padded(width)) of x, whose n rows (heads, width) are `stride` apart; zeros beyond n. In the order
// of memory: head by head, a block's rows would come from as many pages, and each would be waited for.
inline void load_rows(const float* x, int64_t stride, int64_t n, int64_t heads, int64_t width, int64_t steps,
                      float* blocks, float factor = 1.0f) {
    const int64_t wide = padded(width);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t h = 0; h < heads; ++h)
            load_block(blocks + (h * steps + i) * wide, 1, x + i * stride + h * width, 0, 1, width, factor);
    for (int64_t h = 0; n < steps && h < heads; ++h)
        std::fill(blocks + (h * steps + n) * wide, blocks + (h + 1) * steps * wide, 0.0f);
}
inline void store_rows(const float* blocks, int64_t steps, float* x, int64_t stride, int64_t n, int64_t heads,
                       int64_t width) {
    const int64_t wide = padded(width);
    for (int64_t i = 0; i < n; ++i)
        for (int64_t h = 0; h < heads; ++h)
            store_block(blocks + (h * steps + i) * wide, x + i * stride + h * width, 0, 1, width);
}

// out (16) = sums of the rows of x (16, 16).
inline void row_sums(const float* x, float* out) {
    float turned[BLOCK_LANES * BLOCK_LANES];
    transposed(BLOCK_LANES, BLOCK_LANES, x, BLOCK_LANES, turned, BLOCK_LANES);
    Lanes sums = {};
    for (int64_t i = 0; i < BLOCK_LANES; ++i) sums += load<Lanes>(turned + i * BLOCK_LANES);
    store(out, sums);
}

// C (steps, n) = or += A B where A (steps, steps) is zero above the diagonal; steps a multiple of 16.
template <bool ADD>
inline void product_lower(int64_t steps, int64_t n, const float* a, const float* b, float* c) {
    for (int64_t i = 0; i < steps; i += 16) product<ADD>(16, n, i + 16, a + i * steps, steps, b, n, c + i * n, n);
}

// C (steps, n) = or += A^T B for the same A.
template <bool ADD>
inline void product_lower_t(int64_t steps, int64_t n, const float* a, const float* b, float* c) {
    for (int64_t i = 0; i < steps; i += 16)
        product_tn<ADD>(16, n, steps - i, a + i * steps + i, steps, b + i * n, n, c + i * n, n);
}

// C (steps, steps) = A (steps, k) B (k, steps) on and below the diagonal, in squares of 16; the rest is left as it was.
inline void lower_product(int64_t steps, int64_t k, const float* a, const float* b, float* c) {
    for (int64_t i = 0; i < steps; i += 16) product(16, i + 16, k, a + i * k, k, b, steps, c + i * steps, steps);
}

}  // namespace zoo
