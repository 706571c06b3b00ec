#include "patchify.h"

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "lanes.h"
#include "parallel.h"
#include "warp.h"

namespace vise {
namespace {

struct Scratch {
    Warper warper;
    Buffer<uint8_t> band;  // the rows of one row of squares
};

// One patch: each channel's values once, then its repeats.
template <class Value>
void put_patch(const uint8_t* corner, std::ptrdiff_t stride, const Value* table, int patch,
               int taps, Value* out) {
    const std::size_t plane = static_cast<std::size_t>(patch) * patch;
    for (int c = 0; c < 3; ++c) {
        Value* first = out + static_cast<std::size_t>(c) * taps * plane;
        for (int y = 0; y < patch; ++y)
            for (int x = 0; x < patch; ++x)
                first[y * patch + x] = table[c * 256 + corner[y * stride + 3 * x + c]];
        for (int t = 1; t < taps; ++t) std::memcpy(first + t * plane, first, plane * sizeof(Value));
    }
}

// One row of squares, from the top left corner of its first.
template <class Value>
Value* put_squares(const uint8_t* corner, int width, const Value* table, int patch, int merge,
                   int taps, Value* out) {
    const std::ptrdiff_t stride = 3 * static_cast<std::ptrdiff_t>(width);
    const std::size_t row = static_cast<std::size_t>(3) * taps * patch * patch;
    for (int left = 0; left < width; left += patch * merge)
        for (int m = 0; m < merge * merge; ++m, out += row) {
            const int y = m / merge * patch, x = left + m % merge * patch;
            put_patch(corner + y * stride + 3 * x, stride, table, patch, taps, out);
        }
    return out;
}

bool moves(const double* inverse) {
    for (int i = 0; inverse && i < 9; ++i)
        if (inverse[i] != (i % 4 == 0)) return true;
    return false;
}

template <class Value>
void run(const PatchJob& job, const Value* table, int patch, int merge, int taps, float fill,
         Scratch& scratch) {
    const std::ptrdiff_t stride = 3 * static_cast<std::ptrdiff_t>(job.width);
    const int side = patch * merge;
    const bool warped = moves(job.inverse);
    Value* out = static_cast<Value*>(job.out);
    uint8_t* band = nullptr;
    if (warped) {
        WarpJob warp{job.source, nullptr, job.height, job.width, {}};
        std::copy_n(job.inverse, 9, warp.inverse);
        scratch.warper.begin(warp, fill);
        band = scratch.band.at_least(side * stride);
    }
    for (int top = 0; top < job.height; top += side) {
        for (int y = 0; warped && y < side; ++y) scratch.warper.row(top + y, band + y * stride);
        out = put_squares(warped ? band : job.source + top * stride, job.width, table, patch, merge,
                          taps, out);
    }
}

}  // namespace

void patchify(const std::vector<PatchJob>& jobs, const void* table, int bytes, int patch, int merge,
              int taps, float fill, int threads) {
    for_each_parallel<Scratch>(jobs.size(), threads, [&](std::size_t i, Scratch& scratch) {
        if (bytes == 2)
            run(jobs[i], static_cast<const uint16_t*>(table), patch, merge, taps, fill, scratch);
        else run(jobs[i], static_cast<const uint32_t*>(table), patch, merge, taps, fill, scratch);
    });
}

}  // namespace vise
