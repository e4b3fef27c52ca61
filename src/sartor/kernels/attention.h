// What attention of short examples is asked for, and which parts of an example are computed at a time (attention.cpp).

#pragma once

#include <cstdint>

#include "tile.h"

namespace {

constexpr int64_t QUERIES = 32;  // of a block

// Field by field `_Shape` of attend.py.
struct shape {
    int64_t heads, groups, size, value_size, window, query_row, key_row, value_row;
    float scale;
};

struct example {
    int64_t place, length, before, ahead, offset;  // first position and length, those of what it continues, its place in `more`
    int64_t seen() const { return ahead + length; }
};

// A block of queries, by the numbers of their own keys: it sees `keys` of them from `start` on, both multiples of `step`.
struct queries {
    int64_t first, count, start, keys;

    queries(const shape &s, const example &e, int64_t from, int64_t step)
        : first(from), count(e.length - from < QUERIES ? e.length - from : QUERIES) {
        const int64_t number = e.ahead + first + 1;
        start = s.window > 0 && number > s.window ? (number - s.window) / step * step : 0;
        keys = up(e.ahead + first + count - start, step);
    }
    // Of query n of the block: its first key and the one after its last, seen from `start`.
    int64_t last(const example &e, int64_t n) const { return n < count ? e.ahead + first + n + 1 - start : 0; }
    int64_t begin(const shape &s, const example &e, int64_t n) const {
        const int64_t number = e.ahead + first + n + 1 - start;
        return s.window > 0 && number > s.window ? number - s.window : 0;
    }
};

// Every example and every group of heads by itself, so that results do not depend on threads. 1 where there is no memory.
template <class Scratch, class Work>
int each(const example *where, int64_t examples, const shape &s, int threads, Work work) {
    int64_t most = 0;
    for (int64_t n = 0; n < examples; n++) most = where[n].seen() > most ? where[n].seen() : most;
    // Heads that lie beside each other in memory one after the other, where there are enough of them.
    const int64_t work_items = examples * s.groups, share = work_items / (4 * threads);
    const int64_t together = share < 1 ? 1 : share < s.groups ? share : s.groups;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        Scratch at(most, s);
        failed |= !at.all;
#pragma omp for schedule(dynamic, together)
        for (int64_t n = 0; n < work_items; n++) {
            const example &e = where[n / s.groups];
            if (!at.all) continue;
            at.fit(e.seen());
            work(at, e, n % s.groups);
        }
    }
    return failed;
}

}  // namespace
