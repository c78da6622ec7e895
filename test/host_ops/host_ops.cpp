// The operators of src/ops on host memory: what they call of CUDA and of the rest of the library, in plain C++. Products
// are evaluated from the GemmProblem that an operator has filled, in float64, and what a kernel must not read is not read.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "host/cast.h"
#include "host/gemm.h"
#include "host/gemm_sm100.h"
#include "host/knobs.h"
#include "host/mega_moe.h"
#include "host/selection_cache.h"
#include "ops/gemm_ops.h"
#include "ops/mega_moe_ops.h"

// ---------------------------------------------------------------------------------------------------------------------
// CUDA

extern "C" {
cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    const char* major = std::getenv("HOST_OPS_MAJOR");
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? (major ? std::atoi(major) : 9) : 0;
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* data, int value, size_t size, cudaStream_t) {
    std::memset(data, value, size);
    return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
}

namespace deep_gemm {

// ---------------------------------------------------------------------------------------------------------------------
// Knobs

Knobs& knobs() {
    static Knobs instance;
    return instance;
}
int usable_sms(int) { return 132; }

// ---------------------------------------------------------------------------------------------------------------------
// Casts

namespace cast {

namespace {

float scale_at(const void* src, ScaleType type, int64_t offset, int64_t k) {
    if (type == ScaleType::kFloat32) return static_cast<const float*>(src)[offset];
    const int byte = type == ScaleType::kE8M0
                         ? static_cast<const uint8_t*>(src)[offset]
                         : static_cast<const uint32_t*>(src)[offset] >> (8 * (k % 4)) & 255;
    return byte == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, byte - 127);
}

}  // namespace

cudaError_t launch_transpose_fp8(const TransposeProblem& p, cudaStream_t, bool) {
    for (int64_t b = 0; b < p.batch; ++b) {
        const char* x = static_cast<const char*>(p.x) + b * p.x_batch_stride;
        char* out = static_cast<char*>(p.out) + b * p.out_batch_stride;
        for (int64_t r = 0; r < p.rows; ++r) {
            for (int64_t c = 0; c < p.cols; ++c) out[c * p.out_stride + r] = x[r * p.x_stride + c];
        }
    }
    return cudaSuccess;
}

cudaError_t launch_scale_layout(const ScaleLayoutProblem& p, cudaStream_t, bool) {
    const bool packed = p.dst_type == ScaleType::kPackedUE8M0;
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t mn = 0; mn < p.mn; ++mn) {
            for (int64_t k = 0; k < p.k_sf; ++k) {
                const int64_t src_k = k / p.k_repeat;
                const int64_t unit = p.src_type == ScaleType::kPackedUE8M0 ? src_k / 4 : src_k;
                const int64_t offset =
                    b * p.src_batch_stride + mn / p.mn_repeat * p.src_mn_stride + unit * p.src_k_stride;
                const float scale = scale_at(p.src, p.src_type, offset, src_k);
                const int64_t to = b * p.dst_batch_stride + (packed ? k / 4 : k) * p.dst_k_stride + mn;
                if (!packed) {
                    static_cast<float*>(p.dst)[to] = scale;
                    continue;
                }
                int exponent = 0;
                const bool is_half = scale > 0 && std::frexp(scale, &exponent) == 0.5f;
                const bool is_power = is_half || (p.round_up && scale > 0);
                if (!is_half) ++exponent;
                uint32_t& word = static_cast<uint32_t*>(p.dst)[to];
                word = (k % 4 == 0 ? 0 : word) | (is_power ? exponent + 126u : 255u) << (8 * (k % 4));
            }
        }
    }
    return cudaSuccess;
}

}  // namespace cast

namespace {

struct Range {
    int64_t begin, end;
};

// As deep_gemm_ops.layout.group_ranges.
std::vector<Range> group_ranges(const int32_t* ends, int64_t num_groups, int64_t total, GroupLayout layout,
                                int64_t alignment) {
    std::vector<Range> ranges;
    int64_t end = 0;
    for (int64_t group = 0; group < num_groups; ++group) {
        const int64_t value = ends[group];
        const int64_t begin =
            layout == GroupLayout::kPsum ? std::min((end + alignment - 1) / alignment * alignment, total) : end;
        end = std::min(std::max(layout == GroupLayout::kSizes ? begin + value : value, begin), total);
        ranges.push_back({begin, end});
    }
    return ranges;
}

}  // namespace

