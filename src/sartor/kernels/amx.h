// Products of tiles by Intel's AMX (pairs.h): 16 rows of 32 numbers of a times 32 rows of 16 of b at a time.
//
// Two tiles of a and two of b make four sums. The core has few tiles beside the eight that have names, fewer where its other hyperthread
// works too; what is loaded keeps one of them until something else takes its name, and whatever follows waits for a free one (145 ns
// for four products that by themselves take 31; a Xeon with AVX10.1). Set to zero after its last use, a tile is free at once: 73 ns.

#pragma once

#include "pairs.h"

#if defined(SARTOR_PAIRS) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define SARTOR_TILES 1

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t HIGH = 16, STEP = 32, PAIR = 2 * HIGH;  // a tile's rows, numbers summed over at a time, rows or columns of two tiles
constexpr int64_t MOST_COLUMNS = 192;                      // of a panel

// Whether the system lets this process have the tiles, which it has to ask for.
inline bool has_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

// GCC does not know that loading a tile reads memory: what is stored before it has to be there.
inline void written() { asm volatile("" ::: "memory"); }

// A thread's tiles, all of 16 rows of 64 bytes, as long as this lives: sums are 0 to 3, a's 4 and 5, b's 6 and 7.
struct tiles_in_use {
    const bool used = has_tiles();

