// Matrix products of bfloat16 numbers, summed in float32 and rounded once (matmul.py), for processors that multiply pairs of them
// (AVX-512 BF16) or tiles (AMX, amx.h). Blocks as in Goto & van de Geijn 2008: a panel of b is laid out in pairs and stays in the second cache while rows
// of a pass over it, a few at a time, with their sums in registers.
//
// c = scale (a b + a' b') + bias, or that is added to c. a is m x k, b is k x n. The second product is what a low-rank adapter adds: it has the layout
// of the first and a depth of its own.

#include "amx.h"
#include "pairs.h"

#if defined(SARTOR_PAIRS)

namespace {

constexpr int64_t TOGETHER = 16 * GROUP;  // rows of a whose groups are made at once, so that no line of memory is read twice

// Rows of a and the columns that they meet: `pairs` at a + i * down + k * along (numbers), and in the panel; where `odd` a single one.
struct factors {
    const bf16 *a;
    int64_t down, along, pairs;
    bool odd;
    const pair *panel;
};

template <int COUNT, int WIDTH>
inline void add_pairs(__m512 (&sums)[COUNT][WIDTH], const pair (&factors)[COUNT], const pair *panel) {
    __m512i row[WIDTH];
    for (int j = 0; j < WIDTH; j++) row[j] = _mm512_loadu_si512(panel + j * 16);
    for (int i = 0; i < COUNT; i++) {
        const __m512i factor = _mm512_set1_epi32(int(factors[i]));
        for (int j = 0; j < WIDTH; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], __m512bh(factor), __m512bh(row[j]));
    }
}

template <int COUNT, int WIDTH>
inline void sum_up(const factors &of, __m512 (&sums)[COUNT][WIDTH]) {
    const bf16 *a = of.a;
    const pair *panel = of.panel;
    pair here[COUNT];
    for (int64_t k = 0; k < of.pairs; k++, a += of.along, panel += WIDTH * 16) {
        for (int i = 0; i < COUNT; i++) std::memcpy(here + i, a + i * of.down, 4);
        add_pairs<COUNT, WIDTH>(sums, here, panel);
    }
    if (!of.odd) return;
    for (int i = 0; i < COUNT; i++) here[i] = a[i * of.down];
    add_pairs<COUNT, WIDTH>(sums, here, panel);
}

// Rows of a that are columns in memory, group by group: pairs of a step beside each other. `size`: what a group takes.
inline void group_rows(const bf16 *from, int64_t row, pair *to, int64_t size, int64_t depth, int64_t count) {
    for (int64_t k = 0; k < depth; k += 2, to += GROUP)
        for (int64_t i = 0; i < count; i += GROUP) {
            const __mmask8 there = __mmask8((1u << (count - i < GROUP ? count - i : GROUP)) - 1);
            const __m128i one = _mm_maskz_loadu_epi16(there, from + k * row + i);
            const __m128i other = k + 1 < depth ? _mm_maskz_loadu_epi16(there, from + (k + 1) * row + i) : _mm_setzero_si128();
            pair *at = to + i / GROUP * size;
            _mm_storeu_si128(reinterpret_cast<__m128i *>(at), _mm_unpacklo_epi16(one, other));
            _mm_storel_epi64(reinterpret_cast<__m128i *>(at + 4), _mm_unpackhi_epi16(one, other));
        }
}

template <int COUNT, int WIDTH>
void tile(const problem &of, factors all, factors more, int64_t row, results to) {
    __m512 sums[COUNT][WIDTH];
    float *kept = to.kept + row * WIDTH * 16;
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < WIDTH; j++) sums[i][j] = to.begins ? _mm512_setzero_ps() : _mm512_loadu_ps(kept + (i * WIDTH + j) * 16);
    sum_up<COUNT, WIDTH>(all, sums);
    if (to.ends && more.pairs > 0) sum_up<COUNT, WIDTH>(more, sums);
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < WIDTH; j++) {
            if (to.ends) finish(of, to, sums[i][j], row + i, j * 16);
            else _mm512_storeu_ps(kept + (i * WIDTH + j) * 16, sums[i][j]);
        }
}

