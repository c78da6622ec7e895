// How many groups a kernel has tables for in shared memory.
#pragma once

namespace deep_gemm {

inline constexpr int kMaxGroups = 1024;  // M-grouped: of kEndOfGroup and kRowsOfGroup
inline constexpr int kMaxKGroups = 256;  // K-grouped, of a launch

}  // namespace deep_gemm
