// Which row of a GEMM table runs a problem: the one that a cost model finds cheapest among those that support it.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "gemm_problem.h"
#include "gemm_row.h"

namespace deep_gemm {

struct SelectionLimits {
    int num_sms = 132;
    int block_m_multiple_of = 1;
    int block_n_multiple_of = 1;
};

struct Candidate {
    int row;
    double cost_us;      // of the model; meaningless where `reason` is set
    const char* reason;  // why the row cannot run the problem, or null
};

// The operands that a problem's rows on SM90 are for.
OperandType operands_of(const GemmProblem& problem);

// The scaling that a problem's granularities ask for.
Scaling scaling_of(const GemmProblem& problem);

// The kind of rows that run a problem. Gaps between the heads of a dense product are a matter of the batched ones.
Grouping grouping_of(const GemmProblem& problem);

// Whether no tile of a row can touch two groups.
bool fits_alignment(const GemmRow& row, const GemmProblem& problem);

// Rows of a group that selection counts on.
int64_t expected_rows(const GemmProblem& problem);

// M-grouped: tiles of all groups along M, on average where groups have 0.7 to 1.3 times the rows that are expected.
int64_t tiles_along_m(const GemmRow& row, const GemmProblem& problem);

// What names of rows say of their groups, such as "_mgrouped".
const char* grouping_suffix(Grouping grouping);

// What kind of operands a row is for, where these are not the problem's, or null.
const char* operand_mismatch(const GemmRow& row, const GemmProblem& problem);

// Name that says all of a row, such as "sm90_fp8_1d2d_m128n128_rows2" or "sm90_bf16_nt_m128n256".
std::string row_name(const GemmRow& row);

// One entry per row, in the table's order.
std::vector<Candidate> rate_rows(std::span<const GemmRow> rows, const GemmProblem& problem,
                                 const SelectionLimits& limits);

// The cheapest row that supports the problem, or -1, and its cost.
struct Choice {
    int row;
    double cost_us;
};
Choice choose_row(std::span<const GemmRow> rows, const GemmProblem& problem, const SelectionLimits& limits);
inline int select_row(std::span<const GemmRow> rows, const GemmProblem& problem, const SelectionLimits& limits) {
    return choose_row(rows, problem, limits).row;
}

// SM90, B in FP4 with packed scales per 32 of K, A in FP8: A may become BF16, with its scales if these are UE8M0, or else per 128 of
// K without them. The product that this leaves, and what it costs beside that.
inline GemmProblem bf16_fp4(GemmProblem problem, bool scaled) {
    problem.operands = OperandType::kBF16;
    problem.gran_k = scaled ? 32 : 128;
    return problem;
}
double bf16_tokens_us(const GemmProblem& problem);

// SM90, B in FP4 with packed scales per 32 of K, A's per 128: B may be folded to FP8 with a scale per block of 128 x 128
// (cast.h) for the rows of FP8, after which a row of FP4 computes those columns again for which that was not exact.
inline bool can_fold_fp4(const GemmProblem& problem) {
    // C may be where D is, and then is gone when columns are computed again.
    return problem.b_is_fp4 && problem.sfb_is_packed && problem.operands == OperandType::kFP8 && !problem.a_is_fp4 && problem.gran_k == 128 &&
           problem.sfa.gran_mn == 1 && (problem.c == nullptr || problem.c != problem.d);
}

// The product of FP8 that this leaves.
inline GemmProblem folded_fp4(GemmProblem problem) {
    problem.b_is_fp4 = problem.sfb_is_packed = false;
    problem.sfb.gran_mn = 128;
    return problem;
}

// What it costs beside that product.
double fold_fp4_us(const GemmProblem& problem);

// Clusters of this size that are resident together with one CTA on each SM.
int resident_clusters(int cluster_size, int num_sms);

}  // namespace deep_gemm
