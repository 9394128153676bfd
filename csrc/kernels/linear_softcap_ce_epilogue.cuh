// Epilogue of linear_softcap_ce_sm90.cu: from one row of accumulators of wgmma to F, its sum and the target's
// logit.
//
// With E = exp(2 x / cap) and q = 1 / (1 + E): z - cap = -2 cap q and 1 - t^2 = 4 E q^2, so nothing cancels
// where t is near 1 or -1. Two elements share a reciprocal, which makes 2.5 special functions per element. A
// polynomial for tanh needs one special function, but fourteen other instructions, and those slow the other
// warpgroup's wgmma: eight slices took 5,967 clocks with the polynomial and 4,427 with special functions
// (docs/findings.md, 2026-11-23).
#pragma once

#include "kernels/common.h"
#include "kernels/ptx.cuh"

namespace pgolf::epilogue {

constexpr double kLog2e = 1.4426950408889634;
constexpr float kOffset = 2.0f;
// In place of a target's column in the matrix.
constexpr int kInvalidTarget = -1;  // outside [0, vocab)
constexpr int kIgnoredTarget = -2;  // ignore_index, or no such row
// In place of a target's column in a tile.
constexpr uint32_t kOtherTile = 255;
constexpr uint32_t kIgnoredRow = 254;

struct Args {
  bf16* factor;
  int factor_ld;
  float* partial_sums;
  float* target_logit;
  int rows;
  int vocab;
  int column_tiles;
  float rate;   // 2 log2(e) / cap: exp(2 x / cap) = 2^(rate x)
  float slope;  // -2 cap log2(e): exp(z - cap) = 2^(slope q)
};

struct Element {
  float e;       // 4 exp(z - cap)
  float factor;  // exp(z - cap) (1 - tanh^2)
};

// E. The exponent's limit keeps the product of two 1 + E finite; beyond it 1 - t^2 < 5e-19.
__device__ __forceinline__ float double_exponential(const Args& args, float x) {
  return ex2_approx(min_nan(x * args.rate, 63.0f));
}

// `offset` is kOffset, or -infinity where the element counts neither in sums nor in F; then x must not be
// NaN.
template <bool Factor>
__device__ __forceinline__ Element finish_element(const Args& args, float big, float q, float offset) {
  const float e = ex2_approx(fmaf(q, args.slope, offset));
  return {e, Factor ? e * (big * q * q) : 0.0f};
}

template <bool Factor>
__device__ __forceinline__ Element capped_exponential(const Args& args, float x, float offset) {
  const float big = double_exponential(args, x);
  return finish_element<Factor>(args, big, rcp_approx(1.0f + big), offset);
}

// Lanes t = 0 .. 3 exchange a 4 x 4 matrix of words: word j of lane t becomes word t of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&word)[4], int t) {
  PGOLF_UNROLL
  for (int bit = 1; bit < 4; bit *= 2) {
    // Lanes whose numbers differ in `bit` swap the words whose indices differ in it: one shuffle for two
    // words.
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

// The same value, of which the compiler does not know that. Keeps addresses from being computed early, in
// registers that the accumulators need.
__device__ __forceinline__ int late(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// One row of the tile: this thread's kColumns / 4 columns of it, of which value[2 j + e] was element 4 j + e
// (or 4 j + e + 2) of the accumulators.
template <typename C>
struct Row {
  static constexpr int kCount = C::kColumns / 4;
  static constexpr bool kWide = kCount > 32;
  const Args& args;
  float (&value)[kCount];
  int row;
  int column_tile;
  int t;  // lane % 4

  // Column within the tile of value[i].
  __device__ __forceinline__ int column(int i) const {
    if constexpr (C::kPermuted) return i / 8 * 32 + t * 8 + i % 8;
    return i / 2 * 8 + t * 2 + i % 2;
  }

  // Index of a column of the tile among this thread's values, or -1.
  __device__ __forceinline__ int index(int column) const {
    if (column >= C::kColumns) return -1;
    if constexpr (C::kPermuted) return column / 8 % 4 == t ? column / 32 * 8 + column % 8 : -1;
    return column / 2 % 4 == t ? column / 8 * 2 + column % 2 : -1;
  }

  // The target's column within the tile, kOtherTile or kIgnoredRow. `target` is a column of the whole matrix,
  // kInvalidTarget or kIgnoredTarget.
  __device__ __forceinline__ static uint32_t own_column(int target, int column_tile) {
    const uint32_t own = static_cast<uint32_t>(target) - static_cast<uint32_t>(column_tile * C::kColumns);
    if (target == kIgnoredTarget) return kIgnoredRow;
    return target >= 0 && own < C::kColumns ? own : kOtherTile;
  }

  // `target` as own_column gives it.
  __device__ __forceinline__ void run(uint32_t target) {
    bool whole = (late(column_tile) + 1) * C::kColumns <= args.vocab;
    const bool ignored = target == kIgnoredRow;
    const int own = index(static_cast<int>(target));
    // The sums of a wide tile leave no registers to take a target out of it; few tiles have one.
    if constexpr (kWide) whole = whole && !__any_sync(0xffffffffu, own >= 0 || ignored);
    float sum = whole ? inside(own, ignored) : anywhere(own, ignored);
    // Four neighbouring lanes hold one row.
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (t == 0 && row < args.rows) {
      args.partial_sums[static_cast<int64_t>(late(row)) * args.column_tiles + column_tile] = 0.25f * sum;
    }
  }

  __device__ __forceinline__ float inside(int own, bool ignored) {
    const float offset = !kWide && ignored ? -INFINITY : kOffset;
    const uint32_t mask = ignored ? ~0u : own >= 0 ? 1u << own : 0u;
    float sums[2] = {};
    if (!kWide && __any_sync(0xffffffffu, mask != 0)) {
      // Takes the target out of the sum: at -infinity its exponential is at most that of each other element,
      // so that subtracting it loses nothing. Takes out NaN where the row is ignored.
      float x = 0.0f;
      PGOLF_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const bool hit = (mask & (1u << (i % 32))) != 0;
        x = hit ? value[i] : x;
        value[i] = hit ? -INFINITY : value[i];
      }
      if (own >= 0) {
        args.target_logit[late(row)] = x;
        sums[0] = -capped_exponential<false>(args, -INFINITY, offset).e;
      }
    }
    // This thread's first element of F; rows past the end are computed like others and not stored.
    bf16* const to = args.factor + static_cast<int64_t>(late(row)) * args.factor_ld +
                     (column_tile * C::kColumns + column(0));
    PGOLF_UNROLL
    for (int group = 0; group < kCount / 8; ++group) {
      uint32_t word[4];
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) {
        const int i = group * 8 + j * 2;
        const float low_big = double_exponential(args, value[i]);
        const float high_big = double_exponential(args, value[i + 1]);
        const float low_sum = 1.0f + low_big, high_sum = 1.0f + high_big;
        // One reciprocal for two elements: 1 / low = high / (low high).
        const float q = rcp_approx(low_sum * high_sum);
        const Element low = finish_element<C::kFactor>(args, low_big, q * high_sum, offset);
        const Element high = finish_element<C::kFactor>(args, high_big, q * low_sum, offset);
        sums[j % 2] += low.e + high.e;
        if constexpr (C::kFactor) word[j] = pack_pair(low.factor, high.factor);
      }
      if constexpr (C::kFactor) {
        if (row < args.rows) store(to + group * 32, word);
      }
    }
    return sums[0] + sums[1];
  }

  // The same for any tile, in a loop: it is rarely taken, and code that is not there cannot displace
  // other code from the instruction cache.
  __device__ __forceinline__ float anywhere(int own, bool ignored) {
    // Lies in memory, as it is indexed by group. Of another type than `value`, which the compiler would
    // otherwise merge with it and store to memory too, also where this function is not called.
    float copy[kCount / 8][8];
    PGOLF_UNROLL
    for (int i = 0; i < kCount; ++i) copy[i / 8][i % 8] = value[i];
    float sum = 0.0f;
    _Pragma("unroll 1") for (int group = 0; group < kCount / 8; ++group) {
      uint32_t word[4];
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) {
        float factors[2];
        PGOLF_UNROLL
        for (int k = 0; k < 2; ++k) {
          const int i = group * 8 + j * 2 + k;
          const float x = copy[group][j * 2 + k];
          if (i == own) args.target_logit[late(row)] = x;
          const bool counts = !ignored && i != own && column_tile * C::kColumns + column(i) < args.vocab;
          const Element element =
              capped_exponential<C::kFactor>(args, counts ? x : -INFINITY, counts ? kOffset : -INFINITY);
          sum += element.e;
          factors[k] = element.factor;
        }
        word[j] = pack_pair(factors[0], factors[1]);
      }
      if constexpr (C::kFactor) {
        if constexpr (!C::kPermuted) transpose_quad(word, t);
        const int at = column_tile * C::kColumns + group * 32 + t * 8;
        if (row < args.rows && at < args.factor_ld) {
          *reinterpret_cast<uint4*>(args.factor + static_cast<int64_t>(row) * args.factor_ld + at) =
              make_uint4(word[0], word[1], word[2], word[3]);
        }
      }
    }
    return sum;
  }

  // Eight of this thread's columns, of which `to` is the first.
  __device__ __forceinline__ static void store(bf16* to, const uint32_t (&word)[4]) {
    if constexpr (C::kPermuted) {
      *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
    } else {
      PGOLF_UNROLL
      for (int j = 0; j < 4; ++j) reinterpret_cast<uint32_t*>(to)[j * 4] = word[j];
    }
  }
};

}  // namespace pgolf::epilogue
