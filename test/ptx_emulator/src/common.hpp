// Shared vocabulary: error type, small helpers, address-window layout.
#pragma once
#include <bit>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace ptx_emulator {

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using i8 = int8_t;
using i16 = int16_t;
using i32 = int32_t;
using i64 = int64_t;

constexpr int kWarp = 32;

// Any violation of the PTX contract by the emulated program, or PTX that the
// emulator does not implement.  `kind` is a short stable identifier that tests
// match on; `what()` is the human report.
struct EmuError : std::runtime_error {
    std::string kind;
    EmuError(std::string k, const std::string& msg) : std::runtime_error(msg), kind(std::move(k)) {}
};

std::string strf(const char* fmt, ...) __attribute__((format(printf, 1, 2)));

// Generic addresses.  Global memory uses host addresses unchanged, so the two
// other windows sit where no user-space host pointer can be.
constexpr u64 kSharedWindow = u64(1) << 56;
constexpr u64 kLocalWindow = u64(2) << 56;
inline bool isSharedGeneric(u64 a) { return (a >> 56) == 1; }
inline bool isLocalGeneric(u64 a) { return (a >> 56) == 2; }

// 32-bit shared::cluster addresses: CTA rank in bits 24.., offset below.  The
// first KiB of every CTA's window is reserved, as on sm_90 and later.
constexpr u32 kSmemRankShift = 24;
constexpr u32 kSmemOffsetMask = (1u << kSmemRankShift) - 1;
constexpr u32 kSmemReserved = 1024;

template <class T>
inline T alignUp(T v, u64 a) {
    return T((u64(v) + a - 1) / a * a);
}

}  // namespace ptx_emulator
