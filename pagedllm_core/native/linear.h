// Linear layers over packed weights: float32, bfloat16 or int8.
//
//     packed weights, NR = 2 W outputs side by side       [N / NR][K / 4][NR][4]   int8, four inputs in 32 bits
//                                                         [N / NR][K / 2][NR][2]   bfloat16, two inputs in 32 bits
//                                                         [N / NR][K][NR]          float32
//
// Rows are float32, but they are int8 beside int8, and bfloat16 beside bfloat16 where AVX512-BF16 multiplies pairs of it.
// -DEMULATE_BF16 puts what that instruction means in its place, so that its path is tested on any processor with AVX-512.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "interface.h"
#include "team.h"
#include "vectors.h"

namespace {

constexpr int NR = 2 * W, MOST_ROWS = W == 16 ? 12 : 6;
constexpr int GROUPS_TOGETHER = 8;  // groups of MOST_ROWS rows that pass over a weight while it is in the cache
constexpr int AHEAD = 8192;  // bytes between the weights in use and those being fetched; one or two rows wait for them anyway

// Weights whose rows are of their type, too: 32 bits of both meet in one instruction, FAST, or in some that are everywhere.
template <class Number, bool FAST>
struct Dots {
    Number value;
};

inline bool multiplies_bf16() {
#ifdef EMULATE_BF16
    return W == 16;
#else
    static const bool found = __builtin_cpu_supports("avx512bf16") && W == 16;
    return found;
#endif
}

// Inputs in the place of a float in a row.
inline int64_t together(int64_t type) { return type == 1 ? 4 : type == 2 && multiplies_bf16() ? 2 : 1; }

// acc plus the two products of bfloat16 in each lane of w and x, the higher one first.
template <bool>
inline vf dot(vf acc, vi w, vi x) {
#if defined(__AVX512F__) && !defined(EMULATE_BF16)
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
    return acc;
#else
    const vu weights = reinterpret_cast<vu>(w), pair = reinterpret_cast<vu>(x);
    acc += reinterpret_cast<vf>(weights & 0xffff0000u) * reinterpret_cast<vf>(pair & 0xffff0000u);
    return acc + reinterpret_cast<vf>(weights << 16) * reinterpret_cast<vf>(pair << 16);
#endif
}

// int8 is W8A8: weights are scaled by output, and the inputs of each row by their largest. Sums are of integers, so they
// are exact. Weights are stored with 128 added, as the instruction multiplies unsigned bytes with signed ones.

struct RowScale {  // of a row in int8
    float scale;
    int32_t offset;  // 128 times the sum of its numbers, which the weights' 128 adds
};

// acc plus the four products of an unsigned byte in each lane of w with a signed one of x.
template <bool VNNI>
inline vi dot(vi acc, vi w, vi x) {
#ifdef __AVX512F__
    if constexpr (VNNI) {  // gcc 12 spills accumulators around the intrinsic
        asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
        return acc;
    }
    const __m512i weights = reinterpret_cast<__m512i>(w), four = reinterpret_cast<__m512i>(x);
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8), odd = _mm512_srai_epi16(four, 8);
    acc += reinterpret_cast<vi>(_mm512_madd_epi16(_mm512_and_si512(weights, _mm512_set1_epi16(255)), even));
    return acc + reinterpret_cast<vi>(_mm512_madd_epi16(_mm512_srli_epi16(weights, 8), odd));
#else
    const __m256i weights = reinterpret_cast<__m256i>(w), four = reinterpret_cast<__m256i>(x);
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), odd = _mm256_srai_epi16(four, 8);
    acc += reinterpret_cast<vi>(_mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(255)), even));
    return acc + reinterpret_cast<vi>(_mm256_madd_epi16(_mm256_srli_epi16(weights, 8), odd));
#endif
}

inline vi in_each_lane(const float* four_bytes) {
    int32_t bits;
    std::memcpy(&bits, four_bytes, 4);
    return bits - vi{};
}

// The lines that the next 4 NR bytes lie in.
inline void fetch(const void* from) {
    for (int i = 0; i < 4 * NR; i += 64) _mm_prefetch(static_cast<const char*>(from) + i, _MM_HINT_T0);
}

