// C functions for Python: Mega MoE's buffer, and a rank's layer on a caller's backend.

#include <cstring>

#include "callback_backend.h"
#include "mega_moe.h"

#define DG_EXPORT extern "C" __attribute__((visibility("default")))

using namespace deep_gemm;

// The members of MegaMoeOffsets in their order, for the sizes of a problem.
DG_EXPORT void dg_mega_moe_offsets(const MegaMoeProblem* problem, int64_t* offsets) {
    const MegaMoeOffsets values(shape_of(*problem));
    static_assert(sizeof(values) % sizeof(int64_t) == 0);
    std::memcpy(offsets, &values, sizeof(values));
}

// -1 where run_mega_moe chooses.
DG_EXPORT void dg_tune_mega_moe(int block_tokens, int lag, int prefetch_bytes, int evict_weights, int early_bytes,
                                int tile_rows) {
    MegaMoeTuning& tuning = mega_moe_tuning();
    tuning.block_tokens = block_tokens;
    tuning.lag = lag;
    tuning.prefetch_bytes = prefetch_bytes;
    tuning.evict_weights = evict_weights;
    tuning.early_bytes = early_bytes;
    tuning.tile_rows = tile_rows;
}

// Tokens of a block for experts with so many each.
DG_EXPORT int dg_mega_moe_block_tokens(int64_t expected_m) {
    MegaMoeProblem problem;
    problem.expected_m = expected_m;
    return mega_moe_block_tokens(problem);
}

// Runs a rank's layer on host memory through the callbacks. Returns 0, or 1 with the message in `error`.
DG_EXPORT int dg_run_mega_moe(const MegaMoeProblem* problem, int arch, int num_sms, int block_tokens,
                              EncodeTiledFunction encode, LaunchCallback launch, char* error, size_t error_size) {
    return run_on_callbacks(encode, launch, error, error_size, [&](Backend& backend) {
        run_mega_moe(*problem, arch, num_sms, block_tokens, false, backend);
    });
}
