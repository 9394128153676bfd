// CUDA kernels of int6.h that quantize and dequantize on the way, for grids of 4 to 8 bits.
//
// Tiles: 256 threads hold 4096 weights, 16 each, in registers; a row belongs to n / 16 neighbouring threads,
// so its step costs one reduction and no second read. Four codes make a group of 4 * b bits; groups become
// words (and words groups) in shared memory, where the widths differ, and both ends move coalesced. One read
// and one write of each byte; the bound is device memory. General kernels: one block per row, eight codes per
// thread. Floating-point operations that could contract are spelled as intrinsics: the CPU rounds each one.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "kernels/cuda_check.cuh"
#include "kernels/int6.h"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPerThread = 16;
constexpr int kTileCodes = kThreads * kPerThread;
constexpr int kTileGroups = kTileCodes / 4;

__device__ __forceinline__ float step_of(f16 scale) { return __half2float(__ushort_as_half(scale.bits)); }

template <int kBits>
__device__ __forceinline__ int code_of(float w, float step) {
  constexpr float kLargest = (1 << (kBits - 1)) - 1;
  float x = __fdiv_rn(w, step);
  x = x < kLargest ? x : kLargest;
  x = x > -kLargest ? x : -kLargest;
  return __float2int_rn(x);
}

// Four codes -> 4 * kBits bits.
template <int kBits>
__device__ __forceinline__ uint32_t group_of(const float4& w, float step) {
  constexpr uint32_t kMask = (1u << kBits) - 1;
  return (static_cast<uint32_t>(code_of<kBits>(w.x, step)) & kMask) |
         (static_cast<uint32_t>(code_of<kBits>(w.y, step)) & kMask) << kBits |
         (static_cast<uint32_t>(code_of<kBits>(w.z, step)) & kMask) << (2 * kBits) |
         (static_cast<uint32_t>(code_of<kBits>(w.w, step)) & kMask) << (3 * kBits);
}

// What a step needs to know of a row; sums of integers, so any order of `join` gives the same.
struct Moments {
  long long sum, squares;
};

__device__ __forceinline__ uint32_t magnitude(float w) { return __float_as_uint(w) & 0x7fffffffu; }

__device__ __forceinline__ int shift_for(uint32_t largest) {
  return kInt6Mantissa - max(static_cast<int>(largest >> 23) - 127, kInt6Mantissa - 127);
}

__device__ __forceinline__ void add(Moments& m, float w, float factor) {
  const int x = __float2int_rn(__fmul_rn(w, factor));
  m.sum += x;
  m.squares += x * x;  // |x| <= 2^15
}

__device__ __forceinline__ float factor_for(int shift) {
  return __uint_as_float(static_cast<uint32_t>(shift + 127) << 23);
}

__device__ __forceinline__ f16 step_from(const Moments& m, uint32_t largest, int shift, int64_t n, float clip,
                                         int q_max) {
  if (largest >= 0x7f800000u) return f16{0x7e00};
  const double count = static_cast<double>(n), total = static_cast<double>(m.sum);
  const double spread = __dsub_rn(static_cast<double>(m.squares), __ddiv_rn(__dmul_rn(total, total), count));
  const double variance = fmax(__ddiv_rn(spread, __dsub_rn(count, 1.0)), 0.0);
  const double unit = __hiloint2double((1023 - shift) << 20, 0);  // 2^-shift, so the product is exact
  const double deviation = __dmul_rn(__dsqrt_rn(variance), unit);
  const double step = __ddiv_rn(__dmul_rn(static_cast<double>(clip), deviation), static_cast<double>(q_max));
  const float bounded = __double2float_rn(fmin(fmax(step, 0x1p-24), 65504.0));
  return f16{__half_as_ushort(__float2half_rn(bounded))};
}

__device__ __forceinline__ uint32_t warp_max(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }

__device__ __forceinline__ Moments warp_sum(Moments m) {
  PGOLF_UNROLL
  for (int lane = 16; lane > 0; lane /= 2) {
    m.sum += __shfl_xor_sync(0xffffffffu, m.sum, lane);
    m.squares += __shfl_xor_sync(0xffffffffu, m.squares, lane);
  }
  return m;
}

// The row's largest magnitude and its moments, for all of its kRowWarps warps; the whole block takes part.
template <int kRowWarps>
struct RowReduce {
  uint32_t (&maxima)[kWarps];
  Moments (&moments)[kWarps];
  int warp;

  __device__ uint32_t largest(uint32_t mine) {
    mine = warp_max(mine);
    if constexpr (kRowWarps == 1) return mine;
    maxima[warp] = mine;
    __syncthreads();
    const int first = warp / kRowWarps * kRowWarps;
    PGOLF_UNROLL
    for (int i = 0; i < kRowWarps; ++i) mine = max(mine, maxima[first + i]);
    return mine;
  }

