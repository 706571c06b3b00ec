// Ghosting on the CPU: a rectangle's ghost (blur, mean, pixelate), blended into an image's copy.
#pragma once

#include <cstdint>
#include <vector>

#include "blur.h"

namespace vise {

enum class Ghosting { kBlur, kMean, kPixelate };

struct GhostJob {
    const uint8_t* source;  // (height, width, 3)
    uint8_t* out;           // the same shape
    int height, width;
    int x1, y1, x2, y2;     // half-open box within the image, possibly empty
    int cell;               // pixelate: side of a cell in pixels
    const Cosines* kernel;  // blur
};

// `feather`: width of the soft edge in pixels, 0 for a hard one. `outside`: ghost everything but
// the box.
void ghost(const std::vector<GhostJob>& jobs, Ghosting method, float feather, bool outside,
           int threads);

}  // namespace vise
