// What lies between a block's products, forward and backward in one pass each (fused.py). Arithmetic in float32, results rounded to
// the tensors' format; where a model rounds in between, so do these.

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "native.h"

namespace {

template <class T>
inline float rounded(float value);
template <>
inline float rounded<float>(float value) { return value; }
template <>
inline float rounded<bf16>(float value) {
    const uint32_t bits = bits_of(value);  // what is not a number comes from bf16, and stays what it is
    return of_bits((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000);
}

// One row of y = w * (x / rms(x)), or with `offset` 1 the models that keep w - 1. Returns 1 / rms.
template <class T>
float norm_row(const T *x, const T *w, T *y, int64_t width, float epsilon, float offset) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) sum += load(x + i) * load(x + i);
    const float r = 1.0f / sqrtf(sum / width + epsilon);
    if (offset == 0.0f) {
        store_each(y, width, [=](int64_t i) { return load(w + i) * rounded<T>(load(x + i) * r); });
    } else {
        store_each(y, width, [=](int64_t i) { return (load(w + i) + offset) * (load(x + i) * r); });
    }
    return r;
}

struct to_norm {  // field by field `_Norm` of fused.py
    const void *x, *weight;
    void *y;  // backward: the gradient of x
    float *inverse;  // of the roots
    const void *gradient, *more;  // what is added to the gradient of x, or null
    float *to_weight;  // zeros, or null
    int64_t rows, width, threads;
    float epsilon, offset;
};

// Rows are cut into as many parts whatever the number of threads, so that sums do not depend on it.
inline int64_t parts_of(const to_norm &of) { return of.to_weight == nullptr ? 64 : of.rows < 8 ? of.rows : 8; }

template <class T>
void norm(const to_norm &of) {
    const T *x = static_cast<const T *>(of.x), *w = static_cast<const T *>(of.weight);
    T *y = static_cast<T *>(of.y);
    const int64_t width = of.width;
#pragma omp parallel for schedule(static) num_threads(int(of.threads)) if (parallel : of.rows * width > LEAST)
    for (int64_t n = 0; n < of.rows; n++) of.inverse[n] = norm_row(x + n * width, w, y + n * width, width, of.epsilon, of.offset);
}

// dx, and the weight's gradient where it is wanted, with sums of the parts in `room`.
template <class T>
void norm_backward(const to_norm &of, float *sums) {
    const T *g = static_cast<const T *>(of.gradient), *x = static_cast<const T *>(of.x), *w = static_cast<const T *>(of.weight);
    const T *more = static_cast<const T *>(of.more);
    T *dx = static_cast<T *>(of.y);
    const int64_t rows = of.rows, width = of.width, parts = parts_of(of);
    const float offset = of.offset;
    const bool trains = of.to_weight != nullptr;
#pragma omp parallel for schedule(static) num_threads(int(of.threads)) if (parallel : rows * width > LEAST)
    for (int64_t part = 0; part < parts; part++) {
        float *sum = sums + part * width;
        for (int64_t i = 0; trains && i < width; i++) sum[i] = 0.0f;
        for (int64_t n = rows * part / parts; n < rows * (part + 1) / parts; n++) {
            const T *gn = g + n * width, *xn = x + n * width, *mn = more + n * width;
            T *dn = dx + n * width;
            const float rn = of.inverse[n];
            float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < width; i++) dot += load(gn + i) * (load(w + i) + offset) * load(xn + i);
            const float pull = dot * rn * rn / width;
            const auto value = [=](int64_t i) { return rn * (load(gn + i) * (load(w + i) + offset) - load(xn + i) * pull); };
            if (more == nullptr) store_each(dn, width, value);
            else store_each(dn, width, [=](int64_t i) { return rounded<T>(value(i)) + load(mn + i); });
            if (!trains) continue;
#pragma omp simd
            for (int64_t i = 0; i < width; i++) sum[i] += load(gn + i) * (load(xn + i) * rn);
        }
    }
    for (int64_t part = 0; trains && part < parts; part++)
        for (int64_t i = 0; i < width; i++) of.to_weight[i] += sums[part * width + i];
}

inline float sigmoid(float x) {
    const float e = exponential(-fabsf(x)), s = 1.0f / (1.0f + e);
    return x < 0.0f ? e * s : s;
}

constexpr int64_t AT_ONCE = 1024;  // numbers, of one thread

struct to_gate {  // field by field `_Gate` of fused.py
    const void *gradient, *gate, *up;
    void *result, *also;  // the gate's gradient and up's
    int64_t count, threads;
};

