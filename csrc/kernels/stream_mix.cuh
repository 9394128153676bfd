// The kernels of stream_mix. A thread holds eight columns, one 16-byte vector of each tensor, for all of its
// tokens, so the gradients of its coefficients stay in registers. A warp holds 256 columns; 1, 2 or 4 warps
// hold a token, and the rest of the block other tokens. The loads of the next token are under way while this
// one is computed.
#pragma once

#include "kernels/stream_mix.h"
#include "kernels/vector8.cuh"

namespace pgolf {

inline constexpr int kMixWarps = 8;
inline constexpr int kMixThreads = kMixWarps * 32;
inline constexpr int kMixWarpColumns = 32 * kVector;
inline constexpr int kMixMostWarps = kMixMostWidth / kMixWarpColumns;  // that hold a token
static_assert(kMixMostWidth % kMixWarpColumns == 0 && kMixMostWarps <= kMixWarps, "a block holds a token");

// Warps that hold a token, a power of two, so that it divides the warps of a block.
PGOLF_HOST_DEVICE inline int mix_warps(int64_t width) {
  int warps = 1;
  while (warps * kMixWarpColumns < width) warps *= 2;
  return warps;
}

// Tokens that a block holds at once.
PGOLF_HOST_DEVICE inline int mix_tokens(int64_t width) { return kMixWarps / mix_warps(width); }

// Which columns of which of a block's tokens a thread holds. The width is a multiple of eight, so they are
// inside or outside as a whole.
struct MixPlace {
  int warps, token, column;
  bool inside;

  __device__ __forceinline__ explicit MixPlace(int64_t width) : warps(mix_warps(width)) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    token = warp / warps;
    column = (warp % warps * 32 + lane) * kVector;
    inside = column < width;
  }
};

// The coefficients, in shared memory: in registers they would leave too few for the loads under way. Halves
// of eight columns are apart, so that the four floats of a warp's lanes lie side by side.
template <int Pairs>
struct MixCoefficients {
  static constexpr int kQuads = kMixMostWidth / 4;
  float4 value[Pairs][2][kQuads / 2];

  // All threads of the block call it.
  __device__ __forceinline__ void load(const float* source, int64_t width) {
    const int quads = static_cast<int>(width / 4);
    for (int at = static_cast<int>(threadIdx.x); at < Pairs * quads; at += kMixThreads) {
      const int quad = at % quads;
      value[at / quads][quad % 2][quad / 2] = reinterpret_cast<const float4*>(source)[at];
    }
    __syncthreads();
  }

  // Anything outside of the width, where every value that it is multiplied with is 0.
  __device__ __forceinline__ void read(float (&c)[kVector], int pair, const MixPlace& place) const {
    const int at = place.inside ? place.column / kVector : 0;
    const float4 low = value[pair][0][at], high = value[pair][1][at];
    c[0] = low.x, c[1] = low.y, c[2] = low.z, c[3] = low.w;
    c[4] = high.x, c[5] = high.y, c[6] = high.z, c[7] = high.w;
  }
};

using MixDevice = DeviceType<bf16>::type;

// One token's eight values of several tensors, as they are in memory; 0 outside and where there is no tensor.
template <int Count>
struct MixRow {
  Raw8<MixDevice> raw[Count];

  __device__ __forceinline__ void load(const bf16* const (&sources)[Count], const MixPlace& place,
                                       int64_t row, int64_t rows, int64_t width) {
    PGOLF_UNROLL
    for (int i = 0; i < Count; ++i) {
      raw[i] = {};
      if (sources[i] != nullptr && place.inside && row < rows)
        raw[i].load(reinterpret_cast<const MixDevice*>(sources[i]) + row * width + place.column);
    }
  }
};

__device__ __forceinline__ void store_mix(bf16* target, float (&value)[kVector], const MixPlace& place,
                                          int64_t row, int64_t rows, int64_t width) {
  if (target == nullptr || !place.inside || row >= rows) return;
  store8<false>(reinterpret_cast<MixDevice*>(target) + row * width + place.column, value, kVector, true);
}

