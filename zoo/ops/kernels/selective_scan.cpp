// The selective scan of Mamba: h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = (C_t h_t + D u_t) silu(z_t).
//
// u, delta, z, y (batch, steps, D); B, C (batch, steps, N); A (D, N); state (batch, D, N); resets (batch, steps).
// A vector holds the same state of LANES channels, so that nothing is summed across a vector in the forward pass. Only
// the states before every CHUNK-th step are kept; the backward pass makes those between them again, chunk by chunk.
// Groups of channels run in parallel, each with its own share of the gradients of B and C.
#include <algorithm>
#include <vector>

#include "kernel.h"
#include "vectors.h"

namespace {

constexpr int64_t CHUNK = 32, GROUP = 128;  // steps, channels
constexpr int64_t SMALL = 32768;            // updates that one thread is done with before others wake

using zoo::LANES_OF;
using zoo::load;
using zoo::store;
using zoo::Vector;

constexpr double LOG2E = 1.4426950408889634;

// The sum over the lanes of each of `count` vectors, by halving all of them at once; scratch holds count * LANES / 2.
template <typename T, int64_t HALF>
inline void halve(const T* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t l = 0; l < HALF; ++l) to[i * HALF + l] = from[2 * i * HALF + l] + from[(2 * i + 1) * HALF + l];
}
template <typename T>
inline void sum_lanes(const Vector<T>* x, T* scratch, T* out, int64_t count) {
    constexpr int64_t HALF = LANES_OF<T> / 2;
    for (int64_t i = 0; i < count; ++i) {
        T lanes[LANES_OF<T>];
        std::memcpy(lanes, x + i, sizeof(lanes));
        for (int64_t l = 0; l < HALF; ++l) scratch[i * HALF + l] = lanes[l] + lanes[HALF + l];
    }
    if constexpr (HALF == 1) {
        std::copy(scratch, scratch + count, out);
    } else {
        if constexpr (HALF == 8) halve<T, 4>(scratch, scratch, count);
        if constexpr (HALF >= 4) halve<T, 2>(scratch, scratch, count);
        halve<T, 1>(scratch, out, count);
    }
}
template <typename T>
struct Inputs {
    const T *u, *delta, *A, *B, *C, *D, *z, *bias, *state;
    const bool* resets;
    int64_t batch, steps, width, N, use_softplus;

    int64_t chunks() const { return (steps + CHUNK - 1) / CHUNK; }
    int64_t blocks() const { return (width + LANES_OF<T> - 1) / LANES_OF<T>; }
};

// LANES channels of one row: what does not change in time, and the step.
template <typename T>
struct Channels {
    const Inputs<T>& in;
    int64_t row, from, n;
    Vector<T> D, bias;

    Channels(const Inputs<T>& in, int64_t row, int64_t block) : in(in), row(row), from(block * LANES_OF<T>) {
        n = std::min(LANES_OF<T>, in.width - from);
        D = in.D ? load(in.D + from, n) : Vector<T>{};
        bias = in.bias ? load(in.bias + from, n) : Vector<T>{};
    }
    // (D, N) to N vectors and back.
    void gather(const T* matrix, Vector<T>* out, T scale = 1) const {
        for (int64_t k = 0; k < in.N; ++k) {
            out[k] = Vector<T>{};
            for (int64_t l = 0; l < n; ++l) out[k][l] = matrix[(from + l) * in.N + k] * scale;
        }
    }
    void scatter(const Vector<T>* vectors, T* matrix) const {
        for (int64_t k = 0; k < in.N; ++k)
            for (int64_t l = 0; l < n; ++l) matrix[(from + l) * in.N + k] = vectors[k][l];
    }
    int64_t at(int64_t t) const { return (row * in.steps + t) * in.width + from; }
    Vector<T> raw_delta(int64_t t) const { return load(in.delta + at(t), n) + bias; }
    Vector<T> dt(Vector<T> raw) const { return in.use_softplus ? zoo::softplus_of<T>(raw) : raw; }
    bool reset(int64_t t) const { return in.resets && in.resets[row * in.steps + t]; }
    // The states kept before chunk c: (batch, chunks, N, D).
    int64_t kept(int64_t c, int64_t k) const {
        return ((row * in.chunks() + c) * in.N + k) * in.width + from;
    }
};

