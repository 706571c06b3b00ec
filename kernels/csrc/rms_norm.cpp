// A row is read twice; the second time it lies in the nearest cache. The loops are vectorised by the compiler.

#include "rms_norm.h"

#include <cmath>

#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

struct Rows {
    const float *x, *weight;
    std::int64_t width;
    float eps;
};

VISE_INLINE float inverse_of(const Rows &rows, const float *x) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < rows.width; ++i) squares += x[i] * x[i];
    return 1.0f / std::sqrt(squares / float(rows.width) + rows.eps);
}

VISE_CLONES void forward(const Rows &rows, std::int64_t first, std::int64_t last, float *out) {
    for (std::int64_t row = first; row < last; ++row) {
        const float *x = rows.x + row * rows.width, *weight = rows.weight, inverse = inverse_of(rows, x);
        float *z = out + row * rows.width;
#pragma omp simd
        for (std::int64_t i = 0; i < rows.width; ++i) z[i] = x[i] * inverse * weight[i];
    }
}

VISE_CLONES void backward(const Rows &rows, const float *grad, std::int64_t first, std::int64_t last, float *out) {
    for (std::int64_t row = first; row < last; ++row) {
        const float *x = rows.x + row * rows.width, *dz = grad + row * rows.width, *weight = rows.weight, inverse = inverse_of(rows, x);
        float *dx = out + row * rows.width, along = 0;
#pragma omp simd reduction(+ : along)
        for (std::int64_t i = 0; i < rows.width; ++i) along += dz[i] * weight[i] * x[i];
        const float share = along * inverse * inverse / float(rows.width);
#pragma omp simd
        for (std::int64_t i = 0; i < rows.width; ++i) dx[i] = (dz[i] * weight[i] - x[i] * share) * inverse;
    }
}

}  // namespace

void rms_norm(const float *x, const float *weight, std::int64_t rows, std::int64_t width, float eps, float *z, int threads) {
    for_each_stretch(rows, threads, [&](std::int64_t first, std::int64_t last) { forward({x, weight, width, eps}, first, last, z); });
}

void rms_norm_backward(const float *x, const float *weight, const float *dz, std::int64_t rows, std::int64_t width, float eps, float *dx, int threads) {
    for_each_stretch(rows, threads, [&](std::int64_t first, std::int64_t last) { backward({x, weight, width, eps}, dz, first, last, dx); });
}

}  // namespace vise
