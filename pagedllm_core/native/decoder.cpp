// One step of a decoder on a CPU: linear layers over packed weights, paged attention, and what lies between.
//
// The file is compiled once for each tier of instructions (see build.py); W is the width of the tier's vectors. Weights
// are float32, bfloat16 or int8, everything between two layers is float32.
//
// Every number of a row depends on that row alone, added up in one order whatever else is in the batch: a row's result
// is bit-equal alone and in company, in one chunk or several.
//
//     packed weights, NR = 2 W outputs side by side       [N / NR][K / 4][NR][4]   int8, four inputs in 32 bits
//                                                         [N / NR][K / 2][NR][2]   bfloat16, two inputs in 32 bits
//                                                         [N / NR][K][NR]          float32

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <vector>

#include <immintrin.h>

#include "team.h"

namespace {

#ifdef __AVX512F__
constexpr int W = 16, MOST_ROWS = 12;
#else
constexpr int W = 8, MOST_ROWS = 6;
#endif
constexpr int NR = 2 * W;
constexpr int GROUPS_TOGETHER = 8;  // groups of MOST_ROWS rows that pass over a weight while it is in the cache
constexpr int MOST_QUERIES = 3 * W;  // (row, head) pairs that pass over a slice of keys together
constexpr int SLICE = 4 * W;         // keys of a slice of a chunk
constexpr int MOST_DIM = 256;
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

}  // namespace

extern "C" {

struct Matrix {  // y = x W^T + bias
    const void* data;
    const float* bias;    // or null
    const float* scales;  // [outputs], of int8 weights
    int64_t outputs, inputs;
    int64_t type;  // bytes of a weight: 4 float32, 2 bfloat16, 1 int8
};

struct Attention {
    void* keys;  // [kv_heads][blocks][block_size][dim]
    void* values;
    const float* sinks;  // [heads], or null
    int64_t heads, kv_heads, dim, blocks, block_size;
    int64_t is_bf16;
    int64_t window;    // 0: all
    int64_t in_order;  // sums must not depend on what else is in the step
    float scale, softcap;  // softcap 0: none
};

struct Step {
    int64_t tokens, sequences, logits;
    const int64_t *token_ids, *positions, *slots, *logits_rows;
    const int32_t *query_starts, *context_lens, *block_tables;
    int64_t table_width;
};

struct Layer {
    Matrix qkv, o, gate_up, down;
    const float *input_norm, *post_norm;
    const float *q_norm, *k_norm;  // [dim], or null
    Attention attention;
};

struct Decoder {
    const Layer* layers;
    int64_t num_layers, hidden, intermediate, rotary_dim;
    float epsilon;
    const void* embedding;  // [vocab][hidden]
    int64_t embedding_is_bf16;
    const float* cosines;  // [positions][rotary_dim]
    const float* sines;
    const float* norm;
    Matrix head;
};
}

namespace {

// Linear layers.
//
// int8 is W8A8: weights are scaled by output, and the inputs of each row by their largest. Sums are of integers, so they
// are exact. Weights are stored with 128 added, as the instruction multiplies unsigned bytes with signed ones.

template <bool VNNI>
struct Int8 {
    uint8_t value;
};

struct RowScale {  // of a row in int8
    float scale;
    int32_t offset;  // 128 times the sum of its numbers, which the weights' 128 adds
};

// acc plus four unsigned bytes in each lane of w times the four signed bytes at x.
template <bool VNNI>
inline vi dot(vi acc, vi w, const float* x) {
#ifdef __AVX512F__
    if constexpr (VNNI) {  // gcc 12 spills accumulators around the intrinsic
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*x));
        return acc;
    }
    const __m512i weights = reinterpret_cast<__m512i>(w);
    const __m512i four = _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x));
    const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16(four, 8), 8), odd = _mm512_srai_epi16(four, 8);
    acc += reinterpret_cast<vi>(_mm512_madd_epi16(_mm512_and_si512(weights, _mm512_set1_epi16(255)), even));
    return acc + reinterpret_cast<vi>(_mm512_madd_epi16(_mm512_srli_epi16(weights, 8), odd));
#else
    const __m256i weights = reinterpret_cast<__m256i>(w);
    const __m256i four = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x));
    const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8), odd = _mm256_srai_epi16(four, 8);
    acc += reinterpret_cast<vi>(_mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(255)), even));
    return acc + reinterpret_cast<vi>(_mm256_madd_epi16(_mm256_srli_epi16(weights, 8), odd));
