// One vocabulary for vectors. `Vec`: as many floats as a register of this CPU holds, `LANES`; `Vector<T>` is the same for
// float and double. `Lanes`: 16 floats on every CPU, for blocks that are laid out alike everywhere. All of them may lie at
// any address.
#pragma once
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "elementary.h"

namespace zoo {

#if defined(__AVX512F__)
constexpr int64_t BYTES = 64;
#elif defined(__AVX__)
constexpr int64_t BYTES = 32;
#else
constexpr int64_t BYTES = 16;
#endif
template <typename T>
constexpr int64_t LANES_OF = BYTES / sizeof(T);
constexpr int LANES = LANES_OF<float>;
constexpr int64_t BLOCK_LANES = 16;

typedef float Vec __attribute__((vector_size(BYTES), aligned(4), may_alias));
typedef double DoubleVec __attribute__((vector_size(BYTES), aligned(8), may_alias));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef float Lanes __attribute__((vector_size(BLOCK_LANES * sizeof(float)), aligned(4), may_alias));

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef Vec type;
};
template <>
struct VectorOf<double> {
    typedef DoubleVec type;
};
template <typename T>
using Vector = typename VectorOf<T>::type;

// ---- memory

// By memcpy: as arguments of templates, types lose their leave to lie at any address.
template <typename V = Vec>
ZOO_INLINE V load(const float* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
}
template <typename V>
ZOO_INLINE void store(float* p, V v) {
    std::memcpy(p, &v, sizeof(v));
}
// The 16 floats at p, to be read and written.
inline Lanes& at(float* p) { return *reinterpret_cast<Lanes*>(p); }
inline const Lanes& at(const float* p) { return *reinterpret_cast<const Lanes*>(p); }

// The first n lanes alone, zeros after them.
template <typename T>
inline Vector<T> load(const T* from, int64_t n) {
    Vector<T> x = {};
    if (n == LANES_OF<T>)
        std::memcpy(&x, from, sizeof(x));
    else
        for (int64_t l = 0; l < n; ++l) x[l] = from[l];
    return x;
}
template <typename T>
inline void store(T* to, Vector<T> x, int64_t n) {
    if (n == LANES_OF<T>)
        std::memcpy(to, &x, sizeof(x));
    else
        for (int64_t l = 0; l < n; ++l) to[l] = x[l];
}

template <typename V = Vec>
inline V splat(float x) {
    return V{} + x;
}

// The 32 bits at p in every lane, whatever they mean.
inline Vec splat_bits(const float* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vec>(_mm512_set1_epi32(*reinterpret_cast<const int32_t __attribute__((may_alias))*>(p)));
#else
    return splat(*p);
#endif
}

inline int64_t padded(int64_t n) { return (n + BLOCK_LANES - 1) / BLOCK_LANES * BLOCK_LANES; }

// ---- sums

inline float sum(Lanes x) {
    float y[BLOCK_LANES];
    at(y) = x;
    for (int half = BLOCK_LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) y[i] += y[i + half];
    return y[0];
}

// n a multiple of 16.
inline float dot(const float* x, const float* y, int64_t n) {
    Lanes s{};
    for (int64_t i = 0; i < n; i += BLOCK_LANES) s += at(x + i) * at(y + i);
    return sum(s);
}

// ---- functions

// exp of the vector's numbers, as that of one float, but for numbers below -87.3: e^-87.3.
ZOO_INLINE Vec exp(Vec x) {
    x = x < -87.3f ? Vec{} - 87.3f : x;
    x = x > 88.3f ? Vec{} + 88.3f : x;
    const Vec n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (Vec)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// 2^x for |x| <= 126, beyond that as at the bounds: 2^n 2^r with |r| <= 1/2, by a polynomial fitted to 2^r.
inline Vec exp2(Vec x) {
    x = x < -126.0f ? Vec{} - 126.0f : x;
    x = x > 126.0f ? Vec{} + 126.0f : x;
    const Vec shifted = x + 12582912.0f;  // its low bits hold the nearest whole number
    const Vec r = x - (shifted - 12582912.0f);
    Vec p = 0.00015345711f * r + 0.0013399931f;
    p = p * r + 0.009618489f;
    p = p * r + 0.055503286f;
    p = p * r + 0.24022646f;
    p = p * r + 0.6931472f;
    p = p * r + 1.0f;
    return (Vec)((Ints)p + ((Ints)shifted << 23));
}
inline DoubleVec exp2(DoubleVec x) {
    for (int64_t l = 0; l < LANES_OF<double>; ++l) x[l] = std::exp2(x[l]);
    return x;
}

// tanh(x) = x p(x^2) / q(x^2) with polynomials fitted on [0, 8], constant beyond; relative error 4e-7 at most.
ZOO_INLINE Vec tanh(Vec x) {
    x = x < -8.0f ? Vec{} - 8.0f : x;
    x = x > 8.0f ? Vec{} + 8.0f : x;
    const Vec z = x * x;
    Vec p = z * -1.156477069e-13f + 6.365720141e-11f;
    p = p * z - 2.231506512e-08f;
    p = p * z + 1.164254608e-05f;
    p = p * z + 3.149374704e-03f;
    p = p * z + 1.312435877e-01f;
    p = p * z + 9.999999982e-01f;
    Vec q = z * 2.612988670e-04f + 2.467504035e-02f;
    q = q * z + 4.645769028e-01f;
    q = q * z + 1.0f;
    return x * p / q;
}

template <typename T>
inline Vector<T> sigmoid_of(Vector<T> x) {
    T lanes[LANES_OF<T>];
    std::memcpy(lanes, &x, sizeof(x));
    for (int64_t l = 0; l < LANES_OF<T>; ++l) lanes[l] = sigmoid(lanes[l]);
    std::memcpy(&x, lanes, sizeof(x));
    return x;
}
template <typename T>
inline Vector<T> softplus_of(Vector<T> x) {
    T lanes[LANES_OF<T>];
    std::memcpy(lanes, &x, sizeof(x));
    for (int64_t l = 0; l < LANES_OF<T>; ++l) lanes[l] = -log_sigmoid(-lanes[l]);
    std::memcpy(&x, lanes, sizeof(x));
    return x;
}

}  // namespace zoo
