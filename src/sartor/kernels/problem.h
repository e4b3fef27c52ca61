// A matrix product and how its work is cut: c = scale (a b + a' b') + bias, or that is added to c. a is m x k, b is k x n. The second product is what a
// low-rank adapter adds: it has the layout of the first and a depth of its own.

#pragma once

#include <cstdint>

// Field by field `_Problem` of matmul.py.
template <class T>
struct problem_of {
    const T *a, *b, *more_a, *more_b, *bias;
    T *c;
    const uint32_t *laid;  // b as `lay_out_all` lays it out, or null
    int64_t m, n, k, more_k;
    int64_t a_row, b_row, more_a_row, more_b_row, c_row;  // from one row in memory to the next
    int64_t a_turned, b_turned, c_turned;                 // k x m, n x k and n x m in memory
    int64_t adds;                                         // to what c holds
    int64_t threads, thread_bytes, panel, depth, task_rows, packed_rows;  // panel: columns of b that are laid out together
    int64_t strip;                                                        // columns of the panel that lie in a row, by tiles
    float scale;
};

using problem = problem_of<uint16_t>;