// Rows `row` to `end` of a panel's columns. Packed rows of a lie in groups.
template <int WIDTH>
void rows_of(const problem &of, bool packed, factors all, factors more, int64_t row, int64_t end, results to) {
    constexpr int MOST = WIDTH == 4 ? 6 : WIDTH == 3 ? 8 : 12;  // what registers hold
    while (row < end) {
        factors here = all, also = more;
        int64_t count = end - row;
        if (packed) {
            here.a += 2 * (row / GROUP * GROUP * all.down + row % GROUP);
            here.down = 2;
            if (count > GROUP - row % GROUP) count = GROUP - row % GROUP;
        } else here.a += row * all.down;
        also.a += row * more.down;
        if (count >= MOST) tile<MOST, WIDTH>(of, here, also, row, to), row += MOST;
        else if (count >= 4) tile<4, WIDTH>(of, here, also, row, to), row += 4;
        else if (count >= 2) tile<2, WIDTH>(of, here, also, row, to), row += 2;
        else tile<1, WIDTH>(of, here, also, row, to), row += 1;
    }
}

// All rows of a block by pairs: `laid` is where the panel's columns are, `also` those of the product of low rank.
void by_pairs(const problem &of, const block &at, const pair *laid, const pair *also, int64_t width, const results &to) {
    const bool packed = at.packed != nullptr;
    factors all{of.a + at.above * of.a_row + at.k, of.a_row, 2, at.depth / 2, at.depth % 2 != 0, laid};
    if (packed) all = {at.packed + at.k * GROUP, (of.k + 1) / 2, 2 * GROUP, (at.depth + 1) / 2, false, laid};
    factors more{of.more_a + at.above * of.more_a_row, of.more_a_row, 2, of.more_k / 2, of.more_k % 2 != 0, also};
    if (!to.ends || of.more_k == 0) more.pairs = 0, more.odd = false;
    const int64_t row = at.row - at.above, end = at.end - at.above;
    results here = to;
    here.kept -= row * width;
    if (width == 64) rows_of<4>(of, packed, all, more, row, end, here);
    else if (width == 48) rows_of<3>(of, packed, all, more, row, end, here);
    else if (width == 32) rows_of<2>(of, packed, all, more, row, end, here);
    else rows_of<1>(of, packed, all, more, row, end, here);
}

// Columns `column` to `column + of.panel` of rows `row` to `end`. `packed`: the rows from `above` on.
void task(const problem &of, const bf16 *packed, int64_t above, int64_t column, int64_t row, int64_t end, char *room) {
    const int64_t columns = of.n - column < of.panel ? of.n - column : of.panel, width = up(columns, 16);
    pair *panel = reinterpret_cast<pair *>(room), *more_panel = panel + up(of.depth, 32) / 2 * of.panel;
    float *kept = reinterpret_cast<float *>(more_panel + up(of.more_k, 32) / 2 * of.panel);
    bf16 *c = of.c + (of.c_turned ? column * of.c_row + above : above * of.c_row + column);
    for (int64_t k = 0; k < of.k; k += of.depth) {
        const int64_t depth = of.k - k < of.depth ? of.k - k : of.depth;
        const bool ends = k + depth == of.k, adds = ends && of.more_k > 0;
        const bf16 *from = of.b + (of.b_turned ? column * of.b_row + k : k * of.b_row + column);
        const bf16 *more_from = of.more_b + (of.b_turned ? column * of.more_b_row : column);
        const results to{kept, k == 0, ends, c, columns, of.bias == nullptr ? nullptr : of.bias + column};
        const block at{packed, above, row, end, k, depth};
#if defined(SARTOR_TILES)
        if (has_tiles()) {
            const bool whole = of.laid != nullptr;
            const pair *strips = whole ? of.laid + column * up(of.k, STEP) / 2 + k / 2 * of.strip : panel;
            if (!whole) lay_out_strips(of, from, of.b_row, depth, columns, panel);
            if (adds) lay_out_strips(of, more_from, of.more_b_row, of.more_k, columns, more_panel);
            by_tiles(of, at, strips, up(whole ? of.k : depth, STEP) / 2, more_panel, to);
            continue;
        }
#endif
        lay_out(from, of.b_row, of.b_turned, depth, columns, panel, width);
        if (adds) lay_out(more_from, of.more_b_row, of.b_turned, of.more_k, columns, more_panel, width);
        by_pairs(of, at, panel, more_panel, width, to);
    }
}

