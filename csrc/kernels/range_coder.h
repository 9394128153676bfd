// Entropy coder for the int8 codes of one matrix: arithmetic coding under a Gaussian whose scale follows the
// columns. Integer arithmetic only, so that every machine writes and reads the same bytes.
//
// Stream: byte 0 is the mode; whatever follows depends on it.
//   0 raw        rows * cols bytes, the codes row-major
//   1 columns    byte 1 = M, the largest |q| (0 to 128), then the arithmetic-coded bits; nothing if M = 0;
//                at most 2^20 columns
//   2 predicted  as 1 (M >= 1, cols <= 2048), with a mean predicted from the columns to the left
// The encoder takes the shortest (mode 2 is tried when rows >= 8 * cols: its cols^2 / 2 weights have to be
// learned), so a stream has at most rows * cols + 1 bytes.
//
// Model of the code q in row i and column j, rows in order, columns from left to right (">>" is floor):
//   mean      mu = 0, or (mode 2) clamp(sum_{k <= j} w[j][k] x[k] >> 12, 256 lo, 256 hi) in 1/256 with
//             x[0] = 16, x[k] = q[i][k-1], lo = -M, hi = min(M, 127); w in 2^-20, modulo 2^32
//   variance  in 1/256: v = clamp((S[j] + 24 m) * (2^32 / (i + 24)) >> 32, 16, 2^25 - 1), where S[j] is the
//   sum
//             of the column's residuals r^2 >> 8, r = 256 q - mu, and m = (sum of S + 114688) / (64 + i *
//             cols). Mode 2 scales it by the row so far: v' = clamp((v * (R / N)) >> 8, same), R = 16384 +
//             sum of min((r^2 >> 8 << 8) / v, 4096), N = 64 + j
//   tails     T(z) = mass of a Gaussian above z, from the table of tail_table(); z = distance * inverse(v)
//   bits      c = (mu + 128) >> 8, f = mu - 256 c, d = q - c, then: d = 0? ; d > 0? (unless only one sign
//             fits in [lo, hi]) ; for k = 1, 2, ...: |d| = k? (unless k is the largest that fits)
//   p(bit=1)  65536 - (U + L) * 2^15 / T(0); U * 2^16 / (U + L) in mode 2, 32768 in mode 1;
//             65536 - T(k + 1/2) * 2^16 / T(k - 1/2), where U and L are the tails above and below c +- 1/2.
//             Each but the sign of mode 1 is averaged with an adaptive correction (class Correction).
//   learning  w[j][k] += (r * (40265318 / E) >> 16) x[k] with E = max(16, (sum of q^2 of earlier rows + 7
//   cols)
//             / (i + 1)): normalised least mean squares with step 0.15
//   coder     [low, high] of 64 bits, split at low + (range * p >> 16), bit 1 below; equal top bytes leave.
//   The
//             end is the fewest bytes that, followed by zeros, lie inside; a decoder accepts these only.
#pragma once

#include <vector>

#include "kernels/common.h"

namespace pgolf {

// Returns the stream of a matrix, at most rows * cols + 1 bytes.
std::vector<uint8_t> encode_codes_cpu(const int8_t* codes,  // (rows, cols) row-major
                                      int64_t rows, int64_t cols);

// Fills codes and returns nullptr, or returns what is wrong with the stream (codes are then undefined). Never
// reads past data + size; takes at most 257 steps a code and gives up within a row of the stream's end;
// allocates at most 25 MiB.
const char* decode_codes_cpu(const uint8_t* data, int64_t size,
                             int8_t* codes,  // (rows, cols) row-major, out
                             int64_t rows, int64_t cols);

}  // namespace pgolf
