// bfloat16 beside float32, in loops that the compiler vectorises: float32 within, rounded once.
#pragma once

#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace vise {

template <class To, class From>
VISE_INLINE To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct Brain {  // bfloat16: the upper half of a float32
    std::uint16_t bits;
};

VISE_INLINE float load(float from) { return from; }

VISE_INLINE float load(Brain from) { return bits_as<float>(std::uint32_t{from.bits} << 16); }

VISE_INLINE void store(float& to, float value) { to = value; }

VISE_INLINE void store(Brain& to, float value) {
    const std::uint32_t bits = bits_as<std::uint32_t>(value);
    const std::uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);  // to nearest, ties to even
    // a nan must not round to infinity
    to.bits = std::uint16_t((value == value ? rounded : bits | 0x00400000u) >> 16);
}

}  // namespace vise