namespace cast {

cudaError_t launch_k_grouped_transpose_fp8(const KGroupedTransposeProblem& p, const KGroups& groups, cudaStream_t, bool) {
    int64_t column = 0;
    for (const Range& range : group_ranges(groups.ends, groups.num_groups, groups.rows, groups.layout, groups.alignment)) {
        const int64_t size = range.end - range.begin, padded = (size + 127) / 128 * 128;
        for (int64_t mn = 0; mn < p.mn; ++mn) {
            for (int64_t k = 0; k < padded; ++k) {
                const char* x = static_cast<const char*>(p.x);
                x += p.flat ? range.begin * p.mn + mn * size + k : (range.begin + k) * p.x_stride + mn;
                static_cast<char*>(p.out)[mn * p.out_stride + column + k] = k < size ? *x : 0;
            }
        }
        column += padded;
    }
    return cudaSuccess;
}

}  // namespace cast

// ---------------------------------------------------------------------------------------------------------------------
// Products

std::span<const GemmRow> gemm_rows() { return {}; }
std::span<const GemmRow> sm100_gemm_rows() { return {}; }
// An odd number of tokens becomes BF16, and what can be folded of others is.
Choice choose_row_cached(std::span<const GemmRow>, const GemmProblem& p, const SelectionLimits&) {
    if (p.b_is_fp4 && p.operands == OperandType::kBF16) return {0, p.m % 2 == 1 ? -1.0 : 9.0};
    return {0, p.b_is_fp4 ? 2.0 : 0.0};
}
double bf16_tokens_us(const GemmProblem&) { return 1; }
double fold_fp4_us(const GemmProblem&) { return 1; }
const char* operand_mismatch(const GemmRow&, const GemmProblem&) { return nullptr; }
EncodeTiledFunction driver_encode_tiled() { return nullptr; }
void DeviceBackend::launch(const KernelLaunch&) {}
int DeviceBackend::resident_clusters(const KernelLaunch&, int limit) { return limit; }

namespace {

double bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

double decode_e4m3(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    double value = exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
    if (exponent == 15 && mantissa == 7) value = std::numeric_limits<double>::quiet_NaN();
    return bits & 128 ? -value : value;
}

double e2m1(uint8_t bits) {
    const int exponent = bits >> 1 & 3, mantissa = bits & 1;
    const double value = exponent == 0 ? 0.5 * mantissa : std::ldexp(2 + mantissa, exponent - 2);
    return bits & 8 ? -value : value;
}

double e4m3(uint8_t bits) {
    static const std::array<double, 256> values = [] {
        std::array<double, 256> all = {};
        for (int i = 0; i < 256; ++i) all[i] = decode_e4m3(static_cast<uint8_t>(i));
        return all;
    }();
    return values[bits];
}

}  // namespace

namespace cast {

cudaError_t launch_expand_fp4(const ExpandFp4Problem& p, cudaStream_t, bool) {
    static constexpr uint8_t kCodes[] = {0x00, 0x30, 0x38, 0x3c, 0x40, 0x44, 0x48, 0x4c};
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t row = 0; row < p.rows; ++row) {
            const uint8_t* x = static_cast<const uint8_t*>(p.x) + b * p.x_batch_stride + row * p.x_stride;
            uint8_t* out = static_cast<uint8_t*>(p.out) + b * p.out_batch_stride + row * p.out_stride;
            for (int64_t col = 0; col < p.cols; ++col) {
                const int code = x[col / 2] >> (col % 2 * 4) & 15;
                out[col] = kCodes[code & 7] | (code & 8) << 4;
            }
        }
    }
    return cudaSuccess;
}

// Where a value of K is in the order of BF16 tokens.
int64_t position_of_token_value(int64_t k) {
    const int64_t t = k / 32 % 4, i = k / 8 % 4, b = k / 4 % 2, p = k % 4;
    return k / 128 * 128 + 32 * i + 8 * p + 2 * t + b;
}

