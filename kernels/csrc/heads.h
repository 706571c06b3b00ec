// Queries and keys out of one product, normed and rotated, and back; the formulas stand in
// vise_kernels/heads.py.
#pragma once

#include <cstdint>

namespace vise {

// Rows of `queries` + 2 · `keys` heads of 2 · `half` numbers. Everything contiguous, float32 or,
// with `brain`, bfloat16 but for cos and sin.
struct Heads {
    std::int64_t rows, queries, keys, half;
    const void *q_weight, *k_weight;  // (2 half,)
    const float *cos, *sin;           // (rows, half)
    float eps;
    bool brain;
};

// q (rows, queries, 2 half) and k (rows, keys, 2 half) from qkv (rows, queries + 2 keys, 2 half).
void heads(const Heads& heads, const void* qkv, void* q, void* k, int threads);

// dL/dqkv from qkv and dL/dq, dL/dk, dL/dv.
void heads_backward(const Heads& heads, const void* qkv, const void* dq, const void* dk,
                    const void* dv, void* dqkv, int threads);

}  // namespace vise
