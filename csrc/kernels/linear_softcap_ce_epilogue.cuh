// Epilogue of linear_softcap_ce_sm90.cu: from one row of accumulators of wgmma to F, its sum and the target's
// logit.
//
// With u = x / cap, t = tanh(u) is u times a polynomial in u^2 for |u| < kPolynomialRange: one
// special-function instruction an element. Rows with an element beyond it, with columns past the vocabulary
// or with NaN take a loop that computes 1 - 2 / (1 + exp(2 |u|)) instead.
//
// What bounds it is instructions: the code of a tile must stay in the instruction cache, and 14 instructions
// an element take half of the time of the product at width 512.
#pragma once

#include "kernels/common.h"
#include "kernels/ptx.cuh"

namespace pgolf::epilogue {

constexpr double kLog2e = 1.4426950408889634;
// tanh(u) = u P(u^2), minimax over |u| < kPolynomialRange: error 2.4e-6 (Lawson's iteration on Chebyshev
// nodes), 1e-4 of a bfloat16 logit's rounding near the cap.
constexpr double kPolynomialRange = 1.25;
constexpr int kTerms = 6;
constexpr double kPolynomial[kTerms] = {0.9999746925067065,    -0.3328393217344489,  0.13053625430520283,
                                        -0.046926759675204745, 0.012532020996462025, -0.0016820722403244543};
constexpr int kNowhere = -1, kIgnored = -2;  // of a target

struct Args {
  bf16* factor;
  int64_t factor_ld;
  float* partial_sums;
  float* target_logit;
  int64_t rows;
  int vocab;
  int column_tiles;
  float log2_cap;            // cap log2(e)
  float rate;                // 2 log2(e) / cap: exp(-2 |u|) = 2^(-rate |x|)
  float limit;               // the polynomial is taken for |x| < limit
  float least;               // -limit, rounded towards 0
  float polynomial[kTerms];  // in powers of x
};

struct Element {
  float e;       // exp(z - cap)
  float factor;  // e (1 - tanh^2)
};

// |x| < args.limit. Explicit operations, so that the sums with and without F agree in every bit.
template <bool Factor>
__device__ __forceinline__ Element inner(const Args& args, float x, float offset) {
  const float square = x * x;
  float p = args.polynomial[kTerms - 1];
  PGOLF_UNROLL
  for (int k = kTerms - 2; k >= 0; --k) p = fmaf(p, square, args.polynomial[k]);
  const float t = __fmul_rn(p, x);
  const float e = ex2_approx(fmaf(t, args.log2_cap, offset));
  return {e, Factor ? e * fmaf(-t, t, 1.0f) : 0.0f};
}

// Any x; neither z - cap nor 1 - tanh^2 cancels.
__device__ __forceinline__ Element outer(const Args& args, float x) {
  const float e = ex2_approx(-fabsf(x) * args.rate);
  const float q = rcp_approx(1.0f + e);
  const float exponential = ex2_approx(-2.0f * args.log2_cap * (x > 0.0f ? e * q : q));
  return {exponential, exponential * (4.0f * e * q * q)};
}

// Lanes t = 0 .. 3 exchange a 4 x 4 matrix of words: word j of lane t becomes word t of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int t) {
  PGOLF_UNROLL
  for (int bit = 1; bit < 4; bit *= 2) {
    PGOLF_UNROLL
    for (int j = 0; j < 4; ++j) {
      if ((j & bit) != 0) continue;
      const bool upper = (t & bit) != 0;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? word[j] : word[j | bit], bit);
      word[j] = upper ? got : word[j];
      word[j | bit] = upper ? word[j | bit] : got;
    }
  }
}

__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

// One row of the tile: this thread's kColumns / 4 columns of it, of which value[2 j + e] was element 4 j + e
// (or 4 j + e + 2) of the accumulators.
template <typename C>
struct Row {
  static constexpr int kCount = C::kColumns / 4;
  const Args& args;
  float (&value)[kCount];
  int64_t row;
  int column_tile;
  int t;  // lane % 4

  // Column within the tile of value[i].
  __device__ __forceinline__ int column(int i) const {
    if constexpr (C::kPermuted) return i / 8 * 32 + t * 8 + i % 8;
    return i / 2 * 8 + t * 2 + i % 2;
  }

