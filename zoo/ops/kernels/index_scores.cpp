// Scores of one query a row for sparse attention, sum_j weight_j relu(q_j . k_s), each key read from memory once. The
// equation is that of zoo/ops/_sparse_latent_attention.py.
//
// q (B, J, E); key (B, N, E); weight (B, J); score (B, S): of the first S of N keys, cut into `parts` for threads.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "matmul.h"

namespace {

constexpr int64_t BLOCK = 128;

// Heads are columns, filled up with zeros to `heads`, whole vectors of them.
void part(int64_t first, int64_t last, int64_t J, int64_t heads, int64_t E, const float* q, const float* key,
          const float* weight, float* __restrict score) {
    std::vector<float> turned(E * heads), weights(heads), dots(BLOCK * heads);
    std::copy(weight, weight + J, weights.begin());
    for (int64_t j = 0; j < J; ++j)
        for (int64_t e = 0; e < E; ++e) turned[e * heads + j] = q[j * E + e];
    for (int64_t a = first; a < last; a += BLOCK) {
        const int64_t rows = std::min(BLOCK, last - a);
        zoo::product(rows, heads, E, key + a * E, E, turned.data(), heads, dots.data(), heads);
        for (int64_t i = 0; i < rows; ++i) {
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < heads; ++j) sum += weights[j] * std::max(dots[i * heads + j], 0.0f);
            score[a + i] = sum;
        }
    }
}

}  // namespace

extern "C" void index_scores(const float* q, const float* key, const float* weight, float* score, int64_t B, int64_t N,
                             int64_t S, int64_t J, int64_t E, int64_t parts, int64_t threads) {
    const int64_t heads = (J + zoo::LANES - 1) / zoo::LANES * zoo::LANES, each = (S + parts - 1) / parts;
#pragma omp parallel for num_threads(threads)
    for (int64_t task = 0; task < B * parts; ++task) {
        const int64_t b = task / parts, p = task % parts;
        part(std::min(p * each, S), std::min((p + 1) * each, S), J, heads, E, q + b * J * E, key + b * N * E,
             weight + b * J, score + b * S);
    }
}
ZOO_EXPORT(index_scores)
