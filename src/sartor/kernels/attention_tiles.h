// Attention of short examples (attention.cpp) for numbers in bfloat16 where the processor multiplies tiles of them (amx.h). Scores,
// softmax and all sums are in float32; probabilities and the gradients of scores are rounded where they are multiplied. What an
// example takes is in a core's second cache, so most of the time goes to fetching it: the next head's numbers, which lie beside
// this one's, are asked for ahead.

#pragma once

#include <cmath>
#include <memory>
#include <new>

#include "amx.h"
#include "attention.h"

#if defined(SARTOR_TILES)

namespace {

// Memory of one thread, and its tiles. `t`: transposed; `pairs`: of rows.
struct tile_scratch {
    int64_t room = 0, width, value_width;
    char *all = nullptr;
    bf16 *rows, *value_rows, *q, *g, *p, *pt, *dt;
    pair *kt, *vt, *k_pairs, *v_pairs, *q_pairs, *g_pairs, *pairs;
    float *dk, *dv, *out, *s, *d;
    const tiles_in_use in_use{};
    std::unique_ptr<char[]> memory;

    tile_scratch(int64_t most, const shape &s) : width(up(s.size, 32)), value_width(up(s.value_size, 32)) {
        memory.reset(new (std::nothrow) char[fit(most) + 64]);
        if (memory) all = reinterpret_cast<char *>(up(reinterpret_cast<int64_t>(memory.get()), 64));
    }

    template <class T>
    inline void place(T *&at, int64_t &first, int64_t count) {
        if (all != nullptr) at = reinterpret_cast<T *>(all + first);
        first += up(count * int64_t(sizeof(T)), 64);
    }

    // Lay it out for so many keys, of which all may be queries; how many bytes that takes.
    int64_t fit(int64_t keys) {
        room = up(keys, 32);
        int64_t first = 0;
        const int64_t wider = width > value_width ? width : value_width;
        place(rows, first, room * width), place(value_rows, first, room * value_width);
        place(kt, first, room * width / 2), place(vt, first, room * value_width / 2);
        place(k_pairs, first, room * width / 2), place(v_pairs, first, room * value_width / 2);
        place(q, first, QUERIES * width), place(g, first, QUERIES * value_width), place(out, first, QUERIES * wider);
        place(s, first, QUERIES * room), place(d, first, QUERIES * room), place(p, first, QUERIES * room);
        place(pairs, first, QUERIES / 2 * room);
        place(q_pairs, first, room * width / 2), place(g_pairs, first, room * value_width / 2);
        place(dk, first, room * width), place(dv, first, room * value_width);
        place(pt, first, room * room), place(dt, first, room * room);
        return first;
    }
};

// `count` rows of `size` numbers to rows of `width`; zeros up to there and up to `room` rows.
inline void copy(const bf16 *from, int64_t stride, bf16 *to, int64_t width, int64_t count, int64_t size, int64_t room) {
    for (int64_t t = 0; t < room; t++)
        for (int64_t i = 0; i < width; i += 32) {
            const int64_t left = t < count ? size - i : 0;
            const __mmask32 there = left >= 32 ? ~__mmask32(0) : left <= 0 ? 0 : (__mmask32(1) << left) - 1;
            if (t < count && i < size) _mm_prefetch(reinterpret_cast<const char *>(from + t * stride + i + size), _MM_HINT_T0);
            _mm512_storeu_si512(to + t * width + i, _mm512_maskz_loadu_epi16(there, from + t * stride + i));
        }
}

// Keys or values: what is continued, then the example's own.
inline void gather(const bf16 *from, int64_t stride, bf16 *to, int64_t width, const example &e, int64_t size, int64_t room) {
    copy(from + e.before * stride, stride, to, width, e.ahead, size, e.ahead);
    copy(from + e.place * stride, stride, to + e.ahead * width, width, e.length, size, room - e.ahead);
}

inline void put_rounded(const float *from, int64_t width, bf16 *to, int64_t stride, int64_t count, int64_t size, float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int64_t t = 0; t < count; t++)
        for (int64_t i = 0; i < size; i += 16) {
            const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(from + t * width + i), factor);
            _mm256_mask_storeu_epi16(to + t * stride + i, first(size - i), __m256i(_mm512_cvtneps_pbh(values)));
            __builtin_prefetch(to + t * stride + i + size, 1);
        }
}

// e^x for x <= 0 as native.h has it, 16 at a time.
inline __m512 exponential(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), _mm512_fmadd_ps(n, _mm512_set1_ps(-0.693359375f), x));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(1.9875691500e-4f), r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(p, r), r, r), _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

