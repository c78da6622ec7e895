// C ABI.  Every call that can fail returns 0 on success; the message of the last
// failure in this thread is available from ptx_emulator_error().
#pragma once
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif
typedef struct ptx_emulator_module ptx_emulator_module;
typedef struct ptx_emulator_session ptx_emulator_session;

const char* ptx_emulator_error(void);
const char* ptx_emulator_error_kind(void);

ptx_emulator_module* ptx_emulator_module_load(const char* text, size_t bytes);
void ptx_emulator_module_free(ptx_emulator_module*);
const char* ptx_emulator_module_entries(ptx_emulator_module*);  // newline separated
uint64_t ptx_emulator_module_global(ptx_emulator_module*, const char* name);
// "name value" lines: parameter sizes, registers, shared memory, instructions.
const char* ptx_emulator_kernel_info(ptx_emulator_module*, const char* entry);

// A session is one machine: options, memory, and launches that run together.
ptx_emulator_session* ptx_emulator_session_new(void);
void ptx_emulator_session_free(ptx_emulator_session*);
int ptx_emulator_session_option(ptx_emulator_session*, const char* name, int64_t value);
int ptx_emulator_session_region(ptx_emulator_session*, uint64_t address, uint64_t bytes, int read_only,
                                const char* name);
int ptx_emulator_session_launch(ptx_emulator_session*, ptx_emulator_module*, const char* entry, const uint32_t grid[3],
                                const uint32_t block[3], const uint32_t cluster[3], uint32_t dynamic_smem,
                                const void* const* params, const uint32_t* sizes, uint32_t count);
int ptx_emulator_session_run(ptx_emulator_session*);
const char* ptx_emulator_session_stats(ptx_emulator_session*);
// With option "counters": a line "names ...", then per finished CTA "cta <launch> <linear
// index> <bytes received by bulk loads>" and one line "warp <values>" per warp.
const char* ptx_emulator_session_counters(ptx_emulator_session*);
const char* ptx_emulator_session_warnings(ptx_emulator_session*);
const char* ptx_emulator_session_output(ptx_emulator_session*);  // device printf

// Same meaning as cuTensorMapEncodeTiled; `map` receives 128 private bytes.
int ptx_emulator_encode_tiled(void* map, int type, uint32_t rank, uint64_t address, const uint64_t* dims,
                              const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                              int interleave, int swizzle, int l2_promotion, int oob_fill);
#ifdef __cplusplus
}
#endif
