#include "../host/mqa_logits.h"

#include <algorithm>
#include <array>

#include "../host/knobs.h"
#include "check.h"
#include "mqa_logits_ops.h"
#include "stream.h"
#include "tensor_info.h"

namespace deep_gemm::ops {

namespace {

constexpr int64_t kAlignment = 16;  // bytes, of what TMA reads
constexpr int64_t kScaleBytes = 4;
constexpr int64_t kMaxCtas = 65535;

std::string bytes_text(int64_t bytes) { return std::to_string(bytes) + " bytes"; }

void check_base(const char* op, const char* arg, const TensorInfo& x, const char* note) {
    const int64_t past = reinterpret_cast<uintptr_t>(x.data_ptr()) % kAlignment;
    if (past != 0) fail(op, arg, "base address", std::to_string(past) + " modulo 16 bytes", int64_t{0}, note);
}

bool is_empty(const TensorInfo& x) {
    return std::any_of(x.sizes().begin(), x.sizes().end(), [](int64_t size) { return size == 0; });
}

// A tensor that may be absent.
std::optional<TensorInfo> info_of(const std::optional<Tensor>& x) {
    return x ? std::optional<TensorInfo>(*x) : std::nullopt;
}

// Of queries and keys, which are FP4 where queries have scales.
void check_values_dtype(const char* op, const char* arg, const TensorInfo& x, bool fp4) {
    if (fp4) {
        check_dtype(op, arg, x, {ScalarType::Byte, ScalarType::Char, ScalarType::Float4_e2m1fn_x2});
    } else {
        check_dtype(op, arg, x, {ScalarType::Float8_e4m3fn});
    }
}

struct Queries {
    int64_t tokens, heads, head_dim;
    int64_t row_bytes;  // of a head, or a key
};

// q [.., H, D], or FP4 [.., H, D / 2], is a matrix with a row for each head of each token.
Queries check_heads(const char* op, const TensorInfo& q, bool fp4) {
    const int64_t rank = q.dim(), heads = q.size(rank - 2), row_bytes = q.size(rank - 1);
    const int64_t dim = fp4 ? row_bytes * 2 : row_bytes;
    if (heads != 8 && heads != 16 && heads != 32 && heads != 64) fail(op, "q", "heads", heads, "8, 16, 32 or 64");
    if (dim != 32 && dim != 64 && dim != 128) fail(op, "q", "head_dim", dim, "32, 64 or 128");
    int64_t tokens = 1;
    for (int64_t i = 0; i < rank - 2; ++i) tokens *= q.size(i);
    if (tokens > kMaxSize / heads) {
        fail(op, "q", "number of heads", tokens * heads, "at most " + std::to_string(kMaxSize));
    }
    const Queries queries = {tokens, heads, dim, row_bytes};
    if (is_empty(q)) return queries;
    const char* helper = "use q.contiguous()";
    if (q.stride(rank - 1) != 1) fail(op, "q", "inner stride", q.stride(rank - 1), int64_t{1}, helper);
    const int64_t row_stride = q.stride(rank - 2);
    if (row_stride % kAlignment != 0) {
        fail(op, "q", "head stride", bytes_text(row_stride), "a multiple of 16 bytes", helper);
    }
    if (row_stride < row_bytes) {
        fail(op, "q", "head stride", row_stride, "at least " + std::to_string(row_bytes), helper);
    }
    int64_t expected = row_stride * heads;
    for (int64_t i = rank - 3; i >= 0; --i) {
        if (q.size(i) > 1 && q.stride(i) != expected) {
            const std::string what = "stride of dimension " + std::to_string(i);
            fail(op, "q", what.c_str(), q.stride(i), expected, helper);
        }
        expected *= q.size(i);
    }
    check_base(op, "q", q, "use q.clone()");
    return queries;
}

// q_sf [.., H], a row of words for each token.
void check_query_scales(const char* op, const TensorInfo& q, const TensorInfo& q_sf) {
    const int64_t rank = q_sf.dim();
    if (rank == 2) {
        check_shape(op, "q_sf", q_sf, "[S, H]", {q.size(0), q.size(1)});
    } else {
        check_shape(op, "q_sf", q_sf, "[B, next_n, H]", {q.size(0), q.size(1), q.size(2)});
    }
    if (is_empty(q_sf)) return;
    if (q_sf.stride(rank - 1) != 1) fail(op, "q_sf", "inner stride", q_sf.stride(rank - 1), int64_t{1});
    if (rank == 3 && q_sf.size(0) > 1 && q_sf.size(1) > 1 && q_sf.stride(0) != q_sf.stride(1) * q_sf.size(1)) {
        fail(op, "q_sf", "stride of dimension 0", q_sf.stride(0), q_sf.stride(1) * q_sf.size(1), "use q_sf.contiguous()");
    }
}

// Between tokens.
int64_t token_stride(const TensorInfo& q_sf) { return q_sf.stride(q_sf.dim() == 3 && q_sf.size(1) > 1 ? 1 : 0); }

// check_inner_stride for a vector.
void check_dense(const char* op, const char* arg, const TensorInfo& x) {
    if (x.size(0) > 1 && x.stride(0) != 1) fail(op, arg, "inner stride", x.stride(0), int64_t{1});
}

void check_exact_pairs(const char* op, const char* arg, const TensorInfo& x) {
    if (x.stride(1) == 1 && x.stride(0) == 2) return;
    const std::array<int64_t, 2> strides = {x.stride(0), x.stride(1)};
    fail(op, arg, "strides", text(std::span<const int64_t>(strides)), "[2, 1]", "");
}

void check_columns(const char* op, const char* arg, int64_t columns) {
    if (columns < 0 || columns > kMaxSize) fail(op, arg, "value", columns, "0 to " + std::to_string(kMaxSize));
}

void check_logits(const char* op, const TensorInfo* out, ScalarType dtype, const char* names, int64_t rows,
                  int64_t columns) {
    if (!out) {
        if (dtype != ScalarType::BFloat16 && dtype != ScalarType::Float) {
            fail(op, "logits_dtype", "value", text(dtype), "bfloat16 or float32");
        }
        return;
    }
    check_dtype(op, "out", *out, {ScalarType::BFloat16, ScalarType::Float});
    check_shape(op, "out", *out, names, {rows, columns});
    check_inner_stride(op, "out", *out, nullptr);
    check_rows_apart(op, "out", *out);
}

IntSource ints(const TensorInfo& x) {
    return {static_cast<const int32_t*>(x.data_ptr()), x.stride(0), x.dim() == 2 ? x.stride(1) : 0};
}

// The architecture of the device, one that there are kernels for.
int check_architecture(const char* op, const char* arg, int device, bool fp4 = false) {
    const int arch = compute_capability(device);
    const bool sm90 = !fp4 || has_mqa_rows(90, true), sm100 = !fp4 || has_mqa_rows(100, true);
    if ((arch == 90 && sm90) || (arch == 100 && sm100)) return arch;
    const char* expected = sm90 && sm100 ? "sm_90 or sm_100" : sm90 ? "sm_90" : sm100 ? "sm_100" : "one with a kernel";
    fail(op, arg, "architecture", "sm_" + std::to_string(arch), expected, fp4 ? "FP4" : "");
}

// The result: allocated, or what was given.
struct Result {
    Result(const TensorInfo* given, int64_t rows, int64_t columns, ScalarType dtype, const TensorInfo& like) {
        if (given) {
            data = given->data_ptr();
            stride = rows > 1 ? given->stride(0) : columns;
            type = given->scalar_type();
        } else {
            const std::array<int64_t, 2> sizes = {rows, columns}, strides = {std::max<int64_t>(columns, 1), 1};
            tensor = Tensor(new_empty_strided(sizes, strides, dtype, like.get()));
            data = tensor->mutable_data_ptr();
            stride = columns;
            type = dtype;
        }
    }