template <class T>
void gated(const to_gate &of) {
    const T *gate = static_cast<const T *>(of.gate), *up = static_cast<const T *>(of.up);
    T *y = static_cast<T *>(of.result);
    const int64_t count = of.count;
#pragma omp parallel for schedule(static) num_threads(int(of.threads)) if (parallel : count > LEAST)
    for (int64_t at = 0; at < count; at += AT_ONCE)
        store_each(y + at, count - at < AT_ONCE ? count - at : AT_ONCE, [=](int64_t i) {
            const float a = load(gate + at + i);
            return rounded<T>(a * sigmoid(a)) * load(up + at + i);
        });
}

template <class T>
void gated_backward(const to_gate &of) {
    const T *g = static_cast<const T *>(of.gradient), *gate = static_cast<const T *>(of.gate), *up = static_cast<const T *>(of.up);
    T *dgate = static_cast<T *>(of.result), *dup = static_cast<T *>(of.also);
    const int64_t count = of.count;
#pragma omp parallel for schedule(static) num_threads(int(of.threads)) if (parallel : count > LEAST)
    for (int64_t at = 0; at < count; at += AT_ONCE) {
        const int64_t some = count - at < AT_ONCE ? count - at : AT_ONCE;
        float s[AT_ONCE];
#pragma omp simd
        for (int64_t i = 0; i < some; i++) s[i] = sigmoid(load(gate + at + i));
        store_each(dup + at, some, [=, &s](int64_t i) { return load(g + at + i) * rounded<T>(load(gate + at + i) * s[i]); });
        store_each(dgate + at, some, [=, &s](int64_t i) {
            return load(g + at + i) * load(up + at + i) * (s[i] * (1.0f + load(gate + at + i) * (1.0f - s[i])));
        });
    }
}

// Pairs (i, i + half) of every head turned by the angle of their position; `back` turns the other way, by the transposed matrix.
// x and y: rows x positions x heads x size, dense; cosines and sines: (rows or 1) x positions x size.
struct to_turn {  // field by field `_Turn` of fused.py
    const void *x, *cosine, *sine;
    void *y;
    int64_t rows, positions, heads, size, angle_rows, back, threads;
};

template <class T>
void turn(const to_turn &of) {
    const T *x = static_cast<const T *>(of.x), *cosine = static_cast<const T *>(of.cosine), *sine = static_cast<const T *>(of.sine);
    T *y = static_cast<T *>(of.y);
    const int64_t positions = of.positions, heads = of.heads, size = of.size, half = size / 2, count = of.rows * positions;
#pragma omp parallel for schedule(static) num_threads(int(of.threads)) if (parallel : count * heads * size > LEAST)
    for (int64_t n = 0; n < count; n++) {
        const int64_t angle = of.angle_rows == 1 ? n % positions : n;
        const T *c = cosine + angle * size, *s = sine + angle * size;
        for (int64_t h = 0; h < heads; h++) {
            const T *from = x + (n * heads + h) * size;
            T *to = y + (n * heads + h) * size;
            const T *also = from + half;
            if (of.back) {
                store_each(to, half, [=](int64_t i) { return load(from + i) * load(c + i) + load(also + i) * load(s + half + i); });
                store_each(to + half, half, [=](int64_t i) { return load(also + i) * load(c + half + i) - load(from + i) * load(s + i); });
            } else {
                store_each(to, half, [=](int64_t i) { return load(from + i) * load(c + i) - load(also + i) * load(s + i); });
                store_each(to + half, half, [=](int64_t i) {
                    return load(also + i) * load(c + half + i) + load(from + i) * load(s + half + i);
                });
            }
        }
    }
}

// Scores to probabilities in place: softmax over the keys that a query sees, 0 elsewhere. `queries` of them in turn, the first of
// which sees the keys up to `offset`; with a window the last `window` of those.
template <class T>
int causal_softmax(T *scores, int64_t rows, int64_t queries, int64_t keys, int64_t offset, int64_t window, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) if (parallel : rows * keys > LEAST) reduction(| : failed)
    {
        std::unique_ptr<float[]> scratch(new (std::nothrow) float[keys]);
        float *row = scratch.get();
        failed |= row == nullptr;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < rows; n++) {
            if (row == nullptr) continue;
            T *s = scores + n * keys;
            const int64_t at = offset + n % queries, end = at + 1 < keys ? at + 1 : keys;
            const int64_t first = window > 0 && at + 1 > window ? at + 1 - window : 0;
            float top = -INFINITY, sum = 0.0f;
#pragma omp simd reduction(max : top)
            for (int64_t k = first; k < end; k++) {
                row[k] = load(s + k);
                top = row[k] > top ? row[k] : top;
            }
#pragma omp simd reduction(+ : sum)
            for (int64_t k = first; k < end; k++) {
                row[k] = exponential(row[k] - top);
                sum += row[k];
            }
            const float share = 1.0f / sum;
            for (int64_t k = 0; k < first; k++) store(s + k, 0.0f);
#pragma omp simd
            for (int64_t k = first; k < end; k++) store(s + k, row[k] * share);
            for (int64_t k = end; k < keys; k++) store(s + k, 0.0f);
        }
    }
    return failed;
}

