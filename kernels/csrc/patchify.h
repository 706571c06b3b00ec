// uint8 images to rows of normalised patches on the CPU.
#pragma once

#include <cstdint>
#include <vector>

namespace vise {

struct PatchJob {
    const uint8_t* source;  // (height, width, 3), both multiples of patch * merge
    void* out;              // (height / patch * width / patch, 3 * taps * patch * patch)
    int height, width;
    const double* inverse;  // view -> source of the warp it is seen through (warp.h), or null
};

// Rows in merge order (each merge x merge square of patches stays together), a row's values in the
// order channel, tap, y, x. A warped image never exists as a whole: patch * merge rows of it at a
// time, with `fill` around the source. `table` (3, 256) holds the value of each byte of each
// channel, `bytes` (2 or 4) the size of one value.
void patchify(const std::vector<PatchJob>& jobs, const void* table, int bytes, int patch, int merge,
              int taps, float fill, int threads);

}  // namespace vise