  __device__ Moments total(Moments mine) {
    mine = warp_sum(mine);
    if constexpr (kRowWarps == 1) return mine;
    moments[warp] = mine;
    __syncthreads();
    const int first = warp / kRowWarps * kRowWarps;
    Moments all{0, 0};
    PGOLF_UNROLL
    for (int i = 0; i < kRowWarps; ++i) {
      all.sum += moments[first + i].sum;
      all.squares += moments[first + i].squares;
    }
    return all;
  }
};

// Rows of 16 * kRowThreads weights, 256 / kRowThreads of them per block.
template <int kBits, int kRowThreads, bool kSdclip>
__global__ void __launch_bounds__(kThreads)
    quantize_pack_tile(const float4* weight, f16* scales, uint32_t* packed, int64_t rows, float clip) {
  constexpr int kRows = kThreads / kRowThreads;
  constexpr int kRowGroups = 4 * kRowThreads;
  constexpr int kGroupBits = 4 * kBits;
  constexpr int kQMax = (1 << (kBits - 1)) - 1;
  __shared__ uint32_t groups[kTileGroups + 2];  // two more are read, and shifted out, by the last word
  __shared__ uint32_t maxima[kWarps];
  __shared__ Moments moments[kWarps];
  const int t = threadIdx.x % kRowThreads, r = threadIdx.x / kRowThreads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + r;
  const bool live = row < rows;
  float4 w[4];
  PGOLF_UNROLL
  for (int k = 0; k < 4; ++k) {
    w[k] = live ? __ldcs(weight + row * kRowGroups + k * kRowThreads + t) : make_float4(0, 0, 0, 0);
  }
  float step;
  if constexpr (kSdclip) {
    RowReduce<kRowThreads / 32> reduce{maxima, moments, static_cast<int>(threadIdx.x / 32)};
    uint32_t largest = 0;
    PGOLF_UNROLL
    for (int k = 0; k < 4; ++k) {
      largest = max(
          largest, max(max(magnitude(w[k].x), magnitude(w[k].y)), max(magnitude(w[k].z), magnitude(w[k].w))));
    }
    largest = reduce.largest(largest);
    const int shift = shift_for(largest);
    const float factor = factor_for(shift);
    Moments m{0, 0};
    PGOLF_UNROLL
    for (int k = 0; k < 4; ++k) {
      add(m, w[k].x, factor);
      add(m, w[k].y, factor);
      add(m, w[k].z, factor);
      add(m, w[k].w, factor);
    }
    m = reduce.total(m);
    const f16 scale = step_from(m, largest, shift, kPerThread * kRowThreads, clip, kQMax);
    if (live && t == 0) scales[row] = scale;
    step = step_of(scale);
  } else {
    step = live ? step_of(scales[row]) : 1.0f;
  }
  PGOLF_UNROLL
  for (int k = 0; k < 4; ++k) groups[r * kRowGroups + k * kRowThreads + t] = group_of<kBits>(w[k], step);
  __syncthreads();
  const int64_t left = (rows - static_cast<int64_t>(blockIdx.x) * kRows) * (kRowGroups * kGroupBits / 32);
  constexpr int kTileWords = kTileGroups * kGroupBits / 32;
  const int words = left < kTileWords ? static_cast<int>(left) : kTileWords;
  uint32_t* out = packed + static_cast<int64_t>(blockIdx.x) * kTileWords;
  for (int i = threadIdx.x; i < words; i += kThreads) {
    int g = 32 * i / kGroupBits;
    const int offset = 32 * i - kGroupBits * g;
    uint32_t v = groups[g] >> offset;
    PGOLF_UNROLL
    for (int filled = kGroupBits; filled < 32 + kGroupBits; filled += kGroupBits) {
      const int at = filled - offset;
      if (at < 32) v |= groups[++g] << at;
    }
    out[i] = v;
  }
}

// Any n and any alignment, one block per row: the row's step by SDClip.
__global__ void __launch_bounds__(kThreads)
    row_steps(const float* weight, f16* scales, int64_t n, float clip, int q_max) {
  __shared__ uint32_t maxima[kWarps];
  __shared__ Moments moments[kWarps];
  const int64_t row = blockIdx.x;
  const float* w = weight + row * n;
  RowReduce<kWarps> reduce{maxima, moments, static_cast<int>(threadIdx.x / 32)};
  uint32_t largest = 0;
  for (int64_t j = threadIdx.x; j < n; j += kThreads) largest = max(largest, magnitude(w[j]));
  largest = reduce.largest(largest);
  const int shift = shift_for(largest);
  const float factor = factor_for(shift);
  Moments m{0, 0};
  for (int64_t j = threadIdx.x; j < n; j += kThreads) add(m, w[j], factor);
  m = reduce.total(m);
  if (threadIdx.x == 0) scales[row] = step_from(m, largest, shift, n, clip, q_max);
}

