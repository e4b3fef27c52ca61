// Matrix products of bfloat16 numbers, summed in float32 and rounded once (matmul.py), for processors that multiply pairs of them
// (AVX-512 BF16). Blocks as in Goto & van de Geijn 2008: a panel of b is laid out in pairs and stays in the second cache while rows
// of a pass over it, a few at a time, with their sums in registers.
//
// c = given + scale (a b + a' b'), a is m x k, b is k x n. The second product is what a low-rank adapter adds: it has the layout
// of the first and a depth of its own.

#include <cstdint>
#include <cstring>

#include "native.h"
#include "tile.h"

// Field by field `_Problem` of matmul.py.
struct problem {
    const uint16_t *a, *b, *more_a, *more_b, *bias;
    uint16_t *c;
    int64_t m, n, k, more_k;
    int64_t a_row, b_row, more_a_row, more_b_row, c_row;  // from one row in memory to the next
    int64_t a_turned, b_turned, c_turned;                 // k x m, n x k and n x m in memory
    int64_t adds;                                         // to what is in c
    int64_t threads, thread_bytes, depth, task_rows, packed_rows;
    float scale;
};

#if defined(__AVX512BF16__) && defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define SARTOR_PAIRS 1

#include <immintrin.h>

namespace {

// Neighbours along what is summed over, the first one in the lower half. Written as bf16 numbers and read as pairs.
typedef uint32_t __attribute__((may_alias)) pair;

constexpr int64_t PANEL = 64, GROUP = 6;  // columns of b and rows of a that are laid out together
constexpr int64_t TOGETHER = 16 * GROUP;  // rows of a whose groups are made at once, so that no line of memory is read twice

inline __mmask16 first(int64_t count) { return count >= 16 ? 0xFFFF : count <= 0 ? 0 : __mmask16((1u << count) - 1); }
inline __m512 widened(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }

// Columns of neighbouring rows as pairs, rows of `width` pairs: to[t, i] = (from[2t, i], from[2t + 1, i]); zeros after the last row.
inline void paired_rows(const bf16 *from, int64_t stride, pair *to, int64_t width, int64_t count, int64_t size) {
    // The first 16 numbers of either row beside each other, and the next 16: places of the second row are 32 further.
    const __m512i places = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i low = _mm512_or_si512(places, _mm512_slli_epi32(_mm512_add_epi32(places, _mm512_set1_epi32(32)), 16));
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t t = 0; t < count; t += 2)
        for (int64_t i = 0; i < width; i += 16) {
            if (t + 1 < count && size - i >= 32 && width - i >= 32) {
                const __m512i above = _mm512_loadu_si512(from + t * stride + i);
                const __m512i below = _mm512_loadu_si512(from + (t + 1) * stride + i);
                _mm512_storeu_si512(to + t / 2 * width + i, _mm512_permutex2var_epi16(above, low, below));
                _mm512_storeu_si512(to + t / 2 * width + i + 16, _mm512_permutex2var_epi16(above, high, below));
                i += 16;
                continue;
            }
            const __m512i one = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(size - i), from + t * stride + i));
            __m512i other = _mm512_setzero_si512();
            if (t + 1 < count) other = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first(size - i), from + (t + 1) * stride + i));
            _mm512_storeu_si512(to + t / 2 * width + i, _mm512_or_si512(one, _mm512_slli_epi32(other, 16)));
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

// A panel of b: `depth` numbers from `from` on, as pairs, rows of `width` columns of which `columns` are there.
inline void lay_out(const bf16 *from, int64_t row, bool in_columns, int64_t depth, int64_t columns, pair *to, int64_t width) {
    if (!in_columns) return paired_rows(from, row, to, width, depth, columns);
    for (int64_t k = 0; k < depth; k += 32)
        for (int64_t i = 0; i < width; i += 16) turned(from + i * row + k, row, columns - i, depth - k, to + k / 2 * width + i, width);
}

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

// Where sums go: kept in float32 while k goes on, then to c.
struct results {
    float *kept;
    bool begins, ends;
    bf16 *c;
    int64_t columns;
    const bf16 *bias;
};