#endif
}

template <int ROWS, int PANELS, bool VNNI>
inline void kernel(const Int8<VNNI>* weights, int64_t panel_size, int64_t inputs, const float* a, const RowScale* scales,
                   vf (&y)[ROWS][PANELS][2]) {
    vi acc[ROWS][PANELS][2] = {};
    for (int64_t k = 0; k < inputs; k += 4, a += ROWS)
        for (int p = 0; p < PANELS; p++) {
            const Int8<VNNI>* w = weights + p * panel_size + k * NR;
            const vi w0 = *reinterpret_cast<const vi_u*>(w), w1 = *reinterpret_cast<const vi_u*>(w + 4 * W);
            for (int r = 0; r < ROWS; r++) {
                acc[r][p][0] = dot<VNNI>(acc[r][p][0], w0, a + r);
                acc[r][p][1] = dot<VNNI>(acc[r][p][1], w1, a + r);
            }
        }
    std::memcpy(y, acc, sizeof(acc));  // at once: as long as they are summed up, they stay in registers
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
    bool add;  // to what is there
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
                    vf value = y[r][p][h];
                    if constexpr (sizeof(T) == 1) value *= load(m.scales + first + h * W);
                    if (m.bias) value += load(m.bias + first + h * W);
                    if (out.add) value += load(to + h * W);
                    store(to + h * W, value);
                }
                continue;
            }
            const float* from = reinterpret_cast<const float*>(y[r][p]);
            for (int64_t i = 0; i < count; i++) {
                float value = (sizeof(T) == 1 ? from[i] * m.scales[first + i] : from[i]) + (m.bias ? m.bias[first + i] : 0.0f);
                to[i] = out.add ? to[i] + value : value;
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
    return m.type == 1 ? padded_inputs(m.inputs, 1) / 4 : padded_inputs(m.inputs, m.type);
}

// Rows interleaved by groups, their first inputs side by side, so that a tile reads them in order.
struct Rows {
    float* data;
    RowScale* scales;  // [rows], for int8
};

// A row in int8, four numbers in the place of a float.
RowScale quantize(const float* x, int64_t count, int64_t padded, int8_t* to) {
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
    for (; k < padded; k++) to[k] = 0;
    return {scale, 128 * total};
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
        if (m.type == 1)
            packed.scales[group.first + r] = quantize(x, m.inputs, 4 * floats, reinterpret_cast<int8_t*>(y));
        else
            std::memcpy(y, x, m.inputs * sizeof(float));
        std::fill(y + (m.type == 1 ? floats : m.inputs), y + stride, 0.0f);
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
    else if (m.type == 2)
        linear<bf16>(turn, m, packed, rows, out);
    else if (vnni)
        linear<Int8<true>>(turn, m, packed, rows, out);
    else
        linear<Int8<false>>(turn, m, packed, rows, out);
}

// Paged attention.

struct Task {  // rows `first` .. `end` - 1 of the step, all of one sequence
    int64_t sequence, first, end;
};

std::vector<Task> tasks_of(const Step& step, int64_t group) {
    const int64_t together = std::max<int64_t>(1, MOST_QUERIES / group);
    std::vector<Task> tasks;
    for (int64_t s = 0; s < step.sequences; s++)
        for (int64_t row = step.query_starts[s]; row < step.query_starts[s + 1]; row += together)
            tasks.push_back({s, row, std::min<int64_t>(step.query_starts[s + 1], row + together)});
    return tasks;
}

// The rows of a [rows][dim] array as float32, `stride` apart.
template <class T>
void widen(const T* from, int64_t rows, int64_t dim, int64_t stride, float* to) {
    for (int64_t j = 0; j < rows; j++, from += dim, to += stride) {
        int64_t d = 0;
        for (; d + W <= dim; d += W) store(to + d, load(from + d));
        for (; d < dim; d++) to[d] = to_float(from[d]);
    }
}

