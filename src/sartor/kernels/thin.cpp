// Products with one side as small as the rank of an adapter (thin.py), by tiles (AMX): what they cost is reading the other side, so
// all that is wanted of it is taken in one pass.
//
// z is rows x columns, w columns x rank: low = scale z w, and gradient = given^T z (rank x columns). Either may be left out.

#include "amx.h"

// Field by field `_Pass` of thin.py.
struct thin_pass {
    const uint16_t *z, *w, *given;
    uint16_t *low, *gradient;
    int64_t rows, columns, rank;
    int64_t z_row, w_row, given_row, low_row, gradient_row;
    int64_t w_turned, gradient_turned;  // rank x columns, and columns x rank, in memory
    int64_t parts, threads;             // parts of the rows whose sums are kept apart, whatever the number of threads
    float scale;
};

#if defined(SARTOR_TILES)

namespace {

constexpr int64_t STRIPS = 64;    // columns
constexpr int64_t TOGETHER = 64;  // rows at a time: they stay in the second cache
constexpr int64_t MOST = TOGETHER + HIGH;  // rather than few by themselves

inline int64_t high(const thin_pass &of) { return up(of.rank, HIGH); }
inline int64_t wide(const thin_pass &of) { return up(of.columns, STRIPS); }

// What all threads see, then what each has.
struct room_of {
    pair *w;
    float *sums;  // of the parts
    float *low;
    bf16 *given;

    room_of(const thin_pass &of, char *room, int64_t thread) {
        w = reinterpret_cast<pair *>(room);
        sums = reinterpret_cast<float *>(w + high(of) * wide(of) / 2);
        low = reinterpret_cast<float *>(sums + summed(of) * high(of) * wide(of)) + thread * each(of) / 4;
        given = reinterpret_cast<bf16 *>(low + MOST * high(of));
    }
    static int64_t summed(const thin_pass &of) { return of.given == nullptr ? 0 : of.parts; }
    static int64_t each(const thin_pass &of) { return MOST * high(of) * 12; }
    static int64_t bytes(const thin_pass &of) { return (2 + 4 * summed(of)) * high(of) * wide(of) + of.threads * each(of); }
};

// 32 columns of w in pairs.
inline void lay_out_step(const thin_pass &of, int64_t k, pair *to) {
    const int64_t depth = of.columns - k < STEP ? of.columns - k : STEP;
    lay_out(of.w + (of.w_turned ? k : k * of.w_row), of.w_row, of.w_turned, depth, of.rank, to + k / 2 * high(of), high(of));
}

// low of `count` rows from `row` on.
inline void narrow(const thin_pass &of, const room_of &room, int64_t row, int64_t count) {
    const int64_t width = high(of);
    for (int64_t i = 0; i < count; i += PAIR)
        for (int64_t j = 0; j < width; j += PAIR) {
            const int64_t left = count - i < PAIR ? count - i : PAIR;
            const bool tall = left > HIGH, both = width - j > HIGH;
            const auto run = tall ? (both ? tiles_of<2, 2, true> : tiles_of<2, 1, true>) : both ? tiles_of<1, 2, true> : tiles_of<1, 1, true>;
            run({of.z + (row + i) * of.z_row, of.z_row, STEP, HIGH * of.z_row, left, of.columns}, room.w + j, width,
                room.low + i * width + j, width, false);
        }
    const __m512 scale = _mm512_set1_ps(of.scale);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < of.rank; j += HIGH) {
            const __m256bh sums = _mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_load_ps(room.low + i * width + j), scale));
            _mm256_mask_storeu_epi16(of.low + (row + i) * of.low_row + j, first(of.rank - j), __m256i(sums));
        }
}

