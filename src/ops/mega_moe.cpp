#include "mega_moe_ops.h"

#include <array>

#include "../host/knobs.h"
#include "../host/mega_moe.h"
#include "cast_checks.h"

namespace deep_gemm::ops {

namespace {

// What the operators take; the scales are null with BF16.
struct Arguments {
    MegaMoeType type;
    const Tensor& l1;
    const Tensor* l1_sf;
    const Tensor& l2;
    const Tensor* l2_sf;
    const Tensor& buffer;
    const std::vector<int64_t>& buffer_ptrs;
    int64_t rank;
    int64_t num_tokens;
    int64_t max_tokens;
    int64_t num_experts;
    int64_t topk;
    const std::optional<Tensor>& stats;
    std::optional<double> clamp;
    std::optional<int64_t> expected_m;
    int64_t timeout_ms;

    const char* op() const {
        return type == MegaMoeType::kFP8 ? "fp8_mega_moe" : is_fp4() ? "fp8_fp4_mega_moe" : "bf16_mega_moe";
    }
    bool is_fp4() const { return type == MegaMoeType::kFP8FP4; }
    int64_t values() const { return is_fp4() ? 2 : 1; }  // of K in an element of the weights
    int64_t hidden() const { return values() * l1.size(2); }
    int64_t intermediate() const { return values() * l2.size(2); }
};

void check_dense(const char* op, const char* arg, const Tensor& x) {
    int64_t expected = 1;
    for (int64_t i = x.dim() - 1; i >= 0; --i) {
        if (x.size(i) > 1 && x.stride(i) != expected) {
            fail(op, arg, ("dimension-" + std::to_string(i) + " stride").c_str(), x.stride(i), expected);
        }
        expected *= x.size(i);
    }
}

void check_base(const char* op, const char* arg, const Tensor& x) {
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16);
    if (past != 0) fail(op, arg, "base address", std::to_string(past) + " modulo 16 bytes", int64_t{0});
}

// UE8M0 scales of FP4 weights, dense with rows innermost: a multiple of 128 in number, so that TMA can read them.
void check_words(const char* op, const char* arg, const Tensor& sf, const char* names, int64_t experts, int64_t rows,
                 int64_t words) {
    check_shape(op, arg, sf, names, {experts, rows, words});
    const int64_t strides[] = {words * rows, 1, rows};
    check_exact_strides(op, arg, sf, strides);
    check_base(op, arg, sf);
}

void check_positive_multiple(const char* op, const char* arg, int64_t size) {
    if (size < kMegaMoeGranK || size % kMegaMoeGranK != 0) {
        fail(op, arg, "value", size, "a positive multiple of " + std::to_string(kMegaMoeGranK));
    }
}

// What buffers and kernels can hold.
void check_sizes(const char* op, const Arguments& a, int64_t hidden, int64_t intermediate) {
    const auto ranks = static_cast<int64_t>(a.buffer_ptrs.size());
    if (ranks < 1 || ranks > kMegaMoeMaxRanks) {
        fail(op, "buffer_ptrs", "length", ranks, "1 to " + std::to_string(kMegaMoeMaxRanks));
    }
    if (a.num_experts < ranks || a.num_experts % ranks != 0) {
        fail(op, "num_experts", "value", a.num_experts, "a positive multiple of the " + std::to_string(ranks) + " ranks");
    }
    if (a.num_experts / ranks > kMegaMoeMaxLocalExperts) {
        fail(op, "num_experts", "value", a.num_experts,
             "at most " + std::to_string(kMegaMoeMaxLocalExperts) + " for each rank");
    }
    if (a.max_tokens < 1) fail(op, "num_max_tokens_per_rank", "value", a.max_tokens, "a positive integer");
    if (a.topk < 1 || a.topk > a.num_experts) fail(op, "num_topk", "value", a.topk, "1 to num_experts");
    check_positive_multiple(op, "hidden", hidden);
    check_positive_multiple(op, "intermediate_hidden", intermediate);
    const int64_t extra = a.num_experts / ranks * kMegaMoeMaxBlockTokens;
    if (a.max_tokens > (kMaxSize - extra) / (ranks * a.topk)) {
        fail(op, "num_max_tokens_per_rank", "value", a.max_tokens, "fewer than 2^31 rows in all");
    }
}

void check(const Arguments& a, const Tensor* out) {
    const char* op = a.op();
    const ScalarType type = a.l1_sf ? ScalarType::Float8_e4m3fn : ScalarType::BFloat16;
    const ScalarType scales = a.is_fp4() ? ScalarType::Int : ScalarType::Float;
    constexpr const char* kStats = "cumulative_local_expert_recv_stats";
    struct Input {
        const char* arg;
        const Tensor* x;
        ScalarType type;
        int64_t rank;
    };
    const Input inputs[] = {
        {"l1", &a.l1, type, 3},
        {"l1_sf", a.l1_sf, scales, 3},
        {"l2", &a.l2, type, 3},
        {"l2_sf", a.l2_sf, scales, 3},
        {"buffer", &a.buffer, ScalarType::Byte, 1},
        {kStats, a.stats ? &*a.stats : nullptr, ScalarType::Int, 1},
        {"out", out, ScalarType::BFloat16, 2},
    };
    for (const Input& input : inputs) {
        if (input.x == nullptr) continue;
        if (a.is_fp4() && (input.x == &a.l1 || input.x == &a.l2)) {
            check_dtype(op, input.arg, *input.x, {ScalarType::Byte, ScalarType::Char, ScalarType::Float4_e2m1fn_x2});
        } else {
            check_dtype(op, input.arg, *input.x, {input.type});
        }
        check_rank(op, input.arg, *input.x, input.rank);
    }
    for (const Input& input : inputs) {
        if (input.x != nullptr) check_device(op, input.arg, *input.x, a.l1, "l1");
    }
    const int64_t hidden = a.hidden(), intermediate = a.intermediate();
    check_sizes(op, a, hidden, intermediate);
    const auto ranks = static_cast<int64_t>(a.buffer_ptrs.size());
    if (a.rank < 0 || a.rank >= ranks) fail(op, "rank", "value", a.rank, "0 to " + std::to_string(ranks - 1));
    if (a.num_tokens < 0 || a.num_tokens > a.max_tokens) {
        fail(op, "num_tokens", "value", a.num_tokens, "0 to " + std::to_string(a.max_tokens));
    }
    if (a.clamp && !(*a.clamp > 0)) fail(op, "activation_clamp", "value", float_text(*a.clamp), "a positive number");
    if (a.expected_m && *a.expected_m < 0) fail(op, "expected_m", "value", *a.expected_m, "at least 0");
    if (a.timeout_ms <= 0) fail(op, "timeout_ms", "value", a.timeout_ms, "a positive integer");
    const int64_t experts = a.num_experts / ranks;
    check_shape(op, "l1", a.l1,
                a.is_fp4() ? "[local experts, 2 * intermediate, hidden / 2]" : "[local experts, 2 * intermediate, hidden]",
                {experts, 2 * intermediate, hidden / a.values()});
    check_shape(op, "l2", a.l2,
                a.is_fp4() ? "[local experts, hidden, intermediate / 2]" : "[local experts, hidden, intermediate]",
                {experts, hidden, intermediate / a.values()});
    for (const Input& input : {inputs[0], inputs[2]}) {
        check_dense(op, input.arg, *input.x);
        check_base(op, input.arg, *input.x);
    }
    if (a.is_fp4()) {
        check_words(op, "l1_sf", *a.l1_sf, "[local experts, 2 * intermediate, hidden / 128]", experts, 2 * intermediate,
                    hidden / kMegaMoeGranK);
        check_words(op, "l2_sf", *a.l2_sf, "[local experts, hidden, intermediate / 128]", experts, hidden,
                    intermediate / kMegaMoeGranK);
    } else if (a.l1_sf) {
        const int64_t blocks = hidden / kMegaMoeGranK, blocks_h = intermediate / kMegaMoeGranK;
        check_shape(op, "l1_sf", *a.l1_sf, "[local experts, 2 * intermediate / 128, hidden / 128]",
                    {experts, 2 * blocks_h, blocks});
        check_shape(op, "l2_sf", *a.l2_sf, "[local experts, hidden / 128, intermediate / 128]",
                    {experts, blocks, blocks_h});
    }
    const MegaMoeShape shape = {static_cast<int>(ranks),  static_cast<int>(a.num_experts), static_cast<int>(a.max_tokens),
                                static_cast<int>(a.topk), static_cast<int>(hidden),        static_cast<int>(intermediate),
                                a.type};
    const int64_t needed = MegaMoeOffsets(shape).bytes;
    check_dense(op, "buffer", a.buffer);
    if (a.buffer.size(0) < needed) fail(op, "buffer", "bytes", a.buffer.size(0), "at least " + std::to_string(needed));
    const auto address = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.buffer.data_ptr()));
    // Alone, a rank may work on a copy, as functionalisation makes one.
    if (ranks > 1 && address != a.buffer_ptrs[a.rank]) {
        fail(op, "buffer", "address", address, a.buffer_ptrs[a.rank], "that of this rank in buffer_ptrs");
    }
    for (const int64_t ptr : a.buffer_ptrs) {
        if (ptr == 0 || ptr % 16 != 0) fail(op, "buffer_ptrs", "address", ptr, "a multiple of 16");
    }
    if (a.stats) {
        check_shape(op, kStats, *a.stats, "[local experts]", {experts});
        check_dense(op, kStats, *a.stats);
    }
    if (out) {
        check_shape(op, "out", *out, "[num_tokens, hidden]", {a.num_tokens, hidden});
        check_tma_readable(op, "out", *out);
    }
}