// acc = acc * keep + weights * values, for HEADS heads that see the values of the same slots.
template <int HEADS>
void add_values(const float* weights, const float* keep, const float* values, int64_t low, int64_t high, int64_t stride,
                float* acc) {
    int64_t d = 0;
    auto columns = [&](auto vectors) {
        constexpr int N = decltype(vectors)::value;
        for (; d + N * W <= stride; d += N * W) {
            vf y[HEADS][N];
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < N; i++) y[h][i] = load(acc + h * stride + d + i * W) * keep[h];
            for (int64_t j = low; j < high; j++)
                for (int i = 0; i < N; i++) {
                    const vf value = load(values + j * stride + d + i * W);
                    for (int h = 0; h < HEADS; h++) y[h][i] += weights[h * W + j] * value;
                }
            for (int h = 0; h < HEADS; h++)
                for (int i = 0; i < N; i++) store(acc + h * stride + d + i * W, y[h][i]);
        }
    };
    columns(std::integral_constant<int, 4>{});
    columns(std::integral_constant<int, 1>{});
}

// One key head's queries of one task. Keys and values pass in slices of at most W slots of a block, and softmax is
// computed online, slice by slice from the sequence's first, so that the order of every sum depends on positions only.
template <class T>
void attend(const Attention& at, const Step& step, const Task& task, int64_t kv_head, int64_t head, int64_t heads,
            const float* q, int64_t q_row, int64_t q_head, float* out) {
    const int64_t dim = at.dim, size = at.block_size, rows = task.end - task.first, pairs = rows * heads;
    const int64_t stride = (dim + W - 1) / W * W;
    const int64_t position = step.context_lens[task.sequence] - (step.query_starts[task.sequence + 1] - task.first);
    const int64_t lowest = at.window ? std::max<int64_t>(0, position - at.window + 1) : 0, end = position + rows;
    const int32_t* table = step.block_tables + task.sequence * step.table_width;
    alignas(64) float queries[MOST_QUERIES * MOST_DIM], acc[MOST_QUERIES * MOST_DIM];
    alignas(64) float keys[W * MOST_DIM], values[W * MOST_DIM], weights[2 * W];
    float highest[MOST_QUERIES], total[MOST_QUERIES];
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    std::memset(queries, 0, pairs * stride * sizeof(float));
    std::memset(acc, 0, pairs * stride * sizeof(float));
    std::memset(keys, 0, W * stride * sizeof(float));
    std::memset(values, 0, W * stride * sizeof(float));
    for (int64_t p = 0; p < pairs; p++) {
        const float* query = q + (task.first + p / heads) * q_row + (head + p % heads) * q_head;
        for (int64_t d = 0; d < dim; d++) queries[p * stride + d] = query[d] * at.scale;
        highest[p] = -INFINITE, total[p] = 0;
    }
    auto place = [&](const void* from, int64_t at_position) {
        return static_cast<const T*>(from) + ((kv_head * at.blocks + table[at_position / size]) * size + at_position % size) * dim;
    };
    for (int64_t first = lowest / size * size; first < end;) {  // the slice's slots hold positions first .. last - 1
        const int64_t last = std::min({first + W, (first / size + 1) * size, end});
        widen(place(at.keys, first), last - first, dim, stride, keys);
        widen(place(at.values, first), last - first, dim, stride, values);
        for (int64_t p = 0; p < pairs;) {
            const int64_t here = position + p / heads;  // sees this position and `window` - 1 before it
            const int low = at.window ? std::max<int64_t>(0, here - at.window + 1 - first) : 0;
            const int high = std::min(last, here + 1) - first;
            const int together = p % heads + 1 < heads ? 2 : 1;
            if (low >= high) {
                p += together;
                continue;
            }
            const vi outside = (lane < low) | (lane >= high);
            float keep[2];
            for (int h = 0; h < together; h++) {
                vf dots[W] = {};
                for (int64_t d = 0; d < stride; d += W) {
                    const vf query = load(queries + (p + h) * stride + d);
                    for (int j = 0; j < W; j++) dots[j] += query * load(keys + j * stride + d);
                }
                vf scores = sums(dots);
                if (at.softcap != 0)
                    for (int j = 0; j < W; j++) scores[j] = at.softcap * std::tanh(scores[j] / at.softcap);
                scores = outside ? all(-INFINITE) : scores;
                const float before = highest[p + h], most = std::max(before, largest(scores));
                const vf weight = outside ? all(0.0f) : exponential(scores - most);
                keep[h] = before == -INFINITE ? 0 : exponential(all(before - most))[0];
                highest[p + h] = most;
                total[p + h] = total[p + h] * keep[h] + sum(weight);
                store(weights + h * W, weight);
            }
            if (together == 2)
                add_values<2>(weights, keep, values, low, high, stride, acc + p * stride);
            else
                add_values<1>(weights, keep, values, low, high, stride, acc + p * stride);
            p += together;
        }
        first = last;
    }
    for (int64_t p = 0; p < pairs; p++) {
        float sinks = at.sinks ? at.sinks[head + p % heads] : -INFINITE;
        float most = std::max(highest[p], sinks), keep = std::exp(highest[p] - most);
        float factor = keep / (total[p] * keep + std::exp(sinks - most));
        float* to = out + ((task.first + p / heads) * at.heads + head + p % heads) * dim;
        for (int64_t d = 0; d < dim; d++) to[d] = acc[p * stride + d] * factor;
    }
}

