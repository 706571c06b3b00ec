#include "warp.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace vise {
namespace {

struct None {};

uint8_t to_byte(float value) { return static_cast<uint8_t>(value + 0.5f); }

struct Taps {
    float weight[4];  // top left, top right, bottom left, bottom right
};

Taps bilinear(float dx, float dy) { return {{(1 - dx) * (1 - dy), dx * (1 - dy), (1 - dx) * dy, dx * dy}}; }

// All four taps inside.
void sample_inner(const uint8_t* corner, std::ptrdiff_t stride, const Taps& taps, uint8_t* out) {
    for (int c = 0; c < 3; ++c)
        out[c] = to_byte(taps.weight[0] * corner[c] + taps.weight[1] * corner[c + 3] + taps.weight[2] * corner[stride + c] +
                         taps.weight[3] * corner[stride + c + 3]);
}

void sample_edge(const WarpJob& job, int x, int y, const Taps& taps, float fill, uint8_t* out) {
    float value[3] = {};
    for (int t = 0; t < 4; ++t) {
        const int tx = x + (t & 1), ty = y + (t >> 1);
        const bool inside = tx >= 0 && tx < job.width && ty >= 0 && ty < job.height;
        const uint8_t* pixel = job.source + 3 * (static_cast<std::ptrdiff_t>(ty) * job.width + tx);
        for (int c = 0; c < 3; ++c) value[c] += taps.weight[t] * (inside ? pixel[c] : fill);
    }
    for (int c = 0; c < 3; ++c) out[c] = to_byte(value[c]);
}

// One output pixel, sampled at (u, v) in units of source samples: sample (i, j) sits at u = j, v = i.
void sample(const WarpJob& job, double u, double v, float fill, uint8_t* out) {
    // written so that nan (a point at infinity) falls outside too
    if (!(u > -1 && u < job.width && v > -1 && v < job.height)) {
        for (int c = 0; c < 3; ++c) out[c] = to_byte(fill);
        return;
    }
    const int x = static_cast<int>(std::floor(u)), y = static_cast<int>(std::floor(v));
    const Taps taps = bilinear(static_cast<float>(u - x), static_cast<float>(v - y));
    const std::ptrdiff_t stride = 3 * static_cast<std::ptrdiff_t>(job.width);
    if (x >= 0 && x + 1 < job.width && y >= 0 && y + 1 < job.height) sample_inner(job.source + y * stride + 3 * x, stride, taps, out);
    else sample_edge(job, x, y, taps, fill, out);
}

void warp_row(const WarpJob& job, int y, float fill) {
    const double* m = job.inverse;
    const double py = y + 0.5;
    const bool affine = m[6] == 0 && m[7] == 0 && m[8] == 1;
    uint8_t* out = job.out + 3 * static_cast<std::ptrdiff_t>(y) * job.width;
    for (int x = 0; x < job.width; ++x) {
        const double px = x + 0.5;
        double u = m[0] * px + m[1] * py + m[2], v = m[3] * px + m[4] * py + m[5];
        if (!affine) {
            const double depth = m[6] * px + m[7] * py + m[8];
            u /= depth;
            v /= depth;
        }
        sample(job, u - 0.5, v - 0.5, fill, out + 3 * x);
    }
}

}  // namespace

void warp(const std::vector<WarpJob>& jobs, float fill, int threads) {
    for_each_parallel<None>(jobs.size(), threads, [&](std::size_t i, None&) {
        for (int y = 0; y < jobs[i].height; ++y) warp_row(jobs[i], y, fill);
    });
}

}  // namespace vise
