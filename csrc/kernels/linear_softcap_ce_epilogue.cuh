// Epilogue of linear_softcap_ce_sm90.cu: from one row of accumulators of wgmma to F, its sum and the target's
// logit.
//
// With u = x / cap, t = tanh(u) is u times a polynomial in u^2 for |u| < kPolynomialRange, and
// 1 - 2 / (1 + exp(2 u)) beyond, in a branch that few warps take: one special-function instruction an element
// instead of three, which would take 0.65 of the 1.1 ms that the product takes (N = 98304, V = 8192).
#pragma once

#include "kernels/common.h"
#include "kernels/ptx.cuh"

namespace pgolf::epilogue {

constexpr double kLog2e = 1.4426950408889634;
// tanh(u) = w P(w^2), w = 2 u / kPolynomialRange, minimax over |w| < 2: error 2.9e-7 (Lawson's iteration on
// Chebyshev nodes). |w| >= 2, infinity and NaN have bit 30 of the float set.
constexpr double kPolynomialRange = 1.25;
constexpr int kTerms = 7;
constexpr double kPolynomial[kTerms] = {0.624997785,     -0.08135794793,   0.01265030198,  -0.00192391459,
                                        0.0002566409952, -2.458755787e-05, 1.166805605e-06};
constexpr uint32_t kOutOfRangeBit = 1u << 30;
constexpr int kElsewhere = -1, kIgnored = -2;
constexpr float kLeast = -1.9999999f;
constexpr float kExcluded = -3.402823466e38f;  // marks elements that count neither in sums nor in F

struct Args {
  bf16* factor;
  int64_t factor_ld;
  float* partial_sums;
  float* target_logit;
  int64_t rows;
  int vocab;
  int column_tiles;
  // w = x * scale; log2(e) z = w P(w^2) with P scaled; slope = 1 - slope_scale (log2(e) z)^2
  float scale, range_rate, log2_cap, slope_scale, to_logit;
  float polynomial[kTerms];
};

struct Element {
  float e;       // exp(z - cap)
  float factor;  // e (1 - tanh^2)
};

// log2(e) (z - cap) and 1 - tanh^2 where |w| >= 2, both without cancellation.
__device__ __forceinline__ void saturated(const Args& args, float w, float& exponent, float& slope) {
  const float e = ex2_approx(-fabsf(w) * args.range_rate);
  const float q = rcp_approx(1.0f + e);
  exponent = -2.0f * args.log2_cap * (w > 0.0f ? e * q : q);
  if (w == kExcluded) exponent = -INFINITY;
  slope = 4.0f * e * q * q;
}

// log2(e) z where |w| < 2.
__device__ __forceinline__ float polynomial(const Args& args, float w) {
  const float square = w * w;
  float p = args.polynomial[kTerms - 1];
  PGOLF_UNROLL
  for (int k = kTerms - 2; k >= 0; --k) p = fmaf(p, square, args.polynomial[k]);
  return p * w;
}

template <bool Factor, bool Saturates>
__device__ __forceinline__ Element capped_exponential(const Args& args, float w) {
  const float z = polynomial(args, w);
  float exponent = z - args.log2_cap;
  float slope = fmaf(z * args.slope_scale, -z, 1.0f);
  if constexpr (Saturates) {
    float other_exponent, other_slope;
    saturated(args, w, other_exponent, other_slope);
    const bool inside = fabsf(w) < 2.0f;
    exponent = inside ? exponent : other_exponent;
    slope = inside ? slope : other_slope;
  }
  const float e = ex2_approx(exponent);
  return {e, Factor ? e * slope : 0.0f};
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

// One row of the tile: this thread's kTileColumns / 4 columns of it, values(i) for i = 2 j + e being element
// 4 j + e of the accumulators.
template <typename C, int Half>
struct Row {
  static constexpr int kCount = C::kColumns / 4;
  const Args& args;
  float (&c)[C::kAccumulators];

  __device__ __forceinline__ float& value(int i) { return c[i / 2 * 4 + Half * 2 + i % 2]; }

  // Column within the tile of values(i).
  __device__ __forceinline__ static int column(int i, int t) {
    if constexpr (C::kPermuted) return i / 8 * 32 + t * 8 + i % 8;
    return i / 2 * 8 + t * 2 + i % 2;
  }

  // Index of a column among this thread's values, or -1.
  __device__ __forceinline__ static int index(int column, int t) {
    if (column < 0) return -1;
    if constexpr (C::kPermuted) return column / 8 % 4 == t ? column / 32 * 8 + column % 8 : -1;
    return column / 2 % 4 == t ? column / 8 * 2 + column % 2 : -1;
  }

  // `target` is the target's column within the tile, kElsewhere or kIgnored.
  __device__ __forceinline__ void run(int64_t row, int column_tile, int target, int t) {
    const bool ignored = target == kIgnored;
    const int first = column_tile * C::kColumns;
    uint32_t bits = 0;
    PGOLF_UNROLL
    for (int i = 0; i < kCount; ++i) {
      value(i) *= args.scale;
      bits |= __float_as_uint(value(i));
    }
    if (first + C::kColumns > args.vocab) {
      PGOLF_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (first + column(i, t) >= args.vocab) value(i) = kExcluded;
      }
      bits = kOutOfRangeBit;
    }
    const int own = index(target, t);
    const bool saturates = __any_sync(0xffffffffu, (bits & kOutOfRangeBit) != 0);
    float excess = 0.0f;
    if (__any_sync(0xffffffffu, own >= 0)) {
      // Takes the target out of the sum. Where nothing saturates it becomes the least of the polynomial's
      // range, whose exponential is at most that of each other element, so that subtracting it loses nothing.
      const float out = saturates ? kExcluded : kLeast;
      float w = 0.0f;
      PGOLF_UNROLL
      for (int i = 0; i < kCount; ++i) {
        if (i != own) continue;
        w = value(i);
        value(i) = out;
      }
      if (own >= 0) {
        args.target_logit[row] = w * args.to_logit;
        if (!saturates) excess = capped_exponential<false, false>(args, kLeast).e;
      }
    }
    float sum;
    if (saturates) {
      sum = elements<true>(row, first, ignored, t);
    } else {
      sum = elements<false>(row, first, ignored, t) - excess;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (t == 0 && row < args.rows) {
      args.partial_sums[row * args.column_tiles + column_tile] = ignored ? 0.0f : sum;
    }
  }

  template <bool Saturates>
  __device__ __forceinline__ float elements(int64_t row, int first, bool ignored, int t) {
    float sums[4] = {};
    PGOLF_UNROLL
    for (int group = 0; group < kCount / 8; ++group) {
      uint32_t word[4];
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int i = group * 8 + j * 2;
        const Element low = capped_exponential<C::kFactor, Saturates>(args, value(i));
        const Element high = capped_exponential<C::kFactor, Saturates>(args, value(i + 1));
        sums[j] += low.e + high.e;
        if constexpr (C::kFactor) word[j] = pack_pair(low.factor, high.factor);
      }
      if constexpr (C::kFactor) {
        if constexpr (!C::kPermuted) transpose_quad(word, t);
        const int at = first + group * 32 + t * 8;
        if (ignored) word[0] = word[1] = word[2] = word[3] = 0;
        if (row < args.rows && at < args.factor_ld) {
          *reinterpret_cast<uint4*>(args.factor + row * args.factor_ld + at) =
              make_uint4(word[0], word[1], word[2], word[3]);
        }
      }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
};

}  // namespace pgolf::epilogue
