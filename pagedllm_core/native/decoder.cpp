// One step of a decoder on a CPU: linear layers over packed weights, paged attention, and what lies between.
//
// The file is compiled once for each tier of instructions (see build.py); W is the width of the tier's vectors. Weights
// are float32 or bfloat16, everything between two layers is float32.
//
// Every number of a row depends on that row alone, added up in one order whatever else is in the batch: a row's result
// is bit-equal alone and in company, in one chunk or several.
//
//     packed weights, NR = 2 W outputs side by side       [N / NR][K / 2][NR][2]   bfloat16, two inputs in 32 bits
//                                                         [N / NR][K][NR]          float32

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <vector>

#include <omp.h>

namespace {

#ifdef __AVX512F__
constexpr int W = 16, MOST_ROWS = 12;
#else
constexpr int W = 8, MOST_ROWS = 6;
#endif
constexpr int NR = 2 * W;
constexpr int ROWS_TOGETHER = 8 * MOST_ROWS;  // rows that pass over a weight while it is in the cache
constexpr int MOST_QUERIES = 32;              // (row, head) pairs that pass over a block of keys together
constexpr int MOST_DIM = 256;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

typedef float vf __attribute__((vector_size(4 * W)));
typedef float vf_u __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint32_t vu_u __attribute__((vector_size(4 * W), aligned(4)));
typedef uint16_t vh_u __attribute__((vector_size(2 * W), aligned(2)));
typedef uint16_t bf16;

inline vf load(const float* p) { return *reinterpret_cast<const vf_u*>(p); }
inline vf load(const bf16* p) {
    return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh_u*>(p), vu) << 16);
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

inline float sum(vf x) {  // halves on halves
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
#ifdef __AVX512F__
    v8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
           __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    v8 y = x;
#endif
    v4 z = __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
    return (z[0] + z[2]) + (z[1] + z[3]);
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
    const float* bias;  // or null
    int64_t outputs, inputs;
    int64_t is_bf16;
};

