// silu(gate) · up and its gradient; the formulas stand in vise_kernels/swiglu.py. Everything
// contiguous, float32 or, with `brain`, bfloat16.
#pragma once

#include <cstdint>

namespace vise {

// z (rows, width) from x (rows, 2 width), gate and up side by side.
void swiglu(const void* x, std::int64_t rows, std::int64_t width, void* z, bool brain, int threads);

// dL/dx (rows, 2 width) from x and dL/dz (rows, width).
void swiglu_backward(const void* x, const void* dz, std::int64_t rows, std::int64_t width, void* dx,
                     bool brain, int threads);

}  // namespace vise