cudaError_t launch_bf16_tokens(const Bf16TokensProblem& p, cudaStream_t, bool) {
    const ScaleType type = p.sf_is_packed ? ScaleType::kPackedUE8M0 : ScaleType::kE8M0;
    for (int64_t b = 0; b < p.batch; ++b) {
        for (int64_t row = 0; row < p.rows; ++row) {
            if (p.rows_of_group != nullptr && row >= p.rows_of_group[b]) continue;
            for (int64_t k = 0; k < p.cols; ++k) {
                float value = e4m3(static_cast<const uint8_t*>(p.x)[b * p.x_batch_stride + row * p.x_stride + k]);
                if (p.sf != nullptr) {
                    const int64_t group = k / p.gran_k, unit = p.sf_is_packed ? group / 4 : group;
                    const int64_t at = b * p.sf_batch_stride + row / p.gran_mn * p.sf_mn_stride + unit * p.sf_k_stride;
                    value *= scale_at(p.sf, type, at, group);
                }
                const int64_t at = b * p.out_batch_stride + row * p.out_stride + position_of_token_value(k);
                static_cast<uint16_t*>(p.out)[at] = std::bit_cast<uint32_t>(value) >> 16;  // which is exact
            }
        }
    }
    return cudaSuccess;
}

cudaError_t launch_fold_fp4(const FoldFp4Problem& p, cudaStream_t, bool) {
    for (int64_t block = 0; block < p.batch * p.row_blocks() * p.col_blocks(); ++block) {
        const int64_t col_block = block % p.col_blocks(), row_block = block / p.col_blocks() % p.row_blocks();
        const int64_t group = block / p.col_blocks() / p.row_blocks(), end = std::min(p.rows, row_block * 128 + 128);
        p.inexact[block] = 0;
        p.block_sf[block] = std::numeric_limits<float>::quiet_NaN();
        if (p.group_layout != nullptr) {
            const int64_t before = p.ends && group > 0 ? p.group_layout[group - 1] : 0;
            if (p.group_layout[group] <= before) continue;
        }
        const auto code = [&](int64_t row, int64_t k) {
            const uint32_t word = static_cast<const uint32_t*>(
                p.sf)[group * p.sf_batch_stride + col_block * p.sf_stride + row];
            return static_cast<int>(word >> k / 32 * 8 & 255);
        };
        const auto e2m1_code = [&](int64_t row, int64_t k) {
            const int64_t at = group * p.x_batch_stride + row * p.x_stride + (col_block * 128 + k) / 2;
            return static_cast<const uint8_t*>(p.x)[at] >> (k % 2 * 4) & 15;
        };
        int largest = 0;
        for (int64_t row = row_block * 128; row < end; ++row) {
            for (int64_t k = 0; k < 128; ++k) {
                if (code(row, k) != 255 && (e2m1_code(row, k) & 7) != 0) largest = std::max(largest, code(row, k));
            }
        }
        p.block_sf[block] = std::ldexp(1.0f, largest - 133);
        for (int64_t row = row_block * 128; row < end; ++row) {
            for (int64_t k = 0; k < 128; ++k) {
                const double value = std::ldexp(e2m1(e2m1_code(row, k)), code(row, k) - largest + 6);
                int byte = 0;
                while (byte < 127 && e4m3(byte) != std::fabs(value)) ++byte;
                if (code(row, k) == 255) byte = 127;
                if (byte == 127 && code(row, k) != 255) p.inexact[block] = 1;
                const int64_t at = group * p.out_batch_stride + row * p.out_stride + col_block * 128 + k;
                static_cast<uint8_t*>(p.out)[at] = static_cast<uint8_t>(byte | (value < 0) << 7);
            }
        }
    }
    return cudaSuccess;
}

}  // namespace cast

namespace {

// Values that the kernels load by TMA: their rows and batches have to begin on multiples of 16 bytes.
void check_tma(const char* what, const void* data, int64_t rows, int64_t stride, int64_t groups, int64_t group_stride,
               int64_t bytes) {
    const bool fits = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows <= 1 || stride * bytes % 16 == 0) &&
                      (groups <= 1 || group_stride * bytes % 16 == 0);
    if (!fits) throw std::runtime_error(std::string("host_ops: TMA cannot read ") + what);
}

