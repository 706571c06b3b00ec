// Antialiased separable resizing of uint8 images on the CPU.
#pragma once

#include <cstdint>
#include <vector>

namespace vise {

// Output i of an axis is the sum over t < width of weight[i * width + t] * input[first[i] + t].
struct Axis {
    int width;
    const int64_t* first;  // (outputs,)
    const float* weight;   // (outputs, width), zero where a row needs fewer
};

struct ResizeJob {
    const uint8_t* source;  // (height, width, 3)
    uint8_t* out;           // (out_height, out_width, 3)
    int height, width, out_height, out_width;
    Axis across, down;
    bool down_first;
};

// One axis after the other, rounded and clipped to bytes in between: the order decides where
// overshoot is cut.
void resize(const std::vector<ResizeJob>& jobs, int threads);

}  // namespace vise
