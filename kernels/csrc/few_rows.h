// The product of a few rows and a large weight, at the speed of reading the weight; the formula
// stands in vise_kernels/few_rows.py.
#pragma once

#include <cstdint>

namespace vise {

// y (rows, outs) = x (rows, width) times weight (outs, width), plus low (rows, rank) times up
// (outs, rank) unless rank is 0, plus bias (outs,) unless null. All float32 and contiguous. One
// thread.
void few_rows(const float* x, std::int64_t rows, std::int64_t width, const float* weight,
              std::int64_t outs, const float* bias, const float* low, std::int64_t rank,
              const float* up, float* y);

}  // namespace vise
