// C functions for Python: the table of kernels for MQA logits, and problems on a caller's backend.
#include <sstream>

#include "callback_backend.h"
#include "mqa_logits.h"

#define DG_EXPORT extern "C" __attribute__((visibility("default")))

using namespace deep_gemm;

// JSON array with one object per row of the tables, those of SM100 behind those of SM90; lives as long as the library.
DG_EXPORT const char* dg_mqa_instances() {
    static const std::string json = [] {
        std::ostringstream text;
        text << "[";
        int index = 0;
        for (const int arch : {90, 100}) {
            const auto rows = mqa_logits_rows(arch);
            for (size_t i = 0; i < rows.size(); ++i, ++index) {
                const MqaRow& row = rows[i];
                const MqaRowResources resources = row_resources(row);
                text << (index > 0 ? ",\n " : "") << "{\"index\": " << index << ", \"name\": \"" << row_name(row)
                     << "\", \"arch\": \"sm_" << arch << "a\", \"family\": \"" << (row.fp4 ? "fp8_fp4_mqa_logits" : "fp8_mqa_logits")
                     << "\", \"tile_keys\": " << resources.tile_keys << ", \"kernel\": \""
                     << kernel_symbol(row, static_cast<int>(i)) << "\", \"heads\": " << row.heads << ", \"head_dim\": "
                     << row.head_dim << ", \"cols\": " << row.cols << ", \"parts\": " << row.parts
                     << ", \"fp4\": " << (row.fp4 ? "true" : "false") << ", \"warpgroups\": " << row.warpgroups
                     << ", \"paged\": " << (row.paged ? "true" : "false")
                     << ", \"num_stages\": " << resources.num_stages << ", \"shared_bytes\": "
                     << resources.shared_bytes << ", \"num_threads\": " << resources.num_threads << "}";
            }
        }
        text << "]";
        return text.str();
    }();
    return json.c_str();
}

DG_EXPORT int dg_get_forced_mqa_row() { return forced_mqa_row(); }
DG_EXPORT void dg_force_mqa_row(int row) { force_mqa_row(row); }

// Run a problem on host memory through the callbacks. Return 0, or 1 with the message in `error`.
DG_EXPORT int dg_run_mqa_logits(const MqaLogitsProblem* problem, int row, int num_sms, EncodeTiledFunction encode,
                                LaunchCallback launch, char* error, size_t error_size) {
    const int arch = row < static_cast<int>(mqa_logits_rows(90).size()) ? 90 : 100;
    return run_on_callbacks(encode, launch, error, error_size,
                            [&](Backend& backend) { run_mqa_logits(*problem, arch, num_sms, row, false, backend); });
}

DG_EXPORT int dg_run_mqa_metadata(const MqaMetadataProblem* problem, int arch, EncodeTiledFunction encode,
                                  LaunchCallback launch, char* error, size_t error_size) {
    return run_on_callbacks(encode, launch, error, error_size,
                            [&](Backend& backend) { run_mqa_metadata(*problem, arch, false, backend); });
}