struct Attention {
    void* keys;  // [kv_heads][blocks][block_size][dim]
    void* values;
    const float* sinks;  // [heads], or null
    int64_t heads, kv_heads, dim, blocks, block_size;
    int64_t is_bf16;
    int64_t window;  // 0: all
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

template <int ROWS, int PANELS, class T>
inline void kernel(const T* weights, int64_t panel_size, int64_t inputs, const float* a, vf (&y)[ROWS][PANELS][2]) {
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
void tile(const Matrix& m, int64_t panel, int64_t inputs, const float* a, int64_t row, const Output& out) {
    const int64_t panel_size = inputs * NR;
    vf y[ROWS][PANELS][2];
    kernel<ROWS, PANELS>(static_cast<const T*>(m.data) + panel * panel_size, panel_size, inputs, a, y);
    for (int r = 0; r < ROWS; r++)
        for (int p = 0; p < PANELS; p++) {
            int64_t first = (panel + p) * NR, count = std::min<int64_t>(NR, m.outputs - first);
            float* to = out.y + (row + r) * out.stride + first;
            const float* from = reinterpret_cast<const float*>(y[r][p]);
            for (int64_t i = 0; i < count; i++) {
                float value = from[i] + (m.bias ? m.bias[first + i] : 0.0f);
                to[i] = out.add ? to[i] + value : value;
            }
        }
}

template <int ROWS, class T>
void tiles(int rows, const Matrix& m, int64_t panel, int64_t end, int64_t inputs, const float* a, int64_t row,
           const Output& out) {
    if constexpr (ROWS > 0) {
        if (rows != ROWS) return tiles<ROWS - 1, T>(rows, m, panel, end, inputs, a, row, out);
        constexpr int PANELS = ROWS == 1 ? 4 : ROWS <= 2 ? 2 : 1;
        for (; panel + PANELS <= end; panel += PANELS) tile<ROWS, PANELS, T>(m, panel, inputs, a, row, out);
        for (; panel < end; panel++) tile<ROWS, 1, T>(m, panel, inputs, a, row, out);
    }
}

// This thread's part of a linear layer; `scratch` holds ROWS_TOGETHER rows. Rows are interleaved there, a group's first
// inputs side by side, so that a tile reads them in order.
template <class T>
void linear_part(const Matrix& m, const float* x, int64_t stride, int64_t rows, const Output& out, float* scratch) {
    const int64_t inputs = sizeof(T) == 2 ? (m.inputs + 1) / 2 * 2 : m.inputs;
    const int64_t panels = (m.outputs + NR - 1) / NR, threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = panels * me / threads, last = panels * (me + 1) / threads;
    if (first == last) return;
    for (int64_t start = 0; start < rows; start += ROWS_TOGETHER) {
        const int64_t end = std::min<int64_t>(rows, start + ROWS_TOGETHER), count = end - start;
        const int64_t groups = (count + MOST_ROWS - 1) / MOST_ROWS;
        for (int64_t g = 0; g < groups; g++) {
            const int64_t from = start + count * g / groups, size = start + count * (g + 1) / groups - from;
            float* packed = scratch + (from - start) * inputs;
            for (int64_t r = 0; r < size; r++) {
                const float* row = x + (from + r) * stride;
                for (int64_t k = 0; k < m.inputs; k++) packed[k * size + r] = row[k];
                for (int64_t k = m.inputs; k < inputs; k++) packed[k * size + r] = 0;
            }
        }
        constexpr int64_t STRIP = 4;  // panels that stay in the cache while all groups pass
        for (int64_t panel = first; panel < last; panel += STRIP)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t from = start + count * g / groups, size = start + count * (g + 1) / groups - from;
                tiles<MOST_ROWS, T>(size, m, panel, std::min(last, panel + STRIP), inputs,
                                    scratch + (from - start) * inputs, from, out);
            }
    }
}

void linear(const Matrix& m, const float* x, int64_t stride, int64_t rows, const Output& out, float* scratch) {
    if (m.is_bf16)
        linear_part<bf16>(m, x, stride, rows, out, scratch);
    else
        linear_part<float>(m, x, stride, rows, out, scratch);
#pragma omp barrier
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

// One key head's queries of one task. Softmax is computed online, block by block from the sequence's first block, so
// that the order of every sum depends on positions only.
template <class T>
void attend(const Attention& at, const Step& step, const Task& task, int64_t kv_head, int64_t head, int64_t heads,
            const float* q, int64_t q_row, int64_t q_head, float* out) {
    const int64_t dim = at.dim, size = at.block_size, rows = task.end - task.first, pairs = rows * heads;
    const int64_t position = step.context_lens[task.sequence] - (step.query_starts[task.sequence + 1] - task.first);
    const int64_t lowest = at.window ? std::max<int64_t>(0, position - at.window + 1) : 0;
    const int32_t* table = step.block_tables + task.sequence * step.table_width;
    alignas(64) float acc[MOST_QUERIES][MOST_DIM];
    alignas(64) float scores[256 + W];
    float highest[MOST_QUERIES], total[MOST_QUERIES];
    for (int64_t p = 0; p < pairs; p++) {
        highest[p] = -INFINITE, total[p] = 0;
        std::memset(acc[p], 0, dim * sizeof(float));
    }
    for (int64_t block = lowest / size; block * size <= position + rows - 1; block++) {
        const int64_t place = ((kv_head * at.blocks) + table[block]) * size * dim;
        const T* keys = static_cast<const T*>(at.keys) + place;
        const T* values = static_cast<const T*>(at.values) + place;
        for (int64_t p = 0; p < pairs; p++) {
            const int64_t here = position + p / heads;
            const int64_t low = at.window ? std::max<int64_t>(0, here - at.window + 1 - block * size) : 0;
            const int64_t high = std::min<int64_t>(size, here + 1 - block * size);
            if (low >= high) continue;
            const float* query = q + (task.first + p / heads) * q_row + (head + p % heads) * q_head;
            float most = highest[p];
            for (int64_t j = low; j < high; j++) {
                vf dot = {};
                int64_t d = 0;
                for (; d + W <= dim; d += W) dot += load(query + d) * load(keys + j * dim + d);
                float score = sum(dot);
                for (; d < dim; d++) score += query[d] * to_float(keys[j * dim + d]);
                score *= at.scale;
                if (at.softcap != 0) score = at.softcap * std::tanh(score / at.softcap);
                scores[j - low] = score;
                most = std::max(most, score);
            }
            const int64_t count = high - low;
            for (int64_t j = count; j % W; j++) scores[j] = -INFINITE;
            for (int64_t j = 0; j < count; j += W) store(scores + j, exponential(load(scores + j) - most));
            const float keep = highest[p] == -INFINITE ? 0 : exponential(all(highest[p] - most))[0];
            highest[p] = most;
            total[p] *= keep;
            for (int64_t j = 0; j < count; j++) total[p] += scores[j];
            int64_t d = 0;
            for (; d + 4 * W <= dim; d += 4 * W) {
                vf y[4];
                for (int i = 0; i < 4; i++) y[i] = load(acc[p] + d + i * W) * keep;
                for (int64_t j = 0; j < count; j++)
                    for (int i = 0; i < 4; i++) y[i] += scores[j] * load(values + (low + j) * dim + d + i * W);
                for (int i = 0; i < 4; i++) store(acc[p] + d + i * W, y[i]);
            }
            for (; d + W <= dim; d += W) {
                vf y = load(acc[p] + d) * keep;
                for (int64_t j = 0; j < count; j++) y += scores[j] * load(values + (low + j) * dim + d);
                store(acc[p] + d, y);
            }
            for (; d < dim; d++) {
                float y = acc[p][d] * keep;
                for (int64_t j = 0; j < count; j++) y += scores[j] * to_float(values[(low + j) * dim + d]);
                acc[p][d] = y;
            }
        }
    }
    for (int64_t p = 0; p < pairs; p++) {
        float sinks = at.sinks ? at.sinks[head + p % heads] : -INFINITE;
        float most = std::max(highest[p], sinks), keep = std::exp(highest[p] - most);
        float factor = keep / (total[p] * keep + std::exp(sinks - most));
        float* to = out + ((task.first + p / heads) * at.heads + head + p % heads) * dim;
        for (int64_t d = 0; d < dim; d++) to[d] = acc[p][d] * factor;
    }
}

// All attention of one layer: out is [tokens][heads][dim].
void attention_part(const Attention& at, const Step& step, const std::vector<Task>& tasks, const float* q,
                    int64_t q_row, int64_t q_head, float* out) {
    const int64_t group = at.heads / at.kv_heads, together = std::min<int64_t>(group, MOST_QUERIES);
    const int64_t count = tasks.size() * at.kv_heads;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; i++) {
        const int64_t kv_head = i % at.kv_heads;
        for (int64_t h = 0; h < group; h += together) {
            const int64_t heads = std::min(together, group - h);
            if (at.is_bf16)
                attend<bf16>(at, step, tasks[i / at.kv_heads], kv_head, kv_head * group + h, heads, q, q_row, q_head, out);
            else
                attend<float>(at, step, tasks[i / at.kv_heads], kv_head, kv_head * group + h, heads, q, q_row, q_head, out);
        }
    }
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

void rotate_and_write(const Decoder& d, const Layer& layer, const Step& step, float* qkv) {
    const Attention& at = layer.attention;
    const int64_t heads = at.heads + 2 * at.kv_heads;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.tokens; t++) {
        float* row = qkv + t * heads * at.dim;
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
}

void silu_mul(float* gate_up, int64_t rows, int64_t count) {  // the product takes the gate's place
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        float *gate = gate_up + r * 2 * count, *up = gate + count;
        int64_t i = 0;
        for (; i + W <= count; i += W) {
            vf g = load(gate + i);
            vf e = exponential(-(g < -87.0f ? all(-87.0f) : g));
            store(gate + i, g / (1.0f + e) * load(up + i));
        }
        for (; i < count; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
    }
}

void normed(const Decoder& d, const float* x, const float* weight, int64_t rows, float* y) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++)
        rms_norm(x + t * d.hidden, weight, d.hidden, d.epsilon, y + t * d.hidden);
}

