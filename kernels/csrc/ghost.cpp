#include "ghost.h"

#include <algorithm>
#include <cstring>

#include "parallel.h"

namespace vise {
namespace {

struct Byte3 {
    uint8_t channel[3];
};

// Sums of the three channels over a rectangle.
struct Total {
    uint64_t sum[3] = {}, count = 0;

    void add_row(const uint8_t* row, int begin, int end) {
        uint32_t part[3] = {};  // a row has fewer than 2^24 pixels
        for (int x = begin; x < end; ++x)
            for (int c = 0; c < 3; ++c) part[c] += row[3 * x + c];
        for (int c = 0; c < 3; ++c) sum[c] += part[c];
        count += end - begin;
    }

    Byte3 mean() const {  // the nearest whole number, halves up
        Byte3 mean;
        for (int c = 0; c < 3; ++c)
            mean.channel[c] = static_cast<uint8_t>((2 * sum[c] + count) / (2 * count));
        return mean;
    }
};

void fill_row(uint8_t* row, int begin, int end, const Byte3& value) {
    for (int x = begin; x < end; ++x) std::memcpy(row + 3 * x, &value, 3);
}

// The rectangle that is ghosted: the box, or for `outside` the whole image, whose box is put back
// afterwards.
struct Region {
    int x1, y1, x2, y2;
};

std::ptrdiff_t row_of(const GhostJob& job, int y) {
    return 3 * static_cast<std::ptrdiff_t>(y) * job.width;
}

// Within `hole` nothing counts.
void fill_mean(const GhostJob& job, const Region& region, const Region& hole) {
    Total total;
    for (int y = region.y1; y < region.y2; ++y) {
        const bool crossed = y >= hole.y1 && y < hole.y2;
        total.add_row(job.source + row_of(job, y), region.x1, crossed ? hole.x1 : region.x2);
        if (crossed) total.add_row(job.source + row_of(job, y), hole.x2, region.x2);
    }
    if (total.count == 0) return;
    for (int y = region.y1; y < region.y2; ++y)
        fill_row(job.out + row_of(job, y), region.x1, region.x2, total.mean());
}

void fill_cells(const GhostJob& job, const Region& region) {
    for (int top = region.y1; top < region.y2; top += job.cell)
        for (int left = region.x1; left < region.x2; left += job.cell) {
            const int bottom = std::min(top + job.cell, region.y2);
            const int right = std::min(left + job.cell, region.x2);
            fill_mean(job, {left, top, right, bottom}, {});
        }
}

void fill_blur(const GhostJob& job, const Region& region, BlurScratch& scratch) {
    const std::ptrdiff_t corner = row_of(job, region.y1) + 3 * region.x1;
    const int height = region.y2 - region.y1, width = region.x2 - region.x1;
    blur({job.source + corner, job.out + corner, row_of(job, 1), height, width}, *job.kernel,
         scratch);
}

void restore_box(const GhostJob& job) {
    for (int y = job.y1; y < job.y2; ++y) {
        const std::ptrdiff_t at = row_of(job, y) + 3 * job.x1;
        std::memcpy(job.out + at, job.source + at, 3 * (job.x2 - job.x1));
    }
}

// How deep the centre of pixel (x, y) lies inside the box, in pixels; edges on the image's border
// do not count for `inside`.
float depth(const GhostJob& job, int x, int y, bool outside) {
    const float far = 1e9f;
    const float left = !outside && job.x1 == 0 ? far : x + 0.5f - job.x1;
    const float right = !outside && job.x2 == job.width ? far : job.x2 - x - 0.5f;
    const float top = !outside && job.y1 == 0 ? far : y + 0.5f - job.y1;
    const float bottom = !outside && job.y2 == job.height ? far : job.y2 - y - 0.5f;
    return std::min(std::min(left, right), std::min(top, bottom));
}

void soften(const GhostJob& job, const Region& region, float feather, bool outside) {
    for (int y = region.y1; y < region.y2; ++y)
        for (int x = region.x1; x < region.x2; ++x) {
            const float into = depth(job, x, y, outside);
            const float alpha = std::min(std::max(outside ? -into : into, 0.0f) / feather, 1.0f);
            for (std::ptrdiff_t i = row_of(job, y) + 3 * x, end = i + 3; i < end; ++i) {
                const float before = job.source[i];
                job.out[i] = static_cast<uint8_t>(before + alpha * (job.out[i] - before) + 0.5f);
            }
        }
}

void run(const GhostJob& job, Ghosting method, float feather, bool outside, BlurScratch& scratch) {
    std::memcpy(job.out, job.source, row_of(job, job.height));
    const bool empty = job.x1 == job.x2 || job.y1 == job.y2;
    if (empty && !outside) return;
    const Region box = {job.x1, job.y1, job.x2, job.y2}, all = {0, 0, job.width, job.height};
    const Region region = outside ? all : box;
    if (method == Ghosting::kMean) fill_mean(job, region, outside && !empty ? box : Region{});
    else if (method == Ghosting::kPixelate) fill_cells(job, region);
    else fill_blur(job, region, scratch);
    if (outside) restore_box(job);
    if (feather > 0) soften(job, region, feather, outside);
}

}  // namespace

void ghost(const std::vector<GhostJob>& jobs, Ghosting method, float feather, bool outside,
           int threads) {
    for_each_parallel<BlurScratch>(jobs.size(), threads, [&](std::size_t i, BlurScratch& scratch) {
        run(jobs[i], method, feather, outside, scratch);
    });
}

}  // namespace vise
