// A truncated Gaussian is a sum of a few cosines (the caller fits them and bounds the error), and a
// sliding sum weighted by a cosine of frequency w follows a recurrence:
//
//   z(x) = sum_|d|<=R a cos(w d) f(x + d)
//   z(x+1) = 2 cos(w) z(x) - z(x-1) + a cos(w R) [f(x+R+1) + f(x-R-1)]
//                                   - a cos(w (R+1)) [f(x+R) + f(x-R)]
//
// (sliding DCT; K. Sugimoto, S. Kamata, "Efficient constant-time Gaussian filtering with sliding
// DCT/DST-5 and dual-domain error minimization", 2015). It is advanced as a step v and a position
// z, z += v, v += push - 4 sin^2(w/2) z, which keeps float32 rounding from growing with the length.
#include "blur.h"

#include <algorithm>
#include <cmath>

#include "transpose.h"

namespace vise {
namespace {

constexpr int kTerms = 4;  // cosines advanced together, their state in registers

struct Factors {
    float constant = 0;
    float bend[kTerms] = {};   // 4 sin^2(frequency / 2)
    float outer[kTerms] = {};  // amplitude cos(frequency radius)
    float inner[kTerms] = {};  // amplitude cos(frequency (radius + 1))
};

// One group of cosines; unused ones are zero. The constant belongs to the first group.
struct Terms {
    Factors factors;
    // (reach, 1 + kTerms): weights of each sample in the first output: count, cosines
    std::vector<float> first;
};

int reflect_101(int t, int n) {
    if (n == 1) return 0;
    const int period = 2 * (n - 1);
    t = std::abs(t) % period;
    return t < n ? t : period - t;
}

void set_cosine(Terms& terms, int k, double frequency, double amplitude, int radius, int n) {
    const double half = std::sin(frequency / 2);
    terms.factors.bend[k] = static_cast<float>(4 * half * half);
    terms.factors.outer[k] = static_cast<float>(amplitude * std::cos(frequency * radius));
    terms.factors.inner[k] = static_cast<float>(amplitude * std::cos(frequency * (radius + 1)));
    for (int d = -radius; d <= radius; ++d)
        terms.first[reflect_101(d, n) * (1 + kTerms) + 1 + k] +=
            static_cast<float>(amplitude * std::cos(frequency * d));
}

// The groups of a kernel on a signal of n samples.
std::vector<Terms> make_terms(const Cosines& kernel, int n) {
    const int cosines = static_cast<int>(kernel.frequency.size()) - 1;
    std::vector<Terms> groups(std::max(1, (cosines + kTerms - 1) / kTerms));
    for (Terms& terms : groups)
        terms.first.assign(std::min(n, kernel.radius + 1) * (1 + kTerms), 0.0f);
    groups[0].factors.constant = static_cast<float>(kernel.amplitude[0]);
    for (int d = -kernel.radius; d <= kernel.radius; ++d)
        groups[0].first[reflect_101(d, n) * (1 + kTerms)] += 1;
    for (int c = 0; c < cosines; ++c)
        set_cosine(groups[c / kTerms], c % kTerms, kernel.frequency[c + 1], kernel.amplitude[c + 1],
                   kernel.radius, n);
    return groups;
}

// What one pass needs to know: signals of n samples, `step` Blocks from sample to sample.
struct Sweep {
    int n, step, radius;
    const int* mirror;  // (n + 2 radius + 2,) offset in Blocks of sample x - radius - 1
    std::vector<Terms> groups;
};

Sweep make_sweep(const Cosines& kernel, int n, int step, Buffer<int>& buffer) {
    const int reached = n + 2 * kernel.radius + 2;
    int* mirror = buffer.at_least(reached);
    for (int i = 0; i < reached; ++i) mirror[i] = step * reflect_101(i - kernel.radius - 1, n);
    return {n, step, kernel.radius, mirror, make_terms(kernel, n)};
}

// W of the sixteen signals on their way along the samples.
template <int W>
struct Sliding {
    Vector<W> box = {}, z[kTerms] = {}, v[kTerms] = {};

    VISE_INLINE void start(const Block* strip, const Sweep& sweep, const Terms& terms, int part) {
        const int reach = std::min(sweep.n, sweep.radius + 1);
        for (int j = 0; j < reach; ++j) {
            const float* weight = &terms.first[j * (1 + kTerms)];
            const Vector<W> sample = get<W>(strip[j * sweep.step], part);
            box += weight[0] * sample;
            for (int k = 0; k < kTerms; ++k) z[k] += weight[1 + k] * sample;
        }
    }

    // From sample x to sample x + 1. The signal is symmetric about its first sample, so the first
    // step is half a push.
    VISE_INLINE void advance(const Block* strip, const Sweep& sweep, const Factors& factors,
                             int part, int x, bool first) {
        const int* mirror = sweep.mirror + x;
        const Vector<W> before = get<W>(strip[mirror[0]], part);
        const Vector<W> left = get<W>(strip[mirror[1]], part);
        const Vector<W> right = get<W>(strip[mirror[2 * sweep.radius + 1]], part);
        const Vector<W> after = get<W>(strip[mirror[2 * sweep.radius + 2]], part);
        const Vector<W> outer = after + before, inner = right + left;
        box += after - left;
        for (int k = 0; k < kTerms; ++k) {
            v[k] += factors.outer[k] * outer;
            v[k] -= factors.inner[k] * inner;
            v[k] -= factors.bend[k] * z[k];
            if (first) v[k] *= 0.5f;
            z[k] += v[k];
        }
    }

