// The lanes of a vector are queries: the tokens and heads that share a key head. A key, or a value,
// is read number by number and multiplied into all of them, and the softmax needs no sum across
// lanes. Keys go by in blocks with a running maximum ("online softmax", Milakov & Gimelshein 2018).

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "exponential.h"
#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

constexpr int kKeys =
    96;  // of a block: its weights, with 32 queries 12 KB, stay in the first cache
constexpr float kLowest = -1e30f;  // finite: a block without keys stays free of nan

struct Scratch {
    Buffer<float> query, weights, found;
};

template <int W>
VISE_INLINE Vector<W> load(const float* from) {
    Vector<W> value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// A block of at most L queries of one row and key head, and what was found for them so far:
// everything number by number, lane by lane.
template <int L>
struct Queries {
    float* query;    // (dim, L), scaled
    float* weights;  // (kKeys, L): scores, then weights
    float* found;    // (dim, L)
    float top[L], total[L];
    std::int64_t token[L];
};

// Scores of `Count` keys, `stride` apart.
template <int W, int V, int Count>
VISE_INLINE void score(const float* query, const float* keys, std::int64_t stride, std::int64_t dim,
                       float* to) {
    Vector<W> sums[Count][V] = {};
    for (std::int64_t d = 0; d < dim; ++d) {
        Vector<W> part[V];
        for (int v = 0; v < V; ++v) part[v] = load<W>(query + (d * V + v) * W);
#pragma GCC unroll 12
        for (int key = 0; key < Count; ++key)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[key][v] += keys[key * stride + d] * part[v];
    }
#pragma GCC unroll 12
    for (int key = 0; key < Count; ++key)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            std::memcpy(to + (key * V + v) * W, &sums[key][v], sizeof(Vector<W>));
}

// found += weights · values, for `Count` numbers of each value.
template <int W, int V, int Count>
VISE_INLINE void gather(const float* weights, const float* values, std::int64_t stride,
                        std::int64_t keys, float* found) {
    Vector<W> sums[Count][V];
#pragma GCC unroll 12
    for (int d = 0; d < Count; ++d)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[d][v] = load<W>(found + (d * V + v) * W);
    for (std::int64_t key = 0; key < keys; ++key) {
        Vector<W> part[V];
        for (int v = 0; v < V; ++v) part[v] = load<W>(weights + (key * V + v) * W);
#pragma GCC unroll 12
        for (int d = 0; d < Count; ++d)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) sums[d][v] += values[key * stride + d] * part[v];
    }
#pragma GCC unroll 12
    for (int d = 0; d < Count; ++d)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
            std::memcpy(found + (d * V + v) * W, &sums[d][v], sizeof(Vector<W>));
}

// Scores to weights under the new maximum; what was found before shrinks with it. first: the first
// key's token, for the causal mask.
template <int L>
VISE_INLINE void weigh(Queries<L>& block, std::int64_t keys, std::int64_t dim, bool causal,
                       std::int64_t first) {
    float highest[L], shrink[L], sums[L] = {};
    std::memcpy(highest, block.top, sizeof highest);
    for (std::int64_t key = 0; key < keys; ++key) {
        float* score = block.weights + key * L;
        if (causal)
#pragma omp simd
            for (int lane = 0; lane < L; ++lane)
                score[lane] = block.token[lane] < first + key
                                  ? -std::numeric_limits<float>::infinity()
                                  : score[lane];
#pragma omp simd
        for (int lane = 0; lane < L; ++lane)
            highest[lane] = score[lane] > highest[lane] ? score[lane] : highest[lane];
    }
    for (std::int64_t key = 0; key < keys; ++key) {
        float* score = block.weights + key * L;
#pragma omp simd
        for (int lane = 0; lane < L; ++lane) {
            const float z = score[lane] - highest[lane], weight = exp_negative(cut(z));
            score[lane] = z < -87.0f ? 0.0f : weight;
            sums[lane] += score[lane];
        }
    }
    bool moved = false;
    for (int lane = 0; lane < L; ++lane) moved |= highest[lane] != block.top[lane];
#pragma omp simd
    for (int lane = 0; lane < L; ++lane) {
        const float z = block.top[lane] - highest[lane];
        shrink[lane] = z < -87.0f ? 0.0f : exp_negative(cut(z));
        block.total[lane] = block.total[lane] * shrink[lane] + sums[lane];
        block.top[lane] = highest[lane];
    }
    for (std::int64_t d = 0; moved && d < dim; ++d)
#pragma omp simd
        for (int lane = 0; lane < L; ++lane) block.found[d * L + lane] *= shrink[lane];
}

