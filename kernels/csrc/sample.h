// One draw per row of logits by the Gumbel-max rule; the formula and the generator stand in
// vise_kernels/sample.py.
#pragma once

#include <cstdint>

namespace vise {

// rows x columns float32 logits, `stride` elements from row to row, minus infinity where an id is
// banned. temperature, seed and position are (rows,); temperature 0 takes the largest logit. ids
// (rows,) is written. `threads` >= 1.
void sample(const float* logits, std::int64_t rows, std::int64_t columns, std::int64_t stride,
            const float* temperature, const std::int64_t* seed, const std::int64_t* position,
            std::int64_t* ids, int threads);

}  // namespace vise
