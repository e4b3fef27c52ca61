// Small products in float32 within a core's caches, in vectors of the machine's width (attention.cpp, lora.cpp).

#pragma once

#include <cstdint>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "native.h"

namespace {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16, COLUMNS = 4;  // floats of a vector, vectors of a tile: with four rows they fill the registers
#elif defined(__AVX__)
constexpr int64_t LANES = 8, COLUMNS = 3;
#else
constexpr int64_t LANES = 4, COLUMNS = 4;
#endif
constexpr int64_t ROWS = 4;      // of a tile
constexpr int64_t TALL = 8;      // of one that is a vector wide, where rows are many
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));

inline int64_t up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

inline int64_t thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// COUNT rows x WIDTH vectors of c = a b, or of c += a b. a[i, k] lies at i * down + k * along.
struct in_floats {
    using number = float;

    template <int COUNT, int WIDTH>
    static inline void tile(const float *a, int64_t down, int64_t along, const float *b, int64_t b_row, float *c, int64_t c_row,
                            int64_t depth, bool more) {
        lanes sums[COUNT][WIDTH];
        for (int i = 0; i < COUNT; i++)
            for (int j = 0; j < WIDTH; j++) sums[i][j] = more ? *(const lanes *)(c + i * c_row + j * LANES) : lanes{};
#pragma GCC unroll 4
        for (int64_t k = 0; k < depth; k++) {
            lanes row[WIDTH];
            for (int j = 0; j < WIDTH; j++) row[j] = *(const lanes *)(b + k * b_row + j * LANES);
            for (int i = 0; i < COUNT; i++) {
                const float factor = a[i * down + k * along];
                for (int j = 0; j < WIDTH; j++) sums[i][j] += factor * row[j];
            }
        }
        for (int i = 0; i < COUNT; i++)
            for (int j = 0; j < WIDTH; j++) *(lanes *)(c + i * c_row + j * LANES) = sums[i][j];
    }
};

// c = a b or c += a b. `rows` is a multiple of ROWS, `columns` of LANES; `depth` numbers are summed over (of pairs.h: pairs).
template <class Kind>
inline void product(const typename Kind::number *a, int64_t down, int64_t along, const typename Kind::number *b, int64_t b_row,
                    float *c, int64_t c_row, int64_t rows, int64_t columns, int64_t depth, bool more) {
    for (int64_t j = 0; j < columns; j += COLUMNS * LANES) {
        const int64_t left = (columns - j) / LANES;
        for (int64_t i = 0; i < rows; i += ROWS) {
            const auto *from = a + i * down, *row = b + j;
            float *to = c + i * c_row + j;
            if (left >= COLUMNS) Kind::template tile<ROWS, COLUMNS>(from, down, along, row, b_row, to, c_row, depth, more);
            else if (left == 3) Kind::template tile<ROWS, 3>(from, down, along, row, b_row, to, c_row, depth, more);
            else if (left == 2) Kind::template tile<ROWS, 2>(from, down, along, row, b_row, to, c_row, depth, more);
            else if (rows - i >= TALL) {
                Kind::template tile<TALL, 1>(from, down, along, row, b_row, to, c_row, depth, more);
                i += TALL - ROWS;
            } else Kind::template tile<ROWS, 1>(from, down, along, row, b_row, to, c_row, depth, more);
        }
    }
}

inline void product(const float *a, int64_t down, int64_t along, const float *b, int64_t b_row, float *c, int64_t c_row,
                    int64_t rows, int64_t columns, int64_t depth, bool more) {
    product<in_floats>(a, down, along, b, b_row, c, c_row, rows, columns, depth, more);
}

// `count` rows of `size` numbers, times `scale`, to rows of `width`; zeros up to there and up to `room` rows.
template <class T>
inline void spread(const T *from, int64_t stride, float *to, int64_t width, int64_t count, int64_t size, int64_t room, float scale) {
    for (int64_t t = 0; t < room; t++) {
        float *row = to + t * width;
        const int64_t filled = t < count ? size : 0;
#pragma omp simd
        for (int64_t i = 0; i < filled; i++) row[i] = load(from + t * stride + i) * scale;
        for (int64_t i = filled; i < width; i++) row[i] = 0.0f;
    }
}

// The transpose of `size` columns of rows of `width`: to[i, t].
inline void transpose(const float *from, int64_t width, float *to, int64_t room, int64_t size) {
    for (int64_t first = 0; first < room; first += LANES)
        for (int64_t i = 0; i < size; i++)
            for (int64_t t = 0; t < LANES; t++) to[i * room + first + t] = from[(first + t) * width + i];
}

template <class T>
inline void put(const float *from, int64_t width, T *to, int64_t stride, int64_t count, int64_t size, float scale) {
    for (int64_t t = 0; t < count; t++)
#pragma omp simd
        for (int64_t i = 0; i < size; i++) store(to + t * stride + i, from[t * width + i] * scale);
}

}  // namespace
