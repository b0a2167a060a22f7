// Paged attention: keys and values are read from the pool's blocks, softmax is computed online.

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

constexpr int MOST_QUERIES = 3 * W;  // (row, head) pairs that pass over a slice of keys together
constexpr int SLICE = 4 * W;         // keys of a slice of a chunk
constexpr int MOST_DIM = 256;

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

// Those among them that hold a row of logits.
std::vector<Task> tasks_with_logits(const Step& step, const std::vector<Task>& tasks) {
    std::vector<Task> found;
    int64_t i = 0;
    for (const Task& task : tasks) {
        const int64_t before = i;
        while (i < step.logits && step.logits_rows[i] < task.end) i++;
        if (i > before) found.push_back(task);
    }
    return found;
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

}  // namespace
