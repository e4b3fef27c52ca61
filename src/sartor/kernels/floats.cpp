// Matrix products of float32 numbers (matmul.py), for processors with vectors of eight of them (AVX2). Blocks as in Goto & van de Geijn
// 2008: strips of b that all threads lay out together lie in the third cache, one at a time in the first; a thread's rows of a in the
// second; sums in registers.

#include "problem.h"
#include "tile.h"

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#define SARTOR_FLOATS 1

#include <immintrin.h>

namespace {

using floats = problem_of<float>;

constexpr int64_t STRIP = 2 * LANES;  // columns of a tile
constexpr int64_t GROUP = 6;          // rows of it: with a strip's two vectors and a factor they fill the registers
constexpr int64_t FEW = 3 * STRIP;    // columns for which rows are not laid out
constexpr int64_t LEAST_ROWS = 16;    // for which a weight is laid out (matmul.py)
constexpr int64_t AHEAD = 16;         // rows that are asked for before they are laid out as columns
constexpr int64_t AT_A_TIME = 16;     // rows of b, of which few rows of the result are sums

// What is summed up at a time: `depth` columns of a and as many rows of b, then, of an adapter, `more` of a' and of b'.
struct block {
    const float *a, *b;
    int64_t depth, more;
    bool begins;  // the result

    int64_t whole() const { return depth + more; }
};

// Where sums of a tile go: `there` of a strip's columns. GCC keeps sums in registers only if it unrolls the loops over them early.
template <int COUNT>
inline void finish(const floats &of, const lanes (&sums)[COUNT][2], int64_t row, int64_t column, int64_t there, bool begins) {
    const float *bias = begins ? of.bias : nullptr;
    const bool adds = of.adds || !begins;
    if (there >= STRIP && !of.c_turned) {
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                lanes sum = sums[i][j] * of.scale, *at = (lanes *)(of.c + (row + i) * of.c_row + column + j * LANES);
                if (bias != nullptr) sum += *(const lanes *)(bias + column + j * LANES);
                *at = adds ? *at + sum : sum;
            }
        return;
    }
    float values[COUNT][STRIP];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) *(lanes *)(values[i] + j * LANES) = sums[i][j];
    for (int64_t n = column; n < column + (there < STRIP ? there : STRIP); n++)
        for (int i = 0; i < COUNT; i++) {
            float *at = of.c_turned ? of.c + n * of.c_row + row + i : of.c + (row + i) * of.c_row + n;
            const float sum = values[i][n - column] * of.scale + (bias == nullptr ? 0.0f : bias[n]);
            *at = adds ? *at + sum : sum;
        }
}

// COUNT rows of a and a strip of b. `along`: from one column of a to the next.
template <int COUNT>
inline void sum_up(const float *a, int64_t down, int64_t along, const float *strip, int64_t row, int64_t depth, lanes (&sums)[COUNT][2]) {
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) sums[i][0] = sums[i][1] = lanes{};
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k++, a += along, strip += row) {
        const lanes first = *(const lanes *)strip, second = *(const lanes *)(strip + LANES);
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++) {
            const float factor = a[i * down];
            sums[i][0] += factor * first;
            sums[i][1] += factor * second;
        }
    }
}

// Where rows of a are: `step` from one to the next, or in groups.
struct rows_at {
    const float *from;
    int64_t step;
    bool groups;
};

template <int COUNT>
inline void tile(const floats &of, const block &at, const rows_at &rows, const float *a, const float *strip, int64_t row, int64_t column,
                 int64_t there) {
    if (!of.c_turned)
        for (int i = 0; i < COUNT; i++)
            _mm_prefetch(reinterpret_cast<const char *>(of.c + (row + i) * of.c_row + column), _MM_HINT_T0);
    lanes sums[COUNT][2];
    if (rows.groups) sum_up<COUNT>(a, 1, GROUP, strip, STRIP, at.whole(), sums);
    else sum_up<COUNT>(a, rows.step, 1, strip, STRIP, at.whole(), sums);
    finish<COUNT>(of, sums, row, column, there, at.begins);
}