template <int ROWS, int PANELS, class Number, bool FAST>
inline void kernel(const Dots<Number, FAST>* weights, int64_t panel_size, int64_t inputs, const float* a,
                   const RowScale* scales, vf (&y)[ROWS][PANELS][2]) {
    constexpr int64_t TOGETHER = 4 / sizeof(Number);
    std::conditional_t<sizeof(Number) == 1, vi, vf> acc[ROWS][PANELS][2] = {};
    for (int64_t k = 0; k < inputs; k += TOGETHER, a += ROWS)
        for (int p = 0; p < PANELS; p++) {
            const auto* w = weights + p * panel_size + k * NR;
            const vi w0 = *reinterpret_cast<const vi_u*>(w), w1 = *reinterpret_cast<const vi_u*>(w + TOGETHER * W);
            if (ROWS > 2) fetch(reinterpret_cast<const char*>(w) + AHEAD);
            for (int r = 0; r < ROWS; r++) {
                const vi x = in_each_lane(a + r);
                acc[r][p][0] = dot<FAST>(acc[r][p][0], w0, x);
                acc[r][p][1] = dot<FAST>(acc[r][p][1], w1, x);
            }
        }
    std::memcpy(y, acc, sizeof(acc));  // at once: as long as they are summed up, they stay in registers
    if constexpr (sizeof(Number) == 1)
        for (int r = 0; r < ROWS; r++)
            for (int p = 0; p < PANELS; p++)
                for (int h = 0; h < 2; h++)
                    y[r][p][h] = __builtin_convertvector(reinterpret_cast<vi>(y[r][p][h]) - scales[r].offset, vf) *
                                 scales[r].scale;
}

template <int ROWS, int PANELS, class T>
inline void kernel(const T* weights, int64_t panel_size, int64_t inputs, const float* a, const RowScale*,
                   vf (&y)[ROWS][PANELS][2]) {
    vf acc[ROWS][PANELS][2] = {};
    if constexpr (sizeof(T) == 4) {
        for (int64_t k = 0; k < inputs; k++, a += ROWS)
            for (int p = 0; p < PANELS; p++) {
                const float* w = weights + p * panel_size + k * NR;
                vf w0 = load(w), w1 = load(w + W);
                if (ROWS > 2) fetch(reinterpret_cast<const char*>(w) + AHEAD);
                for (int r = 0; r < ROWS; r++) {
                    acc[r][p][0] += a[r] * w0;
                    acc[r][p][1] += a[r] * w1;
                }
            }
    } else {
        for (int64_t k = 0; k < inputs; k += 2, a += 2 * ROWS)
            for (int p = 0; p < PANELS; p++) {
                const T* w = weights + p * panel_size + k * NR;
                vu u0 = *reinterpret_cast<const vu_u*>(w), u1 = *reinterpret_cast<const vu_u*>(w + 2 * W);
                if (ROWS > 2) fetch(reinterpret_cast<const char*>(w) + AHEAD);
                vf low0 = reinterpret_cast<vf>(u0 << 16), low1 = reinterpret_cast<vf>(u1 << 16);
                vf high0 = reinterpret_cast<vf>(u0 & 0xffff0000u), high1 = reinterpret_cast<vf>(u1 & 0xffff0000u);
                for (int r = 0; r < ROWS; r++) {
                    acc[r][p][0] += a[r] * low0;
                    acc[r][p][1] += a[r] * low1;
                }
                for (int r = 0; r < ROWS; r++) {
                    acc[r][p][0] += a[ROWS + r] * high0;
                    acc[r][p][1] += a[ROWS + r] * high1;
                }
            }
    }
    std::memcpy(y, acc, sizeof(acc));
}

struct Output {
    float* y;
    int64_t stride;
    enum { SET, ADD, GATE } how;  // ADD: to what is there; GATE: W outputs gate the W after them, and W are left
};