    std::optional<Tensor> tensor;
    void* data;
    int64_t stride;
    ScalarType type;
};

void fill_common(MqaLogitsProblem& problem, const TensorInfo& q, const std::optional<TensorInfo>& q_sf,
                 const Queries& queries, const TensorInfo& weights, const Result& result, int64_t columns, bool clean) {
    problem.fp4 = q_sf.has_value();
    if (q_sf) {
        problem.q_sf = static_cast<const int32_t*>(q_sf->data_ptr());
        problem.q_sf_stride = token_stride(*q_sf);
    }
    problem.q = q.data_ptr();
    problem.q_stride = q.stride(q.dim() - 2);
    problem.num_tokens = queries.tokens;
    problem.heads = static_cast<int>(queries.heads);
    problem.head_dim = static_cast<int>(queries.head_dim);
    problem.weights = static_cast<const float*>(weights.data_ptr());
    problem.weights_stride = weights.stride(0);
    problem.logits = result.data;
    problem.logits_stride = result.stride;
    problem.width = columns;
    problem.logits_type = result.type == ScalarType::Float ? DataType::kFloat32 : DataType::kBFloat16;
    problem.clean = clean;
}

// With scales of queries these and the keys are FP4, without them FP8.
std::optional<Tensor> run_dense(const char* op, const Tensor& q_, const std::optional<Tensor>& q_sf_, const Tensor& kv_,
                                const Tensor& kv_sf_, const Tensor& weights_, const Tensor& start_, const Tensor& end_,
                                bool clean, int64_t max_seqlen_k, ScalarType dtype, const Tensor* out_) {
    const TensorInfo q(q_), kv(kv_), kv_sf(kv_sf_), weights(weights_), start(start_), end(end_);
    const std::optional<TensorInfo> q_sf = info_of(q_sf_);
    std::optional<TensorInfo> out;
    if (out_) out.emplace(*out_);
    const bool fp4 = q_sf.has_value();
    struct Input {
        const char* arg;
        const TensorInfo* x;
        std::optional<ScalarType> dtype;  // none: that of values
        int64_t rank;
    };
    const Input inputs[] = {
        {"q", &q, std::nullopt, 3},
        {"q_sf", q_sf ? &*q_sf : nullptr, ScalarType::Int, 2},
        {"kv", &kv, std::nullopt, 2},
        {"kv_sf", &kv_sf, fp4 ? ScalarType::Int : ScalarType::Float, 1},
        {"weights", &weights, ScalarType::Float, 2},
        {"cu_seq_len_k_start", &start, ScalarType::Int, 1},
        {"cu_seq_len_k_end", &end, ScalarType::Int, 1},
    };
    for (const Input& input : inputs) {
        if (input.x == nullptr) continue;
        if (input.dtype) {
            check_dtype(op, input.arg, *input.x, {*input.dtype});
        } else {
            check_values_dtype(op, input.arg, *input.x, fp4);
        }
        check_rank(op, input.arg, *input.x, input.rank);
    }
    for (const Input& input : inputs) {
        if (input.x != nullptr) check_device(op, input.arg, *input.x, q, "q");
    }
    if (out) check_device(op, "out", *out, q, "q");
    const Queries queries = check_heads(op, q, fp4);
    if (q_sf) check_query_scales(op, q, *q_sf);
    const int64_t tokens = queries.tokens, keys = kv.size(0);
    check_size(op, "kv", "S_kv", keys);
    if (kv.size(1) != queries.row_bytes) {
        fail(op, "kv", "head_dim", kv.size(1) * (fp4 ? 2 : 1), queries.head_dim, "the head_dim of q");
    }
    check_tma_readable(op, "kv", kv);
    check_shape(op, "kv_sf", kv_sf, "[S_kv]", {keys});
    check_dense(op, "kv_sf", kv_sf);
    if (keys > 0) check_base(op, "kv_sf", kv_sf, "use kv_sf.clone()");
    check_shape(op, "weights", weights, "[S, H]", {tokens, queries.heads});
    check_inner_stride(op, "weights", weights, nullptr);
    check_shape(op, "cu_seq_len_k_start", start, "[S]", {tokens});
    check_shape(op, "cu_seq_len_k_end", end, "[S]", {tokens});
    check_columns(op, "max_seqlen_k", max_seqlen_k);
    const bool compressed = max_seqlen_k > 0;
    const int64_t columns = compressed ? max_seqlen_k : keys;
    check_logits(op, out ? &*out : nullptr, dtype, compressed ? "[S, max_seqlen_k]" : "[S, S_kv]", tokens, columns);

    const int device = q.get_device_index();
    const DeviceGuard guard(device);
    Result result(out ? &*out : nullptr, tokens, columns, dtype, q);
    if (tokens == 0 || columns == 0) return result.tensor;
    const int arch = check_architecture(op, "q", device, fp4);
    MqaLogitsProblem problem;
    fill_common(problem, q, q_sf, queries, weights, result, columns, clean);
    problem.kv = kv.data_ptr();
    // The stride of a single row is never used, but the tensor map wants a multiple of 16.
    problem.kv_stride = keys > 1 ? kv.stride(0) : queries.row_bytes;
    problem.kv_sf = kv_sf.data_ptr();
    problem.num_keys = keys;
    problem.start = ints(start);
    problem.end = ints(end);
    problem.compressed = compressed;
    DeviceBackend backend(device, current_stream(device));
    run_mqa_logits(problem, arch, usable_sms(device), forced_mqa_row(), knobs().pdl, backend);
    return result.tensor;
}

std::optional<Tensor> run_metadata(const Tensor& context_lens_, int64_t block_kv, int64_t num_sms,
                                   const std::optional<Tensor>& indices_, const Tensor* out_) {
    const char* op = "get_paged_mqa_logits_metadata";
    const TensorInfo context_lens(context_lens_);
    std::optional<TensorInfo> indices, out;
    if (indices_) indices.emplace(*indices_);
    if (out_) out.emplace(*out_);
    check_dtype(op, "context_lens", context_lens, {ScalarType::Int});
    if (context_lens.dim() != 1 && context_lens.dim() != 2) {
        fail(op, "context_lens", "rank", context_lens.dim(), "1 or 2");
    }
    if (block_kv != 64 && block_kv != 32) fail(op, "block_kv", "value", block_kv, "64 or 32");
    if (num_sms < 1 || num_sms > kMaxCtas) fail(op, "num_sms", "value", num_sms, "1 to 65535");
    check_size(op, "context_lens", "B", context_lens.size(0));
    if (indices) {
        check_dtype(op, "indices", *indices, {ScalarType::Int});
        check_rank(op, "indices", *indices, 1);
        check_device(op, "indices", *indices, context_lens, "context_lens");
        check_shape(op, "indices", *indices, "[B]", {context_lens.size(0)});
        if (context_lens.dim() == 2 && context_lens.size(1) != 1) {
            fail(op, "context_lens", "next_n", context_lens.size(1), int64_t{1}, "with indices");
        }
    }
    if (out) {
        check_device(op, "out", *out, context_lens, "context_lens");
        check_dtype(op, "out", *out, {ScalarType::Int});
        check_shape(op, "out", *out, "[num_sms + 1, 2]", {num_sms + 1, 2});
        check_exact_pairs(op, "out", *out);
    }

    const int device = context_lens.get_device_index();
    const DeviceGuard guard(device);
    const int arch = check_architecture(op, "context_lens", device);
    std::optional<Tensor> allocated;
    if (!out) {
        const std::array<int64_t, 2> sizes = {num_sms + 1, 2}, strides = {2, 1};
        allocated = Tensor(new_empty_strided(sizes, strides, ScalarType::Int, context_lens.get()));
    }
    MqaMetadataProblem problem;
    problem.context_lens = ints(context_lens);
    if (indices) problem.indices = ints(*indices);
    problem.num_lens = context_lens.size(0);
    problem.lens_per_atom = context_lens.dim() == 2 ? context_lens.size(1) : 1;
    problem.num_ctas = num_sms;
    problem.schedule = static_cast<int32_t*>(out ? out->data_ptr() : allocated->mutable_data_ptr());
    DeviceBackend backend(device, current_stream(device));
    run_mqa_metadata(problem, arch, knobs().pdl, backend);
    return allocated;
}

std::optional<Tensor> run_paged(const char* op, const Tensor& q_, const std::optional<Tensor>& q_sf_,
                                const Tensor& kv_cache_, const Tensor& weights_, const Tensor& context_lens_,
                                const Tensor& block_table_, const Tensor& schedule_, int64_t max_context_len, bool clean,
                                ScalarType dtype, const std::optional<Tensor>& indices_, const Tensor* out_) {
    const TensorInfo q(q_), kv_cache(kv_cache_), weights(weights_), context_lens(context_lens_);
    const TensorInfo block_table(block_table_), schedule(schedule_);
    const std::optional<TensorInfo> q_sf = info_of(q_sf_), indices = info_of(indices_);
    std::optional<TensorInfo> out;
    if (out_) out.emplace(*out_);
    const bool fp4 = q_sf.has_value();
    struct Input {
        const char* arg;
        const TensorInfo* x;
        ScalarType dtype;
        int64_t rank;
    };
    check_values_dtype(op, "q", q, fp4);
    check_rank(op, "q", q, 4);
    const Input inputs[] = {
        {"q_sf", q_sf ? &*q_sf : nullptr, ScalarType::Int, 3},
        {"kv_cache", &kv_cache, ScalarType::Byte, 4},
        {"weights", &weights, ScalarType::Float, 2},
        {"context_lens", &context_lens, ScalarType::Int, 0},
        {"block_table", &block_table, ScalarType::Int, 2},
        {"schedule_metadata", &schedule, ScalarType::Int, 2},
        {"indices", indices ? &*indices : nullptr, ScalarType::Int, 1},
    };
    for (const Input& input : inputs) {
        if (input.x == nullptr) continue;
        check_dtype(op, input.arg, *input.x, {input.dtype});
        if (input.rank > 0) {
            check_rank(op, input.arg, *input.x, input.rank);
        } else if (input.x->dim() != 1 && input.x->dim() != 2) {
            fail(op, input.arg, "rank", input.x->dim(), "1 or 2");
        }
    }
    for (const Input& input : inputs) {
        if (input.x != nullptr) check_device(op, input.arg, *input.x, q, "q");
    }
    if (out) check_device(op, "out", *out, q, "q");
    const Queries queries = check_heads(op, q, fp4);
    if (q_sf) check_query_scales(op, q, *q_sf);
    const int64_t batch = q.size(0), next_n = q.size(1), tokens = queries.tokens;
    const int64_t blocks = kv_cache.size(0), block_kv = kv_cache.size(1), block_cols = kv_cache.size(3);
    if (block_kv != 64 && block_kv != 32) fail(op, "kv_cache", "block_kv", block_kv, "64 or 32");
    check_shape(op, "kv_cache", kv_cache, fp4 ? "[blocks, block_kv, 1, D / 2 + 4]" : "[blocks, block_kv, 1, D + 4]",
                {blocks, block_kv, 1, queries.row_bytes + kScaleBytes});
    check_size(op, "kv_cache", "blocks", blocks);
    if (blocks > 0) {
        if (kv_cache.stride(3) != 1 || kv_cache.stride(1) != block_cols) {
            const std::array<int64_t, 4> strides = {kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
                                                    kv_cache.stride(3)};
            fail(op, "kv_cache", "strides", text(std::span<const int64_t>(strides)),
                 "[any, " + std::to_string(block_cols) + ", any, 1]", "each block dense");
        }
        if (blocks > 1) {
            const int64_t stride = kv_cache.stride(0), bytes = block_kv * block_cols;
            if (stride % kAlignment != 0) {
                fail(op, "kv_cache", "block stride", bytes_text(stride), "a multiple of 16 bytes");
            }
            if (stride < bytes) fail(op, "kv_cache", "block stride", stride, "at least " + std::to_string(bytes));
        }
        check_base(op, "kv_cache", kv_cache, "");
    }
    check_shape(op, "weights", weights, "[B * next_n, H]", {tokens, queries.heads});
    check_inner_stride(op, "weights", weights, nullptr);
    if (context_lens.dim() == 1) {
        check_shape(op, "context_lens", context_lens, "[B]", {batch});
    } else {
        check_shape(op, "context_lens", context_lens, "[B, next_n]", {batch, next_n});
    }
    const int64_t rows = block_table.size(0), max_blocks = block_table.size(1);
    if (!indices && rows != batch) fail(op, "block_table", "rows", rows, batch, "the B of q");
    if (rows > kMaxSize || max_blocks > kMaxSize) {
        fail(op, "block_table", "shape", text(block_table.sizes()), "at most " + std::to_string(kMaxSize) + " each");
    }
    if (schedule.size(0) < 2 || schedule.size(0) > kMaxCtas + 1 || schedule.size(1) != 2) {
        fail(op, "schedule_metadata", "shape", text(schedule.sizes()), "[num_sms + 1, 2], num_sms from 1 to 65535");
    }
    check_exact_pairs(op, "schedule_metadata", schedule);
    if (indices) {
        check_shape(op, "indices", *indices, "[B]", {batch});
        if (next_n != 1) fail(op, "q", "next_n", next_n, int64_t{1}, "with indices");
    }
    check_columns(op, "max_context_len", max_context_len);
    check_logits(op, out ? &*out : nullptr, dtype, "[B * next_n, max_context_len]", tokens, max_context_len);

    const int device = q.get_device_index();
    const DeviceGuard guard(device);
    Result result(out ? &*out : nullptr, tokens, max_context_len, dtype, q);
    if (tokens == 0 || max_context_len == 0) return result.tensor;
    const int arch = check_architecture(op, "q", device, fp4);
    MqaLogitsProblem problem;
    fill_common(problem, q, q_sf, queries, weights, result, max_context_len, clean);
    problem.paged = true;
    problem.cache = kv_cache.data_ptr();
    problem.num_blocks = blocks;
    problem.cache_stride = kv_cache.stride(0);
    problem.block_kv = static_cast<int>(block_kv);
    problem.next_n = next_n;
    problem.context_lens = ints(context_lens);
    problem.lens_per_token = context_lens.dim() == 2;
    problem.block_table = ints(block_table);
    problem.table_rows = rows;
    problem.max_blocks = max_blocks;
    if (indices) problem.indices = ints(*indices);
    problem.schedule = static_cast<const int32_t*>(schedule.data_ptr());
    problem.schedule_ctas = schedule.size(0) - 1;
    DeviceBackend backend(device, current_stream(device));
    run_mqa_logits(problem, arch, usable_sms(device), forced_mqa_row(), knobs().pdl, backend);
    return result.tensor;
}

}  // namespace

Tensor fp8_mqa_logits(Tensor q, Tensor kv, Tensor kv_sf, Tensor weights, Tensor start, Tensor end, bool clean_logits,
                      int64_t max_seqlen_k, ScalarType logits_dtype) {
    return *run_dense("fp8_mqa_logits", q, {}, kv, kv_sf, weights, start, end, clean_logits, max_seqlen_k, logits_dtype,
                      nullptr);
}

void fp8_mqa_logits_out(Tensor q, Tensor kv, Tensor kv_sf, Tensor weights, Tensor start, Tensor end, bool clean_logits,
                        int64_t max_seqlen_k, Tensor out) {
    run_dense("fp8_mqa_logits", q, {}, kv, kv_sf, weights, start, end, clean_logits, max_seqlen_k, ScalarType::Float, &out);
}

Tensor fp8_fp4_mqa_logits(Tensor q, std::optional<Tensor> q_sf, Tensor kv, Tensor kv_sf, Tensor weights, Tensor start,
                          Tensor end, bool clean_logits, int64_t max_seqlen_k, ScalarType logits_dtype) {
    return *run_dense("fp8_fp4_mqa_logits", q, q_sf, kv, kv_sf, weights, start, end, clean_logits, max_seqlen_k,
                      logits_dtype, nullptr);
}

void fp8_fp4_mqa_logits_out(Tensor q, std::optional<Tensor> q_sf, Tensor kv, Tensor kv_sf, Tensor weights, Tensor start,
                            Tensor end, bool clean_logits, int64_t max_seqlen_k, Tensor out) {
    run_dense("fp8_fp4_mqa_logits", q, q_sf, kv, kv_sf, weights, start, end, clean_logits, max_seqlen_k,
              ScalarType::Float, &out);
}

Tensor get_paged_mqa_logits_metadata(Tensor context_lens, int64_t block_kv, int64_t num_sms,
                                     std::optional<Tensor> indices) {
    return *run_metadata(context_lens, block_kv, num_sms, indices, nullptr);
}

void get_paged_mqa_logits_metadata_out(Tensor context_lens, int64_t block_kv, int64_t num_sms,
                                       std::optional<Tensor> indices, Tensor out) {
    run_metadata(context_lens, block_kv, num_sms, indices, &out);
}

Tensor fp8_paged_mqa_logits(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table,
                            Tensor schedule_metadata, int64_t max_context_len, bool clean_logits,
                            ScalarType logits_dtype, std::optional<Tensor> indices) {
    return *run_paged("fp8_paged_mqa_logits", q, {}, kv_cache, weights, context_lens, block_table, schedule_metadata,
                      max_context_len, clean_logits, logits_dtype, indices, nullptr);
}

void fp8_paged_mqa_logits_out(Tensor q, Tensor kv_cache, Tensor weights, Tensor context_lens, Tensor block_table,
                              Tensor schedule_metadata, int64_t max_context_len, bool clean_logits,
                              std::optional<Tensor> indices, Tensor out) {
    run_paged("fp8_paged_mqa_logits", q, {}, kv_cache, weights, context_lens, block_table, schedule_metadata,
              max_context_len, clean_logits, ScalarType::Float, indices, &out);
}

Tensor fp8_fp4_paged_mqa_logits(Tensor q, std::optional<Tensor> q_sf, Tensor kv_cache, Tensor weights,
                                Tensor context_lens, Tensor block_table, Tensor schedule_metadata,
                                int64_t max_context_len, bool clean_logits, ScalarType logits_dtype,
                                std::optional<Tensor> indices) {
    return *run_paged("fp8_fp4_paged_mqa_logits", q, q_sf, kv_cache, weights, context_lens, block_table,
                      schedule_metadata, max_context_len, clean_logits, logits_dtype, indices, nullptr);
}

void fp8_fp4_paged_mqa_logits_out(Tensor q, std::optional<Tensor> q_sf, Tensor kv_cache, Tensor weights,
                                  Tensor context_lens, Tensor block_table, Tensor schedule_metadata,
                                  int64_t max_context_len, bool clean_logits, std::optional<Tensor> indices,
                                  Tensor out) {
    run_paged("fp8_fp4_paged_mqa_logits", q, q_sf, kv_cache, weights, context_lens, block_table, schedule_metadata,
              max_context_len, clean_logits, ScalarType::Float, indices, &out);
}

}  // namespace deep_gemm::ops