MegaMoeBlockScales block_scales(const Tensor* sf) {
    return {static_cast<const float*>(sf->data_ptr()), sf->stride(0), sf->stride(1), sf->stride(2)};
}

// Checks everything, then runs; the result is allocated here when absent.
Tensor run(const Arguments& a, const Tensor* given_out) {
    check(a, given_out);
    const int device = a.l1.get_device_index();
    const DeviceGuard guard(device);
    const int64_t hidden = a.hidden();
    const std::array<int64_t, 2> shape = {a.num_tokens, hidden}, strides = {hidden, 1};
    Tensor out = given_out ? *given_out : empty_strided(shape, strides, ScalarType::BFloat16, a.l1);
    const int arch = compute_capability(device);
    if (arch != 90 && (arch != 100 || a.type == MegaMoeType::kFP8)) {
        const std::string reason = arch == 100 ? "FP8 weights with FP32 scales; SM100 has fp8_fp4_mega_moe" : "";
        fail(a.op(), "l1", "architecture", "sm_" + std::to_string(arch),
             a.type == MegaMoeType::kFP8 ? "sm_90" : "sm_90 or sm_100", reason);
    }
    if (arch == 100 && a.is_fp4()) {
        for (const auto& [arg, x] : {std::pair{"l1", &a.l1}, std::pair{"l2", &a.l2}}) {
            const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x->data_ptr()) % 32);
            if (past != 0) fail(a.op(), arg, "base address", std::to_string(past) + " modulo 32 bytes", int64_t{0}, "FP4");
        }
    }

    MegaMoeProblem problem;
    problem.num_ranks = static_cast<int64_t>(a.buffer_ptrs.size());
    problem.rank = a.rank;
    problem.num_experts = a.num_experts;
    problem.max_tokens = a.max_tokens;
    problem.topk = a.topk;
    problem.hidden = hidden;
    problem.intermediate = a.intermediate();
    problem.num_tokens = a.num_tokens;
    problem.type = a.type;
    problem.l1 = a.l1.data_ptr();
    problem.l2 = a.l2.data_ptr();
    if (a.is_fp4()) {
        problem.l1_words = static_cast<const int32_t*>(a.l1_sf->data_ptr());
        problem.l2_words = static_cast<const int32_t*>(a.l2_sf->data_ptr());
    } else if (a.l1_sf) {
        problem.l1_sf = block_scales(a.l1_sf);
        problem.l2_sf = block_scales(a.l2_sf);
    }
    std::vector<int64_t> buffers = a.buffer_ptrs;
    buffers[a.rank] = static_cast<int64_t>(reinterpret_cast<uintptr_t>(a.buffer.data_ptr()));
    problem.buffers = buffers.data();
    problem.y = out.data_ptr();
    problem.y_stride = a.num_tokens > 1 ? out.stride(0) : hidden;
    problem.stats = a.stats ? static_cast<int32_t*>(a.stats->data_ptr()) : nullptr;
    problem.clamped = a.clamp.has_value();
    problem.clamp = static_cast<float>(a.clamp.value_or(0));
    problem.expected_m = a.expected_m.value_or(-1);
    problem.timeout_ns = a.timeout_ms * 1'000'000;
    DeviceBackend backend(device, current_stream(a.l1));
    run_mega_moe(problem, arch, usable_sms(device), 0, knobs().pdl, backend);
    return out;
}

}  // namespace

