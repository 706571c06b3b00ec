// A row is read twice; the second time it lies in the nearest cache. The loops are vectorised by
// the compiler.

#include "rms_norm.h"

#include <cmath>

#include "brain.h"
#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

struct Rows {
    const void *x, *weight, *dz;
    std::int64_t width;
    float eps;
    void* out;
};

template <class T>
VISE_INLINE float inverse_of(const Rows& rows, const T* x) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < rows.width; ++i) squares += load(x[i]) * load(x[i]);
    return 1.0f / std::sqrt(squares / float(rows.width) + rows.eps);
}

template <class T>
VISE_INLINE void forward(const Rows& rows, std::int64_t first, std::int64_t last) {
    const T* weight = static_cast<const T*>(rows.weight);
    for (std::int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(rows.x) + row * rows.width;
        T* z = static_cast<T*>(rows.out) + row * rows.width;
        const float inverse = inverse_of(rows, x);
#pragma omp simd
        for (std::int64_t i = 0; i < rows.width; ++i)
            store(z[i], load(x[i]) * inverse * load(weight[i]));
    }
}

template <class T>
VISE_INLINE void backward(const Rows& rows, std::int64_t first, std::int64_t last) {
    const T* weight = static_cast<const T*>(rows.weight);
    for (std::int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(rows.x) + row * rows.width;
        const T* dz = static_cast<const T*>(rows.dz) + row * rows.width;
        T* dx = static_cast<T*>(rows.out) + row * rows.width;
        const float inverse = inverse_of(rows, x);
        float along = 0;
#pragma omp simd reduction(+ : along)
        for (std::int64_t i = 0; i < rows.width; ++i)
            along += load(dz[i]) * load(weight[i]) * load(x[i]);
        const float share = along * inverse * inverse / float(rows.width);
#pragma omp simd
        for (std::int64_t i = 0; i < rows.width; ++i)
            store(dx[i], (load(dz[i]) * load(weight[i]) - load(x[i]) * share) * inverse);
    }
}

VISE_CLONES void forward_float(const Rows& rows, std::int64_t first, std::int64_t last) {
    forward<float>(rows, first, last);
}
VISE_CLONES void forward_brain(const Rows& rows, std::int64_t first, std::int64_t last) {
    forward<Brain>(rows, first, last);
}
VISE_CLONES void backward_float(const Rows& rows, std::int64_t first, std::int64_t last) {
    backward<float>(rows, first, last);
}
VISE_CLONES void backward_brain(const Rows& rows, std::int64_t first, std::int64_t last) {
    backward<Brain>(rows, first, last);
}

}  // namespace

void rms_norm(const void* x, const void* weight, std::int64_t rows, std::int64_t width, float eps,
              void* z, bool brain, int threads) {
    const Rows task{x, weight, nullptr, width, eps, z};
    for_each_stretch(rows, threads, [&](std::int64_t first, std::int64_t last) {
        brain ? forward_brain(task, first, last) : forward_float(task, first, last);
    });
}

void rms_norm_backward(const void* x, const void* weight, const void* dz, std::int64_t rows,
                       std::int64_t width, float eps, void* dx, bool brain, int threads) {
    const Rows task{x, weight, dz, width, eps, dx};
    for_each_stretch(rows, threads, [&](std::int64_t first, std::int64_t last) {
        brain ? backward_brain(task, first, last) : backward_float(task, first, last);
    });
}

}  // namespace vise
