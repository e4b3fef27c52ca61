// How numbers are laid out for a product (`problem`): in pairs along what is summed over (matmul.cpp, amx.h); and its result.

#pragma once

#include <cstdint>
#include <cstring>

#include "native.h"
#include "problem.h"
#include "tile.h"

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SARTOR_PAIRS 1

#include <immintrin.h>

namespace {

// Neighbours along what is summed over, the first one in the lower half. Written as bf16 numbers and read as pairs.
typedef uint32_t __attribute__((may_alias)) pair;

constexpr int64_t GROUP = 6;   // rows of a that are laid out together
constexpr int64_t AHEAD = 16;  // rows that are asked for before they are laid out in pairs
constexpr int64_t ALONG = 64;  // and, where rows become columns, numbers of a row

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : __mmask16((1u << count) - 1); }
inline __m512 widened(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }

// Columns of neighbouring rows as pairs, (from[2t, i], from[2t + 1, i]), 16 from i on to `to(t, i)`; zeros after the last row, and
// after `size` columns up to `width`.
template <class Place>
inline void paired_rows(const bf16 *from, int64_t stride, int64_t width, int64_t count, int64_t size, const Place &to) {
    // The first 16 numbers of either row beside each other, and the next 16: places of the second row are 32 further.
    const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_or_si512(places, _mm512_slli_epi32(_mm512_add_epi32(places, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t t = 0; t < count; t += 2) {
        for (int64_t i = 0; i < size && t + AHEAD < count; i += 32)
            for (int64_t row = t + AHEAD; row < t + AHEAD + 2; row++)
                _mm_prefetch(reinterpret_cast<const char *>(from + row * stride + i), _MM_HINT_T0);
        for (int64_t i = 0; i < width; i += 16) {
            if (t + 1 < count && size - i >= 32 && width - i >= 32) {
                const __m512i above = _mm512_loadu_si512(from + t * stride + i);
                const __m512i below = _mm512_loadu_si512(from + (t + 1) * stride + i);
                _mm512_storeu_si512(to(t / 2, i), _mm512_permutex2var_epi16(above, low, below));
                _mm512_storeu_si512(to(t / 2, i + 16), _mm512_permutex2var_epi16(above, high, below));
                i += 16;
                continue;
            }
            const __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(size - i), from + t * stride + i));
            __m512i other = _mm512_setzero_si512();
            if (t + 1 < count) other = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(size - i), from + (t + 1) * stride + i));
            _mm512_storeu_si512(to(t / 2, i), _mm512_or_si512(one, _mm512_slli_epi32(other, 16)));
        }
    }
}

// to[j, i] = from[i, j]: 16 x 16 pairs, of which `rows` rows of `numbers` numbers are there.
inline void turned(const bf16 *from, int64_t row, int64_t rows, int64_t numbers, pair *to, int64_t width) {
    __m512i r[16], t[16];
    const __mmask32 there = numbers >= 32 ? ~__mmask32(0) : (__mmask32(1) << numbers) - 1;
    for (int i = 0; i < 16; i++) r[i] = i < rows ? _mm512_maskz_loadu_epi16(there, from + i * row) : _mm512_setzero_si512();
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 8] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        _mm512_storeu_si512(to + i * width, _mm512_shuffle_i32x4(t[i], t[i + 4], 0x88));
        _mm512_storeu_si512(to + (i + 8) * width, _mm512_shuffle_i32x4(t[i], t[i + 4], 0xdd));
        _mm512_storeu_si512(to + (i + 4) * width, _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0x88));
        _mm512_storeu_si512(to + (i + 12) * width, _mm512_shuffle_i32x4(t[i + 8], t[i + 12], 0xdd));
    }
}

// A panel of b: `depth` numbers from `from` on, as pairs, rows of `width` columns of which `columns` are there; zeros up to 32 numbers.
inline void lay_out(const bf16 *from, int64_t row, bool in_columns, int64_t depth, int64_t columns, pair *to, int64_t width) {
    if (!in_columns) {
        paired_rows(from, row, width, depth, columns, [=](int64_t t, int64_t i) { return to + t * width + i; });
        for (int64_t t = (depth + 1) / 2; t % 16 != 0; t++) std::memset(to + t * width, 0, 4 * width);
        return;
    }
    for (int64_t k = 0; k < depth; k += 32)
        for (int64_t i = 0; i < width; i += 16) {
            for (int64_t r = i; r < i + 16 && r < columns && k + ALONG < depth; r++)
                _mm_prefetch(reinterpret_cast<const char *>(from + r * row + k + ALONG), _MM_HINT_T0);
            turned(from + i * row + k, row, columns - i, depth - k, to + k / 2 * width + i, width);
        }
}

// Where sums go: kept in float32 while k goes on, then to c.
struct results {
    float *kept;
    bool begins, ends;
    bf16 *c;
    int64_t columns;
    const bf16 *bias;
};

// What of a product is summed up at a time: rows `row` to `end`, of which those from `above` on may be packed, from `k` on.
struct block {
    const bf16 *packed;
    int64_t above, row, end, k, depth;
};

// 16 sums to their place in c, `column` columns from the panel's first.
inline void finish(const problem &of, const results &to, __m512 sum, int64_t row, int64_t column) {
    const __mmask16 there = first(to.columns - column);
    sum = _mm512_mul_ps(sum, _mm512_set1_ps(of.scale));
    if (to.bias != nullptr) sum = _mm512_add_ps(sum, widened(_mm256_maskz_loadu_epi16(there, to.bias + column)));
    if (of.c_turned) {
        alignas(64) float values[16];
        _mm512_store_ps(values, sum);
        for (int64_t n = 0; n < 16 && column + n < to.columns; n++) {
            bf16 *at = to.c + (column + n) * of.c_row + row;
            store(at, of.adds ? values[n] + load(at) : values[n]);
        }
        return;
    }
    if (of.adds) sum = _mm512_add_ps(sum, widened(_mm256_maskz_loadu_epi16(there, to.c + row * of.c_row + column)));
    _mm256_mask_storeu_epi16(to.c + row * of.c_row + column, there, __m256i(_mm512_cvtneps_pbh(sum)));
}

}  // namespace

#endif
