// The loops are vectorised by the compiler.

#include "rotate.h"

#include "brain.h"
#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

VISE_INLINE void turn(const Brain* x, const float* cos, const float* sin, std::int64_t half,
                      Brain* out) {
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
        const float low = load(x[i]), high = load(x[i + half]);
        store(out[i], low * cos[i] - high * sin[i]);
        store(out[i + half], high * cos[i] + low * sin[i]);
    }
}

// In two loops, so that every machine rounds the products with the cosine and, where it fuses
// product and sum, not those with the sine: what PyTorch's formula does, on x86 to the last bit.
VISE_INLINE void turn(const float* x, const float* cos, const float* sin, std::int64_t half,
                      float* out) {
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
        out[i] = x[i] * cos[i];
        out[i + half] = x[i + half] * cos[i];
    }
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
        out[i] -= x[i + half] * sin[i];
        out[i + half] += x[i] * sin[i];
    }
}

template <class T>
VISE_INLINE void stretch(const Rotation& r, void* out, std::int64_t first, std::int64_t last) {
    for (std::int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(r.x) + row * r.row_stride;
        T* to = static_cast<T*>(out) + row * r.heads * 2 * r.half;
        const float *cos = r.cos + row * r.half, *sin = r.sin + row * r.half;
        for (std::int64_t head = 0; head < r.heads; ++head)
            turn(x + head * r.head_stride, cos, sin, r.half, to + head * 2 * r.half);
    }
}

VISE_CLONES void of_float(const Rotation& r, void* out, std::int64_t first, std::int64_t last) {
    stretch<float>(r, out, first, last);
}
VISE_CLONES void of_brain(const Rotation& r, void* out, std::int64_t first, std::int64_t last) {
    stretch<Brain>(r, out, first, last);
}

}  // namespace

void rotate(const Rotation& rotation, void* out, int threads) {
    for_each_stretch(rotation.rows, threads, [&](std::int64_t first, std::int64_t last) {
        rotation.brain ? of_brain(rotation, out, first, last)
                       : of_float(rotation, out, first, last);
    });
}

}  // namespace vise