class Product {
public:
    // On SM100 scales are packed words per row, and operands may be FP4. On SM90 B may, and its scales may be such words.
    explicit Product(const GemmProblem& problem, bool sm100 = false) : p_(problem), sm100_(sm100) {
        const bool is_fp8 = p_.operands == OperandType::kFP8 || p_.b_is_fp4;  // or BF16 by FP4
        const int64_t bytes = p_.operands == OperandType::kFP8 ? 1 : 2;
        const bool own_b = p_.grouping != Grouping::kDense && p_.grouping != Grouping::kKGrouped;
        const bool own_a = own_b && (p_.grouping != Grouping::kMGrouped || p_.layout == GroupLayout::kMasked);
        check_tma("a", p_.a, p_.a_mn_major ? p_.k : p_.m, p_.a_stride, own_a ? p_.num_groups : 1, p_.a_group_stride, bytes);
        check_tma("b", p_.b, p_.b_mn_major ? p_.k : p_.n, p_.b_stride, own_b ? p_.num_groups : 1, p_.b_group_stride,
                  is_fp8 ? 1 : bytes);
        if (!is_fp8) return;
        if (sm100_ && ((p_.a_is_fp4 && p_.a_mn_major) || (p_.b_is_fp4 && p_.b_mn_major))) {
            throw std::runtime_error("host_ops: MN-major FP4");
        }
        if (sm100_ && p_.k % 128 != 0 && (p_.a_is_fp4 || p_.b_is_fp4)) throw std::runtime_error("host_ops: FP4 of ragged K");
        if (!sm100_ && (p_.a_is_fp4 || (p_.b_is_fp4 && !p_.sfb_is_packed && p_.gran_k != 32) || (p_.sfb_is_packed && p_.k % 128 != 0))) {
            throw std::runtime_error("host_ops: FP4 that SM90 does not take");
        }
        const bool is_1d2d = p_.sfa.gran_mn == 1 && p_.sfb.gran_mn == 128 && p_.gran_k == 128;
        if (has_scales_of_a()) check_vector("sfa", p_.sfa, p_.m, own_a ? p_.num_groups : 1, sm100_, p_.gran_k);
        if (!is_1d2d || sm100_) {
            check_vector("sfb", p_.sfb, p_.n, own_b ? p_.num_groups : 1, sm100_ || p_.sfb_is_packed, gran_k_b());
        }
    }

    // Adds the product of rows `rows` of A with all of B over [k.begin, k.end) to sums[row][column]. Scales are those of K
    // from k.begin + `sf_shift` on.
    void add(int64_t group_a, int64_t group_b, Range rows, Range k, std::vector<double>& sums, int64_t sf_shift = 0) const {
        const int64_t num_rows = rows.end - rows.begin;
        const std::vector<double> a = values_of_a(group_a, rows, k, sf_shift), b = values_of_b(group_b, k, sf_shift);
        for (int64_t m = 0; m < num_rows; ++m) {
            for (int64_t i = 0; i < k.end - k.begin; ++i) {
                const double value = a[i * num_rows + m];
                for (int64_t n = 0; n < p_.n; ++n) sums[m * p_.n + n] += value * b[i * p_.n + n];
            }
        }
    }

    // Rounds once. `group` is that of D and C.
    void store(int64_t group, int64_t m, int64_t n, double sum) const {
        if (p_.c != nullptr) sum += read(p_.c, group * p_.c_group_stride + m * p_.c_stride + n);
        int64_t column = n;
        if (const int64_t kept = p_.head_left + p_.head_right; kept > 0) {
            column = n / kept * (kept + p_.head_mid) + n % kept + (n % kept >= p_.head_left ? p_.head_mid : 0);
        }
        const int64_t offset = group * p_.d_group_stride + m * p_.d_stride + column;
        const float rounded = static_cast<float>(sum);
        if (p_.d_type == DataType::kFloat32) {
            static_cast<float*>(p_.d)[offset] = rounded;
            return;
        }
        uint32_t bits = std::bit_cast<uint32_t>(rounded);
        bits = std::isnan(rounded) ? 0x7FC00000 : bits + 0x7FFF + (bits >> 16 & 1);
        static_cast<uint16_t*>(p_.d)[offset] = static_cast<uint16_t>(bits >> 16);
    }

private:
    // Of BF16 beside FP4 they may be in its values.
    bool has_scales_of_a() const { return p_.operands == OperandType::kFP8 || p_.gran_k == 128; }

    // [k][row], as are those of B.
    std::vector<double> values_of_a(int64_t group, Range rows, Range k, int64_t sf_shift) const {
        std::vector<double> values;
        for (int64_t i = k.begin; i < k.end; ++i) {
            for (int64_t m = rows.begin; m < rows.end; ++m) {
                values.push_back(value(p_.a, group * p_.a_group_stride, m, i, p_.a_stride, p_.a_mn_major, p_.a_is_fp4,
                                       p_.sfa, group, sm100_, p_.gran_k, i + sf_shift));
            }
        }
        return values;
    }