template <MegaMoeType kType>
Tensor scaled_mega_moe(Tensor l1, Tensor l1_sf, Tensor l2, Tensor l2_sf, Tensor buffer, std::vector<int64_t> buffer_ptrs,
                       int64_t rank, int64_t num_tokens, int64_t num_max_tokens_per_rank, int64_t num_experts,
                       int64_t num_topk, std::optional<Tensor> stats, std::optional<double> activation_clamp,
                       std::optional<int64_t> expected_m, int64_t timeout_ms) {
    return run({kType, l1, &l1_sf, l2, &l2_sf, buffer, buffer_ptrs, rank, num_tokens, num_max_tokens_per_rank,
                num_experts, num_topk, stats, activation_clamp, expected_m, timeout_ms},
               nullptr);
}

template <MegaMoeType kType>
void scaled_mega_moe_out(Tensor l1, Tensor l1_sf, Tensor l2, Tensor l2_sf, Tensor buffer,
                         std::vector<int64_t> buffer_ptrs, int64_t rank, int64_t num_tokens,
                         int64_t num_max_tokens_per_rank, int64_t num_experts, int64_t num_topk,
                         std::optional<Tensor> stats, std::optional<double> activation_clamp,
                         std::optional<int64_t> expected_m, int64_t timeout_ms, Tensor out) {
    run({kType, l1, &l1_sf, l2, &l2_sf, buffer, buffer_ptrs, rank, num_tokens, num_max_tokens_per_rank, num_experts,
         num_topk, stats, activation_clamp, expected_m, timeout_ms},
        &out);
}

