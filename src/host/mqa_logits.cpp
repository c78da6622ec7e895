#include "mqa_logits.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdio>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>

#include "../sm100/mqa_logits_dispatch.h"
#include "../sm100/mqa_logits_traits.h"
#include "../sm90/mqa_logits_dispatch.h"
#include "../sm90/mqa_logits_instances.h"
#include "../sm90/mqa_logits_traits.h"
#include "knobs.h"
#include "shards.h"

namespace deep_gemm {

namespace {

static_assert(sm90::first_invalid_mqa_row(sm90::kMqaRows, sm90::kNumMqaRows) == -1,
              "src/sm90/mqa_logits_instances.h has a row that cannot be compiled: see invalid_reason() in "
              "mqa_logits_traits.h");

#if DG_WITH_SM90
template <int kShard>
struct MqaShard {
    static const void* find(int row) { return sm90::mqa_kernel_in_shard<kShard>(row); }
};
const void* sm90_kernel(int row) { return find_in_shards<MqaShard>(row); }
const void* sm90_metadata() { return sm90::mqa_metadata_kernel(); }
#else
const void* sm90_kernel(int) { return nullptr; }
const void* sm90_metadata() { return nullptr; }
#endif

#if DG_WITH_SM100
const void* sm100_kernel(int row) { return sm100::mqa_kernel(row); }
const void* sm100_metadata() { return sm100::mqa_metadata_kernel(); }
#else
const void* sm100_kernel(int) { return nullptr; }
const void* sm100_metadata() { return nullptr; }
#endif

std::string sm90_name(int row) { return row_name(sm90::kMqaRows[row]); }
std::string sm100_name(int row) { return row_name(sm100::kMqaRows[row]); }
std::string sm90_symbol(int row) { return kernel_symbol(sm90::kMqaRows[row], row); }
std::string sm100_symbol(int row) { return kernel_symbol(sm100::kMqaRows[row], row); }
std::string sm90_metadata_name(int) { return "sm90_mqa_logits_metadata"; }
std::string sm100_metadata_name(int) { return "sm100_mqa_logits_metadata"; }

std::atomic<int> forced_row{-1};

// Tokens that share a pass over the keys, where the cache is read.
int64_t atom_tokens(const MqaLogitsProblem& problem) {
    return problem.indices.data != nullptr ? std::min<int64_t>(kMqaAtomTokens, problem.num_tokens) : problem.next_n;
}

void print_config(const MqaLogitsProblem& problem, const MqaRow& row, const MqaRowResources& resources, int grid) {
    static std::mutex mutex;
    static std::set<std::string> printed;
    std::ostringstream line;
    line << "deep_gemm: MQA logits, " << problem.num_tokens << " tokens, " << problem.heads << " heads of "
         << problem.head_dim << ", " << problem.width << " columns: " << row_name(row) << ", " << resources.num_stages
         << " stages, " << resources.shared_bytes << " bytes shared, grid " << grid << "\n";
    std::lock_guard lock(mutex);
    if (printed.insert(line.str()).second) std::fputs(line.str().c_str(), stderr);
}

bool fits(const MqaRow& row, const MqaLogitsProblem& problem) {
    return row.heads == problem.heads && (row.head_dim == 0 || row.head_dim == problem.head_dim) &&
           row.paged == problem.paged && row.fp4 == problem.fp4;
}

}  // namespace

std::span<const MqaRow> mqa_logits_rows(int arch) {
#if DG_WITH_SM90
    if (arch == 90) return sm90::kMqaRows;
#endif
#if DG_WITH_SM100
    if (arch == 100) return sm100::kMqaRows;
#endif
    return {};
}

bool has_mqa_rows(int arch, bool fp4) {
    const auto rows = mqa_logits_rows(arch);
    return std::any_of(rows.begin(), rows.end(), [&](const MqaRow& row) { return row.fp4 == fp4; });
}

std::string kernel_symbol(const MqaRow& row, int index) {
    if (row.arch == 90) return "sm90_fp8_mqa_logitsILi" + std::to_string(index) + "E";
    return "sm100_mqa_logitsILi" + std::to_string(row.heads) + "ELb" + (row.paged ? "1" : "0") + "ELb" +
           (row.fp4 ? "1" : "0") + "E";
}

MqaRowResources row_resources(const MqaRow& row) {
    if (row.arch == 100) {
        const sm100::MqaType type{row.fp4};
        return {sm100::kMqaKeys, type.stages(), type.shared_bytes(), type.threads()};
    }
    const sm90::MqaLayout layout{row};
    return {kMqaTileKeys, layout.num_stages(), layout.shared_bytes(), layout.num_threads()};
}

std::string row_name(const MqaRow& row) {
    if (row.arch == 100) {
        return std::string(row.fp4 ? "sm100_fp4" : "sm100_fp8") + (row.paged ? "_paged_mqa_h" : "_mqa_h") +
               std::to_string(row.heads);
    }
    std::string name = row.paged ? "sm90_fp8_paged_mqa" : "sm90_fp8_mqa";
    name += "_h" + std::to_string(row.heads) + "d" + std::to_string(row.head_dim) + "_n" + std::to_string(row.cols);
    if (row.parts > 1) name += "x" + std::to_string(row.parts);
    if (row.warpgroups != 2) name += "_" + std::to_string(row.warpgroups) + "wg";
    return name;
}

int select_mqa_row(const MqaLogitsProblem& problem, int arch) {
    const std::span<const MqaRow> rows = mqa_logits_rows(arch);
    int best = -1;
    for (int i = 0; i < static_cast<int>(rows.size()); ++i) {
        if (!fits(rows[i], problem)) continue;
        if (!problem.paged) return i;
        // The fewest columns that take all tokens at once, or else the most.
        const auto enough = [&](const MqaRow& row) { return row.tile_tokens() >= atom_tokens(problem); };
        const bool better = best < 0 || (enough(rows[best]) ? enough(rows[i]) && rows[i].tile_cols() < rows[best].tile_cols()
                                                            : rows[i].tile_cols() > rows[best].tile_cols());
        if (better) best = i;
    }
    return best;
}

int forced_mqa_row() { return forced_row; }
void force_mqa_row(int row) { forced_row = row; }

void run_mqa_logits(const MqaLogitsProblem& problem, int arch, int num_sms, int row_idx, bool pdl, Backend& backend) {
    const std::span<const MqaRow> rows = mqa_logits_rows(arch);
    if (row_idx < 0) {
        row_idx = select_mqa_row(problem, arch);
    } else if (arch == 100) {
        row_idx -= static_cast<int>(mqa_logits_rows(90).size());
    }
    if (row_idx < 0 || row_idx >= static_cast<int>(rows.size()) || !fits(rows[row_idx], problem)) {
        throw std::runtime_error("mqa_logits: no compiled kernel, or not the one that was forced, takes " +
                                 std::to_string(problem.heads) + " heads of " + std::to_string(problem.head_dim));
    }
    const MqaRow& row = rows[row_idx];
    const EncodeTiledFunction encode = backend.encode_tiled();

    MqaLogitsParams params = {};
    const int row_bytes = problem.fp4 ? problem.head_dim / 2 : problem.head_dim;
    const MatrixView q{problem.q, problem.num_tokens * problem.heads, row_bytes, problem.q_stride,
                       CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
    // The tensor core's steps and the swizzle are 32 bytes; what a row has not is zeros.
    const int box_bytes = std::max(row_bytes, 32);
    const MqaRowResources resources = row_resources(row);
    params.row_bytes = box_bytes;
    params.q_rows = row.tile_cols();
    // SM100: as many columns as tokens have that are scored together, 32 at a time.
    const int64_t tokens = problem.paged ? atom_tokens(problem) : problem.num_tokens;
    if (arch == 100) params.q_rows = static_cast<int>(std::min<int64_t>((tokens * row.heads + 31) / 32 * 32, row.cols));
    params.q_map = make_tensor_map(encode, q, params.q_rows, box_bytes);
    // Without keys, or blocks, the maps are of something that is there, and nobody loads through them.
    const bool no_keys = problem.paged ? problem.num_blocks == 0 : problem.num_keys == 0;
    if (no_keys) {
        params.kv_map = params.kv_sf_map = params.q_map;
    } else if (problem.paged) {
        const int64_t scales = static_cast<int64_t>(problem.block_kv) * row_bytes;
        // The stride of a single block is never used, but the tensor map wants a multiple of 16 bytes.
        const int64_t stride = problem.num_blocks > 1 ? problem.cache_stride : scales + problem.block_kv * 4;
        const MatrixView kv{problem.cache, problem.block_kv, row_bytes, row_bytes,
                            CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, problem.num_blocks, stride};
        const MatrixView kv_sf{static_cast<const uint8_t*>(problem.cache) + scales, problem.num_blocks, problem.block_kv,
                               stride / 4, CU_TENSOR_MAP_DATA_TYPE_UINT32, 4};
        params.kv_map = make_tensor_map(encode, kv, problem.block_kv, box_bytes);
        params.kv_sf_map = make_tensor_map(encode, kv_sf, 1, problem.block_kv, false);
    } else {
        const MatrixView kv{problem.kv, problem.num_keys, row_bytes, problem.kv_stride,
                            CU_TENSOR_MAP_DATA_TYPE_UINT8, 1};
        // A matrix of one row, whose stride is never used.
        const MatrixView kv_sf{problem.kv_sf, 1, problem.num_keys, (problem.num_keys + 3) / 4 * 4,
                               CU_TENSOR_MAP_DATA_TYPE_UINT32, 4};
        params.kv_map = make_tensor_map(encode, kv, resources.tile_keys, box_bytes);
        params.kv_sf_map = make_tensor_map(encode, kv_sf, 1, resources.tile_keys, false);
    }
    params.q_sf = reinterpret_cast<const uint32_t*>(problem.q_sf);
    params.q_sf_stride = problem.q_sf_stride;
    params.used_scales = problem.head_dim == 128 ? 0xffffffffu : (1u << problem.head_dim / 4) - 1;  // a byte for each 32
    params.weights = problem.weights;
    params.weights_stride = problem.weights_stride;
    params.logits = problem.logits;
    params.logits_stride = problem.logits_stride;
    params.num_tokens = static_cast<int>(problem.num_tokens);
    params.width = static_cast<int>(problem.width);
    params.logit_bytes = problem.logits_type == DataType::kFloat32 ? 4 : 2;
    params.clean = problem.clean;
    params.start = problem.start;
    params.end = problem.end;
    params.num_keys = static_cast<int>(problem.num_keys);
    params.compressed = problem.compressed;
    params.context_lens = problem.context_lens;
    params.lens_per_token = problem.lens_per_token;
    params.block_table = problem.block_table;
    params.table_rows = static_cast<int>(problem.table_rows);
    params.max_blocks = no_keys ? 0 : static_cast<int>(problem.max_blocks);
    params.block_kv = problem.block_kv;
    params.next_n = static_cast<int>(problem.next_n);
    params.indices = problem.indices;
    params.schedule = problem.schedule;
    if (problem.paged) {
        params.block_kv_log2 = std::countr_zero(static_cast<unsigned>(problem.block_kv));
        params.num_atoms = static_cast<int>(problem.num_tokens / problem.next_n);
        params.max_length = static_cast<int>(std::min<int64_t>(problem.width, int64_t{params.max_blocks} * problem.block_kv));
    }

    KernelLaunch launch;
    launch.kernel = arch == 100 ? sm100_kernel(row_idx) : sm90_kernel(row_idx);
    launch.name = arch == 100 ? &sm100_name : &sm90_name;
    launch.symbol = arch == 100 ? &sm100_symbol : &sm90_symbol;
    launch.row = row_idx;
    launch.grid = problem.paged ? static_cast<int>(problem.schedule_ctas) : num_sms;
    launch.block = resources.num_threads;
    launch.cluster = 1;
    launch.shared_bytes = resources.shared_bytes;
    launch.params = &params;
    launch.params_bytes = sizeof(params);
    launch.pdl = pdl;
    if (print_configs()) print_config(problem, row, resources, launch.grid);
    backend.launch(launch);
}

void run_mqa_metadata(const MqaMetadataProblem& problem, int arch, bool pdl, Backend& backend) {
    MqaMetadataParams params = {};
    params.context_lens = problem.context_lens;
    params.indices = problem.indices;
    params.num_lens = static_cast<int>(problem.num_lens);
    params.lens_per_atom = static_cast<int>(problem.lens_per_atom);
    params.num_ctas = static_cast<int>(problem.num_ctas);
    params.schedule = problem.schedule;

    KernelLaunch launch;
    launch.kernel = arch == 100 ? sm100_metadata() : sm90_metadata();
    launch.name = launch.symbol = arch == 100 ? &sm100_metadata_name : &sm90_metadata_name;
    launch.row = 0;
    launch.grid = 1;
    launch.block = kMqaMetadataThreads;
    launch.cluster = 1;
    launch.shared_bytes = 0;
    launch.params = &params;
    launch.params_bytes = sizeof(params);
    launch.pdl = pdl;
    backend.launch(launch);
}

}  // namespace deep_gemm
