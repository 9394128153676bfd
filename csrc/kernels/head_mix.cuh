// The kernels of head_mix. A lane holds eight columns of v and those of y, and of its gradient, in the
// `Ratio` heads of v's group: v is read once, and the heads are summed in registers.
#pragma once

#include "kernels/head_mix.h"
#include "kernels/head_rows.cuh"

namespace pgolf {

// Which columns of a token's v a lane holds, and where the heads of their group begin in a token's y.
template <int Width, int Ratio>
struct MixedHeads {
  bool inside;
  bool first;  // of the lanes of its heads
  int v;       // column
  int y;       // column, in the first head
  int head;    // the first one

  __device__ __forceinline__ explicit MixedHeads(int groups) {
    v = (static_cast<int>(blockIdx.y) * 32 + static_cast<int>(threadIdx.x) % 32) * kVector;
    inside = v < groups * Width;
    first = v % Width == 0;
    head = v / Width * Ratio;
    y = head * Width + v % Width;
  }
};

struct GateValue {
  float gate, slope;  // and its derivative with respect to z
};

__device__ __forceinline__ GateValue gate_value(const HeadMixGate& gate, float z) {
  if (gate.z == nullptr) return {1.0f, 0.0f};
  const float s = 1.0f / (1.0f + expf(-gate.inner * z));
  return {gate.outer * s, gate.outer * gate.inner * s * (1.0f - s)};
}

__device__ __forceinline__ float load_logit(const HeadMixGate& gate, int64_t token, int head, bool inside) {
  return gate.z != nullptr && inside ? load_either(gate.z, gate.is_bf16, token * gate.stride + head) : 0.0f;
}

template <int Width, int Ratio>
__global__ void __launch_bounds__(kHeadThreads, Ratio == 4 ? 3 : 4)
    head_mix_kernel(HeadMixForward args, HeadMixShape shape) {
  const MixedHeads<Width, Ratio> place(shape.groups);
  const int64_t row = int64_t{shape.heads} * Width, step = int64_t{gridDim.x} * kHeadWarps;
  for (int64_t token = int64_t{blockIdx.x} * kHeadWarps + threadIdx.x / 32; token < shape.tokens;
       token += step) {
    const int64_t at = token * row + place.y;
    HeadRaw v_raw, y_raw[Ratio];
    float z[Ratio];
    load_if(v_raw, args.v + token * args.v_stride + place.v, place.inside);
    PGOLF_UNROLL
    for (int i = 0; i < Ratio; ++i) {
      load_if(y_raw[i], args.y + at + i * Width, place.inside);
      z[i] = load_logit(args.gate, token, place.head + i, place.inside);
    }
    float v[kVector];
    v_raw.widen(v);
    const float inverse = 1.0f / fmaxf(head_sum<Width>(dot8(v, v)), kSmallestSquare);
    PGOLF_UNROLL
    for (int i = 0; i < Ratio; ++i) {
      float y[kVector];
      y_raw[i].widen(y);
      const float a = head_sum<Width>(dot8(y, v)) * inverse, gate = gate_value(args.gate, z[i]).gate;
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) y[l] = gate * fmaf(-a, v[l], y[l]);
      store_if(args.out + at + i * Width, y, place.inside);
    }
  }
}

// Of four heads a thread has values for more than 128 registers on some devices (sm_100).
template <int Width, int Ratio>
__global__ void __launch_bounds__(kHeadThreads, Ratio == 4 ? 1 : 2)
    head_mix_backward_kernel(HeadMixBackward args, HeadMixShape shape) {
  const MixedHeads<Width, Ratio> place(shape.groups);
  const int64_t row = int64_t{shape.heads} * Width, step = int64_t{gridDim.x} * kHeadWarps;
  for (int64_t token = int64_t{blockIdx.x} * kHeadWarps + threadIdx.x / 32; token < shape.tokens;
       token += step) {
    const int64_t at = token * row + place.y;
    HeadRaw v_raw, y_raw[Ratio], p_raw[Ratio];
    float z[Ratio];
    load_if(v_raw, args.v + token * args.v_stride + place.v, place.inside);
    PGOLF_UNROLL
    for (int i = 0; i < Ratio; ++i) {
      load_if(y_raw[i], args.y + at + i * Width, place.inside);
      load_if(p_raw[i], args.grad + at + i * Width, place.inside);
      z[i] = load_logit(args.gate, token, place.head + i, place.inside);
    }
    float v[kVector], dv[kVector] = {};
    v_raw.widen(v);
    const float square = head_sum<Width>(dot8(v, v)), inverse = 1.0f / fmaxf(square, kSmallestSquare);
    float along_v = 0.0f;  // sum of a w
    PGOLF_UNROLL
    for (int i = 0; i < Ratio; ++i) {
      float y[kVector], p[kVector], dy[kVector];
      y_raw[i].widen(y);
      p_raw[i].widen(p);
      const float yv = head_sum<Width>(dot8(y, v)), pv = head_sum<Width>(dot8(p, v));
      const float py = head_sum<Width>(dot8(p, y));
      const GateValue value = gate_value(args.gate, z[i]);
      const float a = yv * inverse, w = value.gate * (pv * inverse);
      along_v += a * w;
      PGOLF_UNROLL
      for (int l = 0; l < kVector; ++l) {
        const float of_mixed = value.gate * p[l];
        dy[l] = fmaf(-w, v[l], of_mixed);
        dv[l] = fmaf(-a, of_mixed, fmaf(-w, y[l], dv[l]));
      }
      store_if(args.dy + at + i * Width, dy, place.inside);
      if (args.dz != nullptr && place.inside && place.first)
        store_either(args.dz, args.gate.is_bf16, token * shape.heads + place.head + i,
                     value.slope * fmaf(-a, pv, py));
      // Of the rounded dy. Lanes that store nothing have another one, but zeros of y.
      const float delta = head_sum<Width>(dot8(dy, y));
      if (place.inside && place.first) args.delta[(place.head + i) * shape.tokens + token] = delta;
    }
    const float curved = square < kSmallestSquare ? 0.0f : 2.0f * along_v;
    PGOLF_UNROLL
    for (int l = 0; l < kVector; ++l) dv[l] = fmaf(curved, v[l], dv[l]);
    store_if(args.dv + token * shape.groups * Width + place.v, dv, place.inside);
  }
}

}  // namespace pgolf
