// The kernels of qk_norm_rope. A warp takes several stripes of the product of q, k and v at once
// (head_rows.cuh), all at the same place in their heads, so that it reads a token's cosines and sines once
// for all of them.
#pragma once

#include <type_traits>

#include "kernels/head_rows.cuh"
#include "kernels/qk_norm_rope.h"

namespace pgolf {

// Stripes of q and k that a warp holds: all that a token of the model has. On the way back it holds one of v,
// too.
inline constexpr int kRopeStripes = 3;
static_assert(kRopeStripes * kStripe % 128 == 0, "every warp begins with a head");

// Eight columns as they are in memory, in some lanes of a warp float32 and in the others bfloat16, which are
// in the first word alone.
struct EitherRaw {
  static constexpr int kWords = 2;
  uint4 words[kWords];
  bool is_bf16;

  __device__ __forceinline__ void widen(float (&value)[kVector]) const {
    HeadRaw narrow;
    Raw8<float> wide;
    narrow.words[0] = wide.words[0] = words[0];
    wide.words[1] = words[1];
    float rounded[kVector];
    narrow.widen(rounded);
    wide.widen(value);
    PGOLF_UNROLL
    for (int l = 0; l < kVector; ++l) value[l] = is_bf16 ? rounded[l] : value[l];
  }
};

// Eight columns at `source`, or zeros where `wanted` is false.
__device__ __forceinline__ void load_rope(EitherRaw& raw, const void* source, bool is_bf16, bool wanted) {
  raw = {};
  raw.is_bf16 = is_bf16;
  if (!wanted) return;
  const uint4* words = static_cast<const uint4*>(source);
  raw.words[0] = __ldcs(words);
  if (!is_bf16) raw.words[1] = __ldcs(words + 1);
}

__device__ __forceinline__ void load_rope(HeadRaw& raw, const void* source, bool, bool wanted) {
  load_if(raw, static_cast<const bf16*>(source), wanted);
}

// Whether eight columns are bfloat16; a constant where all of a warp's are.
__device__ __forceinline__ bool is_bf16(const EitherRaw& raw) { return raw.is_bf16; }
__device__ __forceinline__ bool is_bf16(const HeadRaw&) { return true; }

// The rotation of a lane's eight columns: out = x cos + partner sin, the partner being the column half of the
// rotated ones away. Whole: that half is a multiple of eight, so the partners are the columns of one lane.
template <bool Whole>
struct Rotation {
  float cos[kVector], sin[kVector];  // 1 and 0 for columns that are not rotated
  int first, half;                   // the lane's first column, in its head

  __device__ __forceinline__ Rotation(int first_column, int dims) : first(first_column), half(dims / 2) {}

  // Sign: -1 rotates back.
  __device__ __forceinline__ void load(const QkNormRopeInput& in, int64_t token, float sign) {
    PGOLF_UNROLL
    for (int l = 0; l < kVector; ++l) cos[l] = 1.0f, sin[l] = 0.0f;
    const float *cosines = in.cos + token * half, *sines = in.sin + token * half;
    if constexpr (Whole) {
      if (first >= 2 * half) return;
      const int at = first < half ? first : first - half;
      load_float8(cos, cosines + at);
      load_float8(sin, sines + at);
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) sin[l] *= first < half ? sign : -sign;
    } else {
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) {
        const int column = first + l, at = column < half ? column : column - half;
        if (column >= 2 * half) continue;
        cos[l] = cosines[at];
        sin[l] = column < half ? sign * sines[at] : -sign * sines[at];
      }
    }
  }

  // The rotated columns of `raw`, a HeadRaw or an EitherRaw, which is at `source` in memory. All lanes of the
  // warp call it; `inside`: there is something to rotate.
  template <typename Raw>
  __device__ __forceinline__ void apply(float (&x)[kVector], const Raw& raw, const void* source,
                                        bool inside) const {
    raw.widen(x);
    if (half == 0) return;
    float partner[kVector];
    if constexpr (Whole) {
      const int lane = static_cast<int>(threadIdx.x) % 32, lanes = half / kVector;
      const int from = first >= 2 * half ? lane : first < half ? lane + lanes : lane - lanes;
      Raw other = raw;  // of the same head, so of the same type
      PGOLF_UNROLL
      for (int i = 0; i < Raw::kWords; ++i) {
        other.words[i].x = __shfl_sync(0xffffffffu, raw.words[i].x, from);
        other.words[i].y = __shfl_sync(0xffffffffu, raw.words[i].y, from);
        other.words[i].z = __shfl_sync(0xffffffffu, raw.words[i].z, from);
        other.words[i].w = __shfl_sync(0xffffffffu, raw.words[i].w, from);
      }
      other.widen(partner);
    } else {
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) {
        const int column = first + l;
        partner[l] = 0.0f;
        // From the cache: the lane that holds it has just read it.
        if (inside && column < 2 * half)
          partner[l] = load_either(source, is_bf16(raw), column < half ? l + half : l - half);
      }
    }
    PGOLF_UNROLL
    for (int l = 0; l < kVector; ++l) x[l] = fmaf(partner[l], sin[l], x[l] * cos[l]);
  }

 private:
  static __device__ __forceinline__ void load_float8(float (&value)[kVector], const float* source) {
    const float4 low = reinterpret_cast<const float4*>(source)[0];
    const float4 high = reinterpret_cast<const float4*>(source)[1];
    value[0] = low.x, value[1] = low.y, value[2] = low.z, value[3] = low.w;
    value[4] = high.x, value[5] = high.y, value[6] = high.z, value[7] = high.w;
  }
};