// The 16 rows of `given` from `row` on, of which the first `seen` do not count, as factors of single rows of z instead of pairs: with
// a zero after each for z's even columns, and before each for its odd ones. Rows of `depth` numbers.
inline void spread(const thin_pass &of, int64_t row, int64_t seen, bf16 *to, int64_t depth) {
    for (int64_t i = 0; i < high(of); i += HIGH) {
        alignas(64) pair rows[HIGH * HIGH], even[HIGH * HIGH];
        for (int64_t m = 0; m < HIGH; m++) {
            const __mmask16 there = m < seen ? __mmask16(0) : first(of.rank - i);
            _mm512_store_si512(rows + m * HIGH, _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(there, of.given + (row + m) * of.given_row + i)));
        }
        turned(reinterpret_cast<bf16 *>(rows), PAIR, HIGH, STEP, even, HIGH);
        for (int64_t r = 0; r < HIGH; r++) {
            const __m512i factors = _mm512_load_si512(even + r * HIGH);
            _mm512_storeu_si512(to + (2 * i + r) * depth, factors);
            _mm512_storeu_si512(to + (2 * i + HIGH + r) * depth, _mm512_slli_epi32(factors, 16));
        }
    }
}

// The sums of 32 rows of factors and two strips of z, `rows` rows of it: to `sums`, or added to them.
inline void two_strips(const bf16 *z, int64_t z_row, const bf16 *factors, int64_t depth, int64_t rows, float *sums, bool more) {
    if (more) move_sums<2, 2, true>(sums, PAIR);
    else begin_sums<2, 2>();
    written();
    for (int64_t m = 0; m < rows; m += HIGH, z += HIGH * z_row, factors += STEP) {
        const bf16 *soon = z + (m + PAIR < rows ? PAIR * z_row : (PAIR - rows) * z_row + STRIPS);
        const auto ahead = [&](int64_t columns) {
            for (int64_t i = 0; i < HIGH; i++) _mm_prefetch(reinterpret_cast<const char *>(soon + i * z_row + columns), _MM_HINT_T0);
        };
        _tile_loadd(6, z, 2 * z_row);
        _tile_loadd(4, factors, 2 * depth);
        _tile_dpbf16ps(0, 4, 6);
        ahead(0);
        _tile_loadd(7, z + STEP, 2 * z_row);
        _tile_loadd(5, factors + HIGH * depth, 2 * depth);
        _tile_dpbf16ps(1, 4, 7);
        _tile_zero(4);
        _tile_dpbf16ps(2, 5, 6);
        _tile_zero(6);
        ahead(STEP);
        _tile_dpbf16ps(3, 5, 7);
        _tile_zero(5);
        _tile_zero(7);
    }
    move_sums<2, 2, false>(sums, PAIR);
}

// The sums of given^T z over `count` rows from `row` on, 16 at least, to `sums` or added to them: of even columns and of odd ones,
// since neighbours in a row of z are taken for a pair as they lie. The rows after them are asked for meanwhile.
inline void across(const thin_pass &of, const room_of &room, int64_t row, int64_t count, float *sums, bool more) {
    const int64_t depth = 2 * up(count, HIGH), whole = count / HIGH * HIGH;
    int64_t soon = row + count, line = 0;
    for (int64_t m = 0; m < count; m += HIGH) {
        const int64_t from = m < whole ? m : count - HIGH;
        spread(of, row + from, m - from, room.given + 2 * m, depth);
    }
    alignas(64) bf16 edge[MOST * STRIPS];
    for (int64_t j = 0; j < of.columns; j += STRIPS) {
        for (int64_t some = 0; some < 2 * count && soon < of.rows; some++) {
            _mm_prefetch(reinterpret_cast<const char *>(of.z + soon * of.z_row + line), _MM_HINT_T1);
            line += STEP;
            if (line >= of.columns) line = 0, soon++;
        }
        const bf16 *z = of.z + row * of.z_row + j;
        int64_t z_row = of.z_row;
        if (of.columns - j < STRIPS) {
            for (int64_t m = 0; m < count; m++) {
                std::memset(edge + m * STRIPS, 0, 2 * STRIPS);
                std::memcpy(edge + m * STRIPS, z + m * z_row, 2 * (of.columns - j));
            }
            z = edge, z_row = STRIPS;
        }
        for (int64_t i = 0; i < high(of); i += HIGH) {
            float *to = sums + j * high(of) + i * STRIPS;
            two_strips(z, z_row, room.given + 2 * i * depth, depth, whole, to, more);
            if (count > whole) two_strips(z + (count - HIGH) * z_row, z_row, room.given + 2 * i * depth + 2 * whole, depth, HIGH, to, true);
        }
    }
}

