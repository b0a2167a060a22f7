// Vectors of W floats, W being what the tier's instructions hold, and what is computed lane by lane or across lanes.

#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include <immintrin.h>

namespace {

#ifdef __AVX512F__
constexpr int W = 16;
#else
constexpr int W = 8;
#endif
constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(4 * W)));
typedef float vf_u __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef int32_t vi_u __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint32_t vu_u __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t vh_u __attribute__((vector_size(2 * W), aligned(2)));
typedef uint16_t bf16;

inline vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
inline vf load(const bf16* p) {
#ifdef __AVX512F__  // gcc 12 takes two halves for what is one instruction
    return reinterpret_cast<vf>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(*reinterpret_cast<const __m256i_u*>(p)), 16));
#else
    return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh_u*>(p), vu) << 16);
#endif
}
inline void store(float* p, vf x) { *reinterpret_cast<vf_u*>(p) = x; }
inline vh_u narrow(vf x) {  // to bfloat16: to nearest, ties to even
    const vu bits = reinterpret_cast<vu>(x), rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
#ifdef __AVX512F__
    return reinterpret_cast<vh_u>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(rounded >> 16)));
#else
    return __builtin_convertvector(rounded >> 16, vh_u);
#endif
}
inline vf all(float x) { return x - vf{}; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void put(float* p, float x) { *p = x; }
inline void put(bf16* p, float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *p = x != x ? 0x7fc0 : static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// All lanes in one number, halves on halves.
template <class Operation>
inline float fold(vf x, Operation both) {
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
#ifdef __AVX512F__
    v8 y = both(__builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7),
                __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15));
#else
    v8 y = x;
#endif
    v4 z = both(__builtin_shufflevector(y, y, 0, 1, 2, 3), __builtin_shufflevector(y, y, 4, 5, 6, 7));
    return both(both(z[0], z[2]), both(z[1], z[3]));
}
inline float sum(vf x) {
    return fold(x, [](auto a, auto b) { return a + b; });
}
inline float largest(vf x) {
    return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

// Lane i is the sum of x[i]'s lanes: neighbours are added until one vector is left.
template <int N = W>
inline vf sums(vf* x) {
    for (int i = 0; i < N / 2; i++) {
        vf a = x[2 * i], b = x[2 * i + 1];
#ifdef __AVX512F__
        x[i] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
               __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
        x[i] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
               __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
    }
    if constexpr (N > 2) return sums<N / 2>(x);
    return x[0];
}

// exp(x) to about 1e-7 of its value; x <= 88. Cephes' reduction and polynomial.
inline vf exponential(vf x) {
    x = x < -87.0f ? all(-87.0f) : x;
    vf n = x * 1.44269504f + 12582912.0f;  // rounds: the fraction is shifted out of the mantissa
    vi shift = reinterpret_cast<vi>(n) << 23;
    n -= 12582912.0f;
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf y = all(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    return reinterpret_cast<vf>(reinterpret_cast<vi>(y) + shift);
}

inline vf silu(vf x) { return x / (1.0f + exponential(-(x < -87.0f ? all(-87.0f) : x))); }

}  // namespace
