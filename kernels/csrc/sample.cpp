// Gumbel-max with hardly any logarithm. The noise -log(-log(1 - u)) is at most -log u, and log2 of
// a float is at least its exponent plus its mantissa minus 1, so a few whole-number operations
// bound every id's score. Only ids whose bound beats the best score so far (a handful per row) get
// their exact score, computed as plain PyTorch does: no fused multiply-add, the series below an
// eighth.

#include "sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

constexpr std::int64_t kBlock = 512;
constexpr std::uint32_t kMultiplier = 0xD256D193u, kWeyl = 0x9E3779B9u;
constexpr float kLargestU = 0.999999940395355224609375f;  // 1 - 2^-24

struct Words {
    std::uint32_t left, right;
};

VISE_INLINE Words philox(std::uint32_t left, std::uint32_t right, std::uint32_t key) {
    for (int round = 0; round < 7; ++round) {
        const std::uint64_t product = std::uint64_t{left} * kMultiplier;
        left = std::uint32_t(product >> 32) ^ key ^ right;
        right = std::uint32_t(product);
        key += kWeyl;
    }
    return {left, right};
}

// The exact score. Kept out of the clones, whose fused multiply-adds would round otherwise than
// PyTorch.
__attribute__((noinline)) float score_of(float z, float inverse, std::uint32_t bits) {
    const float u = std::min((float(bits) + 0.5f) * 2.3283064365386963e-10f, kLargestU);
    float series = 1.0f / 6 + u * (1.0f / 7);
    for (int term = 5; term >= 1; --term) series = 1.0f / float(term) + u * series;
    const float hazard = u < 0.125f ? u * series : -std::log(1.0f - u);
    return z * inverse + -std::log(hazard);
}

struct Row {
    const float* logits;
    std::int64_t columns;
    float inverse;
    std::uint32_t low, high;  // the words that the generator mixes with the id
};

struct Best {
    float score = -std::numeric_limits<float>::infinity();
    std::int64_t id = 0;

    VISE_INLINE void offer(float candidate, std::int64_t at) {
        const bool better = candidate > score || (candidate == score && at < id);
        if (!better) return;
        score = candidate;
        id = at;
    }
};

// Random bits and the bound of the score of `count` ids from `first` on; returns the largest bound.
VISE_INLINE float bound(const Row& row, std::int64_t first, std::int64_t count, std::uint32_t* bits,
                        float* bounds) {
    float highest = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : highest)
    for (std::int64_t i = 0; i < count; ++i) {
        bits[i] = philox(std::uint32_t(first + i), row.high, row.low).left;
        const float x = float(bits[i]) + 0.5f;
        std::int32_t pattern;
        std::memcpy(&pattern, &x, sizeof pattern);
        const float log2_u = float(pattern) * 1.1920929e-7f - (127.0f + 32.0f);  // 2^-23
        bounds[i] = row.logits[first + i] * row.inverse + (0.001f - 0.69314718f * log2_u);
        highest = bounds[i] > highest ? bounds[i] : highest;
    }
    return highest;
}

VISE_CLONES void draw(const Row& row, Best& best) {
    std::uint32_t bits[kBlock];
    float bounds[kBlock];
    for (std::int64_t first = 0; first < row.columns; first += kBlock) {
        const std::int64_t count = std::min(kBlock, row.columns - first);
        const float highest = bound(row, first, count, bits, bounds);
        if (!(highest > best.score)) continue;
        // the likeliest sets the bar before the others are looked at
        const std::int64_t likely = std::find(bounds, bounds + count, highest) - bounds;
        best.offer(score_of(row.logits[first + likely], row.inverse, bits[likely]), first + likely);
        for (std::int64_t i = 0; i < count; ++i)
            if (bounds[i] >= best.score)
                best.offer(score_of(row.logits[first + i], row.inverse, bits[i]), first + i);
    }
}

std::int64_t largest(const float* logits, std::int64_t columns) {
    return std::max_element(logits, logits + columns) - logits;
}

struct None {};  // the rows need no scratch memory

}  // namespace

void sample(const float* logits, std::int64_t rows, std::int64_t columns, std::int64_t stride,
            const float* temperature, const std::int64_t* seed, const std::int64_t* position,
            std::int64_t* ids, int threads) {
    for_each_parallel<None>(rows, threads, [=](std::size_t r, None&) {
        const float* row = logits + std::int64_t(r) * stride;
        if (!(temperature[r] > 0)) {
            ids[r] = largest(row, columns);
            return;
        }
        const std::uint64_t word = std::uint64_t(seed[r]);
        const Words mixed =
            philox(std::uint32_t(word), std::uint32_t(word >> 32), std::uint32_t(position[r]));
        Best best;
        draw({row, columns, 1.0f / temperature[r], mixed.left, mixed.right}, best);
        ids[r] = best.id;
    });
}

}  // namespace vise