template <int COUNT, int WIDTH>
void tile(const problem &of, factors all, factors more, int64_t row, results to) {
    __m512 sums[COUNT][WIDTH];
    float *kept = to.kept + row * WIDTH * 16;
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < WIDTH; j++) sums[i][j] = to.begins ? _mm512_setzero_ps() : _mm512_loadu_ps(kept + (i * WIDTH + j) * 16);
    sum_up<COUNT, WIDTH>(all, sums);
    if (to.ends && more.pairs > 0) sum_up<COUNT, WIDTH>(more, sums);
    const __m512 scale = _mm512_set1_ps(of.scale);
    for (int i = 0; i < COUNT; i++)
        for (int j = 0; j < WIDTH; j++) {
            if (!to.ends) {
                _mm512_storeu_ps(kept + (i * WIDTH + j) * 16, sums[i][j]);
                continue;
            }
            const __mmask16 there = first(to.columns - j * 16);
            __m512 sum = _mm512_mul_ps(sums[i][j], scale);
            if (to.bias != nullptr) sum = _mm512_add_ps(sum, widened(_mm256_maskz_loadu_epi16(there, to.bias + j * 16)));
            if (of.c_turned) {
                alignas(64) float values[16];
                _mm512_store_ps(values, sum);
                for (int64_t n = 0; n < 16 && j * 16 + n < to.columns; n++) store(to.c + (j * 16 + n) * of.c_row + row + i, values[n]);
                continue;
            }
            bf16 *at = to.c + (row + i) * of.c_row + j * 16;
            if (of.adds) sum = _mm512_add_ps(sum, widened(_mm256_maskz_loadu_epi16(there, at)));
            _mm256_mask_storeu_epi16(at, there, __m256i(_mm512_cvtneps_pbh(sum)));
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

// Columns `column` to `column + PANEL` of rows `row` to `end`. `packed`: the rows from `above` on.
void task(const problem &of, const pair *packed, int64_t above, int64_t column, int64_t row, int64_t end, char *room) {
    const int64_t columns = of.n - column < PANEL ? of.n - column : PANEL, width = up(columns, 16);
    const int64_t half = (of.k + 1) / 2, laid = up(of.depth, 32) / 2 * PANEL;
    pair *panel = reinterpret_cast<pair *>(room), *more_panel = panel + laid;
    float *kept = reinterpret_cast<float *>(more_panel + up(of.more_k, 32) / 2 * PANEL);
    for (int64_t k = 0; k < of.k; k += of.depth) {
        const int64_t depth = of.k - k < of.depth ? of.k - k : of.depth;
        const bool ends = k + depth == of.k;
        lay_out(of.b + (of.b_turned ? column * of.b_row + k : k * of.b_row + column), of.b_row, of.b_turned, depth, columns, panel, width);
        const bool by_rows = packed == nullptr;
        factors all{of.a + above * of.a_row + k, of.a_row, 2, depth / 2, depth % 2 != 0, panel};
        if (!by_rows) all = {reinterpret_cast<const bf16 *>(packed + k / 2 * GROUP), half, 2 * GROUP, (depth + 1) / 2, false, panel};
        factors more{nullptr, of.more_a_row, 2, 0, false, more_panel};
        if (ends && of.more_k > 0) {
            const bf16 *from = of.more_b + (of.b_turned ? column * of.more_b_row : column);
            lay_out(from, of.more_b_row, of.b_turned, of.more_k, columns, more_panel, width);
            more.a = of.more_a + above * of.more_a_row;
            more.pairs = of.more_k / 2, more.odd = of.more_k % 2 != 0;
        }
        bf16 *c = of.c + (of.c_turned ? column * of.c_row + above : above * of.c_row + column);
        const results to{kept - (row - above) * width, k == 0, ends, c, columns, of.bias == nullptr ? nullptr : of.bias + column};
        if (width == 64) rows_of<4>(of, !by_rows, all, more, row - above, end - above, to);
        else if (width == 48) rows_of<3>(of, !by_rows, all, more, row - above, end - above, to);
        else if (width == 32) rows_of<2>(of, !by_rows, all, more, row - above, end - above, to);
        else rows_of<1>(of, !by_rows, all, more, row - above, end - above, to);
    }
}

}  // namespace

#endif

extern "C" {

// 0: `matmul` does nothing here. 1: it does, but PyTorch's large products are faster (AMX multiplies whole tiles). 2: these are.
int matmul_worth() {
#if !defined(SARTOR_PAIRS)
    return 0;
#elif defined(__AMX_BF16__)
    return 1;
#else
    return 2;
#endif
}

// `room` is threads * thread_bytes, then what packed_rows of a take where a is k x m.
void matmul(const problem *given, char *room) {
#ifdef SARTOR_PAIRS
    const problem &of = *given;
    pair *packed = of.a_turned ? reinterpret_cast<pair *>(room + of.threads * of.thread_bytes) : nullptr;
    const int64_t half = (of.k + 1) / 2, panels = (of.n + PANEL - 1) / PANEL, block = packed != nullptr ? of.packed_rows : of.m;
#pragma omp parallel num_threads(int(of.threads))
    for (int64_t above = 0; above < of.m; above += block) {
        const int64_t below = of.m - above < block ? of.m : above + block;
        if (packed != nullptr) {
#pragma omp for schedule(static)
            for (int64_t row = above; row < below; row += TOGETHER) {
                const int64_t count = below - row < TOGETHER ? below - row : TOGETHER;
                group_rows(of.a + row, of.a_row, packed + (row - above) * half, GROUP * half, of.k, count);
            }
        }
        const int64_t pieces = (below - above + of.task_rows - 1) / of.task_rows;
#pragma omp for schedule(dynamic)
        for (int64_t at = 0; at < panels * pieces; at++) {
            const int64_t row = above + at / panels * of.task_rows, end = below - row < of.task_rows ? below : row + of.task_rows;
            task(of, packed, above, at % panels * PANEL, row, end, room + thread_number() * of.thread_bytes);
        }
    }
#endif
}
}
