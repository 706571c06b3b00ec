// Rotary embedding of heads that lie side by side; the formula stands in vise_kernels/rotate.py.
#pragma once

#include <cstdint>

namespace vise {

// Rows of `heads` heads of 2 · `half` numbers, float32 or, with `brain`, bfloat16; rows of x begin
// `row_stride` numbers apart, its heads `head_stride`.
struct Rotation {
    const void* x;
    std::int64_t rows, heads, half, row_stride, head_stride;
    const float *cos, *sin;  // (rows, half)
    bool brain;
};

// out (rows, heads, 2 half), contiguous.
void rotate(const Rotation& rotation, void* out, int threads);

}  // namespace vise
