// RMS norm of rows and its gradient; the formulas stand in vise_kernels/rms_norm.py. Everything
// contiguous, float32 or, with `brain`, bfloat16.
#pragma once

#include <cstdint>

namespace vise {

// z (rows, width) from x (rows, width) and weight (width,).
void rms_norm(const void* x, const void* weight, std::int64_t rows, std::int64_t width, float eps,
              void* z, bool brain, int threads);

// dL/dx (rows, width) from x and dL/dz.
void rms_norm_backward(const void* x, const void* weight, const void* dz, std::int64_t rows,
                       std::int64_t width, float eps, void* dx, bool brain, int threads);

}  // namespace vise