template <int ROWS, int PANELS, class T>
void tile(const Matrix& m, int64_t panel, int64_t inputs, const float* a, const RowScale* scales, int64_t row,
          const Output& out) {
    const int64_t panel_size = inputs * NR;
    vf y[ROWS][PANELS][2];
    kernel<ROWS, PANELS>(static_cast<const T*>(m.data) + panel * panel_size, panel_size, inputs, a, scales, y);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) {
            int64_t first = (panel + p) * NR, count = std::min<int64_t>(NR, m.outputs - first);
            float* to = out.y + (row + r) * out.stride + first;
            if (count == NR) {
                for (int h = 0; h < 2; h++) {
                    vf& value = y[r][p][h];
                    if constexpr (sizeof(T) == 1) value *= load(m.scales + first + h * W);
                    if (m.bias) value += load(m.bias + first + h * W);
                    if (out.how == Output::ADD) value += load(to + h * W);
                    if (out.how != Output::GATE) store(to + h * W, value);
                }
                if (out.how == Output::GATE) store(to - first / 2, silu(y[r][p][0]) * y[r][p][1]);
                continue;
            }
            const float* from = reinterpret_cast<const float*>(y[r][p]);
            for (int64_t i = 0; i < count; i++) {
                float value = (sizeof(T) == 1 ? from[i] * m.scales[first + i] : from[i]) + (m.bias ? m.bias[first + i] : 0.0f);
                to[i] = out.how == Output::ADD ? to[i] + value : value;
            }
        }
}

template <int ROWS, class T>
void tiles(int rows, const Matrix& m, int64_t panel, int64_t end, int64_t inputs, const float* a, const RowScale* scales,
           int64_t row, const Output& out) {
    if constexpr (ROWS > 0) {
        if (rows != ROWS) return tiles<ROWS - 1, T>(rows, m, panel, end, inputs, a, scales, row, out);
        constexpr int PANELS = ROWS == 1 ? 4 : ROWS <= 2 ? 2 : 1;
        for (; panel + PANELS <= end; panel += PANELS) tile<ROWS, PANELS, T>(m, panel, inputs, a, scales, row, out);
        for (; panel < end; panel++) tile<ROWS, 1, T>(m, panel, inputs, a, scales, row, out);
    }
}

// Rows go through the linear layers in groups of about MOST_ROWS.
struct Group {
    int64_t first, size;
};
inline int64_t groups_of(int64_t rows) { return (rows + MOST_ROWS - 1) / MOST_ROWS; }
inline Group group_of(int64_t rows, int64_t g) {
    const int64_t groups = groups_of(rows), first = rows * g / groups;
    return {first, rows * (g + 1) / groups - first};
}
inline int64_t padded_inputs(int64_t inputs, int64_t type) {
    const int64_t pair = type == 4 ? 1 : 4 / type;
    return (inputs + pair - 1) / pair * pair;
}
inline int64_t row_floats(const Matrix& m) {  // that an interleaved row takes
    return padded_inputs(m.inputs, m.type) / together(m.type);
}

// Rows interleaved by groups, their first inputs side by side, so that a tile reads them in order.
struct Rows {
    float* data;
    RowScale* scales;  // [rows], for int8
};

// A row in int8, four numbers in the place of a float.
RowScale quantize(const float* x, int64_t count, int8_t* to) {
    vf most = {};
    int64_t k = 0;
    for (; k + W <= count; k += W) {
        vf y = load(x + k);
        y = y < 0 ? -y : y;
        most = most > y ? most : y;
    }
    float top = largest(most);
    for (; k < count; k++) top = std::max(top, std::fabs(x[k]));
    const float scale = top / 127.0f, inverse = top > 0 ? 127.0f / top : 0.0f;
    int32_t total = 0;
    for (k = 0; k < count; k++) {
        const int32_t q = static_cast<int32_t>(x[k] * inverse + 12582912.0f - 12582912.0f);  // to nearest, ties to even
        to[k] = static_cast<int8_t>(q);
        total += q;
    }
    return {scale, 128 * total};
}

// A row in bfloat16, two numbers in the place of a float.
void narrow(const float* x, int64_t count, float* to) {
    auto* bytes = reinterpret_cast<char*>(to);
    int64_t k = 0;
    for (; k + W <= count; k += W) {
        const vh_u y = narrow(load(x + k));
        std::memcpy(bytes + 2 * k, &y, sizeof(y));
    }
    vf rest = {};
    std::memcpy(&rest, x + k, (count - k) * 4);
    const vh_u y = narrow(rest);
    std::memcpy(bytes + 2 * k, &y, (count - k) * 2);
}