struct Buffer {  // aligned, not initialised
    explicit Buffer(int64_t count) : data(static_cast<float*>(::operator new(count * 4 + 64, std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    float* data;
};

template <class T>
void embed(const Decoder& d, const Step& step, float* x) {
#pragma omp for schedule(static)
    for (int64_t t = 0; t < step.tokens; t++) {
        const T* row = static_cast<const T*>(d.embedding) + step.token_ids[t] * d.hidden;
        for (int64_t i = 0; i < d.hidden; i++) x[t * d.hidden + i] = to_float(row[i]);
    }
}

template <class T>
void pack(const T* weight, int64_t outputs, int64_t inputs, T* packed) {
    const int64_t padded = sizeof(T) == 2 ? (inputs + 1) / 2 * 2 : inputs, pair = sizeof(T) == 2 ? 2 : 1;
    const int64_t panels = (outputs + NR - 1) / NR;
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < panels; panel++)
        for (int64_t k = 0; k < padded; k++)
            for (int64_t n = 0; n < NR; n++) {
                const int64_t output = panel * NR + n;
                const bool inside = output < outputs && k < inputs;
                packed[panel * padded * NR + k / pair * pair * NR + n * pair + k % pair] =
                    inside ? weight[output * inputs + k] : T(0);
            }
}

}  // namespace

extern "C" {

int64_t packed_size(int64_t outputs, int64_t inputs, int64_t is_bf16) {  // numbers, not bytes
    return (outputs + NR - 1) / NR * NR * (is_bf16 ? (inputs + 1) / 2 * 2 : inputs);
}

void pack_weight(const void* weight, int64_t outputs, int64_t inputs, int64_t is_bf16, void* packed) {
    if (is_bf16)
        pack(static_cast<const bf16*>(weight), outputs, inputs, static_cast<bf16*>(packed));
    else
        pack(static_cast<const float*>(weight), outputs, inputs, static_cast<float*>(packed));
}

void matmul(const Matrix* m, const float* x, int64_t rows, float* y, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        Buffer scratch(ROWS_TOGETHER * (m->inputs + 2));
        linear(*m, x, m->inputs, rows, {y, m->outputs, false}, scratch.data);
    }
}

// q [heads][tokens][dim], k and v [kv_heads][tokens][dim], with the strides (head, row) given in numbers.
void attention(const Attention* at, const Step* step, const float* q, const float* k, const float* v,
               const int64_t* strides, float* out, int64_t threads) {
    const std::vector<Task> tasks = tasks_of(*step, at->heads / at->kv_heads);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t t = 0; t < step->tokens; t++)
            for (int64_t h = 0; h < at->kv_heads; h++) {
                const float *key = k + h * strides[2] + t * strides[3], *value = v + h * strides[4] + t * strides[5];
                if (at->is_bf16)
                    write_slot<bf16>(*at, step->slots[t], h, key, value);
                else
                    write_slot<float>(*at, step->slots[t], h, key, value);
            }
        attention_part(*at, *step, tasks, q, strides[1], strides[0], out);
    }
}

