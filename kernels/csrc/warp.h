// Bilinear warps of uint8 images on the CPU.
#pragma once

#include <cstdint>
#include <vector>

namespace vise {

struct WarpJob {
    const uint8_t* source;  // (height, width, 3)
    uint8_t* out;           // the same shape
    int height, width;
    double inverse[9];      // view -> source, continuous pixel coordinates (a pixel's centre is at +0.5)
};

// out(p) = bilinear sample of source at inverse(p); taps outside the source have the value `fill`.
void warp(const std::vector<WarpJob>& jobs, float fill, int threads);

}  // namespace vise
