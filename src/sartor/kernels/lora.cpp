// What low-rank adapters add to a frozen linear layer, forward and backward (lora.py): y += s (x A^T) B^T. Products with one side as
// small as the rank, for which the way through general ones takes several times what they are worth. In float32, by blocks of rows.
//
// Shapes: rows, `in` and `out` channels, rank; A is rank x in, B is out x rank.

#include <cstdint>
#include <cstring>

#include "native.h"
#include "tile.h"

namespace {

constexpr int64_t BLOCK = 32, CHUNK = 256;  // rows and channels at a time: what is near in cache
constexpr int64_t PARTS = 8;   // of the sums over rows, whatever the number of threads, so that results do not depend on it

// to[i, j] = from[j, i] for j < count, zeros up to `width`.
template <class T>
inline void turned(const T *from, float *to, int64_t count, int64_t size, int64_t width, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++)
        for (int64_t j = 0; j < width; j++) to[i * width + j] = j < count ? load(from + j * size + i) : 0.0f;
}

// y += `more`, rows of `width` numbers there.
template <class T>
inline void add(T *y, int64_t row, const float *more, int64_t width, int64_t count, int64_t size) {
    for (int64_t n = 0; n < count; n++)
#pragma omp simd
        for (int64_t i = 0; i < size; i++) store(y + n * row + i, load(y + n * row + i) + more[n * width + i]);
}

struct sizes {
    int64_t rows, in, out, rank, threads;
    int64_t wide() const { return up(rank, LANES); }
    int64_t wider() const { return up(in > out ? in : out, LANES); }
    int64_t block() const { return BLOCK * (CHUNK + 3 * wide() + wider()); }  // floats of a thread
    int64_t forward() const { return (in + wider()) * wide() + threads * block(); }
    int64_t sums() const { return (up(in, ROWS) + up(out, ROWS)) * wide(); }  // of a part
    int64_t backward() const { return (out + wider()) * wide() + PARTS * sums() + threads * block(); }
};

template <class T>
void forward(const T *x, const T *a, const T *b, T *y, float *u, float scale, const sizes &of, float *at) {
    const int64_t wide = of.wide(), out_wide = up(of.out, LANES);
    float *a_turned = at, *b_turned = a_turned + of.in * wide, *blocks = b_turned + of.wider() * wide;
#pragma omp parallel num_threads(int(of.threads))
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < of.in; i++) turned(a, a_turned, of.rank, of.in, wide, i, i + 1);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < wide; j++)
            for (int64_t i = 0; i < out_wide; i++)
                b_turned[j * out_wide + i] = j < of.rank && i < of.out ? load(b + i * of.rank + j) : 0.0f;
        float *chunk = blocks + thread_number() * of.block(), *low = chunk + BLOCK * CHUNK;
#pragma omp for schedule(static)
        for (int64_t block = 0; block < (of.rows + BLOCK - 1) / BLOCK; block++) {
            const int64_t first = block * BLOCK, count = of.rows - first < BLOCK ? of.rows - first : BLOCK, room = up(count, ROWS);
            for (int64_t i = 0; i < of.in; i += CHUNK) {
                const int64_t some = of.in - i < CHUNK ? of.in - i : CHUNK;
                spread(x + first * of.in + i, of.in, chunk, up(some, LANES), count, some, room, 1.0f);
                product(chunk, up(some, LANES), 1, a_turned + i * wide, wide, low, wide, room, wide, some, i > 0);
            }
            put(low, wide, u + first * of.rank, of.rank, count, of.rank, 1.0f);
            for (int64_t i = 0; i < room * wide; i++) low[i] *= scale;
            for (int64_t i = 0; i < of.out; i += CHUNK) {
                const int64_t some = of.out - i < CHUNK ? of.out - i : CHUNK, width = up(some, LANES);
                product(low, wide, 1, b_turned + i, out_wide, chunk, width, room, width, of.rank, false);
                add(y + first * of.out + i, of.out, chunk, width, count, some);
            }
        }
    }
}