  // Index of a column of the tile among this thread's values, or -1.
  __device__ __forceinline__ int index(int column) const {
    if (column < 0 || column >= C::kColumns) return -1;
    if constexpr (C::kPermuted) return column / 8 % 4 == t ? column / 32 * 8 + column % 8 : -1;
    return column / 2 % 4 == t ? column / 8 * 2 + column % 2 : -1;
  }

  // `target` is a column of the whole matrix, kNowhere or kIgnored.
  __device__ __forceinline__ void run(int target) {
    const int first = column_tile * C::kColumns;
    const int own = target < 0 ? -1 : index(target - first);
    float most[4] = {};
    PGOLF_UNROLL
    for (int i = 0; i < kCount; ++i) most[i % 4] = max_nan(most[i % 4], fabsf(value[i]));
    const float largest = max_nan(max_nan(most[0], most[1]), max_nan(most[2], most[3]));
    const bool fits = largest < args.limit && first + C::kColumns <= args.vocab;
    float sum;
    if (__all_sync(0xffffffffu, fits)) {
      sum = inside(own, target == kIgnored);
    } else {
      sum = anywhere(own, target == kIgnored);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (t == 0 && row < args.rows) args.partial_sums[row * args.column_tiles + column_tile] = sum;
  }

  __device__ __forceinline__ float inside(int own, bool ignored) {
    // An exponent of -infinity makes e and F zero.
    const float offset = ignored ? -INFINITY : -args.log2_cap;
    float excess = 0.0f;
    if (__any_sync(0xffffffffu, own >= 0)) {
      // Takes the target out of the sum: it becomes the least of the polynomial's range, whose exponential is
      // at most that of each other element, so that subtracting it loses nothing.
      float x = 0.0f;
      PGOLF_UNROLL
      for (int i = 0; i < kCount; ++i) {
        x = i == own ? value[i] : x;
        value[i] = i == own ? args.least : value[i];
      }
      if (own >= 0) {
        args.target_logit[row] = x;
        excess = inner<false>(args, args.least, offset).e;
      }
    }
    float sums[4] = {};
    PGOLF_UNROLL
    for (int group = 0; group < kCount / 8; ++group) {
      uint32_t word[4];
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int i = group * 8 + j * 2;
        const Element low = inner<C::kFactor>(args, value[i], offset);
        const Element high = inner<C::kFactor>(args, value[i + 1], offset);
        sums[j] += low.e + high.e;
        if constexpr (C::kFactor) word[j] = pack_pair(low.factor, high.factor);
      }
      if constexpr (C::kFactor) store(group, word);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]) - excess;
  }

  // The same for any values, in a loop.
  __device__ __forceinline__ float anywhere(int own, bool ignored) {
    float copy[kCount];
    PGOLF_UNROLL
    for (int i = 0; i < kCount; ++i) copy[i] = value[i];
    const int first = column_tile * C::kColumns;
    float sum = 0.0f;
    _Pragma("unroll 1") for (int group = 0; group < kCount / 8; ++group) {
      uint32_t word[4];
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) {
        Element pair[2];
        PGOLF_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int i = group * 8 + j * 2 + k;
          const bool counts = !ignored && i != own && first + column(i) < args.vocab;
          pair[k] = outer(args, copy[i]);
          if (i == own) args.target_logit[row] = copy[i];
          if (!counts) pair[k] = {0.0f, 0.0f};
          sum += pair[k].e;
        }
        word[j] = pack_pair(pair[0].factor, pair[1].factor);
      }
      if constexpr (C::kFactor) store(group, word);
    }
    return sum;
  }

  __device__ __forceinline__ void store(int group, uint32_t (&word)[4]) {
    if constexpr (!C::kPermuted) transpose_quad(word, t);
    const int64_t at = column_tile * C::kColumns + group * 32 + t * 8;
    if (row < args.rows && at < args.factor_ld) {
      *reinterpret_cast<uint4*>(args.factor + row * args.factor_ld + at) =
          make_uint4(word[0], word[1], word[2], word[3]);
    }
  }
};

}  // namespace pgolf::epilogue