// scores[j][p] = keys[j] . queries[p], with N vectors of pairs side by side: queries are [dim][MOST_QUERIES].
template <int N>
void multiply_keys(const float* keys, int64_t stride, int64_t count, const float* queries, int64_t dim, float* scores) {
    constexpr int KEYS = W == 16 ? 8 : 4;  // whose sums stay in registers
    for (int64_t j = 0; j < count; j += KEYS, keys += KEYS * stride, scores += KEYS * MOST_QUERIES) {
        vf acc[KEYS][N] = {};
        for (int64_t d = 0; d < dim; d++)
            for (int i = 0; i < KEYS; i++)
                for (int n = 0; n < N; n++) acc[i][n] += keys[i * stride + d] * load(queries + d * MOST_QUERIES + n * W);
        for (int i = 0; i < KEYS; i++)
            for (int n = 0; n < N; n++) store(scores + i * MOST_QUERIES + n * W, acc[i][n]);
    }
}

// acc[p] = acc[p] * keep[p] + sum over j of weights[j][p] values[j], for P pairs and four vectors of columns.
template <int P>
inline void weigh_values(const float* weights, const float* keep, const float* values, int64_t stride, int64_t count,
                       float* acc) {
    vf y[P][4];
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) y[p][i] = load(acc + p * stride + i * W) * keep[p];
    for (int64_t j = 0; j < count; j++, weights += MOST_QUERIES, values += stride) {
        const vf v0 = load(values), v1 = load(values + W), v2 = load(values + 2 * W), v3 = load(values + 3 * W);
        for (int p = 0; p < P; p++) {
            const vf weight = all(weights[p]);
            y[p][0] += weight * v0;
            y[p][1] += weight * v1;
            y[p][2] += weight * v2;
            y[p][3] += weight * v3;
        }
    }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < 4; i++) store(acc + p * stride + i * W, y[p][i]);
}

template <int P = W == 16 ? 6 : 2>
void weigh_values(int64_t pairs, const float* weights, const float* keep, const float* values, int64_t stride, int64_t count,
                float* acc) {
    int64_t p = 0;
    for (; p + P <= pairs; p += P) weigh_values<P>(weights + p, keep + p, values, stride, count, acc + p * stride);
    if constexpr (P > 1)
        if (p < pairs) weigh_values<P / 2>(pairs - p, weights + p, keep + p, values, stride, count, acc + p * stride);
}

// A chunk's softmax state: a lane for each pair, N vectors of them.
template <int N>
struct Softmax {
    vf highest[N], total[N], keep[N];
    vi sees[N];  // the position up to which a pair sees keys

    // Scores of the slots that hold positions first + low .. first + high - 1 become weights, in place.
    void add(const Attention& at, float* scores, int64_t first, int64_t low, int64_t high, bool all_seen) {
        for (int n = 0; n < N; n++) {
            const vi last = sees[n] - static_cast<int32_t>(first);  // as slots
            const vi begin = at.window ? last - static_cast<int32_t>(at.window) : last - std::numeric_limits<int32_t>::max() / 2;
            vf top = highest[n];
            for (int64_t j = low; j < high; j++) {
                vf score = load(scores + j * MOST_QUERIES + n * W);
                if (at.softcap != 0)
                    for (int i = 0; i < W; i++) score[i] = at.softcap * std::tanh(score[i] / at.softcap);
                if (!all_seen) score = (last < static_cast<int32_t>(j)) | (begin >= static_cast<int32_t>(j)) ? all(-INFINITE) : score;
                top = top > score ? top : score;
                store(scores + j * MOST_QUERIES + n * W, score);
            }
            const vf base = top == -INFINITE ? vf{} : top;  // of a pair that has seen nothing yet
            keep[n] = highest[n] == -INFINITE ? vf{} : exponential(highest[n] - base);
            vf added = {};
            for (int64_t j = low; j < high; j++) {
                const vf score = load(scores + j * MOST_QUERIES + n * W);
                const vf weight = score == -INFINITE ? vf{} : exponential(score - base);
                added += weight;
                store(scores + j * MOST_QUERIES + n * W, weight);
            }
            highest[n] = top;
            total[n] = total[n] * keep[n] + added;
        }
    }
};