// Probabilities of a block of queries in at.s; zeros where a key is not seen.
inline void probabilities(const tile_scratch &at, const shape &s, const example &e, const queries &of) {
    multiply(at.q, at.width, at.kt + of.start, at.room, at.s, at.room, up(of.count, 16), of.keys, at.width, false);
    const __m512 scale = _mm512_set1_ps(s.scale);
    for (int64_t n = 0; n < QUERIES; n++) {
        float *row = at.s + n * at.room;
        const int64_t begin = of.begin(s, e, n), last = of.last(e, n);
        __m512 top = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
        for (int64_t i = 0; i < last; i += 16) {
            const __m512 scores = _mm512_mul_ps(_mm512_loadu_ps(row + i), scale);
            top = _mm512_mask_max_ps(top, first(last - i) & ~first(begin - i), top, scores);
            _mm512_storeu_ps(row + i, scores);
        }
        const __m512 most = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        for (int64_t i = 0; i < last; i += 16) {
            const __m512 value = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + i), most));
            const __m512 here = _mm512_maskz_mov_ps(first(last - i) & ~first(begin - i), value);
            sum = _mm512_add_ps(sum, here);
            _mm512_storeu_ps(row + i, here);
        }
        const __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(sum));
        for (int64_t i = 0; i < last; i += 16) _mm512_storeu_ps(row + i, _mm512_mul_ps(_mm512_loadu_ps(row + i), share));
        for (int64_t i = up(last, 16); i < of.keys; i += 16) _mm512_storeu_ps(row + i, _mm512_setzero_ps());
    }
}

inline __m256i rounded(const float *at) { return __m256i(_mm512_cvtneps_pbh(_mm512_loadu_ps(at))); }

// A block's numbers, rounded: its rows to at.p where `as_rows`, and its columns to `turned_to`, from the block's first query on.
inline void round_block(const tile_scratch &at, const float *from, const queries &of, bool as_rows, bf16 *turned_to) {
    if (as_rows)
        for (int64_t n = 0; n < QUERIES; n++)
            for (int64_t i = 0; i < of.keys; i += 16)
                _mm256_storeu_si256(reinterpret_cast<__m256i *>(at.p + n * at.room + i), rounded(from + n * at.room + i));
    if (turned_to == nullptr) return;
    for (int64_t i = 0; i < of.keys; i += 16) {
        for (int64_t n = 0; n < QUERIES; n += 2) {
            const __m512i one = _mm512_cvtepu16_epi32(rounded(from + n * at.room + i));
            const __m512i other = _mm512_cvtepu16_epi32(rounded(from + (n + 1) * at.room + i));
            _mm512_storeu_si512(at.pairs + n / 2 * 16, _mm512_or_si512(one, _mm512_slli_epi32(other, 16)));
        }
        pair *to = reinterpret_cast<pair *>(turned_to + (of.start + i) * at.room + of.first);
        turned(reinterpret_cast<const bf16 *>(at.pairs), 32, 16, 32, to, at.room / 2);
    }
}

void forward_tiles(const bf16 *q, const bf16 *k, const bf16 *v, bf16 *out, const shape &s, const tile_scratch &at,
                   const example &e, int64_t group) {
    const int64_t sharing = s.heads / s.groups, out_row = s.heads * s.value_size;
    gather(k + group * s.size, s.key_row, at.rows, at.width, e, s.size, at.room);
    gather(v + group * s.value_size, s.value_row, at.value_rows, at.value_width, e, s.value_size, at.room);
    lay_out(at.rows, at.width, true, at.width, at.room, at.kt, at.room);
    lay_out(at.value_rows, at.value_width, false, at.room, at.value_width, at.v_pairs, at.value_width);
    for (int64_t h = group * sharing; h < (group + 1) * sharing; h++)
        for (int64_t from = 0; from < e.length; from += QUERIES) {
            const queries of(s, e, from, 32);
            copy(q + (e.place + from) * s.query_row + h * s.size, s.query_row, at.q, at.width, of.count, s.size, QUERIES);
            probabilities(at, s, e, of);
            round_block(at, at.s, of, true, nullptr);
            const pair *values = at.v_pairs + of.start / 2 * at.value_width;
            multiply(at.p, at.room, values, at.value_width, at.out, at.value_width, up(of.count, 16), at.value_width, of.keys, false);
            put_rounded(at.out, at.value_width, out + (e.place + from) * out_row + h * s.value_size, out_row, of.count, s.value_size,
                        1.0f);
        }
}

