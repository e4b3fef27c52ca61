// Causal softmax attention of short examples, forward and backward (attention.py). All arithmetic is in float32, in memory that
// stays in a core's caches: keys and values of one example and the heads that share them, and a block of queries at a time.
// Backward computes the probabilities again. Nothing between the products is written to memory that others see. An example may
// continue a beginning, whose keys and values come before its own; their gradients are handed out for each example by itself.
// Where the processor multiplies tiles of bfloat16 numbers, these take attention_tiles.h.

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "attention.h"
#include "attention_tiles.h"
#include "native.h"
#include "tile.h"

namespace {

// Memory of one thread.
struct scratch {
    int64_t room = 0, width, value_width;
    std::unique_ptr<float[]> all;
    float *k, *v, *kt, *vt, *dk, *dv, *q, *g, *dq, *p, *dp;

    scratch(int64_t most, const shape &s) : width(up(s.size, LANES)), value_width(up(s.value_size, LANES)) {
        all.reset(new (std::nothrow) float[fit(most)]);
    }

    // Lay it out for an example of this length; how many floats that takes.
    int64_t fit(int64_t length) {
        room = up(length, LANES);
        const int64_t keys = room * width, values = room * value_width, block = QUERIES * width, scores = QUERIES * room;
        const int64_t sizes[] = {keys, keys, keys, values, values, values, block, block, QUERIES * value_width, scores, scores};
        float **places[] = {&k, &kt, &dk, &v, &vt, &dv, &q, &dq, &g, &p, &dp};
        int64_t first = 0;
        for (int i = 0; i < 11; i++) {
            if (all) *places[i] = all.get() + first;
            first += sizes[i];
        }
        return first;
    }
};

// Keys or values: what is continued, then the example's own.
template <class T>
inline void gather(const T *from, int64_t stride, float *to, int64_t width, const example &e, int64_t size, int64_t room) {
    spread(from + e.before * stride, stride, to, width, e.ahead, size, e.ahead, 1.0f);
    spread(from + e.place * stride, stride, to + e.ahead * width, width, e.length, size, room - e.ahead, 1.0f);
}

// Probabilities of a block of queries; rows after them are zero. Rows of at.p are as long as the keys that are seen.
inline void probabilities(const scratch &at, const shape &s, const example &e, const queries &of) {
    product(at.q, at.width, 1, at.kt + of.start, at.room, at.p, of.keys, up(of.count, ROWS), of.keys, s.size, false);
    for (int64_t n = 0; n < up(of.count, ROWS); n++) {
        float *row = at.p + n * of.keys;
        const int64_t begin = of.begin(s, e, n), last = of.last(e, n);
        float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t i = begin; i < last; i++) top = row[i] > top ? row[i] : top;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < last; i++) sum += row[i] = exponential(row[i] - top);
        const float share = 1.0f / sum;
        for (int64_t i = 0; i < begin && i < of.keys; i++) row[i] = 0.0f;
#pragma omp simd
        for (int64_t i = begin; i < last; i++) row[i] *= share;
        for (int64_t i = last; i < of.keys; i++) row[i] = 0.0f;
    }
}

template <class T>
void forward_one(const T *q, const T *k, const T *v, T *out, const shape &s, const scratch &at, const example &e, int64_t group) {
    const int64_t sharing = s.heads / s.groups, out_row = s.heads * s.value_size;
    gather(k + group * s.size, s.key_row, at.k, at.width, e, s.size, at.room);
    gather(v + group * s.value_size, s.value_row, at.v, at.value_width, e, s.value_size, at.room);
    transpose(at.k, at.width, at.kt, at.room, s.size);
    for (int64_t h = group * sharing; h < (group + 1) * sharing; h++)
        for (int64_t first = 0; first < e.length; first += QUERIES) {
            const queries of(s, e, first, LANES);
            const int64_t count = of.count, start = of.start, keys = of.keys, rows = up(count, ROWS);
            spread(q + (e.place + first) * s.query_row + h * s.size, s.query_row, at.q, at.width, count, s.size, rows, s.scale);
            probabilities(at, s, e, of);
            const float *values = at.v + start * at.value_width;
            product(at.p, keys, 1, values, at.value_width, at.g, at.value_width, rows, at.value_width, keys, false);
            put(at.g, at.value_width, out + (e.place + first) * out_row + h * s.value_size, out_row, count, s.value_size, 1.0f);
        }
}