// Row i of the square becomes its column i: each pass shuffles the halves like cards.
inline void transpose(vf (&x)[W]) {
    for (int step = 1; step < W; step *= 2) {
        vf y[W];
        for (int i = 0; i < W / 2; i++) {
            const vf a = x[i], b = x[i + W / 2];
#ifdef __AVX512F__
            y[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            y[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
            y[2 * i] = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
            y[2 * i + 1] = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#endif
        }
        std::memcpy(x, y, sizeof(y));
    }
}

// row(r) points to one of the group's rows, valid until the next call.
template <class Row>
void interleave(const Matrix& m, const Group& group, Row row, const Rows& packed) {
    const int64_t floats = row_floats(m), stride = (floats + W - 1) / W * W;
    float* to = packed.data + group.first * floats;
    thread_local std::vector<float> rows;
    rows.resize(group.size * stride);
    for (int64_t r = 0; r < group.size; r++) {
        const float* x = row(group.first + r);
        float* y = rows.data() + r * stride;
        std::fill(y + floats - 1, y + stride, 0.0f);  // the last one may be there in part
        if (m.type == 1)
            packed.scales[group.first + r] = quantize(x, m.inputs, reinterpret_cast<int8_t*>(y));
        else if (together(m.type) == 2)
            narrow(x, m.inputs, y);
        else
            std::memcpy(y, x, m.inputs * sizeof(float));
    }
    if (group.size == 1) {
        std::memcpy(to, rows.data(), floats * sizeof(float));
        return;
    }
    for (int64_t k = 0; k < floats; k += W) {
        vf square[W] = {};
        for (int64_t r = 0; r < group.size; r++) square[r] = load(rows.data() + r * stride + k);
        transpose(square);
        for (int64_t i = 0; i < std::min<int64_t>(W, floats - k); i++) {
            const int64_t at = (k + i) * group.size;
            if (at + W <= floats * group.size)  // the next one is written over what is too much
                store(to + at, square[i]);
            else
                std::memcpy(to + at, &square[i], group.size * sizeof(float));
        }
    }
}

// A linear layer over interleaved rows.
template <class T>
void linear(Team::Turn& turn, const Matrix& m, const Rows& packed, int64_t rows, const Output& out) {
    const int64_t inputs = padded_inputs(m.inputs, m.type), floats = row_floats(m);
    const int64_t panels = (m.outputs + NR - 1) / NR, groups = groups_of(rows);
    const int64_t blocks = (groups + GROUPS_TOGETHER - 1) / GROUPS_TOGETHER;
    // A strip of panels stays in the cache while a block of groups passes; there are some strips for each thread.
    const int64_t strip = std::clamp<int64_t>(panels * blocks / (4 * turn.threads()), 1, 4);
    turn.each((panels + strip - 1) / strip * blocks, [&](int64_t i) {
        const int64_t panel = i / blocks * strip, block = i % blocks;
        for (int64_t g = groups * block / blocks; g < groups * (block + 1) / blocks; g++) {
            const Group group = group_of(rows, g);
            tiles<MOST_ROWS, T>(group.size, m, panel, std::min(panels, panel + strip), inputs,
                                packed.data + group.first * floats, packed.scales + group.first, group.first, out);
        }
    });
}

void linear(Team::Turn& turn, const Matrix& m, const Rows& packed, int64_t rows, const Output& out) {
    static const bool vnni = __builtin_cpu_supports("avx512vnni") && W == 16;
    if (m.type == 4)
        linear<float>(turn, m, packed, rows, out);
    else if (m.type == 2 && multiplies_bf16())
        linear<Dots<bf16, true>>(turn, m, packed, rows, out);
    else if (m.type == 2)
        linear<bf16>(turn, m, packed, rows, out);
    else if (vnni)
        linear<Dots<uint8_t, true>>(turn, m, packed, rows, out);
    else
        linear<Dots<uint8_t, false>>(turn, m, packed, rows, out);
}

}  // namespace
