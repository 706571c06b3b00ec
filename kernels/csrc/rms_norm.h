// RMS norm of rows and its gradient; the formulas stand in vise_kernels/rms_norm.py. Everything float32 and contiguous.
#pragma once

#include <cstdint>

namespace vise {

// z (rows, width) from x (rows, width) and weight (width,).
void rms_norm(const float *x, const float *weight, std::int64_t rows, std::int64_t width, float eps, float *z, int threads);

// dL/dx (rows, width) from x and dL/dz.
void rms_norm_backward(const float *x, const float *weight, const float *dz, std::int64_t rows, std::int64_t width, float eps, float *dx, int threads);

}  // namespace vise
