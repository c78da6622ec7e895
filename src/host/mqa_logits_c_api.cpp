// C functions for Python: the table of kernels for MQA logits, and problems on a caller's backend.
#include <sstream>

#include "callback_backend.h"
#include "mqa_logits.h"

#define DG_EXPORT extern "C" __attribute__((visibility("default")))

using namespace deep_gemm;

// JSON array with one object per row of the table; lives as long as the library.
DG_EXPORT const char* dg_mqa_instances() {
    static const std::string json = [] {
        std::ostringstream text;
        const auto rows = mqa_logits_rows();
        text << "[";
        for (size_t i = 0; i < rows.size(); ++i) {
            const MqaRowResources resources = row_resources(rows[i]);
            text << (i > 0 ? ",\n " : "") << "{\"index\": " << i << ", \"name\": \"" << row_name(rows[i])
                 << "\", \"arch\": \"sm_90a\", \"family\": \"fp8_mqa_logits\", \"kernel\": \"sm90_fp8_mqa_logitsILi" << i
                 << "E\", \"heads\": " << rows[i].heads << ", \"head_dim\": " << rows[i].head_dim << ", \"cols\": "
                 << rows[i].cols << ", \"parts\": " << rows[i].parts << ", \"warpgroups\": " << rows[i].warpgroups
                 << ", \"paged\": " << (rows[i].paged ? "true" : "false") << ", \"num_stages\": " << resources.num_stages
                 << ", \"shared_bytes\": " << resources.shared_bytes << ", \"num_threads\": " << resources.num_threads
                 << "}";
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
    return run_on_callbacks(encode, launch, error, error_size,
                            [&](Backend& backend) { run_mqa_logits(*problem, num_sms, row, false, backend); });
}

DG_EXPORT int dg_run_mqa_metadata(const MqaMetadataProblem* problem, EncodeTiledFunction encode, LaunchCallback launch,
                                  char* error, size_t error_size) {
    return run_on_callbacks(encode, launch, error, error_size,
                            [&](Backend& backend) { run_mqa_metadata(*problem, false, backend); });
}
