// The lanes of a vector are rows of x, so that a weight is read once, multiplied into all rows, and
// nothing is summed across lanes. x is arranged for that first: for every k the rows' values side
// by side. Up to twelve rows of the weight at a time, their sums in registers. While they are used,
// the next ones, which follow in memory, are asked for, one line after each dozen products: in one
// go they would fill the queue of outstanding lines, and the processor's own prefetcher loses track
// of interleaved streams.

#include "few_rows.h"

#include <algorithm>
#include <cstring>

#include "lanes.h"

namespace vise {
namespace {

constexpr int kLine = 16;  // floats of a cache line, and k's of a step

typedef double Doubles __attribute__((vector_size(64)));

// `part` times K neighbouring floats, again and again.
template <int W, int K>
VISE_INLINE Vector<W> times(const Vector<W>& part, const float* from) {
    if constexpr (K == 1) {
        return *from * part;
    } else {
        static_assert(K == 2 && W == 16, "pairs are for wide vectors");
        double pair;
        std::memcpy(&pair, from, sizeof pair);
        // minus zero leaves every value what it is, and compiles to nothing
        return (Vector<W>)(pair - Doubles{}) * part;
    }
}

template <int W>
VISE_INLINE Vector<W> load(const float* from) {
    Vector<W> value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// One factor pair: y += x wᵀ; x (rows, width), w (outs, width).
struct Factors {
    const float *x, *w;
    std::int64_t width;
};

struct Task {
    Factors main, more;  // more.width may be 0
    std::int64_t rows, outs;
    const float* bias;
    float* y;
};

// x of at most V vectors of rows: for every K neighbouring k's V vectors, lane row · K + k; zeros
// beyond the rows and the width.
template <int W, int K, int V>
VISE_INLINE void arrange(const Factors& f, std::int64_t first, std::int64_t rows, float* to) {
    constexpr int kRows = W / K;
    const std::int64_t padded = (f.width + kLine - 1) / kLine * kLine;
    if (rows < V * kRows || padded > f.width) std::fill_n(to, padded * V * kRows, 0.0f);
    for (std::int64_t r = 0; r < rows; ++r) {
        const float* from = f.x + (first + r) * f.width;
        float* lane = to + r / kRows * W + r % kRows * K;
        for (std::int64_t k = 0; k < f.width; ++k) lane[k / K * V * W + k % K] = from[k];
    }
}

template <int W, int V, int Outs>
struct Sums {
    Vector<W> of[Outs][V] = {};
};

// Sixteen k's of `Outs` weight rows, `stride` apart. `Asks`: lines asked for meanwhile, from
// `ahead` on, which may lie behind the weight's end: asking is no reading.
template <int W, int K, int V, int Outs, int Asks>
VISE_INLINE void step(Sums<W, V, Outs>& sums, const float* x, const float* w, std::int64_t stride,
                      const float*& ahead) {
    constexpr int kTurns = kLine / K;
#pragma GCC unroll 16
    for (int turn = 0; turn < kTurns; ++turn) {
        for (int line = turn * Asks / kTurns; line < (turn + 1) * Asks / kTurns; ++line) {
            __builtin_prefetch(ahead, 0, 2);
            ahead += kLine;
        }
        __asm__ volatile("" ::: "memory");  // or the compiler asks for all lines at once
        Vector<W> part[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) part[v] = load<W>(x + (turn * V + v) * W);
#pragma GCC unroll 12
        for (int o = 0; o < Outs; ++o)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v)
                sums.of[o][v] += times<W, K>(part[v], w + o * stride + turn * K);
    }
}

// The products of weight rows `out` ... `out + Outs - 1` with all rows of x.
template <int W, int K, int V, int Outs, int Asks>
VISE_INLINE void add(Sums<W, V, Outs>& sums, const float* x, const Factors& f, std::int64_t out,
                     const float*& ahead) {
    constexpr int kStride = kLine * V * W / K;  // of x, per step
    const float* w = f.w + out * f.width;
    std::int64_t k = 0;
    for (; k + kLine <= f.width; k += kLine, x += kStride)
        step<W, K, V, Outs, Asks>(sums, x, w + k, f.width, ahead);
    if (k == f.width) return;
    float rest[Outs][kLine] = {};
    for (int o = 0; o < Outs; ++o)
        std::memcpy(rest[o], w + o * f.width + k, (f.width - k) * sizeof(float));
    step<W, K, V, Outs, 0>(sums, x, rest[0], kLine, ahead);
}

template <int W, int K, int V, int Outs, int Asks>
VISE_INLINE void outputs(const Task& task, std::int64_t first, std::int64_t rows, const float* x,
                         const float* x_more, std::int64_t out) {
    const float* ahead = task.main.w + (out + Outs) * task.main.width;
    const float* ahead_more = task.more.w + (out + Outs) * task.more.width;
    Sums<W, V, Outs> sums;
    add<W, K, V, Outs, Asks>(sums, x, task.main, out, ahead);
    if (task.more.width) add<W, K, V, Outs, Asks>(sums, x_more, task.more, out, ahead_more);
    float results[Outs][V * W];
#pragma GCC unroll 12
    for (int o = 0; o < Outs; ++o)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            std::memcpy(results[o] + v * W, &sums.of[o][v], sizeof(Vector<W>));
    for (std::int64_t r = 0; r < rows; ++r) {
        float* y = task.y + (first + r) * task.outs + out;
        for (int o = 0; o < Outs; ++o) {
            float total = task.bias ? task.bias[out + o] : 0.0f;
            for (int k = 0; k < K; ++k) total += results[o][r * K + k];
            y[o] = total;
        }
    }
}

// `rows` rows from `first` on, which fill V vectors.
template <int W, int K, int V>
VISE_INLINE void group(const Task& task, std::int64_t first, std::int64_t rows) {
    constexpr int kSums = W == 16 ? 24 : 12;  // AVX2 and SSE2 have half the registers
    constexpr int kOuts = kSums / V < 12 ? kSums / V : 12;
    thread_local Buffer<float> held;
    const auto room = [](const Factors& f) {
        return (f.width + kLine - 1) / kLine * kLine * V * W / K;
    };
    float* x = held.at_least(room(task.main) + room(task.more));
    float* x_more = x + room(task.main);
    arrange<W, K, V>(task.main, first, rows, x);
    arrange<W, K, V>(task.more, first, rows, x_more);
    std::int64_t out = 0;
    for (; out + kOuts <= task.outs; out += kOuts)
        outputs<W, K, V, kOuts, kOuts>(task, first, rows, x, x_more, out);
    for (; out + 4 <= task.outs; out += 4)
        outputs<W, K, V, 4, 0>(task, first, rows, x, x_more, out);
    for (; out < task.outs; ++out) outputs<W, K, V, 1, 0>(task, first, rows, x, x_more, out);
}

struct Whole {
    template <int W>
    VISE_INLINE void operator()(const Task& task) const {
        if constexpr (W == 16) {
            if (task.rows <= W / 2) return group<W, 2, 1>(task, 0, task.rows);
        }
        for (std::int64_t first = 0; first < task.rows; first += 4 * W) {
            const std::int64_t rows = std::min<std::int64_t>(task.rows - first, 4 * W);
            switch ((rows + W - 1) / W) {
                case 1: group<W, 1, 1>(task, first, rows); break;
                case 2: group<W, 1, 2>(task, first, rows); break;
                case 3: group<W, 1, 3>(task, first, rows); break;
                case 4: group<W, 1, 4>(task, first, rows); break;
            }
        }
    }
};

}  // namespace

void few_rows(const float* x, std::int64_t rows, std::int64_t width, const float* weight,
              std::int64_t outs, const float* bias, const float* low, std::int64_t rank,
              const float* up, float* y) {
    widest(Whole(), Task{{x, weight, width}, {low, up, rank}, rows, outs, bias, y});
}

}  // namespace vise
