#include "resize.h"

#include <algorithm>

#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

constexpr int kRows = 4;  // rows squeezed together: 4 x (red, green, blue, nothing) fill the sixteen lanes

struct Scratch {
    Buffer<uint8_t> bytes;
    Buffer<Block> pixels, sums;  // of four rows
    Buffer<float> total;         // of one output row
    Buffer<uint8_t> squeezed;    // (height, out_width, 3)
};

// pixels[x] = pixel x of four rows; missing rows repeat the last.
struct GatherPixels {
    template <int W>
    VISE_INLINE void operator()(const uint8_t* source, int rows, int width, uint8_t* bytes, Block* pixels) const {
        for (int r = 0; r < kRows; ++r) {
            const uint8_t* row = source + 3 * static_cast<std::ptrdiff_t>(std::min(r, rows - 1)) * width;
            for (int x = 0; x < width; ++x) std::memcpy(bytes + x * kLanes + 4 * r, row + 3 * x, 3);
        }
        to_floats(bytes, static_cast<std::ptrdiff_t>(width) * kLanes, pixels->lane);
    }
};

struct Squeeze {
    template <int W>
    VISE_INLINE void operator()(const Block* pixels, const Axis* axis, int out_width, Block* sums) const {
        for (int x = 0; x < out_width; ++x) {
            const Block* from = pixels + axis->first[x];
            const float* weight = axis->weight + static_cast<std::ptrdiff_t>(x) * axis->width;
            Vector<W> sum[kLanes / W] = {};
            for (int t = 0; t < axis->width; ++t)
                for (int part = 0; part < kLanes / W; ++part) sum[part] += weight[t] * get<W>(from[t], part);
            for (int part = 0; part < kLanes / W; ++part) put<W>(sums[x], part, sum[part]);
        }
    }
};

struct PutPixels {
    template <int W>
    VISE_INLINE void operator()(const Block* sums, int rows, int width, uint8_t* bytes, uint8_t* out) const {
        to_bytes(sums->lane, static_cast<std::ptrdiff_t>(width) * kLanes, bytes);
        for (int r = 0; r < rows; ++r) {
            uint8_t* row = out + 3 * static_cast<std::ptrdiff_t>(r) * width;
            for (int x = 0; x < width; ++x) std::memcpy(row + 3 * x, bytes + x * kLanes + 4 * r, 3);
        }
    }
};

// One output row from the `count` rows it needs, two at a time.
struct Stack {
    template <int W>
    VISE_INLINE void operator()(const uint8_t* rows, std::ptrdiff_t stride, const float* weight, int count, float* total, uint8_t* out) const {
        std::fill_n(total, stride, 0.0f);
        for (int t = 0; t < count; t += 2) {
            const uint8_t* upper = rows + t * stride;
            const uint8_t* lower = t + 1 < count ? upper + stride : upper;
            const float a = weight[t], b = t + 1 < count ? weight[t + 1] : 0.0f;
            for (std::ptrdiff_t j = 0; j < stride; ++j) total[j] += a * upper[j] + b * lower[j];
        }
        to_bytes(total, stride, out);
    }
};

void run(const ResizeJob& job, Scratch& scratch) {
    const std::ptrdiff_t in_stride = 3 * static_cast<std::ptrdiff_t>(job.width), stride = 3 * static_cast<std::ptrdiff_t>(job.out_width);
    Block *pixels = scratch.pixels.at_least(job.width), *sums = scratch.sums.at_least(job.out_width);
    uint8_t* bytes = scratch.bytes.at_least(static_cast<std::size_t>(kLanes) * std::max(job.width, job.out_width));
    uint8_t* squeezed = scratch.squeezed.at_least(job.height * stride);
    std::fill_n(bytes, static_cast<std::size_t>(kLanes) * job.width, uint8_t{0});  // the unused fourth channel
    for (int y = 0; y < job.height; y += kRows) {
        const int rows = std::min(kRows, job.height - y);
        widest(GatherPixels{}, job.source + y * in_stride, rows, job.width, bytes, pixels);
        widest(Squeeze{}, pixels, &job.across, job.out_width, sums);
        widest(PutPixels{}, sums, rows, job.out_width, bytes, squeezed + y * stride);
    }
    float* total = scratch.total.at_least(stride);
    for (int y = 0; y < job.out_height; ++y)
        widest(Stack{}, squeezed + job.down.first[y] * stride, stride, job.down.weight + static_cast<std::ptrdiff_t>(y) * job.down.width,
               job.down.width, total, job.out + y * stride);
}

}  // namespace

void resize(const std::vector<ResizeJob>& jobs, int threads) {
    for_each_parallel<Scratch>(jobs.size(), threads, [&](std::size_t i, Scratch& scratch) { run(jobs[i], scratch); });
}

}  // namespace vise