// Gradients of probabilities to those of scores, in place.
template <class T>
void softmax_backward(T *dp, const T *p, int64_t rows, int64_t keys, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel : rows * keys > LEAST)
    for (int64_t n = 0; n < rows; n++) {
        T *d = dp + n * keys;
        const T *q = p + n * keys;
        float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
        for (int64_t k = 0; k < keys; k++) dot += load(d + k) * load(q + k);
#pragma omp simd
        for (int64_t k = 0; k < keys; k++) store(d + k, load(q + k) * (load(d + k) - dot));
    }
}

}  // namespace

// q = x * c rounded to 127 steps of s, the row's largest over 127; c (nothing where null) is a factor for each column.
template <class T>
void quantise_rows(const T *x, const float *c, int8_t *q, float *s, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel : rows * width > LEAST)
    for (int64_t n = 0; n < rows; n++) {
        const T *xn = x + n * width;
        float largest = 0.0f;
        if (c == nullptr) {
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < width; i++) {
                const float size = fabsf(load(xn + i));
                largest = size > largest ? size : largest;
            }
        } else {
#pragma omp simd reduction(max : largest)
            for (int64_t i = 0; i < width; i++) {
                const float size = fabsf(load(xn + i) * c[i]);
                largest = size > largest ? size : largest;
            }
        }
        s[n] = largest / 127.0f;
        const float inverse = largest > 0.0f ? 1.0f / s[n] : 0.0f;
        int8_t *qn = q + n * width;
        if (c == nullptr) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) qn[i] = int8_t(int32_t(rintf(load(xn + i) * inverse)));
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) qn[i] = int8_t(int32_t(rintf(load(xn + i) * c[i] * inverse)));
        }
    }
}

// y = sums * s * c: scales of rows and (nothing where null) of columns.
template <class T>
void dequantise(const int32_t *sums, const float *s, const float *c, T *y, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (parallel : rows * width > LEAST)
    for (int64_t n = 0; n < rows; n++) {
        const int32_t *given = sums + n * width;
        T *yn = y + n * width;
        const float scale = s[n];
        if (c == nullptr) {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) store(yn + i, float(given[i]) * scale);
        } else {
#pragma omp simd
            for (int64_t i = 0; i < width; i++) store(yn + i, float(given[i]) * scale * c[i]);
        }
    }
}

#define KINDS(T, KIND)                                                                                                          \
    void rms_norm_##KIND(const to_norm *of, char *) { norm<T>(*of); }                                                           \
    void rms_norm_backward_##KIND(const to_norm *of, char *room) { norm_backward<T>(*of, reinterpret_cast<float *>(room)); }    \
    void silu_mul_##KIND(const to_gate *of, char *) { gated<T>(*of); }                                                          \
    void silu_mul_backward_##KIND(const to_gate *of, char *) { gated_backward<T>(*of); }                                        \
    void rotate_##KIND(const to_turn *of, char *) { turn<T>(*of); }                                                             \
    int causal_softmax_##KIND(T *scores, int64_t rows, int64_t queries, int64_t keys, int64_t offset, int64_t window,           \
                              int threads) {                                                                                    \
        return causal_softmax(scores, rows, queries, keys, offset, window, threads);                                            \
    }                                                                                                                           \
    void softmax_backward_##KIND(T *dp, const T *p, int64_t rows, int64_t keys, int threads) {                                  \
        softmax_backward(dp, p, rows, keys, threads);                                                                           \
    }                                                                                                                           \
    void quantise_rows_##KIND(const T *x, const float *c, int8_t *q, float *s, int64_t rows, int64_t width, int threads) {      \
        quantise_rows(x, c, q, s, rows, width, threads);                                                                        \
    }                                                                                                                           \
    void dequantise_##KIND(const int32_t *sums, const float *s, const float *c, T *y, int64_t rows, int64_t width,              \
                           int threads) {                                                                                       \
        dequantise(sums, s, c, y, rows, width, threads);                                                                        \
    }

extern "C" {
KINDS(bf16, bf16)
KINDS(float, f32)
}
