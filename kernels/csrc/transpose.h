// 16 x 16 transposes of bytes and of floats, in 128-bit vectors.
#pragma once

#include "lanes.h"

namespace vise {

typedef uint8_t Bytes16 __attribute__((vector_size(16)));
typedef int32_t Index4 __attribute__((vector_size(16)));

#if defined(__clang__)
#define VISE_SHUFFLE(index, a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VISE_SHUFFLE(index, a, b, ...) __builtin_shuffle(a, b, index{__VA_ARGS__})
#endif

// One of four rounds: interleaves row i with row i + 8. Four rounds turn rows[i][j] into
// rows[j][i].
VISE_INLINE void pair_rows(const Bytes16 (&in)[16], Bytes16 (&out)[16]) {
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        out[2 * i] = VISE_SHUFFLE(Bytes16, in[i], in[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5,
                                  21, 6, 22, 7, 23);
        out[2 * i + 1] = VISE_SHUFFLE(Bytes16, in[i], in[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12,
                                      28, 13, 29, 14, 30, 15, 31);
    }
}

VISE_INLINE void transpose_bytes(Bytes16 (&rows)[16]) {
    Bytes16 other[16];
    pair_rows(rows, other);
    pair_rows(other, rows);
    pair_rows(rows, other);
    pair_rows(other, rows);
}

VISE_INLINE void transpose_quads(const float* in, float* out) {
    Vector<4> r[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&r[i], in + i * kLanes, sizeof r[i]);
    const Vector<4> a = VISE_SHUFFLE(Index4, r[0], r[1], 0, 4, 1, 5);
    const Vector<4> b = VISE_SHUFFLE(Index4, r[2], r[3], 0, 4, 1, 5);
    const Vector<4> c = VISE_SHUFFLE(Index4, r[0], r[1], 2, 6, 3, 7);
    const Vector<4> d = VISE_SHUFFLE(Index4, r[2], r[3], 2, 6, 3, 7);
    const Vector<4> turned[4] = {
        VISE_SHUFFLE(Index4, a, b, 0, 1, 4, 5), VISE_SHUFFLE(Index4, a, b, 2, 3, 6, 7),
        VISE_SHUFFLE(Index4, c, d, 0, 1, 4, 5), VISE_SHUFFLE(Index4, c, d, 2, 3, 6, 7)};
    for (int i = 0; i < 4; ++i) std::memcpy(out + i * kLanes, &turned[i], sizeof turned[i]);
}

// Lane i of out[j] = lane j of in[i].
VISE_INLINE void transpose_blocks(const Block* in, Block* out) {
    for (int i = 0; i < kLanes; i += 4)
        for (int j = 0; j < kLanes; j += 4) transpose_quads(in[i].lane + j, out[j].lane + i);
}

}  // namespace vise
