// One query a head against a cache of latents that is key and value at once: softmax(q kv^T) kv[:, :r], each block of
// rows read from memory once. The equations are those of zoo/ops/_latent_attention.py, absorbed, q scaled already.
//
// q (B, H, W); kv (B, N, W); held (B), written rows, at least one; o (B, parts, H, r) and total (B, parts, H): the rows
// of a batch entry fall into `parts`, each with its own softmax and the logarithm of its sum, for several threads.
#include <algorithm>
#include <limits>
#include <vector>

#include "kernel.h"
#include "matmul.h"

namespace {

constexpr int64_t BLOCK = 128;

// Rows first to last of one batch entry. Heads are columns, filled up with zeros to `heads`, whole vectors of them.
void part(int64_t first, int64_t last, int64_t H, int64_t heads, int64_t W, int64_t r, const float* q, const float* kv,
          float* __restrict o, float* __restrict total) {
    std::vector<float> turned(W * heads), scores(BLOCK * heads), memory(3 * heads);
    float *top = memory.data(), *sum = top + heads, *fade = sum + heads;
    for (int64_t h = 0; h < H; ++h)
        for (int64_t w = 0; w < W; ++w) turned[w * heads + h] = q[h * W + w];
    std::fill(top, sum, -1e30f);
    std::fill(o, o + H * r, 0.0f);
    for (int64_t a = first; a < last; a += BLOCK) {
        const int64_t rows = std::min(BLOCK, last - a);
        const float* block = kv + a * W;
        zoo::product(rows, heads, W, block, W, turned.data(), heads, scores.data(), heads);
        std::copy(top, sum, fade);
        for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
            for (int64_t h = 0; h < heads; ++h) top[h] = std::max(top[h], scores[i * heads + h]);
#pragma omp simd
        for (int64_t h = 0; h < heads; ++h) {
            fade[h] = zoo::exp(fade[h] - top[h]);
            sum[h] *= fade[h];
        }
        for (int64_t i = 0; i < rows; ++i)
#pragma omp simd
            for (int64_t h = 0; h < heads; ++h) {
                const float p = zoo::exp(scores[i * heads + h] - top[h]);
                scores[i * heads + h] = p;
                sum[h] += p;
            }
        for (int64_t h = 0; h < H; ++h) {
            if (fade[h] == 1.0f) continue;
#pragma omp simd
            for (int64_t v = 0; v < r; ++v) o[h * r + v] *= fade[h];
        }
        zoo::product_tn<true>(H, r, rows, scores.data(), heads, block, W, o, r);
    }
    for (int64_t h = 0; h < H; ++h) {
        const float scale = last > first ? 1.0f / sum[h] : 0.0f;
        for (int64_t v = 0; v < r; ++v) o[h * r + v] *= scale;
        total[h] = last > first ? top[h] + zoo::log(sum[h]) : -std::numeric_limits<float>::infinity();
    }
}

}  // namespace

extern "C" void latent_decode(const float* q, const float* kv, const int64_t* held, float* o, float* total, int64_t B,
                              int64_t N, int64_t H, int64_t W, int64_t r, int64_t parts, int64_t threads) {
    const int64_t heads = (H + zoo::LANES - 1) / zoo::LANES * zoo::LANES;
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < B * parts; ++task) {
        const int64_t b = task / parts, p = task % parts, each = (held[b] + parts - 1) / parts;
        part(std::min(p * each, held[b]), std::min((p + 1) * each, held[b]), H, heads, W, r, q + b * H * W,
             kv + b * N * W, o + task * H * r, total + task * H);
    }
}
ZOO_EXPORT(latent_decode)
