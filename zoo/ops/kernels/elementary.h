// Elementary functions that compilers vectorise: no branches, no tables, no calls. Errors are a few units in the last
// place in float. Double goes through the standard library. Inlined always: a call would keep its loop from vectorising.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#define ZOO_INLINE inline __attribute__((always_inline))

namespace zoo {

// Denormal numbers count as zero within the scope: decaying states would otherwise end in arithmetic that is a hundred
// times slower. Each thread of a parallel region makes its own.
struct FlushDenormals {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

template <typename To, typename From>
inline To bits(From x) {
    To y;
    static_assert(sizeof(To) == sizeof(From), "");
    std::memcpy(&y, &x, sizeof(y));
    return y;
}

// A bfloat16 in memory; arithmetic is in float.
struct Brief {
    uint16_t number;
    Brief() = default;
    ZOO_INLINE Brief(float x) {  // to nearest, ties to even
        const uint32_t b = bits<uint32_t>(x);
        number = static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
    }
    ZOO_INLINE operator float() const { return bits<float>(static_cast<uint32_t>(number) << 16); }
};

// exp(x) = 2^n exp(r), |r| <= ln 2 / 2, with a Taylor polynomial of degree 7; 0 below -87.3, held at 88.3 above.
ZOO_INLINE float exp(float x) {
    const float low = -87.3f, y = x < low ? low : (x > 88.3f ? 88.3f : x);
    const float n = (y * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // rounds to the nearest whole number
    const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float e = p * bits<float>((static_cast<int32_t>(n) + 127) << 23);
    return x < low ? 0.0f : e;
}
inline double exp(double x) { return std::exp(x); }

// log(x) for normal x > 0: log(2^n m) with m in [sqrt(1/2), sqrt(2)), by atanh((m - 1) / (m + 1)).
ZOO_INLINE float log(float x) {
    const int32_t i = bits<int32_t>(x), shifted = i - 0x3f3504f3;
    const int32_t n = shifted >> 23;
    const float m = bits<float>(i - (n << 23));
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    float p = 2.0f / 9;
    p = p * z + 2.0f / 7;
    p = p * z + 2.0f / 5;
    p = p * z + 2.0f / 3;
    p = p * z + 2.0f;
    const float f = static_cast<float>(n);
    return f * 0.693359375f + (s * p - f * 2.12194440e-4f);
}
inline double log(double x) { return std::log(x); }

// log(1 + x) for x in [0, 1], exact to rounding for small x too.
ZOO_INLINE float log1p_unit(float x) {
    const float s = x / (2.0f + x), z = s * s;  // log((1 + s) / (1 - s)), s <= 1/3
    float p = 2.0f / 15;
    p = p * z + 2.0f / 13;
    p = p * z + 2.0f / 11;
    p = p * z + 2.0f / 9;
    p = p * z + 2.0f / 7;
    p = p * z + 2.0f / 5;
    p = p * z + 2.0f / 3;
    p = p * z + 2.0f;
    return s * p;
}
inline double log1p_unit(double x) { return std::log1p(x); }

template <typename T>
ZOO_INLINE T sigmoid(T x) {
    const T e = exp(x < 0 ? x : -x), d = T(1) / (T(1) + e);
    return x < 0 ? e * d : d;
}

template <typename T>
ZOO_INLINE T log_sigmoid(T x) {
    return (x < 0 ? x : T(0)) - log1p_unit(exp(x < 0 ? x : -x));
}

ZOO_INLINE float tanh(float x) {
    const float a = x < 0 ? -x : x, e = exp(-2.0f * a);
    const float far = (1.0f - e) / (1.0f + e);
    const float z = a * a;  // below 0.6 an odd polynomial: 1 - e would cancel
    float p = -0.00570498872745f;
    p = p * z + 0.0206390887954f;
    p = p * z - 0.0537397155531f;
    p = p * z + 0.133314422036f;
    p = p * z - 0.333332819422f;
    const float near = a + a * z * p;
    const float t = a < 0.6f ? near : far;
    return x < 0 ? -t : t;
}
inline double tanh(double x) { return std::tanh(x); }

}  // namespace zoo
