// Attention of new tokens over several banks of keys that rows share; the formula stands in
// vise_kernels/attention.py. Everything float32.
#pragma once

#include <cstdint>
#include <vector>

namespace vise {

// Keys and values (entries, kv_heads, tokens, dim), `dim` contiguous, the other strides in floats.
// Row n sees entry owner[n] (null: entry n), and of that its first length[entry] tokens (null:
// all). causal: token t of a row sees tokens 0..t.
struct Bank {
    const float *keys, *values;
    std::int64_t tokens;
    std::int64_t key_entry, key_head, key_token, value_entry, value_head, value_token;
    const std::int64_t *owner, *length;
    bool causal;
};

struct Attention {
    const float* q;  // (rows, tokens, heads, dim), contiguous
    std::int64_t rows, tokens, heads, kv_heads, dim;
    float scale;
};

constexpr int kDimStep = 16;  // dim is a multiple of this

// out (rows, tokens, heads, dim) and its log-sum-exp (rows, tokens, heads).
void attention(const Attention& task, const std::vector<Bank>& banks, float* out, float* lse,
               int threads);

}  // namespace vise
