// Sixteen float signals side by side in memory, computed on in vectors as wide as the machine's.
//
// Bodies are written once, as a struct with `template <int W> void operator()(...)`, W floats per
// vector; `widest(body, ...)` runs the copy compiled for this machine: 16 (AVX-512), 8 (AVX2), 4
// (SSE2, NEON); VISE_LANES=8 or 4 in the environment keeps a wide machine to a narrower copy, for
// tests. Vector types are GCC's and Clang's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

namespace vise {

#define VISE_INLINE inline __attribute__((always_inline))

// For a body whose vectors need no choice of width: one copy of the function per x86 level, chosen
// when the module loads.
#if defined(__x86_64__) && !defined(VISE_NATIVE_ARCH) && !defined(__clang__) && __GNUC__ >= 12
#define VISE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VISE_CLONES
#endif

constexpr int kLanes = 16;

template <int W>
struct VectorOf;
template <>
struct VectorOf<4> {
    typedef float type __attribute__((vector_size(16)));
};
template <>
struct VectorOf<8> {
    typedef float type __attribute__((vector_size(32)));
};
template <>
struct VectorOf<16> {
    typedef float type __attribute__((vector_size(64)));
};
template <int W>
using Vector = typename VectorOf<W>::type;

// One sample of each of the sixteen signals.
struct alignas(64) Block {
    float lane[kLanes];
};

// Lanes part * W ... part * W + W - 1 of a block.
template <int W>
VISE_INLINE Vector<W> get(const Block& block, int part) {
    Vector<W> value;
    std::memcpy(&value, __builtin_assume_aligned(block.lane + part * W, sizeof value),
                sizeof value);
    return value;
}

template <int W>
VISE_INLINE void put(Block& block, int part, const Vector<W>& value) {
    std::memcpy(__builtin_assume_aligned(block.lane + part * W, sizeof value), &value,
                sizeof value);
}

#if defined(__x86_64__) && !defined(VISE_NATIVE_ARCH)

#define VISE_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))

template <class Body, class... Args>
VISE_AVX512 void run_16(const Body& body, Args... args) {
    body.template operator()<16>(args...);
}

template <class Body, class... Args>
__attribute__((target("avx2,fma"))) void run_8(const Body& body, Args... args) {
    body.template operator()<8>(args...);
}

inline int allowed_lanes() {
    static const int lanes = [] {
        const char* asked = std::getenv("VISE_LANES");
        return asked ? std::atoi(asked) : kLanes;
    }();
    return lanes;
}

inline bool has_avx512() {
    return __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw");
}

inline bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

template <class Body, class... Args>
void widest(const Body& body, Args... args) {
    const int lanes = allowed_lanes();
    if (lanes >= 16 && has_avx512()) run_16(body, args...);
    else if (lanes >= 8 && has_avx2()) run_8(body, args...);
    else body.template operator()<4>(args...);
}

#else

template <class Body, class... Args>
void widest(const Body& body, Args... args) {
#if defined(__AVX512F__)
    body.template operator()<16>(args...);
#elif defined(__AVX2__)
    body.template operator()<8>(args...);
#else
    body.template operator()<4>(args...);
#endif
}

#endif

// Plain loops, which compilers turn into vector conversions; inlined into bodies for their machine.
VISE_INLINE void to_floats(const uint8_t* __restrict from, std::ptrdiff_t count,
                           float* __restrict to) {
    for (std::ptrdiff_t i = 0; i < count; ++i) to[i] = from[i];
}

// The nearest whole numbers (halves up) within 0..255.
VISE_INLINE void to_bytes(const float* __restrict from, std::ptrdiff_t count,
                          uint8_t* __restrict to) {
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        const float low = from[i] > 0 ? from[i] : 0;
        to[i] = static_cast<uint8_t>(static_cast<int>((low < 255 ? low : 255) + 0.5f));
    }
}

// Pixels of three bytes to pixels of four (the fourth is anything) and back. Four bytes move at a
// time; the last pixel's three.
VISE_INLINE void widen_pixels(const uint8_t* __restrict from, int count, std::ptrdiff_t step,
                              uint8_t* __restrict to) {
    for (int x = 0; x < count - 1; ++x) std::memcpy(to + x * step, from + 3 * x, 4);
    std::memcpy(to + (count - 1) * step, from + 3 * (count - 1), 3);
}

VISE_INLINE void narrow_pixels(const uint8_t* __restrict from, int count, std::ptrdiff_t step,
                               uint8_t* __restrict to) {
    for (int x = 0; x < count - 1; ++x) std::memcpy(to + 3 * x, from + x * step, 4);
    std::memcpy(to + 3 * (count - 1), from + (count - 1) * step, 3);
}

// Memory that grows and is not cleared.
template <class T>
class Buffer {
public:
    T* at_least(std::size_t count) {
        if (count > held_) {
            data_.reset(new T[count]);
            held_ = count;
        }
        return data_.get();
    }

private:
    std::unique_ptr<T[]> data_;
    std::size_t held_ = 0;
};

}  // namespace vise
