// Entropy coder for the int8 codes of one matrix: arithmetic coding under a Gaussian whose scale follows the
// columns and whose mean leans on an earlier row. All arithmetic is on integers, so that every machine reads
// and writes the same bytes.
//
// Stream: byte 0 is the mode; whatever follows depends on it.
//   0 raw        rows * cols bytes, the codes row-major
//   1 columns    byte 1 = M, the largest |q| (0 to 128), then the arithmetic-coded bits; nothing if M = 0;
//                at most 2^20 columns. The fast one: nothing depends on the codes of the same row.
//   2 rows       as 1 (M >= 1, cols <= 2048), and each row may lean on one earlier row
//   3 predicted  as 2, after a prediction from the columns to the left
// The encoder takes the shortest of 0, 1 and either 3 (if rows >= 8 * cols, for its cols^2 / 2 weights have
// to be learned) or 2, so a stream has at most rows * cols + 1 bytes. Earlier rows are those of a pool (codes
// that the reader has already, such as the keys when it reads the queries) and then the matrix's own.
//
// Model of the code q in row i and column j, rows in order, columns from left to right (">>" is floor, "/"
// cuts towards zero; lo = -M, hi = min(M, 127)):
//   base      b = 0, or (mode 3) clamp(sum_{k <= j} w[j][k] x[k] >> 12, 256 lo, 256 hi) in 1/256 with
//             x[0] = 16, x[k] = q[i][k-1]; w in 2^-20, modulo 2^32
//   left      t = (256 q - b) >> 4, in 1/16, kept for later rows (16 q for rows of the pool)
//   leaning   on row l: a l[j] >> 8, where a (1/4096, |a| < 8192) is the prior A at the row's start and then,
//             after each 8th column, P * 4096 / S, with P = (S A >> 12) + sum l t, S = 64 sum l^2 / cols + 1
//             + sum over the columns so far of l^2. At the row's end A += (a - A) >> 4; A starts at 0.
//   mean      mu = clamp(b + leaning, 256 lo, 256 hi)
//   variance  in 1/256: v = clamp((C[j] + 24 m) * (2^32 / (i + 24)) >> 32, 16, 2^25 - 1), where C[j] is the
//             column's sum of r^2 >> 8, r = 256 q - mu, and m = (sum of C + 114688) / (64 + i * cols). Modes
//             2 and 3 scale it by the row so far: clamp(v s >> 8, same), s = 256 at the row's start and then,
//             after each 8th column, min(256 F / G, 4096), F = 64 m' + sum of min(r^2 >> 8, 16 v),
//             G = 64 m' + sum of v, m' = clamp(m, same)
//   tails     T(z) = mass of a Gaussian above z, from the table of tail_table(); z = distance * inverse(v)
//   bits      c = (mu + 128) >> 8, f = mu - 256 c, d = q - c, then: d = 0? ; d > 0? (unless only one sign
//             fits in [lo, hi]) ; for k = 1, 2, ...: |d| = k? (unless k is the largest that fits)
//   p(bit=1)  65536 - (U + L) * 2^15 / T(0); U * 2^16 / (U + L) in modes 2 and 3, 32768 in mode 1;
//             65536 - T(k + 1/2) * 2^16 / T(k - 1/2), where U and L are the tails above and below c +- 1/2.
//             Each but the sign of mode 1 is averaged with an adaptive correction (class Correction).
//   choice    before a row, of n earlier ones: bit "the row after the last choice?" (if there is one; the
//             last choice moves on by one in any case), else bit "any?", else its number in
//             bit_width(n - 1) bits of p = 32768, highest first. The first two follow their past: class
//             Habit.
//   learning  w[j][k] += ((256 q - b) * (40265318 / E) >> 16) x[k] with E = max(16, (sum of q^2 of
//             earlier rows + 7 cols) / (i + 1)): normalised least mean squares with step 0.15
//   coder     [low, high] of 64 bits, split at low + (range * p >> 16), bit 1 below; equal top bytes
//             leave. The end is the fewest bytes that, followed by zeros, lie inside; a decoder accepts
//             these only.
#pragma once

#include <vector>

#include "kernels/common.h"

namespace pgolf {

// A matrix, and the rows of the same width that its rows may lean on in addition to each other.
struct Shape {
  int64_t rows, cols;
  int64_t pool_rows = 0;
};

// Returns the stream of a matrix, at most rows * cols + 1 bytes; `fast` tries modes 0 and 1 only.
std::vector<uint8_t> encode_codes_cpu(const int8_t* codes,  // (rows, cols) row-major
                                      const int8_t* pool,   // (pool_rows, cols) row-major
                                      const Shape& shape, bool fast = false);

// Fills codes and returns nullptr, or returns what is wrong with the stream (codes are then undefined). Never
// reads past data + size; takes at most 257 steps per code and gives up within a row of the stream's end;
// allocates at most 25 MiB, and 2 bytes for each code of the matrix and the pool.
const char* decode_codes_cpu(const uint8_t* data, int64_t size,
                             const int8_t* pool,  // (pool_rows, cols) row-major
                             int8_t* codes,       // (rows, cols) row-major, out
                             const Shape& shape);

}  // namespace pgolf