// Any n and any alignment, one block per row: the row's codes on the given step.
template <int kBits>
__global__ void __launch_bounds__(kThreads)
    quantize_pack_row(const float* weight, const f16* scales, uint8_t* packed, int64_t n) {
  const int64_t row = blockIdx.x;
  const float* w = weight + row * n;
  const float step = step_of(scales[row]);
  const int64_t row_bytes = packed_row_bytes(n, kBits);
  uint8_t* out = packed + row * row_bytes;
  for (int64_t eight = threadIdx.x; eight * kBits < row_bytes; eight += kThreads) {
    uint64_t v = 0;
    for (int k = 0; k < 8 && eight * 8 + k < n; ++k) {
      const uint64_t code =
          static_cast<uint32_t>(code_of<kBits>(w[eight * 8 + k], step)) & ((1u << kBits) - 1);
      v |= code << (kBits * k);
    }
    for (int k = 0; k < kBits && eight * kBits + k < row_bytes; ++k) {
      out[eight * kBits + k] = static_cast<uint8_t>(v >> (8 * k));
    }
  }
}

// Code `k` of the group in the low 4 * kBits bits of v, times the step.
template <int kBits>
__device__ __forceinline__ float value_of(uint32_t v, int k, float step) {
  const int code = static_cast<int>(v << (32 - kBits * (k + 1))) >> (32 - kBits);
  return __fmul_rn(static_cast<float>(code), step);
}

__device__ __forceinline__ uint32_t pair_of(float a, float b) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    unpack_dequantize_tile(const uint8_t* packed, const f16* scales, uint4* weight, int64_t count,
                           uint32_t row_eights) {
  constexpr int kTileBytes = kTileCodes / 8 * kBits;
  __shared__ uint4 staged[kTileBytes / 16 + 1];  // the last eight codes read up to two words beyond theirs
  const int64_t tile = blockIdx.x;
  const int64_t total = count / 8 * kBits;
  for (int i = threadIdx.x; i < kTileBytes / 16; i += kThreads) {
    const int64_t at = tile * kTileBytes + i * 16;
    if (at + 16 <= total) {
      staged[i] = __ldcs(reinterpret_cast<const uint4*>(packed + at));
    } else {
      for (int64_t j = at; j < total; ++j) reinterpret_cast<uint8_t*>(staged)[i * 16 + (j - at)] = packed[j];
    }
  }
  __syncthreads();
  const uint32_t* words = reinterpret_cast<const uint32_t*>(staged);
  const int64_t first_eight = tile * (kTileCodes / 8);
  const int64_t first_row = first_eight / row_eights;
  const uint32_t rest = static_cast<uint32_t>(first_eight - first_row * row_eights);
  PGOLF_UNROLL
  for (int k = 0; k < kPerThread / 8; ++k) {
    const int eight = k * kThreads + threadIdx.x;
    if ((first_eight + eight) * 8 >= count) return;
    const float step = step_of(scales[first_row + (rest + eight) / row_eights]);
    const int at = eight * kBits / 4, bit = eight * kBits % 4 * 8;
    const uint32_t x = words[at], y = words[at + 1], z = words[at + 2];
    const uint32_t low = __funnelshift_r(x, y, bit), high = __funnelshift_r(y, z, bit);
    const uint32_t second = kBits == 8 ? high : __funnelshift_r(low, high, 4 * kBits % 32);
    weight[first_eight + eight] =
        make_uint4(pair_of(value_of<kBits>(low, 0, step), value_of<kBits>(low, 1, step)),
                   pair_of(value_of<kBits>(low, 2, step), value_of<kBits>(low, 3, step)),
                   pair_of(value_of<kBits>(second, 0, step), value_of<kBits>(second, 1, step)),
                   pair_of(value_of<kBits>(second, 2, step), value_of<kBits>(second, 3, step)));
  }
}

