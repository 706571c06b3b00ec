// The loops are vectorised by the compiler.

#include "swiglu.h"

#include "brain.h"
#include "exponential.h"
#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

// 1 / (1 + exp(-gate)); zero where it would be subnormal, nan for nan.
VISE_INLINE float sigmoid(float gate) {
    const float below = gate < 0.0f ? gate : -gate;
    const float whole = exp_negative(cut(below));
    const float share = below < -87.0f ? 0.0f : whole;
    return (gate < 0.0f ? share : 1.0f) / (1.0f + share);
}

struct Rows {
    const void *x, *dz;
    std::int64_t width;
    void* out;
};

template <class T>
VISE_INLINE void forward(const Rows& rows, std::int64_t first, std::int64_t last) {
    const std::int64_t width = rows.width;
    for (std::int64_t row = first; row < last; ++row) {
        const T* gate = static_cast<const T*>(rows.x) + 2 * row * width;
        const T* up = gate + width;
        T* z = static_cast<T*>(rows.out) + row * width;
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i)
            store(z[i], load(gate[i]) * sigmoid(load(gate[i])) * load(up[i]));
    }
}

template <class T>
VISE_INLINE void backward(const Rows& rows, std::int64_t first, std::int64_t last) {
    const std::int64_t width = rows.width;
    for (std::int64_t row = first; row < last; ++row) {
        const T* gate = static_cast<const T*>(rows.x) + 2 * row * width;
        const T* up = gate + width;
        const T* dz = static_cast<const T*>(rows.dz) + row * width;
        T* dgate = static_cast<T*>(rows.out) + 2 * row * width;
        T* dup = dgate + width;
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i) {
            const float g = load(gate[i]), share = sigmoid(g), grad = load(dz[i]);
            store(dgate[i], grad * load(up[i]) * share * (1.0f + g * (1.0f - share)));
            store(dup[i], grad * g * share);
        }
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

void swiglu(const void* x, std::int64_t rows, std::int64_t width, void* z, bool brain,
            int threads) {
    const Rows task{x, nullptr, width, z};
    for_each_stretch(rows, threads, [&](std::int64_t first, std::int64_t last) {
        brain ? forward_brain(task, first, last) : forward_float(task, first, last);
    });
}

void swiglu_backward(const void* x, const void* dz, std::int64_t rows, std::int64_t width, void* dx,
                     bool brain, int threads) {
    const Rows task{x, dz, width, dx};
    for_each_stretch(rows, threads, [&](std::int64_t first, std::int64_t last) {
        brain ? backward_brain(task, first, last) : backward_float(task, first, last);
    });
}

}  // namespace vise
