// One step of a decoder on a CPU: linear layers (linear.h), paged attention (attention.h), and what lies between.
//
// Compiled once for each tier of instructions (see build.py). Everything between two layers is float32.
//
// Every number of a row depends on that row alone, added up in one order whatever else is in the batch: a row's result
// is bit-equal alone and in company. The attention of a chunk of a prompt adds up in another order than that of a lone
// token, unless `in_order` is set: then a result is bit-equal in one chunk or several, too.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>

#include "attention.h"
#include "interface.h"
#include "linear.h"
#include "team.h"
#include "vectors.h"

namespace {

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
    for (; i + W <= count; i += W) store(gate + i, silu(load(gate + i)) * load(up + i));
    for (; i < count; i++) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

struct Buffer {  // aligned, not initialised
    explicit Buffer(int64_t count) : data(static_cast<float*>(::operator new(count * 4 + 64, std::align_val_t(64)))) {}
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    float* data;
};

template <class T>
void embed_packed(const Matrix& head, int64_t token, float* x) {
    constexpr int64_t PAIR = 4 / sizeof(T);
    const T* from = static_cast<const T*>(head.data) + token / NR * padded_inputs(head.inputs, sizeof(T)) * NR;
    for (int64_t k = 0; k < head.inputs; k++) x[k] = to_float(from[k / PAIR * PAIR * NR + token % NR * PAIR + k % PAIR]);
}

void embed(const Decoder& d, int64_t token, float* x) {
    if (!d.embedding && d.head.type == 2)
        embed_packed<bf16>(d.head, token, x);
    else if (!d.embedding)
        embed_packed<float>(d.head, token, x);
    else if (d.embedding_is_bf16)
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

int64_t uses_bf16_products() { return multiplies_bf16(); }  // bfloat16 weights meet rows that are rounded to it

int64_t lanes() { return W; }

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
    linear(turn, *m, packed, rows, {y, m->outputs, Output::SET});
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
    const int64_t gate_width = d.is_gated ? d.intermediate : 2 * d.intermediate;
    const int64_t wide_width = std::max(gate_width, qkv_width);
    Buffer x(tokens * d.hidden), out(tokens * attended), wide(tokens * wide_width);
    Buffer data(std::max(tokens, step->logits) * widest);
    std::vector<RowScale> scales(std::max(tokens, step->logits));
    const Rows packed{data.data, scales.data()};
    Team::Turn turn(team(), threads);
    // What lies between two linear layers is done for a group of rows, and leaves them interleaved for the next one.
    auto each_group = [&](int64_t rows, auto body) {
        turn.each(groups_of(rows), [&](int64_t g) { body(group_of(rows, g)); });
    };
    auto normed = [&](const Matrix& next, const float* weight, const Group& group) {
        thread_local std::vector<float> y;
        y.resize(d.hidden);
        auto norm = [&](int64_t row) {
            rms_norm(x.data + row * d.hidden, weight, d.hidden, d.epsilon, y.data());
            return y.data();
        };
        interleave(next, group, norm, packed);
    };

    each_group(tokens, [&](const Group& group) {
        for (int64_t t = group.first; t < group.first + group.size; t++)
            embed(d, step->token_ids[t], x.data + t * d.hidden);
        normed(d.layers->qkv, d.layers->input_norm, group);
    });
    const std::vector<Task> tasks = tasks_of(*step, at.heads / at.kv_heads);
    const std::vector<Task> last_tasks = tasks_with_logits(*step, tasks);
    for (const Layer* layer = d.layers; layer != d.layers + d.num_layers; layer++) {
        linear(turn, layer->qkv, packed, tokens, {wide.data, qkv_width, Output::SET});
        each_group(tokens, [&](const Group& group) {
            for (int64_t t = group.first; t < group.first + group.size; t++)
                rotate_and_write(d, *layer, *step, t, wide.data + t * qkv_width);
        });
        // All keys and values are there now; of the last layer nothing else is needed but the rows of logits.
        const bool is_last = layer + 1 == d.layers + d.num_layers;
        const int64_t rows = is_last ? step->logits : tokens;
        auto token = [&](int64_t row) { return is_last ? step->logits_rows[row] : row; };
        attend_all(turn, layer->attention, *step, is_last ? last_tasks : tasks, wide.data, qkv_width, at.dim, out.data);
        each_group(rows, [&](const Group& group) {
            interleave(layer->o, group, [&](int64_t row) { return out.data + token(row) * attended; }, packed);
        });
        for (int64_t row = 0; row < rows; row++)  // they ascend: none is written over before it has moved
            if (token(row) != row) std::copy_n(x.data + token(row) * d.hidden, d.hidden, x.data + row * d.hidden);
        linear(turn, layer->o, packed, rows, {x.data, d.hidden, Output::ADD});
        each_group(rows, [&](const Group& group) { normed(layer->gate_up, layer->post_norm, group); });
        linear(turn, layer->gate_up, packed, rows, {wide.data, gate_width, d.is_gated ? Output::GATE : Output::SET});
        each_group(rows, [&](const Group& group) {
            auto product = [&](int64_t row) {
                float* gate = wide.data + row * gate_width;
                if (!d.is_gated) silu_mul(gate, gate + d.intermediate, d.intermediate);
                return gate;
            };
            interleave(layer->down, group, product, packed);
        });
        linear(turn, layer->down, packed, rows, {x.data, d.hidden, Output::ADD});
        each_group(rows, [&](const Group& group) {
            normed(is_last ? d.head : layer[1].qkv, is_last ? d.norm : layer[1].input_norm, group);
        });
    }
    linear(turn, d.head, packed, step->logits, {logits, d.head.outputs, Output::SET});
}
}
