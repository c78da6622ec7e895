// Runs a GemmProblem: selects a row, fills the kernel's parameters, launches.
#pragma once

#include <span>
#include <string>

#include "gemm_problem.h"
#include "launcher.h"
#include "selection.h"

namespace deep_gemm {

// The table of FP8 GEMM kernels that this library was built with; empty where it was built without SM90.
std::span<const GemmRow> gemm_rows();

// Stages of the shared-memory ring, dynamic shared memory and threads of a row.
struct RowResources {
    int num_stages;
    int shared_bytes;
    int num_threads;
};
RowResources row_resources(const GemmRow& row);

// M, N and K must be positive, operand rows 16-byte aligned (the ops check that). `row` forces a row of the table, -1
// selects one. Throws std::runtime_error, naming each row's reason, where none fits.
void run_gemm(const GemmProblem& problem, const SelectionLimits& limits, int row, bool pdl, Backend& backend);

}  // namespace deep_gemm