// Rows `row` to `end`, of which `rows` has the first, and a strip of b.
void strip_of(const floats &of, const block &at, const rows_at &rows, const float *strip, int64_t row, int64_t end, int64_t column,
              int64_t there) {
    const float *a = rows.from;
    const int64_t step = rows.groups ? 1 : rows.step, group = rows.groups ? GROUP * at.whole() : GROUP * step;
    for (; end - row >= GROUP; row += GROUP, a += group) tile<GROUP>(of, at, rows, a, strip, row, column, there);
    if (end - row >= 4) tile<4>(of, at, rows, a, strip, row, column, there), row += 4, a += 4 * step;
    if (end - row >= 2) tile<2>(of, at, rows, a, strip, row, column, there), row += 2, a += 2 * step;
    if (end - row >= 1) tile<1>(of, at, rows, a, strip, row, column, there);
}

// to[j, i] = from[i, j], 8 x 8.
inline void turned(const float *from, int64_t row, float *to, int64_t width) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps(from + i * row);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xee);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * width, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * width, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
    }
}

// A strip: `depth` rows of `count` columns, zeros after these. `in_columns`: columns lie in memory as rows.
inline void lay_out_strip(const float *from, int64_t row, bool in_columns, int64_t depth, int64_t count, float *to) {
    int64_t k = 0;
    if (count == STRIP && in_columns)
        for (; k + LANES <= depth; k += LANES)
            for (int64_t i = 0; i < STRIP; i += LANES) turned(from + i * row + k, row, to + k * STRIP + i, STRIP);
    if (count == STRIP && !in_columns)
        for (; k < depth; k++)
            for (int64_t i = 0; i < STRIP; i += LANES) *(lanes *)(to + k * STRIP + i) = *(const lanes *)(from + k * row + i);
    for (; k < depth; k++)
        for (int64_t i = 0; i < STRIP; i++)
            to[k * STRIP + i] = i >= count ? 0.0f : in_columns ? from[i * row + k] : from[k * row + i];
}

// `count` rows in groups of which each takes `size`; zeros after the last of them. `in_columns`: rows lie in memory as columns.
inline void lay_out_groups(const float *from, int64_t row, bool in_columns, int64_t depth, int64_t count, float *to, int64_t size) {
    for (int64_t k = 0; k < depth; k++) {
        if (in_columns && k + AHEAD < depth)
            for (int64_t i = 0; i < count; i += STRIP)
                _mm_prefetch(reinterpret_cast<const char *>(from + (k + AHEAD) * row + i), _MM_HINT_T0);
        for (int64_t i = 0; i < count; i += GROUP) {
            float *at = to + i / GROUP * size + k * GROUP;
            if (in_columns && count - i >= GROUP) {
                std::memcpy(at, from + k * row + i, GROUP * sizeof(float));
                continue;
            }
            for (int64_t n = 0; n < GROUP; n++)
                at[n] = i + n >= count ? 0.0f : in_columns ? from[k * row + i + n] : from[(i + n) * row + k];
        }
    }
}

// Rows `row` to `end` of a, where a thread's second cache has them; as they lie where few columns meet them.
rows_at lay_out_rows(const floats &of, const block &at, int64_t row, int64_t end, int64_t columns, float *to) {
    const int64_t whole = at.whole(), count = end - row;
    const float *more = of.more_a + row * of.more_a_row;
    if (of.a_turned) {
        lay_out_groups(at.a + row, of.a_row, true, at.depth, count, to, GROUP * whole);
        if (at.more > 0) lay_out_groups(more, of.more_a_row, false, at.more, count, to + GROUP * at.depth, GROUP * whole);
        return {to, 1, true};
    }
    if (columns <= FEW && at.more == 0) return {at.a + row * of.a_row, of.a_row, false};
    for (int64_t i = 0; i < count; i++) {
        std::memcpy(to + i * whole, at.a + (row + i) * of.a_row, at.depth * sizeof(float));
        if (at.more > 0) std::memcpy(to + i * whole + at.depth, more + i * of.more_a_row, at.more * sizeof(float));
    }
    return {to, whole, false};
}

