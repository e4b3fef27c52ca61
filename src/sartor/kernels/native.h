// Formats and functions that the loops share.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t LEAST = 65536;  // elements below which threads cost more than they save

using bf16 = uint16_t;

inline float of_bits(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }
inline uint32_t bits_of(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }

inline float load(const float *at) { return *at; }
inline float load(const bf16 *at) { return of_bits(uint32_t(*at) << 16); }
inline void store(float *at, float value) { *at = value; }
inline void store(bf16 *at, float value) {  // to the nearest, ties to even, as PyTorch does it
    uint32_t bits = bits_of(value);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    *at = bf16(value != value ? 0x7FC0 : rounded);
}

#ifdef FP_FAST_FMAF
inline float plus(float factor, float x, float more) { return fmaf(factor, x, more); }
#else
inline float plus(float factor, float x, float more) { return factor * x + more; }
#endif

// e^x for x <= 0, within 2 units in the last place (the polynomial of Cephes' expf). NaN stays NaN.
inline float exponential(float x) {
    constexpr float WHOLE = 12582912.0f + 127.0f;  // added to it, a number is rounded, and its last bits are an exponent's
    x = x < -87.0f ? -87.0f : x;
    const float power = plus(x, 1.44269504f, WHOLE), n = power - WHOLE;
    const float r = plus(n, 2.12194440e-4f, plus(n, -0.693359375f, x));
    float p = plus(1.9875691500e-4f, r, 1.3981999507e-3f);
    p = plus(p, r, 8.3334519073e-3f);
    p = plus(p, r, 4.1665795894e-2f);
    p = plus(p, r, 1.6666665459e-1f);
    p = plus(p, r, 5.0000001201e-1f);
    p = plus(p * r, r, r) + 1.0f;
    return p * of_bits(bits_of(power) << 23);
}

// to[i] = value(i), rounded.
template <class T, class Value>
inline void store_each(T *to, int64_t count, const Value &value) {
#pragma omp simd
    for (int64_t i = 0; i < count; i++) store(to + i, value(i));
}

#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <class Value>
inline void store_each(bf16 *to, int64_t count, const Value &value) {  // there is an instruction for it, which loops do not find
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        alignas(64) float some[32];
#pragma omp simd
        for (int64_t j = 0; j < 32; j++) some[j] = value(i + j);
        _mm512_storeu_si512(to + i, __m512i(_mm512_cvtne2ps_pbh(_mm512_load_ps(some + 16), _mm512_load_ps(some))));
    }
#pragma omp simd
    for (int64_t j = i; j < count; j++) store(to + j, value(j));
}
#endif

}  // namespace