template <int kBits>
__global__ void __launch_bounds__(kThreads)
    unpack_dequantize_row(const uint8_t* packed, const f16* scales, __nv_bfloat16* weight, int64_t n) {
  const int64_t row = blockIdx.x;
  const int64_t row_bytes = packed_row_bytes(n, kBits);
  const uint8_t* in = packed + row * row_bytes;
  const float step = step_of(scales[row]);
  for (int64_t eight = threadIdx.x; eight * 8 < n; eight += kThreads) {
    uint64_t v = 0;
    for (int k = 0; k < kBits && eight * kBits + k < row_bytes; ++k) {
      v |= static_cast<uint64_t>(in[eight * kBits + k]) << (8 * k);
    }
    for (int k = 0; k < 8 && eight * 8 + k < n; ++k) {
      const auto bits = static_cast<uint32_t>(v >> (kBits * k));
      weight[row * n + eight * 8 + k] = __float2bfloat16_rn(value_of<kBits>(bits, 0, step));
    }
  }
}

bool aligned16(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

template <int kBits, int kRowThreads>
void launch_tiles(const float* weight, f16* scales, uint8_t* packed, int64_t rows, float clip,
                  CUstream_st* stream) {
  const unsigned int blocks = grid_blocks(rows, kThreads / kRowThreads, "quantize_pack");
  const auto* in = reinterpret_cast<const float4*>(weight);
  auto* out = reinterpret_cast<uint32_t*>(packed);
  if (clip > 0) {
    quantize_pack_tile<kBits, kRowThreads, true>
        <<<blocks, kThreads, 0, stream>>>(in, scales, out, rows, clip);
  } else {
    quantize_pack_tile<kBits, kRowThreads, false>
        <<<blocks, kThreads, 0, stream>>>(in, scales, out, rows, clip);
  }
}

template <int kBits>
void launch_quantize(const float* weight, f16* scales, uint8_t* packed, int64_t rows, int64_t n, float clip,
                     CUstream_st* stream) {
  const bool aligned = aligned16(weight, packed);
  if (aligned && n == 512) {
    launch_tiles<kBits, 32>(weight, scales, packed, rows, clip, stream);
  } else if (aligned && n == 1024) {
    launch_tiles<kBits, 64>(weight, scales, packed, rows, clip, stream);
  } else if (aligned && n == 2048) {
    launch_tiles<kBits, 128>(weight, scales, packed, rows, clip, stream);
  } else if (aligned && n == 4096) {
    launch_tiles<kBits, 256>(weight, scales, packed, rows, clip, stream);
  } else {
    const unsigned int blocks = grid_blocks(rows, 1, "quantize_pack");
    if (clip > 0) {
      row_steps<<<blocks, kThreads, 0, stream>>>(weight, scales, n, clip, (1 << (kBits - 1)) - 1);
      PGOLF_LAUNCH_CHECK();
    }
    quantize_pack_row<kBits><<<blocks, kThreads, 0, stream>>>(weight, scales, packed, n);
  }
}

template <int kBits>
void launch_dequantize(const uint8_t* packed, const f16* scales, bf16* weight, int64_t rows, int64_t n,
                       CUstream_st* stream) {
  if (aligned16(packed, weight) && n % 8 == 0 && n < int64_t{1} << 31) {
    const unsigned int blocks = grid_blocks(rows * n, kTileCodes, "unpack_dequantize");
    unpack_dequantize_tile<kBits><<<blocks, kThreads, 0, stream>>>(
        packed, scales, reinterpret_cast<uint4*>(weight), rows * n, static_cast<uint32_t>(n / 8));
  } else {
    const unsigned int blocks = grid_blocks(rows, 1, "unpack_dequantize");
    unpack_dequantize_row<kBits>
        <<<blocks, kThreads, 0, stream>>>(packed, scales, reinterpret_cast<__nv_bfloat16*>(weight), n);
  }
}

}  // namespace

void quantize_pack_cuda(const float* weight, f16* scales, uint8_t* packed, int64_t rows, int64_t n, int bits,
                        float clip, CUstream_st* stream) {
  if (rows == 0 || n == 0) return;
  constexpr decltype(&launch_quantize<4>) kLaunch[] = {
      launch_quantize<4>, launch_quantize<5>, launch_quantize<6>, launch_quantize<7>, launch_quantize<8>};
  kLaunch[bits - 4](weight, scales, packed, rows, n, clip, stream);
  PGOLF_LAUNCH_CHECK();
}

void unpack_dequantize_cuda(const uint8_t* packed, const f16* scales, bf16* weight, int64_t rows, int64_t n,
                            int bits, CUstream_st* stream) {
  if (rows == 0 || n == 0) return;
  constexpr decltype(&launch_dequantize<4>) kLaunch[] = {launch_dequantize<4>, launch_dequantize<5>,
                                                         launch_dequantize<6>, launch_dequantize<7>,
                                                         launch_dequantize<8>};
  kLaunch[bits - 4](packed, scales, weight, rows, n, stream);
  PGOLF_LAUNCH_CHECK();
}

}  // namespace pgolf