// Keys `first` ... `first + count - 1` of a bank.
template <int W, int V>
VISE_INLINE void see(Queries<W * V>& block, const Bank& bank, const float* keys,
                     const float* values, std::int64_t first, std::int64_t count,
                     std::int64_t dim) {
    constexpr int kSums = W == 16 ? 24 : 12, kAtOnce = kSums / V < 12 ? kSums / V : 12, L = W * V;
    std::int64_t key = 0;
    for (; key + kAtOnce <= count; key += kAtOnce)
        score<W, V, kAtOnce>(block.query, keys + (first + key) * bank.key_token, bank.key_token,
                             dim, block.weights + key * L);
    for (; key < count; ++key)
        score<W, V, 1>(block.query, keys + (first + key) * bank.key_token, bank.key_token, dim,
                       block.weights + key * L);
    weigh<L>(block, count, dim, bank.causal, first);
    constexpr int kNumbers = kAtOnce / 4 * 4;
    static_assert(kNumbers >= 4 && kDimStep % 4 == 0, "steps of four end where the dimension does");
    const float* from = values + first * bank.value_token;
    std::int64_t d = 0;
    for (; d + kNumbers <= dim; d += kNumbers)
        gather<W, V, kNumbers>(block.weights, from + d, bank.value_token, count,
                               block.found + d * L);
    for (; d < dim; d += 4)
        gather<W, V, 4>(block.weights, from + d, bank.value_token, count, block.found + d * L);
}

// `count` queries from `start` on, of row `row` and key head `kv`: query i is token i / group and
// head kv · group + i % group.
template <int W, int V>
VISE_INLINE void queries(const Attention& a, const std::vector<Bank>& banks, std::int64_t row,
                         std::int64_t kv, std::int64_t start, std::int64_t count, Scratch& scratch,
                         float* out, float* lse) {
    constexpr int L = W * V;
    const std::int64_t group = a.heads / a.kv_heads, dim = a.dim;
    Queries<L> block;
    block.query = scratch.query.at_least(dim * L);
    block.weights = scratch.weights.at_least(kKeys * L);
    block.found = scratch.found.at_least(dim * L);
    std::fill_n(block.found, dim * L, 0.0f);
    const auto place = [&](std::int64_t lane) {
        const std::int64_t i = start + lane;
        return (row * a.tokens + i / group) * a.heads + kv * group + i % group;
    };
    for (std::int64_t lane = 0; lane < L; ++lane) {
        const std::int64_t own =
            std::min(lane, count - 1);  // lanes without a query repeat the last
        block.top[lane] = kLowest;
        block.total[lane] = 0.0f;
        block.token[lane] = (start + own) / group;
        const float* from = a.q + place(own) * dim;
        for (std::int64_t d = 0; d < dim; ++d) block.query[d * L + lane] = from[d] * a.scale;
    }
    for (const Bank& bank : banks) {
        const std::int64_t entry = bank.owner ? bank.owner[row] : row;
        std::int64_t seen = bank.length ? std::min(bank.length[entry], bank.tokens) : bank.tokens;
        if (bank.causal) seen = std::min(seen, block.token[count - 1] + 1);
        if (seen <= 0) continue;
        const float* keys = bank.keys + entry * bank.key_entry + kv * bank.key_head;
        const float* values = bank.values + entry * bank.value_entry + kv * bank.value_head;
        for (std::int64_t first = 0; first < seen; first += kKeys) {
            const std::int64_t next = std::min<std::int64_t>(seen - first, kKeys);
            see<W, V>(block, bank, keys, values, first, next, dim);
        }
    }
    for (std::int64_t lane = 0; lane < count; ++lane) {
        const float inverse = block.total[lane] > 0.0f ? 1.0f / block.total[lane] : 0.0f;
        float* to = out + place(lane) * dim;
        for (std::int64_t d = 0; d < dim; ++d) to[d] = block.found[d * L + lane] * inverse;
        lse[place(lane)] = block.top[lane] + std::log(block.total[lane]);
    }
}

struct Whole {
    template <int W>
    VISE_INLINE void operator()(const Attention* a, const std::vector<Bank>* banks,
                                std::int64_t row, std::int64_t kv, Scratch* scratch, float* out,
                                float* lse) const {
        const std::int64_t all = a->tokens * (a->heads / a->kv_heads);
        for (std::int64_t start = 0; start < all; start += 2 * W) {
            const std::int64_t count = std::min<std::int64_t>(all - start, 2 * W);
            if (count > W) queries<W, 2>(*a, *banks, row, kv, start, count, *scratch, out, lse);
            else queries<W, 1>(*a, *banks, row, kv, start, count, *scratch, out, lse);
        }
    }
};

}  // namespace

void attention(const Attention& task, const std::vector<Bank>& banks, float* out, float* lse,
               int threads) {
    const auto one = [&](std::size_t i, Scratch& scratch) {
        const std::int64_t row = static_cast<std::int64_t>(i) / task.kv_heads;
        const std::int64_t kv = static_cast<std::int64_t>(i) % task.kv_heads;
        widest(Whole(), &task, &banks, row, kv, &scratch, out, lse);
    };
    for_each_parallel<Scratch>(task.rows * task.kv_heads, threads, one);
}

}  // namespace vise
