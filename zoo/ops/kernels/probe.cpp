// The least that a kernel needs: that it compiles, loads and finds torch's OpenMP.
#include "kernel.h"
#include "matmul.h"

extern "C" void probe_threads(int64_t* out) {
    *out = 0;
#pragma omp parallel
    {
#pragma omp atomic
        *out += 1;
    }
}
ZOO_EXPORT(probe_threads)

extern "C" void probe_functions(const float* x, float* e, float* t, float* s, float* l, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        e[i] = zoo::exp(x[i]);
        t[i] = zoo::tanh(x[i]);
        s[i] = zoo::sigmoid(x[i]);
        l[i] = zoo::log_sigmoid(x[i]);
    }
}
ZOO_EXPORT(probe_functions)

extern "C" void probe_product(const float* a, const float* b, float* c, int64_t m, int64_t n, int64_t k, int64_t kind,
                              int64_t repeats) {
    for (int64_t r = 0; r < repeats; ++r) {
        if (kind == 0) zoo::product(m, n, k, a, k, b, n, c, n);
        if (kind == 1) zoo::product_tn<true>(m, n, k, a, m, b, n, c, n, 0.5f);
        if (kind == 2) zoo::transposed(m, n, a, n, c, m);
    }
}
ZOO_EXPORT(probe_product)
