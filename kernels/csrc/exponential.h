// exp of what is not above zero, in loops that the compiler vectorises.
#pragma once

#include <cstdint>

#include "brain.h"
#include "lanes.h"

namespace vise {

// z cut off at -87, below which exp(z) is subnormal; nan stays nan.
VISE_INLINE float cut(float z) { return z < -87.0f ? -87.0f : z; }

// exp of -87 <= z <= 0; nan for nan. 2^n exp(r), n the nearest integer to z / ln 2, exp(r) a
// polynomial fitted on +-ln 2 / 2 for the smallest relative error (2e-9). The error of n ln 2 in
// one float grows with n, as exp(-n) falls.
VISE_INLINE float exp_negative(float z) {
    // 1.5 * 2^23 + 127: the low bits are n + 127
    const float shifted = z * 1.44269504088896341f + 12583039.0f;
    const float r = z - (shifted - 12583039.0f) * 0.693147180559945309f;
    float p = r * 1.3843653e-3f + 8.374155317e-3f;
    p = p * r + 4.1668002036e-2f;
    p = p * r + 1.66664312625e-1f;
    p = p * r + 4.99999942090e-1f;
    p = p * r + 1.00000003217f;
    p = p * r + 1.0f;
    return p * bits_as<float>(bits_as<std::uint32_t>(shifted) << 23);
}

}  // namespace vise