// Columns `first` to `until`, by all threads.
void columns_of(const floats &of, const block &at, int64_t first, int64_t until, float *strips, char *room) {
    const int64_t whole = at.whole();
#pragma omp for schedule(static)
    for (int64_t column = first; column < until; column += STRIP) {
        const int64_t count = until - column < STRIP ? until - column : STRIP;
        float *to = strips + (column - first) * whole;
        lay_out_strip(at.b + (of.b_turned ? column * of.b_row : column), of.b_row, of.b_turned, at.depth, count, to);
        if (at.more == 0) continue;
        const float *more = of.more_b + (of.b_turned ? column * of.more_b_row : column);
        lay_out_strip(more, of.more_b_row, of.b_turned, at.more, count, to + at.depth * STRIP);
    }
    const int64_t pieces = (of.m + of.task_rows - 1) / of.task_rows, parts = (until - first + of.strip - 1) / of.strip;
#pragma omp for schedule(dynamic)
    for (int64_t piece = 0; piece < pieces * parts; piece++) {
        const int64_t row = piece / parts * of.task_rows, end = of.m - row < of.task_rows ? of.m : row + of.task_rows;
        const int64_t column = first + piece % parts * of.strip, last = until - column < of.strip ? until : column + of.strip;
        float *own = reinterpret_cast<float *>(room + thread_number() * of.thread_bytes);
        const rows_at rows = lay_out_rows(of, at, row, end, last - column, own);
        for (int64_t here = column; here < last; here += STRIP)
            strip_of(of, at, rows, strips + (here - first) * whole, row, end, here, last - here);
    }
}

// COUNT rows of a by two rows of a weight, which are columns of b: to[j, i] += a[i] b[j].
template <int COUNT>
inline void meet(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t depth, float (&to)[2][COUNT]) {
    lanes sums[2][COUNT];
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++) sums[0][i] = sums[1][i] = lanes{};
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
        const lanes first = *(const lanes *)(b + k), second = *(const lanes *)(b + b_row + k);
#pragma GCC unroll 4
        for (int i = 0; i < COUNT; i++) {
            const lanes row = *(const lanes *)(a + i * a_row + k);
            sums[0][i] += row * first;
            sums[1][i] += row * second;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < COUNT; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            for (int64_t n = 0; n < LANES; n++) to[j][i] += sums[j][i][n];
            for (int64_t n = k; n < depth; n++) to[j][i] += a[i * a_row + n] * b[j * b_row + n];
        }
}

// Columns `column` and, if there is one, the next; rows `row` to `row + COUNT`.
template <int COUNT>
inline void few(const floats &of, int64_t row, int64_t column) {
    const int64_t columns = of.n - column < 2 ? 1 : 2, second = columns - 1;
    float sums[2][COUNT] = {};
    meet<COUNT>(of.a + row * of.a_row, of.a_row, of.b + column * of.b_row, second * of.b_row, of.k, sums);
    const float *more = of.more_b + column * of.more_b_row;
    if (of.more_k > 0) meet<COUNT>(of.more_a + row * of.more_a_row, of.more_a_row, more, second * of.more_b_row, of.more_k, sums);
    for (int64_t j = 0; j < columns; j++)
        for (int i = 0; i < COUNT; i++) {
            float *at = of.c_turned ? of.c + (column + j) * of.c_row + row + i : of.c + (row + i) * of.c_row + column + j;
            const float sum = sums[j][i] * of.scale + (of.bias == nullptr ? 0.0f : of.bias[column + j]);
            *at = of.adds ? *at + sum : sum;
        }
}

// An input of few rows by a weight as it lies, in one pass over it: laying it out would be most of the work.
void few_rows(const floats &of) {
#pragma omp parallel for schedule(static) num_threads(int(of.threads))
    for (int64_t column = 0; column < of.n; column += 2)
        for (int64_t row = 0; row < of.m;) {
            const int64_t left = of.m - row;
            if (left >= 4) few<4>(of, row, column), row += 4;
            else if (left == 3) few<3>(of, row, column), row += 3;
            else if (left == 2) few<2>(of, row, column), row += 2;
            else few<1>(of, row, column), row += 1;
        }
}

// to[i, j] += a[k, i] b[k, j] for COUNT rows of the result and a strip of its columns; numbers of a that belong together lie together.
template <int COUNT>
inline void sum_rows(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t depth, float *to, int64_t to_row) {
    lanes sums[COUNT][2];
    sum_up<COUNT>(a, 1, a_row, b, b_row, depth, sums);
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
        *(lanes *)(to + i * to_row) += sums[i][0];
        *(lanes *)(to + i * to_row + LANES) += sums[i][1];
    }
}

