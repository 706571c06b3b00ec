// The loops are vectorised by the compiler.

#include "swiglu.h"

#include "exponential.h"
#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

// 1 / (1 + exp(-gate)); zero where it would be subnormal, nan for nan.
VISE_INLINE float sigmoid(float gate) {
    const float below = gate < 0.0f ? gate : -gate, whole = exp_negative(cut(below)), share = below < -87.0f ? 0.0f : whole;
    return (gate < 0.0f ? share : 1.0f) / (1.0f + share);
}

VISE_CLONES void forward(const float *x, std::int64_t width, std::int64_t first, std::int64_t last, float *out) {
    for (std::int64_t row = first; row < last; ++row) {
        const float *gate = x + 2 * row * width, *up = gate + width;
        float *z = out + row * width;
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i) z[i] = gate[i] * sigmoid(gate[i]) * up[i];
    }
}

VISE_CLONES void backward(const float *x, const float *grad, std::int64_t width, std::int64_t first, std::int64_t last, float *out) {
    for (std::int64_t row = first; row < last; ++row) {
        const float *gate = x + 2 * row * width, *up = gate + width, *dz = grad + row * width;
        float *dgate = out + 2 * row * width, *dup = dgate + width;
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i) {
            const float share = sigmoid(gate[i]);
            dgate[i] = dz[i] * up[i] * share * (1.0f + gate[i] * (1.0f - share));
            dup[i] = dz[i] * gate[i] * share;
        }
    }
}

}  // namespace

void swiglu(const float *x, std::int64_t rows, std::int64_t width, float *z, int threads) {
    for_each_stretch(rows, threads, [&](std::int64_t first, std::int64_t last) { forward(x, width, first, last, z); });
}

void swiglu_backward(const float *x, const float *dz, std::int64_t rows, std::int64_t width, float *dx, int threads) {
    for_each_stretch(rows, threads, [&](std::int64_t first, std::int64_t last) { backward(x, dz, width, first, last, dx); });
}

}  // namespace vise
