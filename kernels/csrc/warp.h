// Bilinear warps of uint8 images on the CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "lanes.h"

namespace vise {

struct WarpJob {
    const uint8_t* source;  // (height, width, 3)
    uint8_t* out;           // the same shape
    int height, width;
    // view -> source, continuous pixel coordinates (a pixel's centre is at +0.5)
    double inverse[9];
};

// One image's warp, row by row: out(p) = bilinear sample of source at inverse(p); taps outside the
// source have the value `fill`. Holds its scratch, which the next image uses again.
class Warper {
public:
    // Makes ready for the rows of `job`, whose source must outlive them; `job.out` is not looked
    // at.
    void begin(const WarpJob& job, float fill);
    // Row y of the view, 3 * width bytes.
    void row(int y, uint8_t* out);

private:
    std::ptrdiff_t padded_row() const { return 4 * static_cast<std::ptrdiff_t>(job_.width + 3); }

    WarpJob job_;
    Buffer<uint8_t> bytes_;
    // (height + 3, width + 3, 4): a border of `fill`, so that every sample exists
    Buffer<float> padded_;
    Buffer<float> across_, down_, row_;
    Buffer<int> corner_;
};

void warp(const std::vector<WarpJob>& jobs, float fill, int threads);

}  // namespace vise