// The same for a chunk of many pairs, which lie side by side in the lanes: neither scores nor softmax need anything
// across lanes. It adds up in another order than `attend`, which a lone token takes.
template <class T, int N>
void attend_chunk(const Attention& at, const Step& step, const Task& task, int64_t kv_head, int64_t head, int64_t heads,
                  const float* q, int64_t q_row, int64_t q_head, float* out) {
    const int64_t dim = at.dim, size = at.block_size, rows = task.end - task.first, pairs = rows * heads;
    const int64_t stride = (dim + SLICE - 1) / SLICE * SLICE;
    const int64_t position = step.context_lens[task.sequence] - (step.query_starts[task.sequence + 1] - task.first);
    const int64_t lowest = at.window ? std::max<int64_t>(0, position - at.window + 1) : 0, end = position + rows;
    const int32_t* table = step.block_tables + task.sequence * step.table_width;
    alignas(64) float queries[MOST_DIM * MOST_QUERIES], acc[MOST_QUERIES * MOST_DIM], scores[SLICE * MOST_QUERIES];
    alignas(64) float keys[SLICE * MOST_DIM], values[SLICE * MOST_DIM];
    Softmax<N> softmax;
    std::memset(queries, 0, dim * MOST_QUERIES * sizeof(float));
    std::memset(acc, 0, pairs * stride * sizeof(float));
    std::memset(keys, 0, SLICE * stride * sizeof(float));
    std::memset(values, 0, SLICE * stride * sizeof(float));
    for (int n = 0; n < N; n++) {
        softmax.highest[n] = all(-INFINITE), softmax.total[n] = vf{};
        for (int i = 0; i < W; i++) softmax.sees[n][i] = position + std::min<int64_t>(n * W + i, pairs - 1) / heads;
    }
    for (int64_t p = 0; p < pairs; p++) {
        const float* query = q + (task.first + p / heads) * q_row + (head + p % heads) * q_head;
        for (int64_t d = 0; d < dim; d++) queries[d * MOST_QUERIES + p] = query[d] * at.scale;
    }
    for (int64_t first = lowest / SLICE * SLICE; first < end; first += SLICE) {
        const int64_t from = std::max(first, lowest / size * size), last = std::min(first + SLICE, end);
        for (int64_t j = from; j < last;) {  // block by block
            const int64_t next = std::min(last, (j / size + 1) * size);
            const int64_t slot = ((kv_head * at.blocks + table[j / size]) * size + j % size) * dim;
            widen(static_cast<const T*>(at.keys) + slot, next - j, dim, stride, keys + (j - first) * stride);
            widen(static_cast<const T*>(at.values) + slot, next - j, dim, stride, values + (j - first) * stride);
            j = next;
        }
        const int64_t low = from - first, high = last - first;
        multiply_keys<N>(keys, stride, high, queries, dim, scores);
        softmax.add(at, scores, first, low, high, at.window == 0 && last <= position + 1);
        const float* weights = scores + low * MOST_QUERIES;
        const float* keep = reinterpret_cast<const float*>(softmax.keep);
        for (int64_t d = 0; d < dim; d += SLICE)
            weigh_values(pairs, weights, keep, values + low * stride + d, stride, high - low, acc + d);
    }
    for (int64_t p = 0; p < pairs; p++) {
        const float highest = softmax.highest[p / W][p % W], total = softmax.total[p / W][p % W];
        float sinks = at.sinks ? at.sinks[head + p % heads] : -INFINITE;
        float most = std::max(highest, sinks), factor = std::exp(highest - most);
        factor /= total * factor + std::exp(sinks - most);
        float* to = out + ((task.first + p / heads) * at.heads + head + p % heads) * dim;
        for (int64_t d = 0; d < dim; d++) to[d] = acc[p * stride + d] * factor;
    }
}

