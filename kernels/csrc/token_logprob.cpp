// One pass over each row of logits, block by block: float32 within a block, float64 across blocks,
// no memory beyond the row's state. Sums are kept relative to a running maximum `top`:
//   total = sum exp(z - top)     moment = sum exp(z - top) (z - top)
//   logsumexp = top + log total  entropy = log total - moment / total
// The loops are vectorised by the compiler (-O3 -fopenmp-simd, no OpenMP runtime).

#include "token_logprob.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "brain.h"
#include "exponential.h"
#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

// columns between two looks at the maximum; 8 KB of float32 stays in the first cache
constexpr std::int64_t kBlock = 2048;
constexpr float kLowest = -std::numeric_limits<float>::max();

struct Sums {
    float top = kLowest;  // finite: a row that begins with minus infinities stays free of nan
    double total = 0, moment = 0;

    void raise(float maximum) {
        if (!(maximum > top)) return;
        const double step = double(top) - double(maximum), factor = std::exp(step);
        moment = factor == 0 ? 0 : factor * (moment + step * total);
        total *= factor;
        top = maximum;
    }
};

// The block as float32, and its maximum: in place where it is float32 already, else in `buffer`.
VISE_INLINE const float* widen(const float* block, std::int64_t columns, float*, float& highest) {
    float most = kLowest;
#pragma omp simd reduction(max : most)
    for (std::int64_t at = 0; at < columns; ++at) most = block[at] > most ? block[at] : most;
    highest = most;
    return block;
}

VISE_INLINE const float* widen(const Brain* block, std::int64_t columns, float* buffer,
                               float& highest) {
    for (std::int64_t at = 0; at < columns; ++at) buffer[at] = load(block[at]);
    return widen(buffer, columns, buffer, highest);
}

template <class T>
VISE_INLINE void add(Sums& sums, const T* row, std::int64_t columns) {
    float buffer[kBlock], highest;
    const float* block = widen(row, columns, buffer, highest);
    sums.raise(highest);
    const float top = sums.top;
    float total = 0, moment = 0;
#pragma omp simd reduction(+ : total, moment)
    for (std::int64_t at = 0; at < columns; ++at) {
        const float z = cut(block[at] - top), share = exp_negative(z);
        total += share;
        moment += share * z;
    }
    sums.total += total;
    sums.moment += moment;
}

template <class T>
VISE_INLINE Sums sums_of(const T* row, std::int64_t columns) {
    Sums sums;
    for (std::int64_t at = 0; at < columns; at += kBlock)
        add(sums, row + at, std::min(kBlock, columns - at));
    // nothing but minus infinity in the row
    if (sums.top == kLowest && sums.total == sums.total) sums.total = 0;
    return sums;
}

struct Row {
    const void* logits;
    std::int64_t columns, id;
};

struct Result {
    float logprob, logsumexp, entropy;
};

template <class T>
VISE_INLINE void forward(const Row& row, Result& result) {
    const T* z = static_cast<const T*>(row.logits);
    const Sums sums = sums_of(z, row.columns);
    const double log_total = std::log(sums.total);
    result.logsumexp = float(sums.top + log_total);
    result.logprob = float(double(load(z[row.id])) - sums.top - log_total);
    result.entropy = float(log_total - sums.moment / sums.total);
}

// d logprob / dz = [v = id] - p    d logsumexp / dz = p    d entropy / dz = -p (log p + entropy)
// Here without the [v = id].
struct Slope {
    float logsumexp, entropy, grad_logprob, grad_logsumexp, grad_entropy;

    VISE_INLINE float operator()(float z) const {
        const float log_share = z - logsumexp;
        const float kept = cut(log_share > 0.0f ? 0.0f : log_share);  // rounding may put it above 0
        const float slope =
            exp_negative(kept) * (grad_logsumexp - grad_logprob - grad_entropy * (kept + entropy));
        return log_share < -87.0f ? 0.0f : slope;
    }
};

template <class T>
VISE_INLINE void backward(const Row& row, const Slope& from, void* grad) {
    const Slope slope = from;  // a copy that the stores below cannot touch
    const T* z = static_cast<const T*>(row.logits);
    T* out = static_cast<T*>(grad);
#pragma omp simd
    for (std::int64_t at = 0; at < row.columns; ++at) store(out[at], slope(load(z[at])));
    store(out[row.id], slope(load(z[row.id])) + slope.grad_logprob);
}

VISE_CLONES void forward_float(const Row& row, Result& result) { forward<float>(row, result); }
VISE_CLONES void forward_brain(const Row& row, Result& result) { forward<Brain>(row, result); }
VISE_CLONES void backward_float(const Row& row, const Slope& slope, void* grad) {
    backward<float>(row, slope, grad);
}
VISE_CLONES void backward_brain(const Row& row, const Slope& slope, void* grad) {
    backward<Brain>(row, slope, grad);
}

std::int64_t width(Logits type) { return type == Logits::float32 ? sizeof(float) : sizeof(Brain); }

const void* row_of(const void* logits, Logits type, std::int64_t row, std::int64_t stride) {
    return static_cast<const char*>(logits) + row * stride * width(type);
}

struct None {};  // the rows need no scratch memory

}  // namespace

void token_logprob_forward(const void* logits, Logits type, std::int64_t rows, std::int64_t columns,
                           std::int64_t stride, const std::int64_t* ids, float* logprob,
                           float* logsumexp, float* entropy, int threads) {
    for_each_parallel<None>(rows, threads, [=](std::size_t r, None&) {
        const Row row{row_of(logits, type, r, stride), columns, ids[r]};
        Result result;
        type == Logits::float32 ? forward_float(row, result) : forward_brain(row, result);
        logprob[r] = result.logprob;
        logsumexp[r] = result.logsumexp;
        entropy[r] = result.entropy;
    });
}

void token_logprob_backward(const void* logits, Logits type, std::int64_t rows,
                            std::int64_t columns, std::int64_t stride, const std::int64_t* ids,
                            const float* logsumexp, const float* entropy, const float* grad_logprob,
                            const float* grad_logsumexp, const float* grad_entropy, void* grad,
                            int threads) {
    for_each_parallel<None>(rows, threads, [=](std::size_t r, None&) {
        const Row row{row_of(logits, type, r, stride), columns, ids[r]};
        const Slope slope{logsumexp[r], entropy[r], grad_logprob[r], grad_logsumexp[r],
                          grad_entropy[r]};
        void* out = static_cast<char*>(grad) + r * columns * width(type);
        type == Logits::float32 ? backward_float(row, slope, out) : backward_brain(row, slope, out);
    });
}

}  // namespace vise
