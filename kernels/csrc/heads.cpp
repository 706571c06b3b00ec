// Head by head: each is read twice, the second time from the nearest cache. The loops are vectorised by the compiler.

#include "heads.h"

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

// One head's rotation: cos and sin of `half` angles, and the norm's weight.
struct Turn {
    const float *weight, *cos, *sin;
    std::int64_t half;
    float eps;
};

VISE_INLINE float inverse_of(const Turn &turn, const float *x) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < 2 * turn.half; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares / float(2 * turn.half) + turn.eps);
}

VISE_INLINE void forward(const Turn &turn, const float *x, float *out) {
    const std::int64_t half = turn.half;
    const float *weight = turn.weight, *cos = turn.cos, *sin = turn.sin, inverse = inverse_of(turn, x);
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
        const float low = x[i] * inverse * weight[i], high = x[i + half] * inverse * weight[i + half];
        out[i] = low * cos[i] - high * sin[i];
        out[i + half] = high * cos[i] + low * sin[i];
    }
}

// Turned back by the same angle, then through the norm. `out` holds the gradient before the norm in between.
VISE_INLINE void backward(const Turn &turn, const float *x, const float *grad, float *out) {
    const std::int64_t half = turn.half;
    const float *weight = turn.weight, *cos = turn.cos, *sin = turn.sin, inverse = inverse_of(turn, x);
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (std::int64_t i = 0; i < half; ++i) {
        const float low = (grad[i] * cos[i] + grad[i + half] * sin[i]) * weight[i];
        const float high = (grad[i + half] * cos[i] - grad[i] * sin[i]) * weight[i + half];
        along += low * x[i] + high * x[i + half];
        out[i] = low;
        out[i + half] = high;
    }
    const float share = along * inverse * inverse / float(2 * half);
#pragma omp simd
    for (std::int64_t i = 0; i < 2 * half; ++i) out[i] = (out[i] - x[i] * share) * inverse;
}

VISE_INLINE Turn turn_of(const Heads &h, std::int64_t row, bool query) {
    return {query ? h.q_weight : h.k_weight, h.cos + row * h.half, h.sin + row * h.half, h.half, h.eps};
}

VISE_CLONES void split(const Heads &h, const float *qkv, std::int64_t first, std::int64_t last, float *q, float *k) {
    const std::int64_t dim = 2 * h.half;
    for (std::int64_t row = first; row < last; ++row) {
        const float *x = qkv + row * (h.queries + 2 * h.keys) * dim;
        const Turn of_q = turn_of(h, row, true), of_k = turn_of(h, row, false);
        for (std::int64_t head = 0; head < h.queries; ++head) forward(of_q, x + head * dim, q + (row * h.queries + head) * dim);
        x += h.queries * dim;
        for (std::int64_t head = 0; head < h.keys; ++head) forward(of_k, x + head * dim, k + (row * h.keys + head) * dim);
    }
}

VISE_CLONES void join(const Heads &h, const float *qkv, const float *dq, const float *dk, const float *dv, std::int64_t first, std::int64_t last, float *out) {
    const std::int64_t dim = 2 * h.half, width = (h.queries + 2 * h.keys) * dim;
    for (std::int64_t row = first; row < last; ++row) {
        const float *x = qkv + row * width;
        float *dx = out + row * width;
        const Turn of_q = turn_of(h, row, true), of_k = turn_of(h, row, false);
        for (std::int64_t head = 0; head < h.queries; ++head) backward(of_q, x + head * dim, dq + (row * h.queries + head) * dim, dx + head * dim);
        x += h.queries * dim, dx += h.queries * dim;
        for (std::int64_t head = 0; head < h.keys; ++head) backward(of_k, x + head * dim, dk + (row * h.keys + head) * dim, dx + head * dim);
        std::memcpy(dx + h.keys * dim, dv + row * h.keys * dim, h.keys * dim * sizeof(float));
    }
}

}  // namespace

void heads(const Heads &heads, const float *qkv, float *q, float *k, int threads) {
    for_each_stretch(heads.rows, threads, [&](std::int64_t first, std::int64_t last) { split(heads, qkv, first, last, q, k); });
}

void heads_backward(const Heads &heads, const float *qkv, const float *dq, const float *dk, const float *dv, float *dqkv, int threads) {
    for_each_stretch(heads.rows, threads, [&](std::int64_t first, std::int64_t last) { join(heads, qkv, dq, dk, dv, first, last, dqkv); });
}

}  // namespace vise
