// CPU kernels of int6.h that quantize and dequantize on the way, for grids of 4 to 8 bits.
//
// Eight codes are folded into 8 * b bits inside one 64-bit word (SWAR), the loops around it are left to the
// compiler, once for any x86 or other CPU and once for AVX2. No target has FMA: the sums and products must
// round as CUDA's do.
#include <algorithm>
#include <cmath>

#include "kernels/int6.h"
#include "kernels/isa.h"
#include "kernels/parallel.h"

#define PGOLF_INLINE inline __attribute__((always_inline))

namespace pgolf {
namespace {

constexpr int64_t kGrainCodes = 1 << 18;  // below which another thread costs more than it saves
constexpr int64_t kBuffer = 512;          // codes between rounding and packing, in the first-level cache

// The low kBits of eight bytes -> 8 * kBits bits, first byte lowest.
template <int kBits>
PGOLF_INLINE uint64_t fold(uint64_t bytes) {
  constexpr uint64_t kMask = 0x0101010101010101u * ((1u << kBits) - 1);
  uint64_t v = bytes & kMask;
  v = (v & 0x00ff00ff00ff00ffu) | ((v & 0xff00ff00ff00ff00u) >> (8 - kBits));
  v = (v & 0x0000ffff0000ffffu) | ((v & 0xffff0000ffff0000u) >> (16 - 2 * kBits));
  if constexpr (kBits < 8) v = (v & 0x00000000ffffffffu) | (v >> 32 << (4 * kBits));
  return v;
}

// 8 * kBits bits -> eight sign-extended bytes.
template <int kBits>
PGOLF_INLINE uint64_t unfold(uint64_t v) {
  if constexpr (kBits == 8) return v;
  constexpr uint64_t kHalf = (uint64_t{1} << (4 * kBits)) - 1;
  constexpr uint64_t kQuarter = (uint64_t{1} << (2 * kBits)) - 1;
  constexpr uint64_t kEven = 0x0001000100010001u * ((1u << kBits) - 1);
  v = (v & kHalf) | (v >> (4 * kBits) & kHalf) << 32;
  v = (v & (kQuarter | kQuarter << 32)) | (v << (16 - 2 * kBits) & (kQuarter << 16 | kQuarter << 48));
  v = (v & kEven) | (v << (8 - kBits) & kEven << 8);
  // (u ^ sign) - sign in each byte; the top bit, set for the subtraction, keeps the bytes from borrowing.
  constexpr uint64_t kSign = 0x0101010101010101u << (kBits - 1), kTop = 0x8080808080808080u;
  return (((v ^ kSign) | kTop) - kSign) ^ kTop;
}

// Sums of a row's weights as integers x, |x| <= 2^15: of x, and of x^2.
struct Moments {
  int64_t sum = 0, squares = 0;
};

PGOLF_INLINE Moments moments(const float* w, int64_t n, float factor) {
  Moments m;
  for (int64_t begin = 0; begin < n; begin += kBuffer) {
    const int64_t end = std::min(begin + kBuffer, n);
    int32_t sum = 0;  // at most 2^9 * 2^15
    int64_t squares = 0;
    for (int64_t j = begin; j < end; ++j) {
      const int32_t x = static_cast<int32_t>(__builtin_rintf(w[j] * factor));
      sum += x;
      squares += x * x;
    }
    m.sum += sum;
    m.squares += squares;
  }
  return m;
}

// The step of a row by SDClip; see int6.h.
PGOLF_INLINE f16 row_scale(const float* w, int64_t n, float clip, int q_max) {
  uint32_t largest = 0;
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, float_to_bits(w[j]) & 0x7fffffffu);
  if (largest >= 0x7f800000u) return f16{0x7e00};
  const int exponent = std::max(static_cast<int>(largest >> 23) - 127, kInt6Mantissa - 127);
  const int shift = kInt6Mantissa - exponent;  // at most 127
  const Moments m = moments(w, n, bits_to_float(static_cast<uint32_t>(shift + 127) << 23));
  const double count = static_cast<double>(n), total = static_cast<double>(m.sum);
  const double variance = (static_cast<double>(m.squares) - total * total / count) / (count - 1.0);
  const double deviation = std::ldexp(std::sqrt(std::max(variance, 0.0)), -shift);
  const double step = static_cast<double>(clip) * deviation / static_cast<double>(q_max);
  return from_float<f16>(static_cast<float>(std::clamp(step, 0x1p-24, 65504.0)));
}

template <int kBits>
PGOLF_INLINE void quantize_row(const float* w, float step, uint8_t* packed, int64_t n) {
  constexpr float kLargest = (1 << (kBits - 1)) - 1;
  alignas(64) uint8_t codes[kBuffer];
  alignas(64) uint64_t eights[kBuffer / 8];
  const int64_t row_bytes = packed_row_bytes(n, kBits);
  for (int64_t begin = 0; begin < n; begin += kBuffer) {
    const int64_t count = std::min(kBuffer, n - begin);
    for (int64_t j = 0; j < count; ++j) {
      float x = w[begin + j] / step;
      x = x < kLargest ? x : kLargest;
      x = x > -kLargest ? x : -kLargest;
      codes[j] = static_cast<uint8_t>(static_cast<int32_t>(__builtin_rintf(x)));
    }
    if (count < kBuffer) std::fill(codes + count, codes + kBuffer, uint8_t{0});
    std::memcpy(eights, codes, kBuffer);
    for (int64_t i = 0; i < kBuffer / 8; ++i) eights[i] = fold<kBits>(eights[i]);
    uint8_t* out = packed + begin / 8 * kBits;
    const int64_t bytes = std::min(row_bytes - begin / 8 * kBits, kBuffer / 8 * kBits);
    int64_t i = 0, at = 0;
    for (; at + 8 <= bytes; ++i, at += kBits) std::memcpy(out + at, eights + i, 8);  // the next overwrites
    for (; at < bytes; ++i, at += kBits) {
      std::memcpy(out + at, eights + i, static_cast<size_t>(std::min<int64_t>(kBits, bytes - at)));
    }
  }
}

template <int kBits>
PGOLF_INLINE void dequantize_row(const uint8_t* packed, float step, bf16* w, int64_t n) {
  alignas(64) int8_t codes[kBuffer];
  alignas(64) uint64_t eights[kBuffer / 8];
  const int64_t row_bytes = packed_row_bytes(n, kBits);
  for (int64_t begin = 0; begin < n; begin += kBuffer) {
    const int64_t count = std::min(kBuffer, n - begin);
    const uint8_t* in = packed + begin / 8 * kBits;
    const int64_t bytes = std::min(row_bytes - begin / 8 * kBits, kBuffer / 8 * kBits);
    std::fill(eights, eights + kBuffer / 8, uint64_t{0});
    int64_t i = 0, at = 0;
    for (; at + 8 <= bytes; ++i, at += kBits) std::memcpy(eights + i, in + at, 8);
    for (; at < bytes; ++i, at += kBits) {
      std::memcpy(eights + i, in + at, static_cast<size_t>(std::min<int64_t>(kBits, bytes - at)));
    }
    for (i = 0; i < kBuffer / 8; ++i) eights[i] = unfold<kBits>(eights[i]);
    std::memcpy(codes, eights, kBuffer);
    if (!(step <= 65504.0f)) {  // NaN or infinity
      for (int64_t j = 0; j < count; ++j)
        w[begin + j] = from_float<bf16>(static_cast<float>(codes[j]) * step);
      continue;
    }
    for (int64_t j = 0; j < count; ++j) {  // from_float<bf16> of a number, without its test for NaN
      const uint32_t bits = float_to_bits(static_cast<float>(codes[j]) * step);
      w[begin + j].bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
  }
}

template <int kBits>
PGOLF_INLINE void quantize_rows(const float* weight, f16* scales, uint8_t* packed, int64_t rows, int64_t n,
                                float clip) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* w = weight + row * n;
    if (clip > 0) scales[row] = row_scale(w, n, clip, (1 << (kBits - 1)) - 1);
    quantize_row<kBits>(w, to_float(scales[row]), packed + row * packed_row_bytes(n, kBits), n);
  }
}