template <class T>
void backward_one(const T *g, const T *q, const T *k, const T *v, T *dq, T *dk, T *dv, float *more_k, float *more_v,
                  const shape &s, const scratch &at, const example &e, int64_t group) {
    const int64_t sharing = s.heads / s.groups, g_row = s.heads * s.value_size, q_row = s.heads * s.size;
    const int64_t k_row = s.groups * s.size, v_row = s.groups * s.value_size;
    gather(k + group * s.size, s.key_row, at.k, at.width, e, s.size, at.room);
    gather(v + group * s.value_size, s.value_row, at.v, at.value_width, e, s.value_size, at.room);
    transpose(at.k, at.width, at.kt, at.room, s.size);
    transpose(at.v, at.value_width, at.vt, at.room, s.value_size);
    for (int64_t i = 0; i < at.room * at.width; i++) at.dk[i] = 0.0f;
    for (int64_t i = 0; i < at.room * at.value_width; i++) at.dv[i] = 0.0f;
    for (int64_t h = group * sharing; h < (group + 1) * sharing; h++)
        for (int64_t first = 0; first < e.length; first += QUERIES) {
            const queries of(s, e, first, LANES);
            const int64_t count = of.count, start = of.start, keys = of.keys, rows = up(count, ROWS);
            spread(q + (e.place + first) * s.query_row + h * s.size, s.query_row, at.q, at.width, count, s.size, rows, s.scale);
            const T *given = g + (e.place + first) * g_row + h * s.value_size;
            spread(given, g_row, at.g, at.value_width, count, s.value_size, rows, 1.0f);
            probabilities(at, s, e, of);
            product(at.g, at.value_width, 1, at.vt + start, at.room, at.dp, keys, rows, keys, s.value_size, false);
            float *dv_here = at.dv + start * at.value_width, *dk_here = at.dk + start * at.width;
            product(at.p, 1, keys, at.g, at.value_width, dv_here, at.value_width, keys, at.value_width, count, true);
            for (int64_t n = 0; n < rows; n++) {
                float *d = at.dp + n * keys, dot = 0.0f;
                const float *p = at.p + n * keys;
#pragma omp simd reduction(+ : dot)
                for (int64_t i = 0; i < keys; i++) dot += d[i] * p[i];
#pragma omp simd
                for (int64_t i = 0; i < keys; i++) d[i] = p[i] * (d[i] - dot);
            }
            product(at.dp, keys, 1, at.k + start * at.width, at.width, at.dq, at.width, rows, at.width, keys, false);
            product(at.dp, 1, keys, at.q, at.width, dk_here, at.width, keys, at.width, count, true);
            put(at.dq, at.width, dq + (e.place + first) * q_row + h * s.size, q_row, count, s.size, s.scale);
        }
    const float *own_k = at.dk + e.ahead * at.width, *own_v = at.dv + e.ahead * at.value_width;
    put(own_k, at.width, dk + e.place * k_row + group * s.size, k_row, e.length, s.size, 1.0f);  // the scale is in the queries
    put(own_v, at.value_width, dv + e.place * v_row + group * s.value_size, v_row, e.length, s.value_size, 1.0f);
    put(at.dk, at.width, more_k + e.offset * k_row + group * s.size, k_row, e.ahead, s.size, 1.0f);
    put(at.dv, at.value_width, more_v + e.offset * v_row + group * s.value_size, v_row, e.ahead, s.value_size, 1.0f);
}

template <class T>
int attend(const T *q, const T *k, const T *v, T *out, const example *where, int64_t examples, const shape &s, int threads) {
#if defined(SARTOR_TILES)
    if constexpr (std::is_same_v<T, bf16>)
        if (has_tiles())
            return each<tile_scratch>(where, examples, s, threads, [=, &s](const tile_scratch &at, const example &e, int64_t group) {
                forward_tiles(q, k, v, out, s, at, e, group);
            });
#endif
    return each<scratch>(where, examples, s, threads, [=, &s](const scratch &at, const example &e, int64_t group) {
        forward_one(q, k, v, out, s, at, e, group);
    });
}

template <class T>
int attend_backward(const T *g, const T *q, const T *k, const T *v, T *dq, T *dk, T *dv, float *more_k, float *more_v,
                    const example *where, int64_t examples, const shape &s, int threads) {
#if defined(SARTOR_TILES)
    if constexpr (std::is_same_v<T, bf16>)
        if (has_tiles())
            return each<tile_scratch>(where, examples, s, threads, [=, &s](const tile_scratch &at, const example &e, int64_t group) {
                backward_tiles(g, q, k, v, dq, dk, dv, more_k, more_v, s, at, e, group);
            });
#endif
    return each<scratch>(where, examples, s, threads, [=, &s](const scratch &at, const example &e, int64_t group) {
        backward_one(g, q, k, v, dq, dk, dv, more_k, more_v, s, at, e, group);
    });
}

}  // namespace

#define KINDS(T, KIND)                                                                                                          \
    int attend_##KIND(const T *q, const T *k, const T *v, T *out, const example *where, int64_t examples, const shape *s,       \
                      int threads) {                                                                                            \
        return attend(q, k, v, out, where, examples, *s, threads);                                                              \
    }                                                                                                                           \
    int attend_backward_##KIND(const T *g, const T *q, const T *k, const T *v, T *dq, T *dk, T *dv, float *more_k, float *more_v,\
                               const example *where, int64_t examples, const shape *s, int threads) {                           \
        return attend_backward(g, q, k, v, dq, dk, dv, more_k, more_v, where, examples, *s, threads);                           \
    }

extern "C" {
KINDS(bf16, bf16)
KINDS(float, f32)
}
