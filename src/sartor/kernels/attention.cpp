// Causal softmax attention of short examples, forward and backward (attention.py). All arithmetic is in float32, in memory that
// stays in a core's caches: keys and values of one example and the heads that share them, and a block of queries at a time. Backward
// computes the probabilities again. Nothing between the products is written to memory that others see.

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "native.h"
#include "tile.h"

namespace {

constexpr int64_t QUERIES = 32;  // of a block

struct shape {
    int64_t heads, groups, size, value_size, window, query_row, key_row, value_row;
    float scale;
};

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

// Probabilities of queries first … first + count of an example; rows after them are zero. Returns the first key's number and how
// many there are, multiples of LANES; p's rows are `keys` long.
inline void probabilities(const scratch &at, const shape &s, int64_t first, int64_t count, int64_t start, int64_t keys) {
    product(at.q, at.width, 1, at.kt + start, at.room, at.p, keys, up(count, ROWS), keys, s.size, false);
    for (int64_t n = 0; n < up(count, ROWS); n++) {
        float *row = at.p + n * keys;
        const int64_t last = n < count ? first + n - start + 1 : 0;
        const int64_t begin = s.window > 0 && first + n + 1 > s.window + start ? first + n + 1 - s.window - start : 0;
        float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
        for (int64_t i = begin; i < last; i++) top = row[i] > top ? row[i] : top;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = begin; i < last; i++) sum += row[i] = exponential(row[i] - top);
        const float share = 1.0f / sum;
        for (int64_t i = 0; i < begin && i < keys; i++) row[i] = 0.0f;
#pragma omp simd
        for (int64_t i = begin; i < last; i++) row[i] *= share;
        for (int64_t i = last; i < keys; i++) row[i] = 0.0f;
    }
}

// The keys that a block of queries sees, in whole vectors.
inline int64_t start_of(const shape &s, int64_t first) {
    return s.window > 0 && first + 1 > s.window ? (first + 1 - s.window) / LANES * LANES : 0;
}

template <class T>
void forward_one(const T *q, const T *k, const T *v, T *out, const shape &s, const scratch &at, int64_t place, int64_t length,
                 int64_t group) {
    const int64_t sharing = s.heads / s.groups, out_row = s.heads * s.value_size;
    spread(k + place * s.key_row + group * s.size, s.key_row, at.k, at.width, length, s.size, at.room, 1.0f);
    spread(v + place * s.value_row + group * s.value_size, s.value_row, at.v, at.value_width, length, s.value_size, at.room, 1.0f);
    transpose(at.k, at.width, at.kt, at.room, s.size);
    for (int64_t h = group * sharing; h < (group + 1) * sharing; h++)
        for (int64_t first = 0; first < length; first += QUERIES) {
            const int64_t count = length - first < QUERIES ? length - first : QUERIES, start = start_of(s, first);
            const int64_t keys = up(first + count - start, LANES), rows = up(count, ROWS);
            spread(q + (place + first) * s.query_row + h * s.size, s.query_row, at.q, at.width, count, s.size, rows, s.scale);
            probabilities(at, s, first, count, start, keys);
            product(at.p, keys, 1, at.v + start * at.value_width, at.value_width, at.g, at.value_width, rows, at.value_width, keys,
                    false);
            put(at.g, at.value_width, out + (place + first) * out_row + h * s.value_size, out_row, count, s.value_size, 1.0f);
        }
}

template <class T>
void backward_one(const T *g, const T *q, const T *k, const T *v, T *dq, T *dk, T *dv, const shape &s, const scratch &at,
                  int64_t place, int64_t length, int64_t group) {
    const int64_t sharing = s.heads / s.groups, g_row = s.heads * s.value_size, q_row = s.heads * s.size;
    const int64_t k_row = s.groups * s.size, v_row = s.groups * s.value_size;
    spread(k + place * s.key_row + group * s.size, s.key_row, at.k, at.width, length, s.size, at.room, 1.0f);
    spread(v + place * s.value_row + group * s.value_size, s.value_row, at.v, at.value_width, length, s.value_size, at.room, 1.0f);
    transpose(at.k, at.width, at.kt, at.room, s.size);
    transpose(at.v, at.value_width, at.vt, at.room, s.value_size);
    for (int64_t i = 0; i < at.room * at.width; i++) at.dk[i] = 0.0f;
    for (int64_t i = 0; i < at.room * at.value_width; i++) at.dv[i] = 0.0f;
    for (int64_t h = group * sharing; h < (group + 1) * sharing; h++)
        for (int64_t first = 0; first < length; first += QUERIES) {
            const int64_t count = length - first < QUERIES ? length - first : QUERIES, start = start_of(s, first);
            const int64_t keys = up(first + count - start, LANES), rows = up(count, ROWS);
            spread(q + (place + first) * s.query_row + h * s.size, s.query_row, at.q, at.width, count, s.size, rows, s.scale);
            spread(g + (place + first) * g_row + h * s.value_size, g_row, at.g, at.value_width, count, s.value_size, rows, 1.0f);
            probabilities(at, s, first, count, start, keys);
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
            put(at.dq, at.width, dq + (place + first) * q_row + h * s.size, q_row, count, s.size, s.scale);
        }
    put(at.dk, at.width, dk + place * k_row + group * s.size, k_row, length, s.size, 1.0f);  // the scale is in the queries
    put(at.dv, at.value_width, dv + place * v_row + group * s.value_size, v_row, length, s.value_size, 1.0f);
}

// Every example and every group of heads by itself, so that results do not depend on threads. `where`: first positions and
// lengths in turn. 1 where there is no memory.
template <class Work>
int each(const int64_t *where, int64_t examples, const shape &s, int threads, Work work) {
    int64_t most = 0;
    for (int64_t n = 0; n < examples; n++) most = where[2 * n + 1] > most ? where[2 * n + 1] : most;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        scratch at(most, s);
        failed |= !at.all;
#pragma omp for schedule(dynamic, 1)
        for (int64_t n = 0; n < examples * s.groups; n++) {
            const int64_t *example = where + 2 * (n / s.groups);
            if (!at.all) continue;
            at.fit(example[1]);
            work(at, example[0], example[1], n % s.groups);
        }
    }
    return failed;
}

}  // namespace

#define KINDS(T, KIND)                                                                                                          \
    int attend_##KIND(const T *q, const T *k, const T *v, T *out, const int64_t *where, int64_t examples, const shape *s,       \
                      int threads) {                                                                                            \
        return each(where, examples, *s, threads, [=](const scratch &at, int64_t place, int64_t length, int64_t group) {        \
            forward_one(q, k, v, out, *s, at, place, length, group);                                                            \
        });                                                                                                                     \
    }                                                                                                                           \
    int attend_backward_##KIND(const T *g, const T *q, const T *k, const T *v, T *dq, T *dk, T *dv, const int64_t *where,       \
                               int64_t examples, const shape *s, int threads) {                                                 \
        return each(where, examples, *s, threads, [=](const scratch &at, int64_t place, int64_t length, int64_t group) {        \
            backward_one(g, q, k, v, dq, dk, dv, *s, at, place, length, group);                                                 \
        });                                                                                                                     \
    }

extern "C" {
KINDS(bf16, bf16)
KINDS(float, f32)
}
