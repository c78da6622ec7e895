// The SM100 side of running a GemmProblem: its table, its cost model, its kernels' parameters.
#pragma once

#include <span>
#include <string>

#include "gemm.h"

namespace deep_gemm {

// The table of GEMM kernels for SM100; empty where the library was built without it.
std::span<const GemmRow> sm100_gemm_rows();

RowResources sm100_row_resources(const GemmRow& row);

std::string sm100_row_name(const GemmRow& row);

// Why a row of the table cannot run a problem, or null; and how long it would take, by a model. selection.cpp asks.
const char* sm100_reason_against(const GemmRow& row, const GemmProblem& problem, const SelectionLimits& limits);
double sm100_cost_us(const GemmRow& row, const GemmProblem& problem, const SelectionLimits& limits);

// As run_gemm(), of the SM100 table. Scales are packed UE8M0 words per row, MN-major (see ScaleTensor).
void run_sm100_gemm(const GemmProblem& problem, const SelectionLimits& limits, int row, bool pdl, Backend& backend);

}  // namespace deep_gemm
