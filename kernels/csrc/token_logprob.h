// Log-prob, log-sum-exp and entropy of rows of logits, and their gradient. Pointers and sizes only.
#pragma once

#include <cstdint>

namespace vise {

enum class Logits { float32, bfloat16 };

// rows x columns logits, `stride` elements from row to row; outputs are (rows,) float32.
// Every id must lie in 0..columns-1: the caller checks. `threads` >= 1.
void token_logprob_forward(const void* logits, Logits type, std::int64_t rows, std::int64_t columns,
                           std::int64_t stride, const std::int64_t* ids, float* logprob,
                           float* logsumexp, float* entropy, int threads);

// grad (rows x columns, contiguous, same type as logits) from the gradients of the three outputs,
// each (rows,) float32.
void token_logprob_backward(const void* logits, Logits type, std::int64_t rows,
                            std::int64_t columns, std::int64_t stride, const std::int64_t* ids,
                            const float* logsumexp, const float* entropy, const float* grad_logprob,
                            const float* grad_logsumexp, const float* grad_entropy, void* grad,
                            int threads);

}  // namespace vise