template <typename T>
void forward(const Inputs<T>& in, T* y, T* last, T* checkpoints) {
    const int64_t N = in.N;
#pragma omp parallel if (in.batch * in.steps * in.width * N > SMALL)
    {
        zoo::FlushDenormals flush;
        std::vector<Vector<T>> A(N), h(N);
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < in.batch; ++row)
            for (int64_t block = 0; block < in.blocks(); ++block) {
                const Channels<T> here(in, row, block);
                here.gather(in.A, A.data(), static_cast<T>(LOG2E));
                here.gather(in.state + row * in.width * N, h.data());
                for (int64_t t = 0; t < in.steps; ++t) {
                    if (checkpoints && t % CHUNK == 0)
                        for (int64_t k = 0; k < N; ++k) store<T>(checkpoints + here.kept(t / CHUNK, k), h[k], here.n);
                    if (here.reset(t)) std::fill(h.begin(), h.end(), Vector<T>{});
                    const T *B = in.B + (row * in.steps + t) * N, *C = in.C + (row * in.steps + t) * N;
                    const Vector<T> u = load(in.u + here.at(t), here.n), dt = here.dt(here.raw_delta(t)), x = dt * u;
                    Vector<T> o = here.D * u;
                    for (int64_t k = 0; k < N; ++k) {
                        h[k] = zoo::exp2(dt * A[k]) * h[k] + x * B[k];
                        o += h[k] * C[k];
                    }
                    if (in.z) {
                        const Vector<T> z = load(in.z + here.at(t), here.n);
                        o *= z * zoo::sigmoid_of<T>(z);
                    }
                    store<T>(y + here.at(t), o, here.n);
                }
                here.scatter(h.data(), last + row * in.width * N);
            }
    }
}

template <typename T>
struct Gradients {
    T *u, *delta, *z, *state;     // as their inputs
    T *B, *C;                     // (groups, batch, steps, N): to be summed over groups
    double *A, *D, *bias;         // (batch, D, N), (batch, D), (batch, D): to be summed over rows
};

// One group of channels of one row, backwards in time. With g the gradient of h_t:
// g = a_{t+1} g_{t+1} + d_o C ;  d_C = sum_d d_o h ;  d_B = sum_d g x ;  d_x = sum_n g B ;
// d_A = dt (g a h_{t-1}) ;  d_dt = u d_x + sum_n A (g a h_{t-1}).
template <typename T>
struct Backward {
    const Inputs<T>& in;
    const int64_t N;
    std::vector<Vector<T>> A, g, h, a, d_A, d_B, d_C, dt, u, d_o;
    std::vector<T> scratch;

    explicit Backward(const Inputs<T>& in)
        : in(in), N(in.N), A(N), g(GROUP / LANES_OF<T> * N), h((CHUNK + 1) * N), a(CHUNK * N), d_A(N), d_B(CHUNK * N),
          d_C(CHUNK * N), dt(CHUNK), u(CHUNK), d_o(CHUNK), scratch(CHUNK * N * LANES_OF<T> / 2) {}

    void run(int64_t row, int64_t group, const T* checkpoints, const T* d_y, const T* d_last, const Gradients<T>& out) {
        const int64_t first = group * (GROUP / LANES_OF<T>), end = std::min(first + GROUP / LANES_OF<T>, in.blocks());
        for (int64_t block = first; block < end; ++block)
            Channels<T>(in, row, block).gather(d_last + row * in.width * N, g.data() + (block - first) * N);
        for (int64_t c = in.chunks() - 1; c >= 0; --c) {
            const int64_t start = c * CHUNK, steps = std::min(CHUNK, in.steps - start);
            std::fill(d_B.begin(), d_B.end(), Vector<T>{});
            std::fill(d_C.begin(), d_C.end(), Vector<T>{});
            for (int64_t block = first; block < end; ++block) {
                const Channels<T> here(in, row, block);
                again(here, c, start, steps, checkpoints, d_y, out);
                back(here, start, steps, g.data() + (block - first) * N, out);
            }
            const int64_t at = ((group * in.batch + row) * in.steps + start) * N;
            sum_lanes<T>(d_B.data(), scratch.data(), out.B + at, steps * N);
            sum_lanes<T>(d_C.data(), scratch.data(), out.C + at, steps * N);
        }
        for (int64_t block = first; block < end; ++block)
            Channels<T>(in, row, block).scatter(g.data() + (block - first) * N, out.state + row * in.width * N);
    }

    // The chunk's states and decays once more; the gradient of o from that of y.
    void again(const Channels<T>& here, int64_t c, int64_t start, int64_t steps, const T* checkpoints, const T* d_y,
               const Gradients<T>& out) {
        here.gather(in.A, A.data(), static_cast<T>(LOG2E));
        for (int64_t k = 0; k < N; ++k) h[k] = load<T>(checkpoints + here.kept(c, k), here.n);
        for (int64_t i = 0; i < steps; ++i) {
            const int64_t t = start + i, at = here.at(t);
            const T *B = in.B + (here.row * in.steps + t) * N, *C = in.C + (here.row * in.steps + t) * N;
            const T keep = here.reset(t) ? 0 : 1;
            u[i] = load(in.u + at, here.n);
            dt[i] = here.dt(here.raw_delta(t));
            const Vector<T> x = dt[i] * u[i], now = dt[i];
            const Vector<T>* before = h.data() + i * N;
            Vector<T> *after = h.data() + (i + 1) * N, *decay = a.data() + i * N;
            Vector<T> o = here.D * u[i];
            for (int64_t k = 0; k < N; ++k) {
                decay[k] = zoo::exp2(now * A[k]) * keep;
                after[k] = decay[k] * before[k] + x * B[k];
                o += after[k] * C[k];
            }
            d_o[i] = load(d_y + at, here.n);
            if (in.z) {
                const Vector<T> z = load(in.z + at, here.n), s = zoo::sigmoid_of<T>(z);
                store<T>(out.z + at, d_o[i] * o * s * (T(1) + z * (T(1) - s)), here.n);
                d_o[i] *= z * s;
            }
        }
    }