// One step of the whole model; logits is [step.logits][head.outputs].
void decode(const Decoder* decoder, const Step* step, float* logits, int64_t threads) {
    const Decoder& d = *decoder;
    const Attention& at = d.layers[0].attention;
    const int64_t tokens = step->tokens, attended = at.heads * at.dim, qkv_width = (at.heads + 2 * at.kv_heads) * at.dim;
    const int64_t widest = std::max({d.hidden, d.intermediate, attended}) + 2;
    Buffer x(tokens * d.hidden), y(tokens * d.hidden), out(tokens * attended);
    Buffer wide(tokens * std::max(2 * d.intermediate, qkv_width));
    const std::vector<Task> tasks = tasks_of(*step, at.heads / at.kv_heads);
#pragma omp parallel num_threads(threads)
    {
        Buffer scratch(std::min<int64_t>(ROWS_TOGETHER, std::max(tokens, step->logits)) * widest);
        if (d.embedding_is_bf16)
            embed<bf16>(d, *step, x.data);
        else
            embed<float>(d, *step, x.data);
        for (const Layer* layer = d.layers; layer != d.layers + d.num_layers; layer++) {
            normed(d, x.data, layer->input_norm, tokens, y.data);
            linear(layer->qkv, y.data, d.hidden, tokens, {wide.data, qkv_width, false}, scratch.data);
            rotate_and_write(d, *layer, *step, wide.data);
            attention_part(layer->attention, *step, tasks, wide.data, qkv_width, at.dim, out.data);
            linear(layer->o, out.data, attended, tokens, {x.data, d.hidden, true}, scratch.data);
            normed(d, x.data, layer->post_norm, tokens, y.data);
            linear(layer->gate_up, y.data, d.hidden, tokens, {wide.data, 2 * d.intermediate, false}, scratch.data);
            silu_mul(wide.data, tokens, d.intermediate);
            linear(layer->down, wide.data, 2 * d.intermediate, tokens, {x.data, d.hidden, true}, scratch.data);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < step->logits; i++)
            rms_norm(x.data + step->logits_rows[i] * d.hidden, d.norm, d.hidden, d.epsilon,
                     y.data + i * d.hidden);
        linear(d.head, y.data, d.hidden, step->logits, {logits, d.head.outputs, false}, scratch.data);
    }
}
}