// Sums over a token's columns, in every thread that holds some of them.
template <int Values>
struct MixRowSums {
  // Two of each: a warp that is a token ahead must not overwrite what another one still reads. It cannot be
  // two ahead, because of the barrier between.
  float staged[2][Values][kMixWarps];

  // All threads of the block call it, with `turn` 0 and 1 in turn.
  __device__ __forceinline__ void add(float (&value)[Values], const MixPlace& place, int turn) {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    PGOLF_UNROLL
    for (int k = 0; k < Values; ++k) {
      PGOLF_UNROLL
      for (int lanes = 16; lanes > 0; lanes /= 2) value[k] += __shfl_xor_sync(0xffffffffu, value[k], lanes);
      if (threadIdx.x % 32 == 0) staged[turn][k][warp] = value[k];
    }
    __syncthreads();
    PGOLF_UNROLL
    for (int k = 0; k < Values; ++k) {
      value[k] = 0.0f;
      PGOLF_UNROLL
      for (int i = 0; i < kMixMostWarps; ++i) {
        if (i < place.warps) value[k] += staged[turn][k][place.token * place.warps + i];
      }
    }
  }
};

// sum += a * b
__device__ __forceinline__ void add_product(float (&sum)[kVector], const float (&a)[kVector],
                                            const float (&b)[kVector]) {
  PGOLF_UNROLL
  for (int l = 0; l < kVector; ++l) sum[l] = fmaf(a[l], b[l], sum[l]);
}

template <int Streams, int Sums, bool Norm>
__global__ void __launch_bounds__(kMixThreads, Sums == 1 ? 3 : 2)
    mix_kernel(StreamMixForward args, int64_t rows, int64_t width) {
  __shared__ MixCoefficients<Sums * Streams> coefficients;
  __shared__ MixRowSums<1> row_sums;
  coefficients.load(args.coefficients, width);
  const MixPlace place(width);
  const bf16* sources[Streams];
  PGOLF_UNROLL
  for (int i = 0; i < Streams; ++i) sources[i] = args.streams[i];
  const int64_t tokens = mix_tokens(width), step = gridDim.x * tokens;
  [[maybe_unused]] const float share = 1.0f / static_cast<float>(width);
  MixRow<Streams> next;
  next.load(sources, place, blockIdx.x * tokens + place.token, rows, width);
  int turn = 0;
  // The same number of rounds in all threads, because of the barriers.
  for (int64_t first = blockIdx.x * tokens; first < rows; first += step) {
    const int64_t row = first + place.token;
    const MixRow<Streams> now = next;
    next.load(sources, place, row + step, rows, width);
    float y[Sums][kVector] = {};
    PGOLF_UNROLL
    for (int i = 0; i < Streams; ++i) {
      float s[kVector];
      now.raw[i].widen(s);
      PGOLF_UNROLL
      for (int o = 0; o < Sums; ++o) {
        float c[kVector];
        coefficients.read(c, o * Streams + i, place);
        add_product(y[o], c, s);
      }
    }
    if constexpr (Norm) {
      float square[1] = {dot8(y[Sums - 1], y[Sums - 1])}, n[kVector];
      row_sums.add(square, place, turn);
      turn = 1 - turn;
      const float rho = rsqrtf(square[0] * share + args.eps);
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) n[l] = rho * y[Sums - 1][l];
      store_mix(args.norm, n, place, row, rows, width);
    }
    PGOLF_UNROLL
    for (int o = 0; o < Sums; ++o) store_mix(args.sums[o], y[o], place, row, rows, width);
  }
}