template <int kBits>
PGOLF_INLINE void dequantize_rows(const uint8_t* packed, const f16* scales, bf16* weight, int64_t rows,
                                  int64_t n) {
  for (int64_t row = 0; row < rows; ++row) {
    dequantize_row<kBits>(packed + row * packed_row_bytes(n, kBits), to_float(scales[row]), weight + row * n,
                          n);
  }
}

template <int kBits>
void quantize_any(const float* weight, f16* scales, uint8_t* packed, int64_t rows, int64_t n, float clip) {
  quantize_rows<kBits>(weight, scales, packed, rows, n, clip);
}

template <int kBits>
void dequantize_any(const uint8_t* packed, const f16* scales, bf16* weight, int64_t rows, int64_t n) {
  dequantize_rows<kBits>(packed, scales, weight, rows, n);
}

#if defined(__x86_64__)
template <int kBits>
PGOLF_TARGET("avx2")
void quantize_avx2(const float* weight, f16* scales, uint8_t* packed, int64_t rows, int64_t n, float clip) {
  quantize_rows<kBits>(weight, scales, packed, rows, n, clip);
}

template <int kBits>
PGOLF_TARGET("avx2")
void dequantize_avx2(const uint8_t* packed, const f16* scales, bf16* weight, int64_t rows, int64_t n) {
  dequantize_rows<kBits>(packed, scales, weight, rows, n);
}
#endif

struct RowOps {
  void (*quantize)(const float*, f16*, uint8_t*, int64_t, int64_t, float);
  void (*dequantize)(const uint8_t*, const f16*, bf16*, int64_t, int64_t);
};

template <int kBits>
RowOps best_ops() {
#if defined(__x86_64__)
  if (best_isa() != Isa::kBaseline) return {quantize_avx2<kBits>, dequantize_avx2<kBits>};
#endif
  return {quantize_any<kBits>, dequantize_any<kBits>};
}

RowOps ops_for(int bits) {
  switch (bits) {
    case 4:
      return best_ops<4>();
    case 5:
      return best_ops<5>();
    case 6:
      return best_ops<6>();
    case 7:
      return best_ops<7>();
    default:
      return best_ops<8>();
  }
}

}  // namespace

void quantize_pack_cpu(const float* weight, f16* scales, uint8_t* packed, int64_t rows, int64_t n, int bits,
                       float clip, int threads) {
  if (n == 0) return;
  const RowOps ops = ops_for(bits);
  const int64_t row_bytes = packed_row_bytes(n, bits);
  parallel_for(rows, std::max<int64_t>(kGrainCodes / n, 1), threads, [&](int64_t begin, int64_t end) {
    ops.quantize(weight + begin * n, scales + begin, packed + begin * row_bytes, end - begin, n, clip);
  });
}

void unpack_dequantize_cpu(const uint8_t* packed, const f16* scales, bf16* weight, int64_t rows, int64_t n,
                           int bits, int threads) {
  if (n == 0) return;
  const RowOps ops = ops_for(bits);
  const int64_t row_bytes = packed_row_bytes(n, bits);
  parallel_for(rows, std::max<int64_t>(kGrainCodes / n, 1), threads, [&](int64_t begin, int64_t end) {
    ops.dequantize(packed + begin * row_bytes, scales + begin, weight + begin * n, end - begin, n);
  });
}

}  // namespace pgolf
