// Head by head: each is read twice, the second time from the nearest cache. The loops are
// vectorised by the compiler.

#include "heads.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "brain.h"
#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

// One head's rotation: cos and sin of `half` angles, and the norm's weight.
template <class T>
struct Turn {
    const T* weight;
    const float *cos, *sin;
    std::int64_t half;
    float eps;
};

struct Places {
    const void *qkv, *dq, *dk, *dv;
    void *q, *k, *dqkv;
};

template <class T>
VISE_INLINE float inverse_of(const Turn<T>& turn, const T* x) {
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (std::int64_t i = 0; i < 2 * turn.half; ++i) squares += load(x[i]) * load(x[i]);
    return 1.0f / std::sqrt(squares / float(2 * turn.half) + turn.eps);
}

template <class T>
VISE_INLINE void forward(const Turn<T>& turn, const T* x, T* out) {
    const std::int64_t half = turn.half;
    const T* weight = turn.weight;
    const float *cos = turn.cos, *sin = turn.sin;
    const float inverse = inverse_of(turn, x);
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
        const float low = load(x[i]) * inverse * load(weight[i]);
        const float high = load(x[i + half]) * inverse * load(weight[i + half]);
        store(out[i], low * cos[i] - high * sin[i]);
        store(out[i + half], high * cos[i] + low * sin[i]);
    }
}

// Turned back by the same angle, then through the norm. `held` (2 half,): the gradient in between.
template <class T>
VISE_INLINE void backward(const Turn<T>& turn, const T* x, const T* grad, float* held, T* out) {
    const std::int64_t half = turn.half;
    const T* weight = turn.weight;
    const float *cos = turn.cos, *sin = turn.sin;
    const float inverse = inverse_of(turn, x);
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (std::int64_t i = 0; i < half; ++i) {
        const float g_low = load(grad[i]), g_high = load(grad[i + half]);
        const float low = (g_low * cos[i] + g_high * sin[i]) * load(weight[i]);
        const float high = (g_high * cos[i] - g_low * sin[i]) * load(weight[i + half]);
        along += low * load(x[i]) + high * load(x[i + half]);
        held[i] = low;
        held[i + half] = high;
    }
    const float share = along * inverse * inverse / float(2 * half);
#pragma omp simd
    for (std::int64_t i = 0; i < 2 * half; ++i)
        store(out[i], (held[i] - load(x[i]) * share) * inverse);
}

template <class T>
VISE_INLINE Turn<T> turn_of(const Heads& h, std::int64_t row, const void* weight) {
    return {static_cast<const T*>(weight), h.cos + row * h.half, h.sin + row * h.half, h.half,
            h.eps};
}

template <class T>
VISE_INLINE void split(const Heads& h, const Places& p, std::int64_t first, std::int64_t last) {
    const std::int64_t dim = 2 * h.half;
    T *q = static_cast<T*>(p.q), *k = static_cast<T*>(p.k);
    for (std::int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(p.qkv) + row * (h.queries + 2 * h.keys) * dim;
        const Turn<T> of_q = turn_of<T>(h, row, h.q_weight), of_k = turn_of<T>(h, row, h.k_weight);
        for (std::int64_t head = 0; head < h.queries; ++head)
            forward(of_q, x + head * dim, q + (row * h.queries + head) * dim);
        x += h.queries * dim;
        for (std::int64_t head = 0; head < h.keys; ++head)
            forward(of_k, x + head * dim, k + (row * h.keys + head) * dim);
    }
}

template <class T>
VISE_INLINE void join(const Heads& h, const Places& p, std::int64_t first, std::int64_t last,
                      float* held) {
    const std::int64_t dim = 2 * h.half, width = (h.queries + 2 * h.keys) * dim;
    const T* dq = static_cast<const T*>(p.dq);
    const T* dk = static_cast<const T*>(p.dk);
    const T* dv = static_cast<const T*>(p.dv);
    for (std::int64_t row = first; row < last; ++row) {
        const T* x = static_cast<const T*>(p.qkv) + row * width;
        T* dx = static_cast<T*>(p.dqkv) + row * width;
        const Turn<T> of_q = turn_of<T>(h, row, h.q_weight), of_k = turn_of<T>(h, row, h.k_weight);
        for (std::int64_t head = 0; head < h.queries; ++head)
            backward(of_q, x + head * dim, dq + (row * h.queries + head) * dim, held,
                     dx + head * dim);
        x += h.queries * dim;
        dx += h.queries * dim;
        for (std::int64_t head = 0; head < h.keys; ++head)
            backward(of_k, x + head * dim, dk + (row * h.keys + head) * dim, held, dx + head * dim);
        std::memcpy(dx + h.keys * dim, dv + row * h.keys * dim, h.keys * dim * sizeof(T));
    }
}

VISE_CLONES void split_float(const Heads& h, const Places& p, std::int64_t first,
                             std::int64_t last) {
    split<float>(h, p, first, last);
}
VISE_CLONES void split_brain(const Heads& h, const Places& p, std::int64_t first,
                             std::int64_t last) {
    split<Brain>(h, p, first, last);
}
VISE_CLONES void join_float(const Heads& h, const Places& p, std::int64_t first, std::int64_t last,
                            float* held) {
    join<float>(h, p, first, last, held);
}
VISE_CLONES void join_brain(const Heads& h, const Places& p, std::int64_t first, std::int64_t last,
                            float* held) {
    join<Brain>(h, p, first, last, held);
}

}  // namespace

void heads(const Heads& heads, const void* qkv, void* q, void* k, int threads) {
    const Places places{qkv, nullptr, nullptr, nullptr, q, k, nullptr};
    for_each_stretch(heads.rows, threads, [&](std::int64_t first, std::int64_t last) {
        heads.brain ? split_brain(heads, places, first, last)
                    : split_float(heads, places, first, last);
    });
}

void heads_backward(const Heads& heads, const void* qkv, const void* dq, const void* dk,
                    const void* dv, void* dqkv, int threads) {
    const Places places{qkv, dq, dk, dv, nullptr, nullptr, dqkv};
    for_each_stretch(heads.rows, threads, [&](std::int64_t first, std::int64_t last) {
        std::vector<float> held(2 * heads.half);
        heads.brain ? join_brain(heads, places, first, last, held.data())
                    : join_float(heads, places, first, last, held.data());
    });
}

}  // namespace vise
