// choose_row() with a memory: the cost model takes about a microsecond, and a program asks for few different shapes.
#pragma once

#include <span>

#include "selection.h"

namespace deep_gemm {

// As choose_row(). Each thread has its own memory, which the next problem with the same slot overwrites.
Choice choose_row_cached(std::span<const GemmRow> rows, const GemmProblem& problem, const SelectionLimits& limits);

}  // namespace deep_gemm