    std::vector<double> values_of_b(int64_t group, Range k, int64_t sf_shift) const {
        std::vector<double> values;
        for (int64_t i = k.begin; i < k.end; ++i) {
            for (int64_t n = 0; n < p_.n; ++n) {
                values.push_back(value(p_.b, group * p_.b_group_stride, n, i, p_.b_stride, p_.b_mn_major, p_.b_is_fp4,
                                       p_.sfb, group, sm100_ || p_.sfb_is_packed, gran_k_b(), i + sf_shift));
            }
        }
        return values;
    }

    // SM90's packed scales of FP4 are per 32 of K, whatever A's.
    int64_t gran_k_b() const { return p_.sfb_is_packed ? 32 : p_.gran_k; }

    void check_vector(const char* what, const ScaleTensor& sf, int64_t mn, int64_t groups, bool packed, int64_t gran_k) const {
        if (sf.gran_mn != 1 && mn > 1) throw std::runtime_error(std::string("host_ops: a scale per block in ") + what);
        if (sf.stride_mn != 1 && mn > 1) throw std::runtime_error(std::string("host_ops: not MN-major: ") + what);
        if (packed) gran_k *= 4;
        check_tma(what, sf.data, (p_.k + gran_k - 1) / gran_k, sf.stride_k, groups, sf.stride_group, 4);
    }

    double value(const void* data, int64_t offset, int64_t mn, int64_t k, int64_t stride, bool mn_major,
                 bool is_fp4, const ScaleTensor& sf, int64_t group, bool packed, int64_t gran_k, int64_t sf_k) const {
        offset += mn_major ? k * stride + mn : mn * stride + k;
        if (p_.operands == OperandType::kBF16 && !p_.b_is_fp4) return bfloat16(static_cast<const uint16_t*>(data)[offset]);
        if (p_.operands == OperandType::kBF16 && !is_fp4) {
            offset += cast::position_of_token_value(k) - k;
            const double x = bfloat16(static_cast<const uint16_t*>(data)[offset]);
            if (!has_scales_of_a()) return x;
            return x * sf.data[group * sf.stride_group + mn * sf.stride_mn + k / gran_k * sf.stride_k];
        }
        const uint8_t* bytes = static_cast<const uint8_t*>(data);
        const double x = is_fp4 ? e2m1(bytes[offset / 2] >> (offset % 2 * 4) & 15) : e4m3(bytes[offset]);
        if (packed) {
            const int64_t block = sf_k / gran_k;
            const int64_t word = group * sf.stride_group + mn * sf.stride_mn + block / 4 * sf.stride_k;
            return x * cast::scale_at(sf.data, cast::ScaleType::kPackedUE8M0, word, block);
        }
        return x * sf.data[group * sf.stride_group + mn / sf.gran_mn * sf.stride_mn + sf_k / gran_k * sf.stride_k];
    }

    double read(const void* data, int64_t offset) const {
        return p_.d_type == DataType::kFloat32 ? static_cast<const float*>(data)[offset]
                                               : bfloat16(static_cast<const uint16_t*>(data)[offset]);
    }

    const GemmProblem& p_;
    bool sm100_;
};

}  // namespace