// The part of rows `first` to `first + depth` of b in `count` columns of the result. The next rows are asked for meanwhile: they lie too
// far apart for the processor to do it.
void sum_part(const floats &of, int64_t first, int64_t depth, int64_t column, int64_t count, float *sums) {
    const float *a = of.a + first * of.a_row;
    const int64_t next = of.k - first < 2 * depth ? of.k - first : 2 * depth;
    int64_t n = 0;
    for (; n + STRIP <= count; n += STRIP) {
        const float *b = of.b + first * of.b_row + column + n;
        for (int64_t k = depth; k < next; k++) _mm_prefetch(reinterpret_cast<const char *>(b + k * of.b_row), _MM_HINT_T1);
        int64_t i = 0;
        for (; of.m - i >= GROUP; i += GROUP) sum_rows<GROUP>(a + i, of.a_row, b, of.b_row, depth, sums + i * of.strip + n, of.strip);
        if (of.m - i >= 4) sum_rows<4>(a + i, of.a_row, b, of.b_row, depth, sums + i * of.strip + n, of.strip), i += 4;
        if (of.m - i >= 2) sum_rows<2>(a + i, of.a_row, b, of.b_row, depth, sums + i * of.strip + n, of.strip), i += 2;
        if (of.m - i >= 1) sum_rows<1>(a + i, of.a_row, b, of.b_row, depth, sums + i * of.strip + n, of.strip);
    }
    for (; n < count; n++)
        for (int64_t k = 0; k < depth; k++)
            for (int64_t i = 0; i < of.m; i++) sums[i * of.strip + n] += a[k * of.a_row + i] * of.b[(first + k) * of.b_row + column + n];
}

// Few rows that are sums over many rows of b, as gradients of adapters are: b is read once, along its rows, and not laid out.
void few_sums(const floats &of, char *room) {
#pragma omp parallel for schedule(dynamic) num_threads(int(of.threads))
    for (int64_t column = 0; column < of.n; column += of.strip) {
        float *sums = reinterpret_cast<float *>(room + thread_number() * of.thread_bytes);
        const int64_t count = of.n - column < of.strip ? of.n - column : of.strip;
        std::memset(sums, 0, of.m * of.strip * sizeof(float));
        for (int64_t k = 0; k < of.k; k += AT_A_TIME)
            sum_part(of, k, of.k - k < AT_A_TIME ? of.k - k : AT_A_TIME, column, count, sums);
        for (int64_t i = 0; i < of.m; i++)
            for (int64_t n = 0; n < count; n++) {
                float *at = of.c_turned ? of.c + (column + n) * of.c_row + i : of.c + i * of.c_row + column + n;
                const float sum = sums[i * of.strip + n] * of.scale + (of.bias == nullptr ? 0.0f : of.bias[column + n]);
                *at = of.adds ? *at + sum : sum;
            }
    }
}

}  // namespace

#endif

extern "C" {

// Whether `matmul_floats` does anything here, and is worth it: on AMD's processors, on which PyTorch's library (MKL) is slower.
int floats_worth() {
#if defined(SARTOR_FLOATS)
    __builtin_cpu_init();
    return __builtin_cpu_is("amd") != 0;
#else
    return 0;
#endif
}

// `room` is threads * thread_bytes, for rows of a, then what of.panel columns of b take; for `few_sums` sums of of.strip columns.
void matmul_floats(const problem_of<float> *given, char *room) {
#if defined(SARTOR_FLOATS)
    const floats &of = *given;
    if (of.m < LEAST_ROWS && of.b_turned && !of.a_turned) return few_rows(of);
    if (of.depth == 0) return few_sums(of, room);
    float *strips = reinterpret_cast<float *>(room + of.threads * of.thread_bytes);
#pragma omp parallel num_threads(int(of.threads))
    for (int64_t first = 0; first < of.n; first += of.panel) {
        const int64_t until = of.n - first < of.panel ? of.n : first + of.panel;
        for (int64_t k = 0; k < of.k; k += of.depth) {
            const bool ends = of.k - k <= of.depth;
            const float *a = of.a + (of.a_turned ? k * of.a_row : k), *b = of.b + (of.b_turned ? k : k * of.b_row);
            columns_of(of, {a, b, ends ? of.k - k : of.depth, ends ? of.more_k : 0, k == 0}, first, until, strips, room);
        }
    }
#endif
}
}