template <class T>
void attend_task(const Attention& at, const Step& step, const Task& task, int64_t kv_head, int64_t head, int64_t heads,
                 const float* q, int64_t q_row, int64_t q_head, float* out) {
    const int64_t pairs = (task.end - task.first) * heads;
    auto* chosen = at.in_order || pairs < 12 ? attend<T>
                   : pairs <= W              ? attend_chunk<T, 1>
                   : pairs <= 2 * W          ? attend_chunk<T, 2>
                                             : attend_chunk<T, 3>;
    chosen(at, step, task, kv_head, head, heads, q, q_row, q_head, out);
}

// All attention of one layer: out is [tokens][heads][dim].
void attend_all(Team::Turn& turn, const Attention& at, const Step& step, const std::vector<Task>& tasks, const float* q,
                int64_t q_row, int64_t q_head, float* out) {
    const int64_t group = at.heads / at.kv_heads, together = std::min<int64_t>(group, MOST_QUERIES);
    turn.each(tasks.size() * at.kv_heads, [&](int64_t i) {
        const int64_t kv_head = i % at.kv_heads;
        const Task& task = tasks[i / at.kv_heads];
        for (int64_t h = 0; h < group; h += together) {
            const int64_t heads = std::min(together, group - h);
            auto* attend_one = at.is_bf16 ? attend_task<bf16> : attend_task<float>;
            attend_one(at, step, task, kv_head, kv_head * group + h, heads, q, q_row, q_head, out);
        }
    });
}

template <class T>
void write_slot(const Attention& at, int64_t slot, int64_t kv_head, const float* k, const float* v) {
    const int64_t place = (kv_head * at.blocks * at.block_size + slot) * at.dim;
    for (int64_t d = 0; d < at.dim; d++) {
        put(static_cast<T*>(at.keys) + place + d, k[d]);
        put(static_cast<T*>(at.values) + place + d, v[d]);
    }
}

// What lies between.

float root_mean_square(const float* x, int64_t count, float epsilon) {
    vf squares = {};
    int64_t i = 0;
    for (; i + W <= count; i += W) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < count; i++) total += x[i] * x[i];
    return 1.0f / std::sqrt(total / count + epsilon);
}

void rms_norm(const float* x, const float* weight, int64_t count, float epsilon, float* y) {
    const float factor = root_mean_square(x, count, epsilon);
    for (int64_t i = 0; i < count; i++) y[i] = x[i] * factor * weight[i];
}

void rotate(float* x, const float* cosines, const float* sines, int64_t dim) {
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];
        x[i] = a * cosines[i] - b * sines[i];
        x[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
}

void rotate_and_write(const Decoder& d, const Layer& layer, const Step& step, int64_t t, float* row) {
    const Attention& at = layer.attention;
    const int64_t table = step.positions[t] * d.rotary_dim;
    for (int64_t h = 0; h < at.heads + at.kv_heads; h++) {
        float* x = row + h * at.dim;
        const float* norm = h < at.heads ? layer.q_norm : layer.k_norm;
        if (norm) rms_norm(x, norm, at.dim, d.epsilon, x);
        rotate(x, d.cosines + table, d.sines + table, d.rotary_dim);
    }
    for (int64_t h = 0; h < at.kv_heads; h++) {
        const float *k = row + (at.heads + h) * at.dim, *v = k + at.kv_heads * at.dim;
        if (at.is_bf16)
            write_slot<bf16>(at, step.slots[t], h, k, v);
        else
            write_slot<float>(at, step.slots[t], h, k, v);
    }
}