    VISE_INLINE void emit(const Factors& factors, bool add, int part, Block& sum) const {
        Vector<W> total = factors.constant * box + ((z[0] + z[1]) + (z[2] + z[3]));
        if (add) total += get<W>(sum, part);
        put<W>(sum, part, total);
    }
};

// Sixteen signals: sum = or += one group's share of the blurred strip.
struct Slide {
    template <int W>
    VISE_INLINE void operator()(const Block* strip, const Sweep* sweep, const Terms* group,
                                bool add, Block* sum) const {
        const Factors factors = group->factors;  // a copy, so that stores to `sum` cannot change it
        for (int part = 0; part < kLanes / W; ++part) {
            Sliding<W> sliding;
            sliding.start(strip, *sweep, *group, part);
            sliding.emit(factors, add, part, sum[0]);
            sliding.advance(strip, *sweep, factors, part, 0, true);
            for (int x = 1; x < sweep->n; ++x) {
                sliding.emit(factors, add, part, sum[x * sweep->step]);
                sliding.advance(strip, *sweep, factors, part, x, false);
            }
        }
    }
};

void slide_all(const Block* strip, const Sweep& sweep, Block* sum) {
    for (const Terms& terms : sweep.groups)
        widest(Slide{}, strip, &sweep, &terms, &terms != &sweep.groups[0], sum);
}

// bytes (16 count) = byte j of sixteen rows, for j < count; rows beyond the last are zero.
VISE_INLINE void turn_tile(const uint8_t* source, std::ptrdiff_t stride, int rows, int count,
                           uint8_t* bytes) {
    Bytes16 tile[16] = {};
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r)
        if (r < rows) std::memcpy(&tile[r], source + r * stride, count);
    transpose_bytes(tile);
    std::memcpy(bytes, tile, sizeof tile);
}

// strip[j] = byte j of sixteen rows, for j < count.
struct GatherRows {
    template <int W>
    VISE_INLINE void operator()(const uint8_t* source, std::ptrdiff_t stride, int rows, int count,
                                uint8_t* bytes, Block* strip) const {
        int j = 0;
        if (rows == kLanes)
            for (; j + kLanes <= count; j += kLanes)
                turn_tile(source + j, stride, kLanes, kLanes, bytes + j * kLanes);
        for (; j < count; j += kLanes)
            turn_tile(source + j, stride, rows, std::min(kLanes, count - j), bytes + j * kLanes);
        to_floats(bytes, static_cast<std::ptrdiff_t>(count) * kLanes, strip->lane);
    }
};

// Strip s of `turned`, sixteen columns of `height` blocks, gets its next sixteen samples from
// columns 16 s ... of `sum`.
struct Turn {
    template <int W>
    VISE_INLINE void operator()(const Block* sum, int strips, std::ptrdiff_t height,
                                Block* turned) const {
        for (int s = 0; s < strips; ++s) transpose_blocks(sum + s * kLanes, turned + s * height);
    }
};

struct PutColumns {
    template <int W>
    VISE_INLINE void operator()(const Block* sum, int rows, int count, uint8_t* bytes,
                                std::ptrdiff_t stride, uint8_t* out) const {
        to_bytes(sum->lane, static_cast<std::ptrdiff_t>(rows) * kLanes, bytes);
        for (int y = 0; y < rows; ++y) {
            if (count == kLanes) std::memcpy(out + y * stride, bytes + y * kLanes, kLanes);
            else std::memcpy(out + y * stride, bytes + y * kLanes, count);
        }
    }
};

int round_up(int value) { return (value + kLanes - 1) / kLanes * kLanes; }

}  // namespace

void blur(const Rectangle& rectangle, const Cosines& kernel, BlurScratch& scratch) {
    const int columns = 3 * rectangle.width, strips = round_up(columns) / kLanes;
    const std::ptrdiff_t height = round_up(rectangle.height);
    const std::ptrdiff_t most = std::max<std::ptrdiff_t>(round_up(columns), height);
    Block *strip = scratch.strip.at_least(most), *sum = scratch.sum.at_least(most);
    Block* turned = scratch.turned.at_least(strips * height);
    uint8_t* bytes = scratch.bytes.at_least(most * kLanes);
    std::fill_n(sum, round_up(columns), Block{});  // the columns that only fill up the last strip

    const Sweep across = make_sweep(kernel, rectangle.width, 3, scratch.mirror);
    for (int y = 0; y < rectangle.height; y += kLanes) {
        const int rows = std::min(kLanes, rectangle.height - y);
        widest(GatherRows{}, rectangle.source + y * rectangle.stride, rectangle.stride, rows,
               columns, bytes, strip);
        for (int c = 0; c < 3; ++c) slide_all(strip + c, across, sum + c);
        widest(Turn{}, sum, strips, height, turned + y);
    }
    const Sweep down = make_sweep(kernel, rectangle.height, 1, scratch.mirror);
    for (int s = 0; s < strips; ++s) {
        slide_all(turned + s * height, down, sum);
        widest(PutColumns{}, sum, rectangle.height, std::min(kLanes, columns - s * kLanes), bytes,
               rectangle.stride, rectangle.out + s * kLanes);
    }
}

}  // namespace vise
