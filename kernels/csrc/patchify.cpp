#include "patchify.h"

#include <cstddef>
#include <cstring>

#include "parallel.h"

namespace vise {
namespace {

struct None {};

// One patch: each channel's values once, then its repeats.
template <class Value>
void put_patch(const uint8_t* corner, std::ptrdiff_t stride, const Value* table, int patch, int taps, Value* out) {
    const std::size_t plane = static_cast<std::size_t>(patch) * patch;
    for (int c = 0; c < 3; ++c) {
        Value* first = out + c * taps * plane;
        for (int y = 0; y < patch; ++y)
            for (int x = 0; x < patch; ++x) first[y * patch + x] = table[c * 256 + corner[y * stride + 3 * x + c]];
        for (int t = 1; t < taps; ++t) std::memcpy(first + t * plane, first, plane * sizeof(Value));
    }
}

template <class Value>
void run(const PatchJob& job, const Value* table, int patch, int merge, int taps) {
    const std::ptrdiff_t stride = 3 * static_cast<std::ptrdiff_t>(job.width);
    const std::size_t row = static_cast<std::size_t>(3) * taps * patch * patch;
    Value* out = static_cast<Value*>(job.out);
    const int side = patch * merge;
    for (int top = 0; top < job.height; top += side)
        for (int left = 0; left < job.width; left += side)
            for (int m = 0; m < merge * merge; ++m, out += row) {
                const int y = top + m / merge * patch, x = left + m % merge * patch;
                put_patch(job.source + y * stride + 3 * x, stride, table, patch, taps, out);
            }
}

}  // namespace

void patchify(const std::vector<PatchJob>& jobs, const void* table, int bytes, int patch, int merge, int taps, int threads) {
    for_each_parallel<None>(jobs.size(), threads, [&](std::size_t i, None&) {
        if (bytes == 2) run(jobs[i], static_cast<const uint16_t*>(table), patch, merge, taps);
        else run(jobs[i], static_cast<const uint32_t*>(table), patch, merge, taps);
    });
}

}  // namespace vise
