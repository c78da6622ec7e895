// What running a GemmProblem has in common on all architectures: checks of groups, tile schedules, the launch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>

#include "../device/gemm_params.h"
#include "gemm.h"

namespace deep_gemm {

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// Throws std::runtime_error with each row's reason against a problem that none can run; `arch`: of the table.
[[noreturn]] void throw_no_row(std::span<const GemmRow> rows, const char* arch, const GemmProblem& problem,
                               const SelectionLimits& limits);

// Throws where groups are not as the kernels count on; the ops see to it.
void check_groups(const GemmProblem& problem);

// K-grouped problems of more groups than a launch takes: calls run(problem of some of them) for each launch, and is true.
template <class Run>
bool run_in_parts(const GemmProblem& problem, Run&& run) {
    if (problem.grouping != Grouping::kKGrouped || problem.num_groups <= kMaxKGroups) return false;
    const int64_t element_bytes = size_of(problem.d_type);
    for (int64_t first = 0; first < problem.num_groups; first += kMaxKGroups) {
        GemmProblem part = problem;
        part.first_group += first;
        part.num_groups = std::min<int64_t>(problem.num_groups - first, kMaxKGroups);
        part.d = static_cast<char*>(problem.d) + first * problem.d_group_stride * element_bytes;
        if (problem.c != nullptr) {
            part.c = static_cast<const char*>(problem.c) + first * problem.c_group_stride * element_bytes;
        }
        run(part);
    }
    return true;
}

// How many matrices a tensor map has as its third dimension; 0: it has none.
struct GroupDims {
    int64_t a = 0, b = 0, d = 0;
};
GroupDims group_dims(const GemmProblem& problem);

// D as it is stored, gaps between heads included, with `groups` as its third dimension.
MatrixView result_view(const GemmProblem& problem, int64_t groups);

// Sums in place, such as gradients: TMA can add, and the kernel does not wait for what it adds to.
bool adds_in_place(const GemmProblem& problem);

// Whether TMA can address D in boxes of `box_cols` columns.
bool tma_can_address_result(const GemmProblem& problem, int box_cols);

// Sets the walk over the tiles, and all that epilogues need but for how they store. Returns how many clusters walk.
int set_problem(GemmParams& params, const GemmProblem& problem, const GemmRow& row, const SelectionLimits& limits);

// How a row's kernel is launched.
struct RowKernel {
    int row;  // in its table
    const void* kernel;
    std::string (*name)(int row);
    std::string (*symbol)(int row);
};
void launch_row(const RowKernel& kernel, const GemmProblem& problem, const GemmRow& row, const RowResources& resources,
                int clusters, const void* params, size_t params_bytes, bool pdl, Backend& backend);

}  // namespace deep_gemm
