// A Gaussian of a rectangle in constant time per pixel, whatever its radius.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lanes.h"

namespace vise {

// A symmetric kernel of 2 radius + 1 taps: g(d) = sum_k amplitude[k] cos(frequency[k] d), with
// frequency[0] = 0.
struct Cosines {
    int radius;
    std::vector<double> frequency;
    std::vector<double> amplitude;
};

struct BlurScratch {
    Buffer<Block> strip, sum;  // sixteen rows or columns side by side: input, output
    Buffer<Block> turned;      // between the two passes: strips of sixteen columns
    Buffer<uint8_t> bytes;     // of the same sixteen
    Buffer<int> mirror;
};

// A rectangle of an interleaved (rows, columns, 3) image; rows are `stride` bytes apart.
struct Rectangle {
    const uint8_t* source;
    uint8_t* out;
    std::ptrdiff_t stride;
    int height, width;
};

// out = source blurred along both axes, each continued at the rectangle's edges by reflection that
// does not repeat the edge (101), rounded to the nearest grey level.
void blur(const Rectangle& rectangle, const Cosines& kernel, BlurScratch& scratch);

}  // namespace vise