// The first column of the product that a lane holds, those of its further stripes being kStripe apart.
__device__ __forceinline__ int rope_column() {
  return static_cast<int>(blockIdx.y) * kRopeStripes * kStripe + static_cast<int>(threadIdx.x) % 32 * kVector;
}

// Blocks that share a token: of q and k, and on the way back of v.
PGOLF_HOST_DEVICE inline unsigned int rope_parts(const QkNormRopeShape& shape, bool with_v) {
  const int64_t v = int64_t{shape.groups} * shape.width, qk = int64_t{shape.heads} * shape.width + v;
  const unsigned int of_v = with_v ? stripe_count(v, 1) : 1;
  return std::max(stripe_count(qk, kRopeStripes), of_v);
}

// The factors of a lane's heads, 1 for those of k.
template <int Width>
__device__ __forceinline__ void load_gains(float (&gain)[kRopeStripes], const QkNormRopeInput& in, int begin,
                                           int q_columns) {
  PGOLF_UNROLL
  for (int u = 0; u < kRopeStripes; ++u) {
    const int column = begin + u * kStripe;
    gain[u] = column < q_columns ? load_either(in.gain, in.gain_is_bf16, column / Width) : 1.0f;
  }
}

template <int Width, bool Whole>
__global__ void __launch_bounds__(kHeadThreads, Whole ? 3 : 2)
    qk_norm_rope_kernel(QkNormRopeForward args, QkNormRopeShape shape) {
  const int begin = rope_column();
  const int q_columns = shape.heads * Width, k_columns = shape.groups * Width;
  float gain[kRopeStripes];
  load_gains<Width>(gain, args.in, begin, q_columns);
  Rotation<Whole> rotation(begin % Width, shape.dims);
  const int64_t step = int64_t{gridDim.x} * kHeadWarps;
  for (int64_t token = int64_t{blockIdx.x} * kHeadWarps + threadIdx.x / 32; token < shape.tokens;
       token += step) {
    const bf16* row = args.in.qkv + token * args.in.stride;
    HeadRaw raw[kRopeStripes];
    PGOLF_UNROLL
    for (int u = 0; u < kRopeStripes; ++u) {
      const int column = begin + u * kStripe;
      load_if(raw[u], row + column, column < q_columns + k_columns);
    }
    rotation.load(args.in, token, 1.0f);
    PGOLF_UNROLL
    for (int u = 0; u < kRopeStripes; ++u) {
      const int column = begin + u * kStripe;
      const bool inside = column < q_columns + k_columns;
      float x[kVector];
      raw[u].widen(x);
      const float mean = head_sum<Width>(dot8(x, x)) * (1.0f / Width);
      rotation.apply(x, raw[u], row + column, inside);
      const float factor = gain[u] * rsqrtf(mean + args.in.eps);
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) x[l] *= factor;
      bf16* target = column < q_columns ? args.q + token * q_columns + column
                                        : args.k + token * k_columns + (column - q_columns);
      store_if(target, x, inside);
    }
  }
}

// Adds a block's part of the gain's gradient over its tokens, and writes it to the block's row of partials.
template <int Width>
__device__ __forceinline__ void store_gain_partials(const QkNormRopeBackward& args,
                                                    const QkNormRopeShape& shape,
                                                    const float (&dgain)[kRopeStripes]) {
  constexpr int kPerStripe = kStripe / Width, kHeads = kRopeStripes * kPerStripe;
  __shared__ float staged[kHeadWarps][kHeads];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (lane * kVector % Width == 0) {
    PGOLF_UNROLL
    for (int u = 0; u < kRopeStripes; ++u) staged[warp][u * kPerStripe + lane * kVector / Width] = dgain[u];
  }
  __syncthreads();
  const int at = static_cast<int>(threadIdx.x), head = static_cast<int>(blockIdx.y) * kHeads + at;
  if (at >= kHeads || head >= shape.heads) return;
  float sum = 0.0f;
  for (int i = 0; i < kHeadWarps; ++i) sum += staged[i][at];
  args.partials[int64_t{blockIdx.x} * shape.heads + head] = sum;
}