namespace {

// Of the columns of a product some of which are computed again.
bool wanted(const GemmProblem& p, int64_t group, int64_t n) {
    const int64_t k_blocks = p.k / 128, first = (group * ((p.n + 127) / 128) + n / 128) * k_blocks;
    return std::any_of(p.blocks_to_redo + first, p.blocks_to_redo + first + k_blocks, [](uint8_t flag) { return flag != 0; });
}

void run_on_host(const GemmProblem& p, bool sm100) {
    if (p.m <= 0 || p.n <= 0 || p.k <= 0 || p.num_groups <= 0) throw std::runtime_error("host_ops: an empty problem");
    const Product product(p, sm100);
    const auto store = [&](int64_t group, Range rows, const std::vector<double>& sums) {
        for (int64_t m = rows.begin; m < rows.end; ++m) {
            for (int64_t n = 0; n < p.n; ++n) product.store(group, m, n, sums[(m - rows.begin) * p.n + n]);
        }
    };
    const auto matrix = [&](int64_t group_a, int64_t group_b, int64_t group_d, Range rows, Range k, int64_t sf_shift = 0) {
        std::vector<double> sums(std::max<int64_t>(rows.end - rows.begin, 0) * p.n);
        if (!sums.empty()) product.add(group_a, group_b, rows, k, sums, sf_shift);
        if (p.blocks_to_redo == nullptr) return store(group_d, rows, sums);
        for (int64_t m = rows.begin; m < rows.end; ++m) {
            for (int64_t n = 0; n < p.n; ++n) {
                if (wanted(p, group_b, n)) product.store(group_d, m, n, sums[(m - rows.begin) * p.n + n]);
            }
        }
    };
    const Range all_rows = {0, p.m}, all_k = {0, p.k};
    if (p.grouping == Grouping::kDense) return matrix(0, 0, 0, all_rows, all_k);
    if (p.grouping == Grouping::kBatched) {
        for (int64_t group = 0; group < p.num_groups; ++group) matrix(group, group, group, all_rows, all_k);
    } else if (p.grouping == Grouping::kSummed) {
        std::vector<double> sums(p.m * p.n);
        for (int64_t group = 0; group < p.num_groups; ++group) product.add(group, group, all_rows, all_k, sums);
        store(0, all_rows, sums);
    } else if (p.grouping == Grouping::kKGrouped) {
        const bool scaled = p.operands == OperandType::kFP8, padded = scaled && !p.a_mn_major;
        int64_t column = 0;  // of scales, in elements of K
        const auto ranges = group_ranges(p.group_layout, p.num_groups, p.k, p.layout, p.group_alignment);
        for (int64_t group = 0; group < p.num_groups; ++group) {
            Range k = ranges[group];
            const int64_t size = k.end - k.begin, begin = column;
            if (scaled) column += (size + 127) / 128 * 128;
            if (padded) k = {std::min(begin, p.k), std::min(begin + size, p.k)};
            matrix(0, 0, group, all_rows, k, scaled ? begin - k.begin : 0);
        }
    } else if (p.layout == GroupLayout::kMasked) {
        for (int64_t group = 0; group < p.num_groups; ++group) {
            const int64_t rows = std::clamp<int64_t>(p.group_layout[group], 0, p.m);
            matrix(group, group, group, {0, rows}, all_k);
        }
    } else {
        std::vector<int64_t> owner(p.m, -1);
        if (p.layout == GroupLayout::kIndices) {
            std::copy_n(p.group_layout, p.m, owner.begin());
        } else {
            const auto ranges = group_ranges(p.group_layout, p.num_groups, p.m, p.layout, p.group_alignment);
            for (int64_t group = 0; group < p.num_groups; ++group) {
                std::fill(owner.begin() + ranges[group].begin, owner.begin() + ranges[group].end, group);
            }
        }
        for (int64_t begin = 0, end = 0; begin < p.m; begin = end) {
            while (end < p.m && owner[end] == owner[begin]) ++end;
            const Range rows = {begin, end};
            const bool owned = owner[begin] >= 0 && owner[begin] < p.num_groups;
            if (owned) matrix(0, owner[begin], 0, rows, all_k);
            if (!owned && p.zero_padding) store(0, rows, std::vector<double>((end - begin) * p.n));
        }
    }
}

}  // namespace

void run_gemm(const GemmProblem& p, const SelectionLimits&, int, bool, Backend&) { run_on_host(p, false); }
void run_sm100_gemm(const GemmProblem& p, const SelectionLimits&, int, bool, Backend&) { run_on_host(p, true); }
// Of Mega MoE arguments are checked, and nothing is computed.
void run_mega_moe(const MegaMoeProblem&, int, int, int, bool, Backend&) {}

}  // namespace deep_gemm

extern "C" void host_ops_set_alignment(int alignment) { deep_gemm::knobs().mk_alignment = alignment; }

// ---------------------------------------------------------------------------------------------------------------------
// Registration: the products and Mega MoE, for tensors in host memory

namespace {

using namespace deep_gemm::ops;

STABLE_TORCH_LIBRARY(deep_gemm, m) {
#define DG_SCHEMA(schema) m.def(schema);
#include "ops/schemas.inc"
#undef DG_SCHEMA
}

STABLE_TORCH_LIBRARY_IMPL(deep_gemm, CPU, m) {
#include "ops/product_impls.inc"
#include "ops/mega_moe_impls.inc"
}

}  // namespace
