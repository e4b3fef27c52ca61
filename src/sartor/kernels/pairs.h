// The products of lora.cpp for processors that multiply pairs of bfloat16 numbers and sum in float32 (AVX-512 BF16): half as many
// instructions as in float32, and inputs are read as they are. What is between two products is rounded to bfloat16, as between
// PyTorch's.

#pragma once

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SARTOR_PAIRS 1

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "native.h"
#include "tile.h"

namespace {

// Neighbours along what is summed over, the first one in the lower half. Written as bf16 numbers and read as pairs.
typedef uint32_t __attribute__((may_alias)) pair;

inline pair pair_at(const bf16 *at) { pair both; std::memcpy(&both, at, 4); return both; }

struct in_pairs_of_numbers {
    using number = pair;

    template <int COUNT, int WIDTH>
    static inline void tile(const pair *a, int64_t down, int64_t along, const pair *b, int64_t b_row, float *c, int64_t c_row,
                            int64_t depth, bool more) {
        __m512 sums[COUNT][WIDTH];
        for (int i = 0; i < COUNT; i++)
            for (int j = 0; j < WIDTH; j++) sums[i][j] = more ? _mm512_loadu_ps(c + i * c_row + j * LANES) : _mm512_setzero_ps();
        for (int64_t k = 0; k < depth; k++) {
            __m512i row[WIDTH];
            for (int j = 0; j < WIDTH; j++) row[j] = _mm512_loadu_si512(b + k * b_row + j * LANES);
            for (int i = 0; i < COUNT; i++) {
                const __m512i factor = _mm512_set1_epi32(int(a[i * down + k * along]));
                for (int j = 0; j < WIDTH; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], __m512bh(factor), __m512bh(row[j]));
            }
        }
        for (int i = 0; i < COUNT; i++)
            for (int j = 0; j < WIDTH; j++) _mm512_storeu_ps(c + i * c_row + j * LANES, sums[i][j]);
    }
};

inline void pair_product(const pair *a, int64_t down, int64_t along, const pair *b, int64_t b_row, float *c, int64_t c_row,
                         int64_t rows, int64_t columns, int64_t depth, bool more) {
    product<in_pairs_of_numbers>(a, down, along, b, b_row, c, c_row, rows, columns, depth, more);
}

inline __m512 widened(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }

// y += more.
inline void add_rows(bf16 *y, int64_t row, const float *more, int64_t width, int64_t count, int64_t size) {
    for (int64_t n = 0; n < count; n++)
        for (int64_t i = 0; i < size; i += LANES) {
            const __mmask16 there = size - i < LANES ? __mmask16((1u << (size - i)) - 1) : __mmask16(0xFFFF);
            bf16 *at = y + n * row + i;
            const __m512 sum = _mm512_add_ps(widened(_mm256_maskz_loadu_epi16(there, at)), _mm512_loadu_ps(more + n * width + i));
            _mm256_mask_storeu_epi16(at, there, __m256i(_mm512_cvtneps_pbh(sum)));
        }
}

// Columns of neighbouring rows as pairs, rows of `width` pairs: to[t, i] = (from[2t, i], from[2t + 1, i]); zeros after the last row.
inline void paired_rows(const bf16 *from, int64_t stride, pair *to, int64_t width, int64_t count, int64_t size) {
    for (int64_t t = 0; t < count; t += 2)
        for (int64_t i = 0; i < width; i += LANES) {
            const int64_t left = size - i;
            const __mmask16 there = left >= LANES ? __mmask16(0xFFFF) : left <= 0 ? __mmask16(0) : __mmask16((1u << left) - 1);
            const __m512i first = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + t * stride + i));
            __m512i second = _mm512_setzero_si512();
            if (t + 1 < count) second = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, from + (t + 1) * stride + i));
            _mm512_storeu_si512(to + t / 2 * width + i, _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
        }
}

// Rows of float32 numbers times `scale`, rounded: beside each other, and where `turned` is given as pairs of rows.
inline void rounded_rows(const float *from, int64_t width, bf16 *to, pair *turned, int64_t rows, float scale) {
    for (int64_t i = 0; i < rows * width; i++) store(to + i, from[i] * scale);
    if (turned != nullptr) paired_rows(to, width, turned, width, rows, width);
}

}  // namespace

#endif
