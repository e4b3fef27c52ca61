// Products of tiles by Intel's AMX (pairs.h): 16 rows of 32 numbers of a times 32 rows of 16 of b at a time.
//
// One tile of a and one of b after the other, with three of sums: where the core's other hyperthread works too, tiles that are loaded
// wait until earlier ones are used up, and the more of the eight are in use the longer (two by two: 145 ns for what takes 76 so, and
// 31 without loading; on a Xeon with AVX10.1). Three sums are what hides that a product takes three times as long as its turn.

#pragma once

#include "pairs.h"

#if defined(SARTOR_PAIRS) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define SARTOR_TILES 1

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t HIGH = 16, STEP = 32, MOST_WIDE = 3;  // a tile's rows, numbers summed over at a time, tiles of b beside each other

// Whether the system lets this process have the tiles, which it has to ask for.
inline bool has_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

// GCC does not know that loading a tile reads memory: what is stored before it has to be there.
inline void written() { asm volatile("" ::: "memory"); }

// A thread's tiles, all of 16 rows of 64 bytes, as long as this lives: sums are 0 to 2, a's 3, b's 4.
struct tiles_in_use {
    const bool used = has_tiles();

    tiles_in_use() {
        if (!used) return;
        alignas(64) uint8_t shapes[64] = {1};
        for (int i = 0; i < 5; i++) shapes[16 + 2 * i] = 64, shapes[48 + i] = 16;
        written();
        _tile_loadconfig(shapes);
    }
    ~tiles_in_use() {
        if (used) _tile_release();
    }
};

// Rows of a that are columns in memory, 16 by 16 of them step by step; zeros where none are.
inline void tile_rows(const bf16 *from, int64_t row, bf16 *to, int64_t depth, int64_t count) {
    alignas(64) pair both[HIGH * 2 * HIGH];
    const int64_t all = HIGH * up(depth, STEP);
    for (int64_t i = 0; i < count; i += 2 * HIGH)
        for (int64_t k = 0; k < depth; k += STEP) {
            lay_out(from + k * row + i, row, false, depth - k < STEP ? depth - k : STEP, count - i, both, 2 * HIGH);
            for (int64_t half = 0; half < 2 && i + half * HIGH < count; half++) {
                bf16 *at = to + (i / HIGH + half) * all + k * HIGH;
                turned(reinterpret_cast<bf16 *>(both + half * HIGH), 4 * HIGH, HIGH, STEP, reinterpret_cast<pair *>(at), HIGH);
            }
        }
}

// Rows of a: `down` numbers from one to the next, `along` from one step to the next.
struct tile_factors {
    const bf16 *a;
    int64_t down, along, rows, depth;
};

template <int WIDE>
inline void sum_tiles(tile_factors of, const pair *panel, int64_t width) {
    alignas(64) bf16 edge[HIGH * STEP];
    for (int64_t k = 0; k < of.depth; k += STEP, of.a += of.along, panel += STEP / 2 * width) {
        const bf16 *a = of.a;
        int64_t down = of.down;
        const int64_t numbers = of.depth - k < STEP ? of.depth - k : STEP;
        if (of.along == STEP && (of.rows < HIGH || numbers < STEP)) {
            const __mmask32 there = ~__mmask32(0) >> (STEP - numbers);
            for (int64_t i = 0; i < of.rows; i++)
                _mm512_store_si512(edge + i * STEP, _mm512_maskz_loadu_epi16(there, a + i * of.down));
            for (int64_t i = of.rows; i < HIGH; i++) _mm512_store_si512(edge + i * STEP, _mm512_setzero_si512());
            a = edge, down = STEP;
        }
        written();
        _tile_loadd(3, a, 2 * down);
        _tile_loadd(4, panel, 4 * width);
        _tile_dpbf16ps(0, 3, 4);
        if (WIDE > 1) {
            _tile_loadd(4, panel + HIGH, 4 * width);
            _tile_dpbf16ps(1, 3, 4);
        }
        if (WIDE > 2) {
            _tile_loadd(4, panel + 2 * HIGH, 4 * width);
            _tile_dpbf16ps(2, 3, 4);
        }
    }
}

// Rows `row` to `row + 16`, seen from the first packed one, of 16 * WIDE columns.
template <int WIDE>
inline void strip(const problem &of, const tile_factors &all, const tile_factors &more, const pair *panel, const pair *more_panel,
                  int64_t width, int64_t row, int64_t column, const results &to, float *kept) {
    constexpr int64_t SUMS = HIGH * HIGH, BYTES = 4 * HIGH;
    if (to.begins) {
        _tile_zero(0);
        if (WIDE > 1) _tile_zero(1);
        if (WIDE > 2) _tile_zero(2);
    } else {
        _tile_loadd(0, kept, BYTES);
        if (WIDE > 1) _tile_loadd(1, kept + SUMS, BYTES);
        if (WIDE > 2) _tile_loadd(2, kept + 2 * SUMS, BYTES);
    }
    sum_tiles<WIDE>(all, panel, width);
    if (to.ends && of.more_k > 0) sum_tiles<WIDE>(more, more_panel, width);
    alignas(64) float sums[WIDE * SUMS];
    float *at = to.ends ? sums : kept;
    _tile_stored(0, at, BYTES);
    if (WIDE > 1) _tile_stored(1, at + SUMS, BYTES);
    if (WIDE > 2) _tile_stored(2, at + 2 * SUMS, BYTES);
    if (!to.ends) return;
    if (of.scale == 1.0f && to.bias == nullptr && !of.c_turned && to.columns - column >= WIDE * HIGH) {
        bf16 *c = to.c + row * of.c_row + column;
        for (int64_t i = 0; i < all.rows; i++)
            for (int64_t j = 0; j < WIDE; j++) {
                const __m512 sum = _mm512_load_ps(sums + j * SUMS + i * HIGH);
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(c + i * of.c_row + j * HIGH), __m256i(_mm512_cvtneps_pbh(sum)));
            }
        return;
    }
    for (int64_t i = 0; i < all.rows; i++)
        for (int64_t j = 0; j < WIDE; j++) finish(of, to, _mm512_load_ps(sums + j * SUMS + i * HIGH), row + i, column + j * HIGH);
}

// All rows of a block by tiles: `laid` is where the panel's columns are, `also` those of the product of low rank.
inline void by_tiles(const problem &of, const block &at, const pair *laid, const pair *also, int64_t width, const results &to) {
    for (int64_t row = at.row; row < at.end; row += HIGH) {
        const int64_t rows = at.end - row < HIGH ? at.end - row : HIGH, from = row - at.above;
        tile_factors all{of.a + row * of.a_row + at.k, of.a_row, STEP, rows, at.depth};
        if (at.packed != nullptr) all = {at.packed + from * up(of.k, STEP) + at.k * HIGH, STEP, HIGH * STEP, rows, at.depth};
        const tile_factors more{of.more_a + row * of.more_a_row, of.more_a_row, STEP, rows, of.more_k};
        for (int64_t column = 0; column < width; column += MOST_WIDE * HIGH) {
            float *kept = to.kept + (row - at.row) * of.panel + column * HIGH;
            const auto run = width - column > 2 * HIGH ? strip<3> : width - column > HIGH ? strip<2> : strip<1>;
            run(of, all, more, laid + column, also + column, width, from, column, to, kept);
        }
    }
}

}  // namespace

#endif