// Rows of a that are columns in memory, `row` to `end` of those from `above` on, laid out for `task`.
void pack(const problem &of, int64_t above, int64_t row, int64_t end, bf16 *packed) {
#if defined(SARTOR_TILES)
    if (has_tiles()) return tile_rows(of.a + row, of.a_row, packed + (row - above) * up(of.k, 32), of.k, end - row);
#endif
    const int64_t half = (of.k + 1) / 2;
    group_rows(of.a + row, of.a_row, reinterpret_cast<pair *>(packed) + (row - above) * half, GROUP * half, of.k, end - row);
}

}  // namespace

#endif

extern "C" {

// 0: `matmul` does nothing here. 1: it multiplies pairs of numbers. 2: tiles of them.
int matmul_worth() {
#if defined(SARTOR_TILES)
    if (has_tiles()) return 2;
#endif
#if defined(SARTOR_PAIRS)
    return 1;
#else
    return 0;
#endif
}

// All of b, for products by tiles: strip after strip, the last one filled up with zeros.
void lay_out_all(const problem *given, uint32_t *laid) {
#if defined(SARTOR_TILES)
    const problem &of = *given;
#pragma omp parallel for schedule(static) num_threads(int(of.threads))
    for (int64_t column = 0; column < of.n; column += of.strip) {
        const bf16 *from = of.b + (of.b_turned ? column * of.b_row : column);
        const int64_t columns = of.n - column < of.strip ? of.n - column : of.strip;
        lay_out_strips(of, from, of.b_row, of.k, columns, laid + column * up(of.k, STEP) / 2);
    }
#endif
}

// `room` is threads * thread_bytes, then what packed_rows of a take where a is k x m.
void matmul(const problem *given, char *room) {
#ifdef SARTOR_PAIRS
    const problem &of = *given;
    bf16 *packed = of.a_turned ? reinterpret_cast<bf16 *>(room + of.threads * of.thread_bytes) : nullptr;
    const int64_t panels = (of.n + of.panel - 1) / of.panel, most = packed != nullptr ? of.packed_rows : of.m;
#pragma omp parallel num_threads(int(of.threads))
    {
#if defined(SARTOR_TILES)
        const tiles_in_use in_use;
#endif
        for (int64_t above = 0; above < of.m; above += most) {
            const int64_t below = of.m - above < most ? of.m : above + most;
            if (packed != nullptr) {
#pragma omp for schedule(static)
                for (int64_t row = above; row < below; row += TOGETHER)
                    pack(of, above, row, below - row < TOGETHER ? below : row + TOGETHER, packed);
            }
            const int64_t pieces = (below - above + of.task_rows - 1) / of.task_rows;
#pragma omp for schedule(dynamic)
            for (int64_t at = 0; at < panels * pieces; at++) {
                const int64_t row = above + at / panels * of.task_rows, end = below - row < of.task_rows ? below : row + of.task_rows;
                task(of, packed, above, at % panels * of.panel, row, end, room + thread_number() * of.thread_bytes);
            }
        }
    }
#endif
}
}
