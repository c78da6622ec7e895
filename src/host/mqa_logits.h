// MQA logits of the lightning indexer: the problem, the table of kernels, and the launch.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "../device/mqa_logits_params.h"
#include "gemm_problem.h"
#include "launcher.h"
#include "mqa_logits_row.h"

namespace deep_gemm {

// logits[i, j] = sum_h relu(q[i, h] . kv[j] * kv_sf[j]) * weights[i, h], see MqaLogitsParams. Strides in elements, of FP4
// in pairs of them. With FP4 each word of scales holds head_dim / 32 UE8M0, the lowest byte first.
struct MqaLogitsProblem {
    const void* q = nullptr;  // FP8 [num_tokens * heads, head_dim], or FP4
    int64_t q_stride = 0;     // between heads
    int64_t num_tokens = 0;
    int heads = 0;
    int head_dim = 0;
    bool fp4 = false;         // queries and keys
    const int32_t* q_sf = nullptr;  // FP4: [num_tokens, heads]
    int64_t q_sf_stride = 0;
    const float* weights = nullptr;  // [num_tokens, heads]
    int64_t weights_stride = 0;
    void* logits = nullptr;   // [num_tokens, width]
    int64_t logits_stride = 0;
    int64_t width = 0;
    DataType logits_type = DataType::kFloat32;
    bool clean = true;

    // Without a cache.
    const void* kv = nullptr;  // FP8 [num_keys, head_dim], or FP4
    int64_t kv_stride = 0;
    const void* kv_sf = nullptr;  // [num_keys], FP32, or words of UE8M0
    int64_t num_keys = 0;
    IntSource start = {}, end = {};
    bool compressed = false;

    // With a cache of blocks: block_kv rows of head_dim values, then block_kv scales or words of them.
    bool paged = false;
    const void* cache = nullptr;
    int64_t num_blocks = 0;
    int64_t cache_stride = 0;  // bytes between blocks
    int block_kv = 64;
    int64_t next_n = 1;
    IntSource context_lens = {};
    bool lens_per_token = false;
    IntSource block_table = {};
    int64_t table_rows = 0;
    int64_t max_blocks = 0;
    IntSource indices = {};
    const int32_t* schedule = nullptr;
    int64_t schedule_ctas = 0;
};

struct MqaMetadataProblem {
    IntSource context_lens = {};
    IntSource indices = {};
    int64_t num_lens = 0;
    int64_t lens_per_atom = 1;
    int64_t num_ctas = 0;
    int32_t* schedule = nullptr;
};

// The table of kernels for an architecture, 90 or 100; empty where the library was built without it.
std::span<const MqaRow> mqa_logits_rows(int arch);

// Whether any row of an architecture's table takes FP4, or FP8.
bool has_mqa_rows(int arch, bool fp4);

struct MqaRowResources {
    int tile_keys;
    int num_stages;
    int shared_bytes;
    int num_threads;
};
MqaRowResources row_resources(const MqaRow& row);

// A part of the mangled name of the kernel of a row, which is the `index`-th of its table.
std::string kernel_symbol(const MqaRow& row, int index);

// Name that says all of a row, such as "sm90_fp8_mqa_h64d128_n128x2".
std::string row_name(const MqaRow& row);

// Index of the row for a problem in an architecture's table, or -1.
int select_mqa_row(const MqaLogitsProblem& problem, int arch);

// A row that every problem is run on, -1 to select one; for tests and tuning. SM100's table is counted behind SM90's.
int forced_mqa_row();
void force_mqa_row(int row);

// num_tokens and width must be positive, what TMA reads aligned to 16 bytes (the ops check that). `num_sms` CTAs are launched, with a schedule as many as it is made for. `row`: of
// both tables, -1 to select one. Throws std::runtime_error where no row fits.
void run_mqa_logits(const MqaLogitsProblem& problem, int arch, int num_sms, int row, bool pdl, Backend& backend);

void run_mqa_metadata(const MqaMetadataProblem& problem, int arch, bool pdl, Backend& backend);

}  // namespace deep_gemm
