#include "tensorcore.hpp"

#include <limits>

namespace ptx_emulator {

Elem elemFromName(std::string_view n, bool& ok) {
    ok = true;
    if (n == "f16") return Elem::F16;
    if (n == "bf16") return Elem::BF16;
    if (n == "tf32") return Elem::TF32;
    if (n == "e4m3") return Elem::E4M3;
    if (n == "e5m2") return Elem::E5M2;
    if (n == "e2m3") return Elem::E2M3;
    if (n == "e3m2") return Elem::E3M2;
    if (n == "e2m1") return Elem::E2M1;
    if (n == "s8") return Elem::S8;
    if (n == "u8") return Elem::U8;
    if (n == "f64") return Elem::F64;
    ok = false;
    return Elem::F16;
}

void decodeElems(Elem e, const u8* p, u32 n, double* out) {
    auto u16At = [&](u32 i) {
        u16 v;
        std::memcpy(&v, p + 2 * i, 2);
        return v;
    };
    switch (e) {
        case Elem::F16:
            for (u32 i = 0; i < n; i++) out[i] = halfToFloat(u16At(i));
            break;
        case Elem::BF16:
            for (u32 i = 0; i < n; i++) out[i] = bf16ToFloat(u16At(i));
            break;
        case Elem::TF32:
            for (u32 i = 0; i < n; i++) {
                u32 v;
                std::memcpy(&v, p + 4 * i, 4);
                out[i] = tf32Truncate(v);
            }
            break;
        case Elem::E4M3:
            for (u32 i = 0; i < n; i++) out[i] = kMini.e4m3[p[i]];
            break;
        case Elem::E5M2:
            for (u32 i = 0; i < n; i++) out[i] = kMini.e5m2[p[i]];
            break;
        case Elem::E2M3:
            for (u32 i = 0; i < n; i++) out[i] = kMini.e2m3[p[i] & 63];
            break;
        case Elem::E3M2:
            for (u32 i = 0; i < n; i++) out[i] = kMini.e3m2[p[i] & 63];
            break;
        case Elem::E2M1:
            for (u32 i = 0; i < n; i++) out[i] = kMini.e2m1[p[i] & 15];
            break;
        case Elem::S8:
            for (u32 i = 0; i < n; i++) out[i] = i8(p[i]);
            break;
        case Elem::U8:
            for (u32 i = 0; i < n; i++) out[i] = p[i];
            break;
        case Elem::F64: std::memcpy(out, p, 8 * n); break;
    }
}

// R rows by 8 columns per block keep all accumulators in vector registers.
namespace {
template <u32 R>
inline void matmulBlock(u32 n, u32 k, const double* a, const double* b, double* c) {
    typedef double V __attribute__((vector_size(32), aligned(8)));
    V acc[R][2] = {};
    for (u32 q = 0; q < k; q++) {
        V b0 = *(const V*)(b + size_t(q) * n), b1 = *(const V*)(b + size_t(q) * n + 4);
        for (u32 i = 0; i < R; i++) {
            double x = a[size_t(i) * k + q];
            acc[i][0] += x * b0;
            acc[i][1] += x * b1;
        }
    }
    for (u32 i = 0; i < R; i++) {
        *(V*)(c + size_t(i) * n) += acc[i][0];
        *(V*)(c + size_t(i) * n + 4) += acc[i][1];
    }
}
}  // namespace

void matmulAdd(u32 m, u32 n, u32 k, const double* a, const double* b, double* c) {
    for (u32 j = 0; j + 8 <= n; j += 8) {
        u32 i = 0;
        for (; i + 4 <= m; i += 4) matmulBlock<4>(n, k, a + size_t(i) * k, b + j, c + size_t(i) * n + j);
        for (; i < m; i++) matmulBlock<1>(n, k, a + size_t(i) * k, b + j, c + size_t(i) * n + j);
    }
}

// The K products and the accumulator are aligned to the largest exponent among them, a product's being the sum of its
// factors' (not normalised; zeros do not count), and cut to 13 fraction bits below it, with FP8 operands, or 25.  Their
// sum, taken exactly, is cut to an FP32 number, with FP8 operands of 13 fraction bits.  All cuts are towards zero.
void hopperMatmulAdd(Elem ea, Elem eb, u32 m, u32 n, u32 k, const double* a, const double* b, double* c) {
    const bool fp8 = elemBytes(ea) == 1;
    const int kept = fp8 ? 13 : 25, resultBits = fp8 ? 13 : 23;
    constexpr int kZero = -100000;
    // The exponent that a number's code has, which for subnormal numbers is that of the smallest normal one.
    auto exponent = [](double x, int least) {
        return x == 0 ? kZero : std::max(int(std::bit_cast<u64>(x) >> 52 & 0x7ff) - 1023, least);
    };
    auto least = [](Elem e) {
        return e == Elem::E4M3 ? -6 : e == Elem::E5M2 || e == Elem::F16 ? -14 : -126;
    };
    auto power = [](int e) { return std::bit_cast<double>(u64(e + 1023) << 52); };
    int expA[32], expB[32 * 256], top[256];
    double scale[256], sum[256];
    for (u32 i = 0; i < k * n; i++) expB[i] = exponent(b[i], least(eb));
    for (u32 r = 0; r < m; r++) {
        const double* row = a + size_t(r) * k;
        double* out = c + size_t(r) * n;
        for (u32 q = 0; q < k; q++) expA[q] = exponent(row[q], least(ea));
        for (u32 j = 0; j < n; j++) top[j] = exponent(out[j], -126);
        for (u32 q = 0; q < k; q++)
            for (u32 j = 0; j < n; j++) top[j] = std::max(top[j], expA[q] + expB[q * n + j]);
        for (u32 j = 0; j < n; j++) {
            scale[j] = power(kept - std::max(top[j], -900));
            sum[j] = std::trunc(out[j] * scale[j]);
        }
        for (u32 q = 0; q < k; q++)
            for (u32 j = 0; j < n; j++) sum[j] += std::trunc(row[q] * b[q * n + j] * scale[j]);
        for (u32 j = 0; j < n; j++) {
            if (!std::isfinite(sum[j])) {
                double plain = out[j];
                for (u32 q = 0; q < k; q++) plain += row[q] * b[q * n + j];
                out[j] = std::isnan(plain) ? asFloat(0x7fffffff) : plain;
            } else if (sum[j] == 0) {
                out[j] = 0;
            } else {
                double v = sum[j] / scale[j];
                double unit = power(std::max(exponent(v, -126), -126) - resultBits);
                out[j] = std::trunc(v / unit) * unit;
            }
        }
    }
}

namespace {
SmemDesc common(u64 d) {
    SmemDesc s;
    s.start = u32(d & 0x3fff) << 4;
    s.lbo = u32(d >> 16 & 0x3fff) << 4;
    s.sbo = u32(d >> 32 & 0x3fff) << 4;
    s.baseOffset = u32(d >> 49 & 7);
    s.swizzle = SmemDesc::None;
    return s;
}
}  // namespace

SmemDesc wgmmaDesc(u64 d) {
    SmemDesc s = common(d);
    static constexpr SmemDesc::Swizzle modes[] = {SmemDesc::None, SmemDesc::S128, SmemDesc::S64, SmemDesc::S32};
    s.swizzle = modes[d >> 62];
    return s;
}
SmemDesc ummaDesc(u64 d) {
    SmemDesc s = common(d);
    switch (d >> 61) {
        case 0: s.swizzle = SmemDesc::None; break;
        case 1: s.swizzle = SmemDesc::S128Base32; break;
        case 2: s.swizzle = SmemDesc::S128; break;
        case 4: s.swizzle = SmemDesc::S64; break;
        case 6: s.swizzle = SmemDesc::S32; break;
        default:
            throw EmuError(
                "smem_descriptor",
                strf("[smem_descriptor] layout type %lu of the shared-memory descriptor is reserved", d >> 61));
    }
    return s;
}

void gatherOperand(Machine& m, Warp* w, Cta* c, const OperandLayout& l, Elem e, u32 mn, u32 k, double* out,
                   std::vector<u32>& granules, const char* what, bool packed4) {
    u32 eb = elemBytes(e);
    u32 outer = l.mnMajor ? k : mn, inner = l.mnMajor ? mn : k;
    u32 perChunk = packed4 ? 32 : 16 / eb;
    double tmp[32];
    const size_t first = granules.size();
    for (u32 o = 0; o < outer; o++)
        for (u32 x = 0; x < inner; x += perChunk) {
            u32 at = l.chunk(o, packed4 ? x / 2 : x * eb);
            if (at % 16 || at + 16 > c->smem.size() || at < kSmemReserved) {
                std::string msg = strf("%s: descriptor reaches shared offset %#x, the CTA has [%#x, %#zx)", what, at,
                                       kSmemReserved, c->smem.size());
                if (w) m.fault(w, -1, "smem_bounds", msg);
                m.faultAt(c, "smem_bounds", msg);
            }
            const bool written = smemAsyncRead(m, w, c, at, 16, what, m.opt.nanOperands);
            granules.push_back(at / 16);
            u32 n = std::min(perChunk, inner - x);
            if (packed4) {
                u8 un[32];
                for (u32 q = 0; q < 16; q++) un[2 * q] = c->smem[at + q] & 15, un[2 * q + 1] = c->smem[at + q] >> 4;
                decodeElems(e, un, n, tmp);
            } else if (e == Elem::E2M1) {  // 16 elements in 8 bytes, 8 bytes of padding
                u8 un[16];
                for (u32 q = 0; q < 8; q++) un[2 * q] = c->smem[at + q] & 15, un[2 * q + 1] = c->smem[at + q] >> 4;
                decodeElems(e, un, n, tmp);
            } else if (e == Elem::E2M3 || e == Elem::E3M2) {  // 16 elements in 12 bytes
                u8 un[16];
                for (u32 q = 0; q < 16; q++) {
                    u32 bit = q * 6, v = u32(c->smem[at + bit / 8]) | u32(c->smem[at + bit / 8 + 1]) << 8;
                    un[q] = u8(v >> (bit % 8) & 63);
                }
                decodeElems(e, un, n, tmp);
            } else {
                decodeElems(e, &c->smem[at], n, tmp);
            }
            if (!written && m.opt.nanOperands) std::fill_n(tmp, n, std::numeric_limits<double>::quiet_NaN());
            if (l.mnMajor)
                for (u32 q = 0; q < n; q++) out[size_t(x + q) * k + o] = tmp[q];
            else
                for (u32 q = 0; q < n; q++) out[size_t(o) * k + x + q] = tmp[q];
        }
    if (w) orderAsyncRead(*w, c, granules, first, what);
}

}  // namespace ptx_emulator
