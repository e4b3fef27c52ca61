// Loops over memory that PyTorch takes several passes for. Compiled on the machine that runs them (native.py), called from Python.
// Beside every caller is the same in PyTorch's operators, for where there is no compiler.
//
// bf16 is the upper half of a float32. Where both halves of a master weight are kept, `weight` is the nearest bf16 and `residual`
// what has to be added to its bits, as a signed number, to have the float32's.

#include <cmath>
#include <cstdint>
#include <memory>
#include <new>

#include "native.h"

namespace {

constexpr int64_t BLOCK = 16384;  // elements summed at once, whatever the number of threads

inline float hyperbolic_tangent(float x) {
    float e = exponential(-2.0f * fabsf(x));
    return copysignf((1.0f - e) / (1.0f + e), x);
}

// The cross entropy of one row of logits x, which are first multiplied by `scale` and then, where `cap` is above 0, become
// cap * tanh(x / cap). In their place comes the gradient times `factor`, but where that is 0. `row` is scratch memory.
template <class T>
float cross_entropy_row(T *x, float *row, int64_t width, int64_t target, float scale, float cap, float factor) {
    const float narrow = cap > 0.0f ? scale / cap : 0.0f;
    float top = -INFINITY, sum = 0.0f;
    if (cap > 0.0f) {
#pragma omp simd reduction(max : top)
        for (int64_t v = 0; v < width; v++) {
            row[v] = cap * hyperbolic_tangent(load(x + v) * narrow);
            top = row[v] > top ? row[v] : top;
        }
    } else {
#pragma omp simd reduction(max : top)
        for (int64_t v = 0; v < width; v++) top = load(x + v) * scale > top ? load(x + v) * scale : top;
    }
    const float wanted = (cap > 0.0f ? row[target] : load(x + target) * scale) - top;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < width; v++) {
        row[v] = exponential((cap > 0.0f ? row[v] : load(x + v) * scale) - top);
        sum += row[v];
    }
    const float loss = logf(sum) - wanted;
    if (factor == 0.0f) return loss;
    const float share = factor * scale / sum;
    row[target] -= sum;
    if (cap > 0.0f) {
#pragma omp simd
        for (int64_t v = 0; v < width; v++) {
            float bent = hyperbolic_tangent(load(x + v) * narrow);
            row[v] *= 1.0f - bent * bent;
        }
    }
    store_each(x, width, [=](int64_t v) { return row[v] * share; });
    return loss;
}

// 0, or 1 where there is no memory, 2 where a target is none of the row's places.
template <class T>
int cross_entropy(T *logits, int64_t stride, int64_t rows, int64_t width, const int64_t *targets, float *losses, float scale,
                  float cap, float factor, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        std::unique_ptr<float[]> row(new (std::nothrow) float[width]);
        failed |= !row;
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            if (targets[r] < 0 || targets[r] >= width) failed |= 2;
            else if (row) losses[r] = cross_entropy_row(logits + r * stride, row.get(), width, targets[r], scale, cap, factor);
    }
    return failed;
}

struct to_square {  // field by field `_Squares` of adam.py
    const void *values;
    double *sums;  // of blocks
    int64_t count, threads;
};

template <class T>
void squares(const to_square &of) {
    const T *values = static_cast<const T *>(of.values);
#pragma omp parallel for schedule(static) num_threads(int(of.threads)) if (parallel : of.count > LEAST)
    for (int64_t first = 0; first < of.count; first += BLOCK) {
        const int64_t end = first + BLOCK < of.count ? first + BLOCK : of.count;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = first; i < end; i++) sum += load(values + i) * load(values + i);
        of.sums[first / BLOCK] = sum;
    }
}

struct Rates {  // adam.py says what they are
    float scale, decay, first, second, kept, step, correction, epsilon;
};

struct to_update {  // field by field `_Update` of adam.py
    bf16 *weight;
    int16_t *residual;
    const void *gradient;
    float *first, *second;
    int64_t count, threads;
    Rates rates;
};

template <class T>
void adamw(const to_update &of) {
    const Rates k = of.rates;
    bf16 *weight = of.weight;
    int16_t *residual = of.residual;
    const T *gradient = static_cast<const T *>(of.gradient);
    float *first = of.first, *second = of.second;
#pragma omp parallel for simd schedule(static) num_threads(int(of.threads)) if (parallel : of.count > LEAST / 8)
    for (int64_t i = 0; i < of.count; i++) {
        float g = load(gradient + i) * k.scale;  // 26 bytes each
        float m = plus(k.first, g - first[i], first[i]);
        float v = plus(k.second * g, g, second[i] * k.kept);
        float master = of_bits((uint32_t(weight[i]) << 16) + uint32_t(int32_t(residual[i]))) * k.decay;
        master -= k.step * m / (sqrtf(v) / k.correction + k.epsilon);
        uint32_t bits = bits_of(master), upper = (bits + 0x8000u) >> 16;
        weight[i] = bf16(upper);
        residual[i] = int16_t(bits - (upper << 16));
        first[i] = m;
        second[i] = v;
    }
}

}  // namespace

extern "C" {

int64_t block() { return BLOCK; }

// What calls.py gathers: where pointers to functions of ours are, and what these take.
struct call {
    void (*const *run)(const void *of, char *room);
    const void *of;
};

void run_calls(const call *calls, int64_t count, char *room) {
    for (int64_t i = 0; i < count; i++) (*calls[i].run)(calls[i].of, room);
}

int cross_entropy_bf16(bf16 *logits, int64_t stride, int64_t rows, int64_t width, const int64_t *targets, float *losses, float scale,
                       float cap, float factor, int threads) {
    return cross_entropy(logits, stride, rows, width, targets, losses, scale, cap, factor, threads);
}

int cross_entropy_f32(float *logits, int64_t stride, int64_t rows, int64_t width, const int64_t *targets, float *losses, float scale,
                      float cap, float factor, int threads) {
    return cross_entropy(logits, stride, rows, width, targets, losses, scale, cap, factor, threads);
}

// total += part, in float32.
void add_bf16(float *total, const bf16 *part, int64_t count, int threads) {
#pragma omp parallel for simd schedule(static) num_threads(threads) if (parallel : count > LEAST)
    for (int64_t i = 0; i < count; i++) total[i] += load(part + i);
}

void squares_bf16(const to_square *of, char *) { squares<bf16>(*of); }

void squares_f32(const to_square *of, char *) { squares<float>(*of); }

void adamw_bf16(const to_update *of, char *) { adamw<bf16>(*of); }

void adamw_f32(const to_update *of, char *) { adamw<float>(*of); }
}