// WideQ: the gradient of q is float32.
template <int Width, bool Whole, bool WideQ>
__global__ void __launch_bounds__(kHeadThreads, Whole ? 2 : 1)
    qk_norm_rope_backward_kernel(QkNormRopeBackward args, QkNormRopeShape shape) {
  using QGrad = std::conditional_t<WideQ, float, bf16>;
  const int begin = rope_column();
  const int q_columns = shape.heads * Width, k_columns = shape.groups * Width;
  const int columns = q_columns + 2 * k_columns;
  float gain[kRopeStripes], dgain[kRopeStripes] = {};
  load_gains<Width>(gain, args.in, begin, q_columns);
  Rotation<Whole> rotation(begin % Width, shape.dims);
  const int v_column = static_cast<int>(blockIdx.y) * kStripe + static_cast<int>(threadIdx.x) % 32 * kVector;
  const bool v_inside = v_column < k_columns;
  const int64_t step = int64_t{gridDim.x} * kHeadWarps;
  for (int64_t token = int64_t{blockIdx.x} * kHeadWarps + threadIdx.x / 32; token < shape.tokens;
       token += step) {
    const bf16* row = args.in.qkv + token * args.in.stride + begin;
    bf16* target = args.dqkv + token * columns;
    const void* grads[kRopeStripes];
    std::conditional_t<WideQ, EitherRaw, HeadRaw> g_raw[kRopeStripes];
    HeadRaw x_raw[kRopeStripes], v_raw[kRopeValueGrads];
    PGOLF_UNROLL
    for (int u = 0; u < kRopeStripes; ++u) {
      const int column = begin + u * kStripe;
      const bool of_q = column < q_columns;
      if (of_q) {
        grads[u] = static_cast<const QGrad*>(args.dq) + token * q_columns + column;
      } else {
        grads[u] = args.dk + token * k_columns + (column - q_columns);
      }
      load_rope(g_raw[u], grads[u], !WideQ || !of_q, column < q_columns + k_columns);
      load_if(x_raw[u], row + u * kStripe, column < q_columns + k_columns);
    }
    PGOLF_UNROLL
    for (int i = 0; i < kRopeValueGrads; ++i) {
      const bool given = v_inside && args.dv[i] != nullptr;
      load_if(v_raw[i], given ? args.dv[i] + token * k_columns + v_column : nullptr, given);
    }
    rotation.load(args.in, token, -1.0f);
    PGOLF_UNROLL
    for (int u = 0; u < kRopeStripes; ++u) {
      const bool inside = begin + u * kStripe < q_columns + k_columns;
      float h[kVector], x[kVector];
      rotation.apply(h, g_raw[u], grads[u], inside);
      x_raw[u].widen(x);
      const float mean = head_sum<Width>(dot8(x, x)) * (1.0f / Width), dot = head_sum<Width>(dot8(h, x));
      const float r = rsqrtf(mean + args.in.eps), along = r * dot, rate = r * along * (1.0f / Width);
      const float factor = gain[u] * r;
      dgain[u] += along;
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) h[l] = factor * fmaf(-rate, x[l], h[l]);
      store_if(target + begin + u * kStripe, h, inside);
    }
    float v[kVector], other[kVector];
    v_raw[0].widen(v);
    v_raw[1].widen(other);
    PGOLF_UNROLL
    for (int l = 0; l < kVector; ++l) v[l] += other[l];
    store_if(target + q_columns + k_columns + v_column, v, v_inside);
  }
  store_gain_partials<Width>(args, shape, dgain);
}

// dgain of a head, from all blocks: one block per head.
inline constexpr int kRopeSumThreads = 128;
__global__ void __launch_bounds__(kRopeSumThreads)
    sum_gain_kernel(const float* partials, float* dgain, int heads) {
  __shared__ float staged[kRopeSumThreads];
  const int at = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int row = at; row < kRopePartials; row += kRopeSumThreads) sum += partials[row * heads + blockIdx.x];
  staged[at] = sum;
  for (int half = kRopeSumThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (at < half) staged[at] += staged[at + half];
  }
  if (at == 0) dgain[blockIdx.x] = staged[0];
}

}  // namespace pgolf