void silu_mul(float* gate, const float* up, int64_t count) {  // the product takes the gate's place
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        vf g = load(gate + i);
        vf e = exponential(-(g < -87.0f ? all(-87.0f) : g));
        store(gate + i, g / (1.0f + e) * load(up + i));
    }
    for (; i < count; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

struct Buffer {  // aligned, not initialised
    explicit Buffer(int64_t count) : data(static_cast<float*>(::operator new(count * 4 + 64, std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    float* data;
};

void embed(const Decoder& d, int64_t token, float* x) {
    if (d.embedding_is_bf16)
        widen(static_cast<const bf16*>(d.embedding) + token * d.hidden, 1, d.hidden, d.hidden, x);
    else
        widen(static_cast<const float*>(d.embedding) + token * d.hidden, 1, d.hidden, d.hidden, x);
}

// One panel; `write(output, input, place)` is called for its padding, too, beyond the last output and input.
template <class Write>
void pack(int64_t inputs, int64_t type, int64_t panel, Write write) {
    const int64_t padded = padded_inputs(inputs, type), pair = 4 / type;
    for (int64_t k = 0; k < padded; k++)
        for (int64_t n = 0; n < NR; n++)
            write(panel * NR + n, k, panel * padded * NR + k / pair * pair * NR + n * pair + k % pair);
}

template <class T>
void pack_as_is(const T* weight, int64_t outputs, int64_t inputs, int64_t panel, T* packed) {
    constexpr int64_t PAIR = 4 / sizeof(T), AHEAD = 64 / sizeof(T);
    if ((panel + 1) * NR <= outputs && inputs % AHEAD == 0) {  // whole: 32 bits at a time, a cache line of each output
        const T* from = weight + panel * NR * inputs;
        T* to = packed + panel * NR * inputs;
        for (int64_t k = 0; k < inputs; k += AHEAD)
            for (int64_t n = 0; n < NR; n++)
                for (int64_t i = k; i < k + AHEAD; i += PAIR) std::memcpy(to + i * NR + n * PAIR, from + n * inputs + i, 4);
        return;
    }
    pack(inputs, sizeof(T), panel, [&](int64_t n, int64_t k, int64_t place) {
        packed[place] = n < outputs && k < inputs ? weight[n * inputs + k] : T(0);
    });
}

template <class T>
void pack_int8(const T* weight, int64_t outputs, int64_t inputs, int64_t panel, uint8_t* packed, float* scales) {
    float inverse[NR] = {};
    for (int64_t n = 0; n < NR && panel * NR + n < outputs; n++) {
        float top = 0;
        for (int64_t k = 0; k < inputs; k++)
            top = std::max(top, std::fabs(to_float(weight[(panel * NR + n) * inputs + k])));
        scales[panel * NR + n] = top / 127.0f;
        inverse[n] = top > 0 ? 127.0f / top : 0.0f;
    }
    pack(inputs, 1, panel, [&](int64_t n, int64_t k, int64_t place) {
        const bool inside = n < outputs && k < inputs;
        packed[place] = 128 + (inside ? std::lrint(to_float(weight[n * inputs + k]) * inverse[n - panel * NR]) : 0);
    });
}

Team& team() {
    static Team* made = new Team;  // its threads outlive everything
    return *made;
}

}  // namespace

extern "C" {

int64_t packed_size(int64_t outputs, int64_t inputs, int64_t type) {  // bytes
    return (outputs + NR - 1) / NR * NR * padded_inputs(inputs, type) * type;
}

// `from` and `type` are types as in Matrix; from another type only to int8, whose scales are written, too.
void pack_weight(const void* weight, int64_t outputs, int64_t inputs, int64_t from, int64_t type, void* packed,
                 float* scales, int64_t threads) {
    Team::Turn turn(team(), threads);
    const auto* floats = static_cast<const float*>(weight);
    const auto* halves = static_cast<const bf16*>(weight);
    turn.each((outputs + NR - 1) / NR, [&](int64_t panel) {
        if (type == 1 && from == 2)
            pack_int8(halves, outputs, inputs, panel, static_cast<uint8_t*>(packed), scales);
        else if (type == 1)
            pack_int8(floats, outputs, inputs, panel, static_cast<uint8_t*>(packed), scales);
        else if (type == 2)
            pack_as_is(halves, outputs, inputs, panel, static_cast<bf16*>(packed));
        else
            pack_as_is(floats, outputs, inputs, panel, static_cast<float*>(packed));
    });
}

void matmul(const Matrix* m, const float* x, int64_t rows, float* y, int64_t threads) {
    Team::Turn turn(team(), threads);
    Buffer data(rows * row_floats(*m));
    std::vector<RowScale> scales(rows);
    const Rows packed{data.data, scales.data()};
    turn.each(groups_of(rows), [&](int64_t g) {
        interleave(*m, group_of(rows, g), [&](int64_t row) { return x + row * m->inputs; }, packed);
    });
    linear(turn, *m, packed, rows, {y, m->outputs, false});
}

// q [heads][tokens][dim], k and v [kv_heads][tokens][dim], with the strides (head, row) given in numbers.
void attention(const Attention* at, const Step* step, const float* q, const float* k, const float* v,
               const int64_t* strides, float* out, int64_t threads) {
    Team::Turn turn(team(), threads);
    turn.each(groups_of(step->tokens), [&](int64_t g) {
        const Group group = group_of(step->tokens, g);
        for (int64_t t = group.first; t < group.first + group.size; t++)
            for (int64_t h = 0; h < at->kv_heads; h++) {
                const float *key = k + h * strides[2] + t * strides[3], *value = v + h * strides[4] + t * strides[5];
                if (at->is_bf16)
                    write_slot<bf16>(*at, step->slots[t], h, key, value);
                else
                    write_slot<float>(*at, step->slots[t], h, key, value);
            }
    });
    attend_all(turn, *at, *step, tasks_of(*step, at->heads / at->kv_heads), q, strides[1], strides[0], out);
}

// One step of the whole model; logits is [step.logits][head.outputs].
void decode(const Decoder* decoder, const Step* step, float* logits, int64_t threads) {
    const Decoder& d = *decoder;
    const Attention& at = d.layers[0].attention;
    const int64_t tokens = step->tokens, attended = at.heads * at.dim, qkv_width = (at.heads + 2 * at.kv_heads) * at.dim;
    const int64_t widest = std::max({d.hidden, d.intermediate, attended}) + 1;  // an odd number is padded
    const int64_t wide_width = std::max(2 * d.intermediate, qkv_width);
    Buffer x(tokens * d.hidden), out(tokens * attended), wide(tokens * wide_width);
    Buffer data(std::max(tokens, step->logits) * widest);
    std::vector<RowScale> scales(std::max(tokens, step->logits));
    const Rows packed{data.data, scales.data()};
    const std::vector<Task> tasks = tasks_of(*step, at.heads / at.kv_heads);
    Team::Turn turn(team(), threads);
    // What lies between two linear layers is done for a group of rows, and leaves them interleaved for the next one.
    auto each_group = [&](int64_t rows, auto body) {
        turn.each(groups_of(rows), [&](int64_t g) { body(group_of(rows, g)); });
    };
    auto normed = [&](const Matrix& next, const float* weight, const Group& group, auto row) {
        thread_local std::vector<float> y;
        y.resize(d.hidden);
        auto norm = [&](int64_t t) {
            rms_norm(x.data + row(t) * d.hidden, weight, d.hidden, d.epsilon, y.data());
            return y.data();
        };
        interleave(next, group, norm, packed);
    };
    auto same = [](int64_t t) { return t; };

    each_group(tokens, [&](const Group& group) {
        for (int64_t t = group.first; t < group.first + group.size; t++)
            embed(d, step->token_ids[t], x.data + t * d.hidden);
        normed(d.layers->qkv, d.layers->input_norm, group, same);
    });
    for (const Layer* layer = d.layers; layer != d.layers + d.num_layers; layer++) {
        linear(turn, layer->qkv, packed, tokens, {wide.data, qkv_width, false});
        each_group(tokens, [&](const Group& group) {
            for (int64_t t = group.first; t < group.first + group.size; t++)
                rotate_and_write(d, *layer, *step, t, wide.data + t * qkv_width);
        });
        attend_all(turn, layer->attention, *step, tasks, wide.data, qkv_width, at.dim, out.data);
        each_group(tokens, [&](const Group& group) {
            interleave(layer->o, group, [&](int64_t t) { return out.data + t * attended; }, packed);
        });
        linear(turn, layer->o, packed, tokens, {x.data, d.hidden, true});
        each_group(tokens, [&](const Group& group) { normed(layer->gate_up, layer->post_norm, group, same); });
        linear(turn, layer->gate_up, packed, tokens, {wide.data, 2 * d.intermediate, false});
        each_group(tokens, [&](const Group& group) {
            auto product = [&](int64_t t) {
                float* gate = wide.data + t * 2 * d.intermediate;
                silu_mul(gate, gate + d.intermediate, d.intermediate);
                return gate;
            };
            interleave(layer->down, group, product, packed);
        });
        linear(turn, layer->down, packed, tokens, {x.data, d.hidden, true});
        if (layer + 1 != d.layers + d.num_layers)
            each_group(tokens, [&](const Group& group) { normed(layer[1].qkv, layer[1].input_norm, group, same); });
    }
    each_group(step->logits, [&](const Group& group) {
        normed(d.head, d.norm, group, [&](int64_t i) { return step->logits_rows[i]; });
    });
    linear(turn, d.head, packed, step->logits, {logits, d.head.outputs, false});
}
}
