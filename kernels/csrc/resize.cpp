#include "resize.h"

#include <algorithm>

#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

// rows squeezed together: 4 x (red, green, blue, nothing) fill the sixteen lanes
constexpr int kRows = 4;

struct Scratch {
    Buffer<uint8_t> bytes;
    Buffer<Block> pixels, sums;  // of four rows
    Buffer<float> total;         // of one output row
    Buffer<uint8_t> between;     // after the first axis
};

// pixels[x] = pixel x of four rows; missing rows repeat the last.
struct GatherPixels {
    template <int W>
    VISE_INLINE void operator()(const uint8_t* source, int rows, int width, uint8_t* bytes,
                                Block* pixels) const {
        for (int r = 0; r < kRows; ++r) {
            const uint8_t* row =
                source + 3 * static_cast<std::ptrdiff_t>(std::min(r, rows - 1)) * width;
            widen_pixels(row, width, kLanes, bytes + 4 * r);
        }
        to_floats(bytes, static_cast<std::ptrdiff_t>(width) * kLanes, pixels->lane);
    }
};

struct Squeeze {
    template <int W>
    VISE_INLINE void operator()(const Block* pixels, const Axis* axis, int out_width,
                                Block* sums) const {
        for (int x = 0; x < out_width; ++x) {
            const Block* from = pixels + axis->first[x];
            const float* weight = axis->weight + static_cast<std::ptrdiff_t>(x) * axis->width;
            Vector<W> sum[kLanes / W] = {};
            for (int t = 0; t < axis->width; ++t)
                for (int part = 0; part < kLanes / W; ++part)
                    sum[part] += weight[t] * get<W>(from[t], part);
            for (int part = 0; part < kLanes / W; ++part) put<W>(sums[x], part, sum[part]);
        }
    }
};

struct PutPixels {
    template <int W>
    VISE_INLINE void operator()(const Block* sums, int rows, int width, uint8_t* bytes,
                                uint8_t* out) const {
        to_bytes(sums->lane, static_cast<std::ptrdiff_t>(width) * kLanes, bytes);
        for (int r = 0; r < rows; ++r) {
            narrow_pixels(bytes + 4 * r, width, kLanes,
                          out + 3 * static_cast<std::ptrdiff_t>(r) * width);
        }
    }
};

// One output row from the `count` rows it needs, two at a time.
struct Stack {
    template <int W>
    VISE_INLINE void operator()(const uint8_t* rows, std::ptrdiff_t stride, const float* weight,
                                int count, float* __restrict total, uint8_t* out) const {
        std::fill_n(total, stride, 0.0f);
        for (int t = 0; t < count; t += 2) {
            const uint8_t* __restrict upper = rows + t * stride;
            const uint8_t* __restrict lower = t + 1 < count ? upper + stride : upper;
            const float a = weight[t], b = t + 1 < count ? weight[t + 1] : 0.0f;
            for (std::ptrdiff_t j = 0; j < stride; ++j) total[j] += a * upper[j] + b * lower[j];
        }
        to_bytes(total, stride, out);
    }
};

std::ptrdiff_t row_bytes(int width) { return 3 * static_cast<std::ptrdiff_t>(width); }

void squeeze(const uint8_t* source, int height, int width, const Axis& axis, int out_width,
             Scratch& scratch, uint8_t* out) {
    Block *pixels = scratch.pixels.at_least(width), *sums = scratch.sums.at_least(out_width);
    const std::size_t most = static_cast<std::size_t>(kLanes) * std::max(width, out_width);
    uint8_t* bytes = scratch.bytes.at_least(most);
    std::fill_n(bytes, most, uint8_t{0});  // the unused fourth channel
    for (int y = 0; y < height; y += kRows) {
        const int rows = std::min(kRows, height - y);
        widest(GatherPixels{}, source + y * row_bytes(width), rows, width, bytes, pixels);
        widest(Squeeze{}, pixels, &axis, out_width, sums);
        widest(PutPixels{}, sums, rows, out_width, bytes, out + y * row_bytes(out_width));
    }
}

void stack(const uint8_t* source, int width, const Axis& axis, int out_height, Scratch& scratch,
           uint8_t* out) {
    const std::ptrdiff_t stride = row_bytes(width);
    float* total = scratch.total.at_least(stride);
    for (int y = 0; y < out_height; ++y)
        widest(Stack{}, source + axis.first[y] * stride, stride,
               axis.weight + static_cast<std::ptrdiff_t>(y) * axis.width, axis.width, total,
               out + y * stride);
}

void run(const ResizeJob& job, Scratch& scratch) {
    if (job.out_width == job.width && job.out_height == job.height) {
        std::memcpy(job.out, job.source, job.height * row_bytes(job.width));
    } else if (job.out_width == job.width) {
        stack(job.source, job.width, job.down, job.out_height, scratch, job.out);
    } else if (job.out_height == job.height) {
        squeeze(job.source, job.height, job.width, job.across, job.out_width, scratch, job.out);
    } else if (job.down_first) {
        uint8_t* between = scratch.between.at_least(job.out_height * row_bytes(job.width));
        stack(job.source, job.width, job.down, job.out_height, scratch, between);
        squeeze(between, job.out_height, job.width, job.across, job.out_width, scratch, job.out);
    } else {
        uint8_t* between = scratch.between.at_least(job.height * row_bytes(job.out_width));
        squeeze(job.source, job.height, job.width, job.across, job.out_width, scratch, between);
        stack(between, job.out_width, job.down, job.out_height, scratch, job.out);
    }
}

}  // namespace

void resize(const std::vector<ResizeJob>& jobs, int threads) {
    for_each_parallel<Scratch>(jobs.size(), threads,
                               [&](std::size_t i, Scratch& scratch) { run(jobs[i], scratch); });
}

}  // namespace vise