// The gradients of a head's queries; what the sums over them need: probabilities and the gradients of scores, turned, and pairs.
void backward_queries(const bf16 *g, const bf16 *q, bf16 *dq, const shape &s, const tile_scratch &at, const example &e, int64_t h) {
    const int64_t g_row = s.heads * s.value_size, q_row = s.heads * s.size;
    for (int64_t from = 0; from < e.length; from += QUERIES) {
        const queries of(s, e, from, 32);
        const int64_t rows = up(of.count, 16);
        copy(q + (e.place + from) * s.query_row + h * s.size, s.query_row, at.q, at.width, of.count, s.size, QUERIES);
        copy(g + (e.place + from) * g_row + h * s.value_size, g_row, at.g, at.value_width, of.count, s.value_size, QUERIES);
        lay_out(at.q, at.width, false, QUERIES, at.width, at.q_pairs + from / 2 * at.width, at.width);
        lay_out(at.g, at.value_width, false, QUERIES, at.value_width, at.g_pairs + from / 2 * at.value_width, at.value_width);
        probabilities(at, s, e, of);
        multiply(at.g, at.value_width, at.vt + of.start, at.room, at.d, at.room, rows, of.keys, at.value_width, false);
        round_block(at, at.s, of, false, at.pt);
        for (int64_t n = 0; n < QUERIES; n++) {
            float *d = at.d + n * at.room;
            const float *p = at.s + n * at.room;
            __m512 dot = _mm512_setzero_ps();
            if (n < of.count)
                for (int64_t i = 0; i < of.keys; i += 16) dot = _mm512_fmadd_ps(_mm512_loadu_ps(d + i), _mm512_loadu_ps(p + i), dot);
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot));
            for (int64_t i = 0; i < of.keys; i += 16) {
                const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(p + i), _mm512_sub_ps(_mm512_loadu_ps(d + i), mean));
                _mm512_storeu_ps(d + i, n < of.count ? value : _mm512_setzero_ps());
            }
        }
        round_block(at, at.d, of, true, at.dt);
        const pair *keys = at.k_pairs + of.start / 2 * at.width;
        multiply(at.p, at.room, keys, at.width, at.out, at.width, rows, at.width, of.keys, false);
        put_rounded(at.out, at.width, dq + (e.place + from) * q_row + h * s.size, q_row, of.count, s.size, s.scale);
    }
}

void backward_tiles(const bf16 *g, const bf16 *q, const bf16 *k, const bf16 *v, bf16 *dq, bf16 *dk, bf16 *dv, float *more_k,
                    float *more_v, const shape &s, const tile_scratch &at, const example &e, int64_t group) {
    const int64_t sharing = s.heads / s.groups, k_row = s.groups * s.size, v_row = s.groups * s.value_size;
    gather(k + group * s.size, s.key_row, at.rows, at.width, e, s.size, at.room);
    gather(v + group * s.value_size, s.value_row, at.value_rows, at.value_width, e, s.value_size, at.room);
    lay_out(at.rows, at.width, true, at.width, at.room, at.kt, at.room);
    lay_out(at.rows, at.width, false, at.room, at.width, at.k_pairs, at.width);
    lay_out(at.value_rows, at.value_width, true, at.value_width, at.room, at.vt, at.room);
    std::memset(at.dk, 0, 4 * at.room * at.width);
    std::memset(at.dv, 0, 4 * at.room * at.value_width);
    for (int64_t h = group * sharing; h < (group + 1) * sharing; h++) {
        backward_queries(g, q, dq, s, at, e, h);
        for (int64_t key = 0; key < up(e.seen(), 16); key += 16) {
            int64_t from = e.length, to = 0;  // the blocks of queries that see these keys
            for (int64_t first = 0; first < e.length; first += QUERIES) {
                const queries of(s, e, first, 32);
                if (key < of.start || key >= of.start + of.keys) continue;
                from = first < from ? first : from, to = first + QUERIES;
            }
            if (from >= to) continue;
            const pair *given = at.g_pairs + from / 2 * at.value_width, *asked = at.q_pairs + from / 2 * at.width;
            const int64_t place = key * at.room + from;
            multiply(at.pt + place, at.room, given, at.value_width, at.dv + key * at.value_width, at.value_width, 16, at.value_width,
                     to - from, true);
            multiply(at.dt + place, at.room, asked, at.width, at.dk + key * at.width, at.width, 16, at.width, to - from, true);
        }
    }
    const float *own_k = at.dk + e.ahead * at.width, *own_v = at.dv + e.ahead * at.value_width;
    put_rounded(own_k, at.width, dk + e.place * k_row + group * s.size, k_row, e.length, s.size, s.scale);
    put_rounded(own_v, at.value_width, dv + e.place * v_row + group * s.value_size, v_row, e.length, s.value_size, 1.0f);
    put(at.dk, at.width, more_k + e.offset * k_row + group * s.size, k_row, e.ahead, s.size, s.scale);
    put(at.dv, at.value_width, more_v + e.offset * v_row + group * s.value_size, v_row, e.ahead, s.value_size, 1.0f);
}

}  // namespace

#endif
