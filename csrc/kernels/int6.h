// Packing of int6 codes: four values in three bytes. The one home of the bit layout.
//
// A group is four codes c0..c3, each in [-32, 31], seen as unsigned u = c & 63 (two's complement). The
// group's 24-bit word v = u0 | u1 << 6 | u2 << 12 | u3 << 18 is stored little-endian:
//
//   bit       7    6    5    4    3    2    1    0
//   byte 0  u1.1 u1.0 u0.5 u0.4 u0.3 u0.2 u0.1 u0.0      low byte of v
//   byte 1  u2.3 u2.2 u2.1 u2.0 u1.5 u1.4 u1.3 u1.2
//   byte 2  u3.5 u3.4 u3.3 u3.2 u3.1 u3.0 u2.5 u2.4      high byte of v
//
// A row of n codes takes 3 * ceil(n / 4) bytes; the last group of a row is filled with zeros. Rows do not
// share groups.
//
// The fused kernels do the same for grids of b = 4 to 8 bits: the codes' low b bits, first code lowest, form
// one little-endian stream of bits per row, in groups of 2, 8, 4, 8, 1 codes (1, 5, 3, 7, 1 bytes) for b = 4,
// 5, 6, 7, 8; the last group of a row is filled with zeros. Q = 2^(b-1) - 1 is the largest code they write.
#pragma once

#include "kernels/common.h"

namespace pgolf {

inline constexpr int kInt6Min = -32;
inline constexpr int kInt6Max = 31;
inline constexpr int kInt6Mantissa = 14;  // bits of the integers whose sums give a row's step, see below

// Bytes that a row of n codes takes.
inline int64_t int6_row_bytes(int64_t n) { return (n + 3) / 4 * 3; }

// Index of the first code outside [-32, 31], or -1. Deterministic for any number of threads.
int64_t int6_first_bad_code(const int8_t* codes, int64_t count);

void pack_int6_cpu(
    const int8_t* codes,  // (rows, n) row-major, each in [-32, 31]; others wrap to their low six bits
    uint8_t* packed,      // (rows, 3 * ceil(n / 4)) row-major, out
    int64_t rows, int64_t n, int threads);

void unpack_int6_cpu(const uint8_t* packed,  // (rows, 3 * ceil(n / 4)) row-major
                     int8_t* codes,          // (rows, n) row-major, out
                     int64_t rows, int64_t n, int threads);

// The same on device pointers; fast when n is a multiple of 4 and both pointers are 16-byte aligned.
void pack_int6_cuda(const int8_t* codes, uint8_t* packed, int64_t rows, int64_t n, CUstream_st* stream);
void unpack_int6_cuda(const uint8_t* packed, int8_t* codes, int64_t rows, int64_t n, CUstream_st* stream);

// Bytes that a row of n codes of `bits` bits (4 to 8) takes.
constexpr int64_t packed_row_bytes(int64_t n, int bits) {
  const int64_t group = bits == 8 ? 1 : bits == 6 ? 4 : bits == 4 ? 2 : 8;
  return (n + group - 1) / group * group * bits / 8;
}

// Quantize and pack: q = clamp(round(w / s), -Q, Q), ties to even, with the row's step s.
//
// clip == 0: the steps are given. clip > 0: they are computed first (SDClip) and written,
//   s = f16(clamp(clip * std(row) / Q, 2^-24, 65504)), std unbiased, n >= 2,
// from sums of the weights as integers: x = round(w * 2^(14 - e)), 2^e <= max|w| < 2^(e+1). Sums of integers
// do not depend on their order, so every device and number of threads gives the same steps; the rounding
// moves s by less than 2^-14 max|w| / std, relatively. A row that holds NaN or infinity gets the step NaN,
// and NaN the code Q.
void quantize_pack_cpu(const float* weight,  // (rows, n) row-major
                       f16* scales,          // (rows,) steps > 0: in for clip == 0, else out
                       uint8_t* packed,      // (rows, packed_row_bytes(n, bits)) row-major, out
                       int64_t rows, int64_t n, int bits, float clip, int threads);

// Unpack and dequantize: w = bf16(q * s), the product in float32, rounded to nearest even.
void unpack_dequantize_cpu(const uint8_t* packed,  // (rows, packed_row_bytes(n, bits)) row-major
                           const f16* scales,      // (rows,)
                           bf16* weight,           // (rows, n) row-major, out
                           int64_t rows, int64_t n, int bits, int threads);

// The same on device pointers. Fast for 16-byte aligned pointers and, packing, n = 512, 1024, 2048 or 4096,
// unpacking, n a multiple of 8.
void quantize_pack_cuda(const float* weight, f16* scales, uint8_t* packed, int64_t rows, int64_t n, int bits,
                        float clip, CUstream_st* stream);
void unpack_dequantize_cuda(const uint8_t* packed, const f16* scales, bf16* weight, int64_t rows, int64_t n,
                            int bits, CUstream_st* stream);

}  // namespace pgolf