// The parts' sums of 64 columns from `column` on, to where the gradient is.
inline void sum_up(const thin_pass &of, const float *sums, int64_t column) {
    const int64_t size = high(of) * wide(of);
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t i = 0; i < of.rank; i += HIGH)
        for (int64_t j = 0; j < STRIPS && column + j < of.columns; j += STEP) {
            alignas(64) float all[2][HIGH * HIGH], across[HIGH * HIGH];
            for (int64_t r = 0; r < HIGH; r++) {
                const float *at = sums + column * high(of) + i * STRIPS + r * PAIR + j / 2;
                __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
                for (int64_t part = 0; part < of.parts; part++, at += size)
                    even = _mm512_add_ps(even, _mm512_loadu_ps(at)), odd = _mm512_add_ps(odd, _mm512_loadu_ps(at + HIGH * PAIR));
                _mm512_store_ps(all[0] + r * HIGH, _mm512_permutex2var_ps(even, low, odd));
                _mm512_store_ps(all[1] + r * HIGH, _mm512_permutex2var_ps(even, _mm512_add_epi32(low, _mm512_set1_epi32(8)), odd));
            }
            const int64_t ranks = of.rank - i < HIGH ? of.rank - i : HIGH;
            for (int64_t half = 0; half < 2 && column + j + half * HIGH < of.columns; half++) {
                const int64_t at = column + j + half * HIGH, some = of.columns - at < HIGH ? of.columns - at : HIGH;
                const float *from = all[half];
                bf16 *to = of.gradient + (of.gradient_turned ? at * of.gradient_row + i : i * of.gradient_row + at);
                if (of.gradient_turned) {
                    turned(reinterpret_cast<bf16 *>(all[half]), PAIR, HIGH, STEP, reinterpret_cast<pair *>(across), HIGH);
                    from = across;
                }
                for (int64_t r = 0; r < (of.gradient_turned ? some : ranks); r++) {
                    const __m256bh row = _mm512_cvtneps_pbh(_mm512_load_ps(from + r * HIGH));
                    _mm256_mask_storeu_epi16(to + r * of.gradient_row, first(of.gradient_turned ? ranks : some), __m256i(row));
                }
            }
        }
}

void run(const thin_pass &of, char *memory) {
#pragma omp parallel num_threads(int(of.threads))
    {
        const tiles_in_use in_use;
        const room_of room(of, memory, thread_number());
        if (of.w != nullptr) {
#pragma omp for schedule(static)
            for (int64_t k = 0; k < of.columns; k += STEP) lay_out_step(of, k, room.w);
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < of.parts; part++) {
            const int64_t begin = of.rows * part / of.parts / HIGH * HIGH, next = part + 1;
            const int64_t end = next < of.parts ? of.rows * next / of.parts / HIGH * HIGH : of.rows;
            int64_t count;
            for (int64_t row = begin; row < end; row += count) {
                count = end - row < TOGETHER + HIGH ? end - row : TOGETHER;
                if (of.w != nullptr) narrow(of, room, row, count);
                if (of.given != nullptr) across(of, room, row, count, room.sums + part * high(of) * wide(of), row > begin);
            }
        }
        if (of.given != nullptr) {
#pragma omp for schedule(static)
            for (int64_t column = 0; column < of.columns; column += STRIPS) sum_up(of, room.sums, column);
        }
    }
}

}  // namespace

#endif

extern "C" {

// Bytes of working memory, which sizes, parts and threads tell, and whether there is a `given`.
int64_t thin_room(const thin_pass *of) {
#if defined(SARTOR_TILES)
    return room_of::bytes(*of);
#else
    return int64_t(of == nullptr);
#endif
}

// For machines where `matmul_worth` is 2, and 16 rows or more.
void thin(const thin_pass *of, char *room) {
#if defined(SARTOR_TILES)
    run(*of, room);
#endif
}
}
