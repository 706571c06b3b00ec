#include "warp.h"

#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "parallel.h"

namespace vise {
namespace {

// One row of pixels, four values each, between one pixel of `fill` and two.
struct PadRow {
    template <int W>
    VISE_INLINE void operator()(const uint8_t* source, int width, float fill, uint8_t* bytes,
                                float* padded) const {
        std::fill_n(padded, 4, fill);
        widen_pixels(source, width, 4, bytes);
        to_floats(bytes, 4 * static_cast<std::ptrdiff_t>(width), padded + 4);
        std::fill_n(padded + 4 * (width + 1), 8, fill);
    }
};

// Where a row's pixels are sampled: the pixel of the padded source up and left of the point, and
// the way from it.
struct Locate {
    template <int W>
    VISE_INLINE void operator()(const WarpJob* shared, int y, int* corner, float* across,
                                float* down) const {
        const WarpJob job = *shared;  // a copy, so that no store below can change it
        const double* m = job.inverse;
        const double py = y + 0.5;
        if (m[6] == 0 && m[7] == 0)
            for (int x = 0; x < job.width; ++x) locate(job, x, py, 1 / m[8], corner, across, down);
        else
            for (int x = 0; x < job.width; ++x)
                locate(job, x, py, 1 / (m[6] * (x + 0.5) + m[7] * py + m[8]), corner, across, down);
    }

    VISE_INLINE static void locate(const WarpJob& job, int x, double py, double nearness,
                                   int* corner, float* across, float* down) {
        const double* m = job.inverse;
        const double px = x + 0.5, right = job.width, low = job.height;
        const double u = (m[0] * px + m[1] * py + m[2]) * nearness - 0.5;
        const double v = (m[3] * px + m[4] * py + m[5]) * nearness - 0.5;
        // far points, and nan for points at infinity, land where all four samples are `fill`; + 1
        // for the border
        const double cu = (u > -1 ? (u < right ? u : right) : -1) + 1;
        const double cv = (v > -1 ? (v < low ? v : low) : -1) + 1;
        const int cx = static_cast<int>(cu), cy = static_cast<int>(cv);
        corner[x] = cy * (job.width + 3) + cx;
        across[x] = static_cast<float>(cu - cx);
        down[x] = static_cast<float>(cv - cy);
    }
};

struct Sample {
    template <int W>
    VISE_INLINE void operator()(const float* padded, std::ptrdiff_t stride, const int* corner,
                                const float* across, const float* down, int width, float* row,
                                uint8_t* bytes, uint8_t* out) const {
        for (int x = 0; x < width; ++x) {
            const float* at = padded + 4 * static_cast<std::ptrdiff_t>(corner[x]);
            Vector<4> tap[4];
            std::memcpy(&tap[0], at, 2 * sizeof tap[0]);
            std::memcpy(&tap[2], at + stride, 2 * sizeof tap[0]);
            const Vector<4> upper = tap[0] + across[x] * (tap[1] - tap[0]);
            const Vector<4> lower = tap[2] + across[x] * (tap[3] - tap[2]);
            const Vector<4> value = upper + down[x] * (lower - upper);
            std::memcpy(row + 4 * x, &value, sizeof value);
        }
        to_bytes(row, 4 * static_cast<std::ptrdiff_t>(width), bytes);
        narrow_pixels(bytes, width, 4, out);
    }
};

}  // namespace

void Warper::begin(const WarpJob& job, float fill) {
    job_ = job;
    const std::ptrdiff_t stride = padded_row();
    float* padded = padded_.at_least((job.height + 3) * stride);
    uint8_t* bytes = bytes_.at_least(4 * static_cast<std::size_t>(job.width));
    std::fill_n(bytes, 4 * static_cast<std::size_t>(job.width), uint8_t{0});
    std::fill_n(padded, stride, fill);
    for (int y = 0; y < job.height; ++y)
        widest(PadRow{}, job.source + 3 * static_cast<std::ptrdiff_t>(y) * job.width, job.width,
               fill, bytes, padded + (y + 1) * stride);
    std::fill_n(padded + (job.height + 1) * stride, 2 * stride, fill);
}

void Warper::row(int y, uint8_t* out) {
    float* across = across_.at_least(job_.width);
    float* down = down_.at_least(job_.width);
    int* corner = corner_.at_least(job_.width);
    widest(Locate{}, &job_, y, corner, across, down);
    widest(Sample{}, padded_.at_least(0), padded_row(), corner, across, down, job_.width,
           row_.at_least(4 * job_.width), bytes_.at_least(0), out);
}

void warp(const std::vector<WarpJob>& jobs, float fill, int threads) {
    for_each_parallel<Warper>(jobs.size(), threads, [&](std::size_t i, Warper& warper) {
        warper.begin(jobs[i], fill);
        for (int y = 0; y < jobs[i].height; ++y)
            warper.row(y, jobs[i].out + 3 * static_cast<std::ptrdiff_t>(y) * jobs[i].width);
    });
}

}  // namespace vise