// Adds the gradients of the coefficients over the tokens of a block, and writes the block's row of partials.
template <int Pairs>
__device__ __forceinline__ void store_partials(float* partials, const MixPlace& place, int64_t width,
                                               const float (&dc)[Pairs][kVector]) {
  __shared__ float staged[kMixWarps][kMixWarpColumns];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  PGOLF_UNROLL
  for (int pair = 0; pair < Pairs; ++pair) {
    PGOLF_UNROLL
    for (int l = 0; l < kVector; ++l) staged[warp][lane * kVector + l] = dc[pair][l];
    __syncthreads();
    for (int column = static_cast<int>(threadIdx.x); column < width; column += kMixThreads) {
      float sum = 0.0f;
      for (int at = column / kMixWarpColumns; at < kMixWarps; at += place.warps)
        sum += staged[at][column % kMixWarpColumns];
      partials[(int64_t{blockIdx.x} * Pairs + pair) * width + column] = sum;
    }
    __syncthreads();  // before the next pair overwrites what was read
  }
}

template <int Streams, int Sums, bool Norm>
__global__ void __launch_bounds__(kMixThreads, Sums == 1 && Streams < 4 ? 2 : 1)
    mix_backward_kernel(StreamMixBackward args, int64_t rows, int64_t width) {
  constexpr int kLast = Sums - 1, kTensors = Streams + Sums + Norm;
  __shared__ MixCoefficients<Sums * Streams> coefficients;
  __shared__ MixRowSums<2> row_sums;
  coefficients.load(args.coefficients, width);
  const MixPlace place(width);
  const bf16* sources[kTensors];  // streams, gradients of the sums, that of the norm
  PGOLF_UNROLL
  for (int i = 0; i < Streams; ++i) sources[i] = args.streams[i];
  PGOLF_UNROLL
  for (int o = 0; o < Sums; ++o) sources[Streams + o] = args.grads[o];
  if constexpr (Norm) sources[Streams + Sums] = args.grad_norm;
  float dc[Sums * Streams][kVector] = {};
  const int64_t tokens = mix_tokens(width), step = gridDim.x * tokens;
  [[maybe_unused]] const float share = 1.0f / static_cast<float>(width);
  MixRow<kTensors> next;
  next.load(sources, place, blockIdx.x * tokens + place.token, rows, width);
  int turn = 0;
  // The same number of rounds in all threads, because of the barriers.
  for (int64_t first = blockIdx.x * tokens; first < rows; first += step) {
    const int64_t row = first + place.token;
    const MixRow<kTensors> now = next;
    next.load(sources, place, row + step, rows, width);
    float g[Sums][kVector];
    PGOLF_UNROLL
    for (int o = 0; o < Sums; ++o) now.raw[Streams + o].widen(g[o]);
    if constexpr (Norm) {
      float y[kVector] = {}, dn[kVector];
      PGOLF_UNROLL
      for (int i = 0; i < Streams; ++i) {
        float s[kVector], c[kVector];
        now.raw[i].widen(s);
        coefficients.read(c, kLast * Streams + i, place);
        add_product(y, c, s);
      }
      now.raw[Streams + Sums].widen(dn);
      float sums[2] = {dot8(y, y), dot8(dn, y)};
      row_sums.add(sums, place, turn);
      turn = 1 - turn;
      const float rho = rsqrtf(sums[0] * share + args.eps);
      const float rate = rho * rho * (rho * (sums[1] * share));
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) g[kLast][l] += rho * dn[l] - rate * y[l];
    }
    PGOLF_UNROLL
    for (int i = 0; i < Streams; ++i) {
      float s[kVector], ds[kVector] = {};
      now.raw[i].widen(s);
      PGOLF_UNROLL
      for (int o = 0; o < Sums; ++o) {
        float c[kVector];
        coefficients.read(c, o * Streams + i, place);
        add_product(ds, c, g[o]);
        add_product(dc[o * Streams + i], s, g[o]);
      }
      store_mix(args.stream_grads[i], ds, place, row, rows, width);
    }
  }
  store_partials(args.partials, place, width, dc);
}

}  // namespace pgolf