    void back(const Channels<T>& here, int64_t start, int64_t steps, Vector<T>* g, const Gradients<T>& out) {
        here.gather(in.A, A.data());
        std::fill(d_A.begin(), d_A.end(), Vector<T>{});
        Vector<T> d_D = {}, d_bias = {};
        for (int64_t i = steps - 1; i >= 0; --i) {
            const int64_t t = start + i, at = here.at(t);
            const T *B = in.B + (here.row * in.steps + t) * N, *C = in.C + (here.row * in.steps + t) * N;
            const Vector<T> *before = h.data() + i * N, *after = before + N, *decay = a.data() + i * N;
            Vector<T> *to_B = d_B.data() + i * N, *to_C = d_C.data() + i * N;
            const Vector<T> x = dt[i] * u[i], now = dt[i], d = d_o[i];
            Vector<T> d_x = {}, d_dt = {};
            for (int64_t k = 0; k < N; ++k) {
                const Vector<T> here_g = g[k] + d * C[k];
                to_C[k] += d * after[k];
                to_B[k] += here_g * x;
                d_x += here_g * B[k];
                const Vector<T> decayed = here_g * decay[k], q = decayed * before[k];
                d_A[k] += q * now;
                d_dt += q * A[k];
                g[k] = decayed;
            }
            store<T>(out.u + at, d * here.D + now * d_x, here.n);
            d_dt += u[i] * d_x;
            if (in.use_softplus) d_dt *= zoo::sigmoid_of<T>(here.raw_delta(t));
            store<T>(out.delta + at, d_dt, here.n);
            d_bias += d_dt;
            d_D += d * u[i];
        }
        const int64_t channel = here.row * in.width + here.from;  // sums over many chunks: in double
        for (int64_t l = 0; l < here.n; ++l) {
            out.D[channel + l] += d_D[l];
            out.bias[channel + l] += d_bias[l];
            for (int64_t k = 0; k < N; ++k) out.A[(channel + l) * N + k] += d_A[k][l];
        }
    }
};

template <typename T>
void backward(const Inputs<T>& in, const T* checkpoints, const T* d_y, const T* d_last, const Gradients<T>& out) {
    const int64_t groups = (in.width + GROUP - 1) / GROUP;
#pragma omp parallel if (in.batch * in.steps * in.width * in.N > SMALL)
    {
        zoo::FlushDenormals flush;
        Backward<T> work(in);
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < in.batch; ++row)
            for (int64_t group = 0; group < groups; ++group) work.run(row, group, checkpoints, d_y, d_last, out);
    }
}

}  // namespace

#define INPUTS(T)                                                                                                      \
    const T *u, const T *delta, const T *A, const T *B, const T *C, const T *D, const T *z, const T *bias,             \
        const T *state, const bool *resets
#define NUMBERS int64_t batch, int64_t steps, int64_t width, int64_t N, int64_t softplus
#define GATHERED {u, delta, A, B, C, D, z, bias, state, resets, batch, steps, width, N, softplus}
#define FUNCTIONS(T, NAME)                                                                                             \
    extern "C" void selective_scan_forward_##NAME(INPUTS(T), T* y, T* last, T* checkpoints, NUMBERS) {                 \
        forward<T>(GATHERED, y, last, checkpoints);                                                                    \
    }                                                                                                                  \
    ZOO_EXPORT(selective_scan_forward_##NAME)                                                                          \
    extern "C" void selective_scan_backward_##NAME(INPUTS(T), const T* checkpoints, const T* d_y, const T* d_last,     \
                                                   T* d_u, T* d_delta, T* d_z, T* d_state, T* d_B, T* d_C,             \
                                                   double* d_A, double* d_D, double* d_bias, NUMBERS) {                \
        backward<T>(GATHERED, checkpoints, d_y, d_last, {d_u, d_delta, d_z, d_state, d_B, d_C, d_A, d_D, d_bias});     \
    }                                                                                                                  \
    ZOO_EXPORT(selective_scan_backward_##NAME)
FUNCTIONS(float, float)
FUNCTIONS(double, double)

ZOO_SIZES({"CHUNK", CHUNK}, {"GROUP", GROUP})
