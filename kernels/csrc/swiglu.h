// silu(gate) · up and its gradient; the formulas stand in vise_kernels/swiglu.py. Everything float32 and contiguous.
#pragma once

#include <cstdint>

namespace vise {

// z (rows, width) from x (rows, 2 width), gate and up side by side.
void swiglu(const float *x, std::int64_t rows, std::int64_t width, float *z, int threads);

// dL/dx (rows, 2 width) from x and dL/dz (rows, width).
void swiglu_backward(const float *x, const float *dz, std::int64_t rows, std::int64_t width, float *dx, int threads);

}  // namespace vise