// The parts' sums, within a parallel region.
template <class T>
void sum_up(const float *parts, T *da, T *db, const sizes &of) {
    const int64_t wide = of.wide(), db_sums = up(of.in, ROWS) * wide;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < of.in + of.out; i++) {
        const bool first = i < of.in;
        const int64_t row = first ? i : i - of.in, place = (first ? 0 : db_sums) + row * wide;
        for (int64_t j = 0; j < of.rank; j++) {
            float sum = 0.0f;
            for (int64_t part = 0; part < PARTS; part++) sum += parts[part * of.sums() + place + j];
            if (first) store(da + j * of.in + row, sum);
            else store(db + row * of.rank + j, sum);
        }
    }
}

// dx (nothing where null) has more added to it; da and db are written.
template <class T>
void backward(const T *g, const T *x, const float *u, const T *a, const T *b, T *dx, T *da, T *db, float scale, const sizes &of,
              float *at) {
    const int64_t wide = of.wide(), in_wide = up(of.in, LANES);
    float *b_spread = at, *a_spread = b_spread + of.out * wide, *parts = a_spread + of.wider() * wide;
    float *blocks = parts + PARTS * of.sums();
    const int64_t db_sums = up(of.in, ROWS) * wide;  // within a part, behind those of da
#pragma omp parallel num_threads(int(of.threads))
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < of.out; i++) spread(b + i * of.rank, of.rank, b_spread + i * wide, wide, 1, of.rank, 1, 1.0f);
#pragma omp for schedule(static)
        for (int64_t j = 0; j < of.rank; j++) spread(a + j * of.in, of.in, a_spread + j * in_wide, in_wide, 1, of.in, 1, 1.0f);
        float *chunk = blocks + thread_number() * of.block(), *low = chunk + BLOCK * CHUNK, *given = low + BLOCK * wide;
#pragma omp for schedule(static)
        for (int64_t part = 0; part < PARTS; part++) {
            float *sums = parts + part * of.sums();
            for (int64_t i = 0; i < of.sums(); i++) sums[i] = 0.0f;
            const int64_t end = of.rows * (part + 1) / PARTS;
            for (int64_t first = of.rows * part / PARTS; first < end; first += BLOCK) {
                const int64_t count = end - first < BLOCK ? end - first : BLOCK, room = up(count, ROWS);
                spread(u + first * of.rank, of.rank, given, wide, count, of.rank, room, 1.0f);
                for (int64_t i = 0; i < of.out; i += CHUNK) {
                    const int64_t some = of.out - i < CHUNK ? of.out - i : CHUNK, width = up(some, LANES);
                    spread(g + first * of.out + i, of.out, chunk, width, count, some, room, scale);
                    product(chunk, width, 1, b_spread + i * wide, wide, low, wide, room, wide, some, i > 0);
                    product(chunk, 1, width, given, wide, sums + db_sums + i * wide, wide, up(some, ROWS), wide, count, true);
                }
                for (int64_t i = 0; i < of.in; i += CHUNK) {
                    const int64_t some = of.in - i < CHUNK ? of.in - i : CHUNK, width = up(some, LANES);
                    spread(x + first * of.in + i, of.in, chunk, width, count, some, room, 1.0f);
                    product(chunk, 1, width, low, wide, sums + i * wide, wide, up(some, ROWS), wide, count, true);
                    if (dx == nullptr) continue;
                    product(low, wide, 1, a_spread + i, in_wide, chunk, width, room, width, of.rank, false);
                    add(dx + first * of.in + i, of.in, chunk, width, count, some);
                }
            }
        }
        sum_up(parts, da, db, of);
    }
}

}  // namespace

#define KINDS(T, KIND)                                                                                                          \
    void lora_##KIND(const T *x, const T *a, const T *b, T *y, float *u, float scale, const sizes *of, float *at) {             \
        forward(x, a, b, y, u, scale, *of, at);                                                                                 \
    }                                                                                                                           \
    void lora_backward_##KIND(const T *g, const T *x, const float *u, const T *a, const T *b, T *dx, T *da, T *db, float scale, \
                              const sizes *of, float *at) {                                                                     \
        backward(g, x, u, a, b, dx, da, db, scale, *of, at);                                                                    \
    }

extern "C" {
KINDS(bf16, bf16)
KINDS(float, f32)
// Floats of working memory.
int64_t lora_room(const sizes *of, int back) { return back ? of->backward() : of->forward(); }
}