#define DG_SCALED(type)                                                                                                 \
    template Tensor scaled_mega_moe<type>(Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<int64_t>, int64_t, int64_t, \
                                          int64_t, int64_t, int64_t, std::optional<Tensor>, std::optional<double>,      \
                                          std::optional<int64_t>, int64_t);                                             \
    template void scaled_mega_moe_out<type>(Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<int64_t>, int64_t,       \
                                            int64_t, int64_t, int64_t, int64_t, std::optional<Tensor>,                  \
                                            std::optional<double>, std::optional<int64_t>, int64_t, Tensor);
DG_SCALED(MegaMoeType::kFP8)
DG_SCALED(MegaMoeType::kFP8FP4)
#undef DG_SCALED

Tensor bf16_mega_moe(Tensor l1, Tensor l2, Tensor buffer, std::vector<int64_t> buffer_ptrs, int64_t rank,
                     int64_t num_tokens, int64_t num_max_tokens_per_rank, int64_t num_experts, int64_t num_topk,
                     std::optional<Tensor> stats, std::optional<double> activation_clamp,
                     std::optional<int64_t> expected_m, int64_t timeout_ms) {
    return run({MegaMoeType::kBF16, l1, nullptr, l2, nullptr, buffer, buffer_ptrs, rank, num_tokens, num_max_tokens_per_rank,
                num_experts, num_topk, stats, activation_clamp, expected_m, timeout_ms},
               nullptr);
}

void bf16_mega_moe_out(Tensor l1, Tensor l2, Tensor buffer, std::vector<int64_t> buffer_ptrs, int64_t rank,
                       int64_t num_tokens, int64_t num_max_tokens_per_rank, int64_t num_experts, int64_t num_topk,
                       std::optional<Tensor> stats, std::optional<double> activation_clamp,
                       std::optional<int64_t> expected_m, int64_t timeout_ms,
                       Tensor out) {
    run({MegaMoeType::kBF16, l1, nullptr, l2, nullptr, buffer, buffer_ptrs, rank, num_tokens, num_max_tokens_per_rank,
         num_experts, num_topk, stats, activation_clamp, expected_m, timeout_ms},
        &out);
}

}  // namespace deep_gemm::ops
