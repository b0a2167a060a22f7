// What Python hands over; library.py mirrors it field by field.

#pragma once

#include <cstdint>

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
    int64_t tokens, sequences, logits;  // logits: rows of the result
    const int64_t *token_ids, *positions, *slots, *logits_rows;  // logits_rows ascend
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
    int64_t is_gated;  // the outputs of gate_up take turns: W of the gate, then the W that they multiply
    float epsilon;
    const void* embedding;  // [vocab][hidden], or null: the head's own weights, which are not int8 then
    int64_t embedding_is_bf16;
    const float* cosines;  // [positions][rotary_dim]
    const float* sines;
    const float* norm;
    Matrix head;
};
}
