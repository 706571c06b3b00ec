// Six rows of the weight at a time, which stay in the nearest cache while four rows of x after four pass over them: 24 sums in registers.
// What makes it quick is the prefetch: while six weight rows are used, the next six, which follow in memory, are asked for line by line.
// The processor's own prefetcher loses track of six interleaved streams.

#include "few_rows.h"

#include <cstring>

#include "lanes.h"

namespace vise {
namespace {

constexpr int kLine = 16;  // floats of a cache line

struct Product {
    const float *x;
    std::int64_t rows, width;
    const float *weight;
    std::int64_t outs;
    const float *bias;
    float *y;
};

template <int W>
VISE_INLINE float total(const Vector<W> &value) {
    if constexpr (W == 4) {
        return (value[0] + value[1]) + (value[2] + value[3]);
    } else {
        Vector<W / 2> low, high;
        std::memcpy(&low, &value, sizeof low);
        std::memcpy(&high, reinterpret_cast<const char *>(&value) + sizeof low, sizeof high);
        return total<W / 2>(low + high);
    }
}

template <int W>
VISE_INLINE Vector<W> load(const float *from) {
    Vector<W> value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

// `Outs` outputs from `out` on, of `Rows` rows from `row` on. Each step asks for `Lines` lines from `ahead` on, which may lie behind the
// weight's end: asking is no reading.
template <int W, int Outs, int Rows, int Lines>
VISE_INLINE void tile(const Product &p, std::int64_t out, std::int64_t row, const float *&ahead) {
    const float *w = p.weight + out * p.width, *x = p.x + row * p.width;
    Vector<W> sums[Outs][Rows] = {};
    const std::int64_t whole = p.width / W * W;
    for (std::int64_t k = 0; k < whole; k += W) {
        for (int line = 0; line < Lines; ++line, ahead += kLine) __builtin_prefetch(ahead, 0, 2);
        Vector<W> part[Rows];
        for (int r = 0; r < Rows; ++r) part[r] = load<W>(x + r * p.width + k);
        for (int o = 0; o < Outs; ++o) {
            const Vector<W> weights = load<W>(w + o * p.width + k);
            for (int r = 0; r < Rows; ++r) sums[o][r] += weights * part[r];
        }
    }
    float results[Rows][Outs];
#pragma GCC unroll 6
    for (int o = 0; o < Outs; ++o)
#pragma GCC unroll 4
        for (int r = 0; r < Rows; ++r) results[r][o] = total<W>(sums[o][r]);
    for (std::int64_t k = whole; k < p.width; ++k)
        for (int r = 0; r < Rows; ++r)
            for (int o = 0; o < Outs; ++o) results[r][o] += w[o * p.width + k] * x[r * p.width + k];
    for (int r = 0; r < Rows; ++r)
        for (int o = 0; o < Outs; ++o) p.y[(row + r) * p.outs + out + o] = results[r][o] + (p.bias ? p.bias[out + o] : 0.0f);
}

// All rows of `Outs` outputs; each of the `passes` over them asks for its share of the next weight rows.
template <int W, int Outs, int Lines>
VISE_INLINE void outputs(const Product &p, std::int64_t out) {
    const float *ahead = p.weight + (out + Outs) * p.width;
    std::int64_t row = 0;
    for (; row + 4 <= p.rows; row += 4) tile<W, Outs, 4, Lines>(p, out, row, ahead);
    switch (p.rows - row) {
        case 3: return tile<W, Outs, 3, Lines>(p, out, row, ahead);
        case 2: return tile<W, Outs, 2, Lines>(p, out, row, ahead);
        case 1: return tile<W, Outs, 1, Lines>(p, out, row, ahead);
    }
}

struct Whole {
    template <int W>
    VISE_INLINE void operator()(const Product &p) const {
        constexpr int kOuts = W == 16 ? 6 : 2;  // AVX2 and SSE2 have half the registers
        constexpr int kLines = (kOuts * W + kLine - 1) / kLine;  // of a step through all of them
        const std::int64_t passes = (p.rows + 3) / 4;
        std::int64_t out = 0;
        for (; out + kOuts <= p.outs; out += kOuts) {
            if (passes == 1) outputs<W, kOuts, kLines>(p, out);
            else if (passes == 2) outputs<W, kOuts, (kLines + 1) / 2>(p, out);
            else outputs<W, kOuts, (kLines + 2) / 3>(p, out);
        }
        for (; out < p.outs; ++out) outputs<W, 1, 0>(p, out);
    }
};

}  // namespace

void few_rows(const float *x, std::int64_t rows, std::int64_t width, const float *weight, std::int64_t outs, const float *bias, float *y) {
    widest(Whole(), Product{x, rows, width, weight, outs, bias, y});
}

}  // namespace vise