    tiles_in_use() {
        if (!used) return;
        alignas(64) uint8_t shapes[64] = {1};
        for (int i = 0; i < 8; i++) shapes[16 + 2 * i] = 64, shapes[48 + i] = 16;
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

// Rows of a: `down` numbers from one to the next, `along` from one step to the next, `below` from one tile to the one below.
struct tile_factors {
    const bf16 *a;
    int64_t down, along, below, rows, depth;
};

// Where 16 rows of a tile are, of which `rows` are there, or what is there of them beside zeros.
struct tile_place {
    const bf16 *at;
    int64_t down;

    tile_place(const bf16 *a, int64_t down, int64_t rows, int64_t numbers, bf16 *edge) : at(a), down(down) {
        if (rows >= HIGH && numbers >= STEP) return;
        const __mmask32 there = ~__mmask32(0) >> (STEP - numbers);
        for (int64_t i = 0; i < HIGH; i++)
            _mm512_store_si512(edge + i * STEP, i < rows ? _mm512_maskz_loadu_epi16(there, a + i * down) : _mm512_setzero_si512());
        at = edge, this->down = STEP;
    }
    // Ask for the same rows some steps ahead: there is no telling processors that these are many streams.
    inline void ahead(int64_t along) const {
        for (int64_t i = 0; i < HIGH; i++) _mm_prefetch(reinterpret_cast<const char *>(at + i * down + along), _MM_HINT_T0);
    }
};

// The sums of 16 * TALL rows and 16 * WIDE columns are two by two tiles, or up to three beside each other; rows of `row` numbers.
template <int TALL, int WIDE>
inline void begin_sums() {
    _tile_zero(0);
    if (WIDE > 1) _tile_zero(1);
    if (TALL > 1 || WIDE > 2) _tile_zero(2);
    if (TALL > 1 && WIDE > 1) _tile_zero(3);
}

// One of the tiles of sums from memory or to it. An instruction names its tile, so there is one for each.
template <bool LOADS>
inline __attribute__((always_inline)) void move_sum(int tile, float *at, int64_t bytes) {
    if (LOADS) {
        if (tile == 0) _tile_loadd(0, at, bytes);
        if (tile == 1) _tile_loadd(1, at, bytes);
        if (tile == 2) _tile_loadd(2, at, bytes);
        if (tile == 3) _tile_loadd(3, at, bytes);
        return;
    }
    if (tile == 0) _tile_stored(0, at, bytes);
    if (tile == 1) _tile_stored(1, at, bytes);
    if (tile == 2) _tile_stored(2, at, bytes);
    if (tile == 3) _tile_stored(3, at, bytes);
}

// All of them: LOADS, or they are stored.
template <int TALL, int WIDE, bool LOADS>
inline void move_sums(float *at, int64_t row) {
    if (LOADS) written();
    move_sum<LOADS>(0, at, 4 * row);
    if (WIDE > 1) move_sum<LOADS>(1, at + HIGH, 4 * row);
    if (TALL > 1) move_sum<LOADS>(2, at + HIGH * row, 4 * row);
    if (TALL > 1 && WIDE > 1) move_sum<LOADS>(3, at + HIGH * row + HIGH, 4 * row);
    if (WIDE > 2) move_sum<LOADS>(2, at + 2 * HIGH, 4 * row);
}

// The next step of 32 rows.
template <int WIDE, bool SOON>
inline void step(const tile_place &above, const tile_place &below, int64_t later, const pair *panel, int64_t width) {
    _tile_loadd(6, panel, 4 * width);
    _tile_loadd(4, above.at, 2 * above.down);
    _tile_dpbf16ps(0, 4, 6);
    if (SOON) above.ahead(later);
    if (WIDE > 1) _tile_loadd(7, panel + HIGH, 4 * width);
    _tile_loadd(5, below.at, 2 * below.down);
    if (WIDE > 1) _tile_dpbf16ps(1, 4, 7);
    _tile_zero(4);
    if (SOON)
        for (int64_t i = HIGH * width; i < 2 * HIGH * width; i += HIGH)
            _mm_prefetch(reinterpret_cast<const char *>(panel + i), _MM_HINT_T0);
    _tile_dpbf16ps(2, 5, 6);
    _tile_zero(6);
    if (SOON) below.ahead(later);
    if (WIDE > 1) _tile_dpbf16ps(3, 5, 7);
    _tile_zero(5);
    if (WIDE > 1) _tile_zero(7);
}

// The next step of 16 rows.
template <int WIDE, bool SOON>
inline void step(const tile_place &rows, int64_t later, const pair *panel, int64_t width) {
    _tile_loadd(6, panel, 4 * width);
    _tile_loadd(4, rows.at, 2 * rows.down);
    _tile_dpbf16ps(0, 4, 6);
    _tile_zero(6);
    if (WIDE > 1) {
        _tile_loadd(7, panel + HIGH, 4 * width);
        _tile_dpbf16ps(1, 4, 7);
        _tile_zero(7);
    }
    if (SOON) rows.ahead(later);
    if (WIDE > 2) {
        _tile_loadd(6, panel + 2 * HIGH, 4 * width);
        _tile_dpbf16ps(2, 4, 6);
        _tile_zero(6);
    }
    _tile_zero(4);
}

// Rows of the panel are `width` pairs. SOON: what comes is in no near cache.
template <int TALL, int WIDE, bool SOON>
inline void sum_tiles(tile_factors of, const pair *panel, int64_t width) {
    alignas(64) bf16 edge[TALL * HIGH * STEP];
    const int64_t later = (TALL > 1 ? 3 : 2) * of.along;
    for (int64_t k = 0; k < of.depth; k += STEP, of.a += of.along, panel += STEP / 2 * width) {
        const bool laid = of.along != STEP;  // with zeros after them
        const int64_t rows = laid ? TALL * HIGH : of.rows, numbers = laid || of.depth - k >= STEP ? STEP : of.depth - k;
        const tile_place above(of.a, of.down, rows, numbers, edge);
        if (TALL > 1) {
            const tile_place below(of.a + of.below, of.down, rows - HIGH, numbers, edge + (TALL - 1) * HIGH * STEP);
            written();
            step<WIDE, SOON>(above, below, later, panel, width);
        } else {
            written();
            step<WIDE, SOON>(above, later, panel, width);
        }
    }
}

template <int TALL, int WIDE, bool SOON = false>
inline void tiles_of(const tile_factors &of, const pair *b, int64_t b_row, float *c, int64_t c_row, bool more) {
    if (more) move_sums<TALL, WIDE, true>(c, c_row);
    else begin_sums<TALL, WIDE>();
    sum_tiles<TALL, WIDE, SOON>(of, b, b_row);
    move_sums<TALL, WIDE, false>(c, c_row);
}

// c = a b or c += a b, b in pairs. Rows and columns are multiples of 16; `depth`, of 32, numbers are summed over.
inline void multiply(const bf16 *a, int64_t a_row, const pair *b, int64_t b_row, float *c, int64_t c_row, int64_t rows,
                     int64_t columns, int64_t depth, bool more) {
    for (int64_t i = 0; i < rows; i += PAIR)
        for (int64_t j = 0; j < columns; j += PAIR) {
            const bool tall = rows - i > HIGH, wide = columns - j > HIGH;
            const auto run = tall ? (wide ? tiles_of<2, 2> : tiles_of<2, 1>) : wide ? tiles_of<1, 2> : tiles_of<1, 1>;
            run({a + i * a_row, a_row, STEP, HIGH * a_row, tall ? PAIR : HIGH, depth}, b + j, b_row, c + i * c_row + j, c_row, more);
        }
}

// Rows from `row` on, seen from the first packed one, of 16 * WIDE columns. Rows of the panel are `width` pairs.
template <int TALL, int WIDE>
inline void strip(const problem &of, const tile_factors &all, const tile_factors &more, const pair *panel, const pair *more_panel,
                  int64_t width, int64_t row, int64_t column, const results &to, float *kept) {
    constexpr int64_t WIDTH = WIDE * HIGH;
    if (to.begins) begin_sums<TALL, WIDE>();
    else move_sums<TALL, WIDE, true>(kept, width);
    sum_tiles<TALL, WIDE, true>(all, panel, width);
    if (!to.ends) return move_sums<TALL, WIDE, false>(kept, width);
    if (of.more_k > 0) sum_tiles<TALL, WIDE, false>(more, more_panel, width);
    alignas(64) float sums[TALL * HIGH * WIDTH];
    move_sums<TALL, WIDE, false>(sums, WIDTH);
    if (of.scale != 1.0f || to.bias != nullptr || of.c_turned || of.adds || to.columns - column < WIDTH) {
        for (int64_t i = 0; i < all.rows; i++)
            for (int64_t j = 0; j < WIDTH; j += HIGH) finish(of, to, _mm512_load_ps(sums + i * WIDTH + j), row + i, column + j);
        return;
    }
    bf16 *c = to.c + row * of.c_row + column;
    for (int64_t i = 0; i < all.rows; i++, c += of.c_row) {
        const float *at = sums + i * WIDTH;
        if (WIDE > 1) _mm512_storeu_si512(c, __m512i(_mm512_cvtne2ps_pbh(_mm512_load_ps(at + HIGH), _mm512_load_ps(at))));
        if (WIDE % 2 == 0) continue;
        const __m256bh last = _mm512_cvtneps_pbh(_mm512_load_ps(at + WIDTH - HIGH));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(c + WIDTH - HIGH), __m256i(last));
    }
}

// A panel of b for `by_tiles`: strip after strip.
inline void lay_out_strips(const problem &of, const bf16 *from, int64_t row, int64_t depth, int64_t columns, pair *to) {
    const int64_t all = up(depth, STEP), width = of.strip, panel = up(columns, width);
    if (of.b_turned) {
        for (int64_t j = 0; j < columns; j += width)
            lay_out(from + j * row, row, true, depth, columns - j < width ? columns - j : width, to + j * all / 2, width);
        return;
    }
    pair *places[MOST_COLUMNS / HIGH];
    for (int64_t i = 0; i < panel; i += HIGH) places[i / HIGH] = to + i / width * width * all / 2 + i % width;
    paired_rows(from, row, panel, depth, columns, [&](int64_t t, int64_t i) { return places[i / HIGH] + t * width; });
    for (int64_t t = (depth + 1) / 2; t < all / 2; t++)
        for (int64_t i = 0; i < panel; i += HIGH) _mm512_storeu_si512(places[i / HIGH] + t * width, _mm512_setzero_si512());
}

// All rows of a block by tiles: `laid` is where the panel's strips are, of `size` rows each, `also` those of the product of low rank.
inline void by_tiles(const problem &of, const block &at, const pair *laid, int64_t size, const pair *also, const results &to) {
    const int64_t down = up(of.k, STEP), more_size = up(of.more_k, STEP) / 2;
    const int64_t width = of.strip, high = width > PAIR ? HIGH : PAIR;
    for (int64_t row = at.row; row < at.end; row += high) {
        const int64_t rows = at.end - row < high ? at.end - row : high, from = row - at.above;
        tile_factors all{of.a + row * of.a_row + at.k, of.a_row, STEP, HIGH * of.a_row, rows, at.depth};
        if (at.packed != nullptr) all = {at.packed + from * down + at.k * HIGH, STEP, HIGH * STEP, HIGH * down, rows, at.depth};
        const tile_factors more{of.more_a + row * of.more_a_row, of.more_a_row, STEP, HIGH * of.more_a_row, rows, of.more_k};
        for (int64_t column = 0; column < to.columns; column += width) {
            const int64_t left = to.columns - column;
            auto run = left > PAIR && width > PAIR ? strip<1, 3> : left > HIGH ? strip<1, 2> : strip<1, 1>;
            if (rows > HIGH) run = left > HIGH ? strip<2, 2> : strip<2, 1>;
            float *kept = to.kept + (row - at.row) * of.panel + column * high;
            run(of, all, more, laid + column * size, also + column * more_size, width, from, column, to, kept);
        }
    }
}

}  // namespace

#endif
