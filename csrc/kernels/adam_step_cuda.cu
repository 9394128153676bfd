// CUDA kernels of adam_step.h: bound by memory, 16 bytes at a time, every tensor read and written once.
// Pointers travel as kernel arguments, so a CUDA graph holds them by value.
#include <algorithm>

#include "kernels/adam_step.h"
#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/muon_momentum.cuh"
#include "kernels/reduce.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 2;                              // vectors of a thread in adam_step
constexpr int64_t kRun = kThreads * kVector * kUnroll;  // elements of a block in adam_step
constexpr int kMaxTargets = 56;
constexpr int kSumThreads = 512;
constexpr int kSumBlocks = 528;  // a tensor; fixed, so that the order of the sum is the same on every GPU
constexpr int kMaxSums = 64;

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// ---- square_sums: blocks stride over a tensor, the last one to finish adds the partial sums in order
// --------------------------------------------------------------------------

struct SumArgs {
  SquareSum tensors[kMaxSums];
  float* out;
  unsigned int* counters;  // (tensors,), zero
  float* partial;          // (tensors, kSumBlocks)
};
static_assert(sizeof(SumArgs) <= 4096, "kernel arguments hold 4 KB on every driver");

template <typename T>
__global__ void __launch_bounds__(kSumThreads) square_sums_kernel(const __grid_constant__ SumArgs args) {
  __shared__ float staged[kSumThreads / kWarp], staged_last[kSumThreads / kWarp];
  __shared__ bool last;
  const SquareSum& tensor = args.tensors[blockIdx.y];
  const T* data = static_cast<const T*>(tensor.data);
  const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  float* partial = args.partial + static_cast<int64_t>(blockIdx.y) * kSumBlocks;
  float sum = 0.0f;
  constexpr int64_t kStride = static_cast<int64_t>(kSumBlocks) * kSumThreads * kVector;
  const int64_t first = (static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x) * kVector;
#pragma unroll 4
  for (int64_t at = first; at < tensor.count; at += kStride) {
    float value[kVector];
    load8(value, data + at, tensor.count - at, aligned && tensor.count - at >= kVector);
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) sum = fmaf(value[i], value[i], sum);
  }
  sum = block_sum<kSumThreads>(sum, staged);
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(args.counters + blockIdx.y, 1u) == kSumBlocks - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  float total = 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < kSumBlocks; i += kSumThreads) total += __ldcg(partial + i);
  total = block_sum<kSumThreads>(total, staged_last);
  if (threadIdx.x == 0) args.out[blockIdx.y] = total;
}

__global__ void clip_scale_kernel(const float* sums, int count, float* state, float* scalars,
                                  float* corrections, ClipRule rule) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += sums[i];
  const float norm = sqrtf(sum);
  const bool finite = isfinite(norm);
  const float scale = rule.clip > 0 ? fminf(static_cast<float>(rule.clip) / (norm + kClipEps), 1.0f) : 1.0f;
  scalars[kMuonGradScale] = finite ? scale : __int_as_float(0x7fffffff);  // NaN
  state[kClipNorm] = norm;
  state[finite ? kClipSteps : kClipSkipped] += 1.0f;
  const double steps = fmaxf(state[kClipSteps], 1.0f);
  corrections[0] = static_cast<float>(1.0 / (1.0 - pow(rule.beta1, steps)));
  corrections[1] = static_cast<float>(1.0 / (1.0 - pow(rule.beta2, steps)));
}

// ---- adam_step: a block a run of elements
// --------------------------------------------------------------------------

struct Run {
  AdamTarget target;
  unsigned int first;  // block of the launch at which the tensor starts
  bool aligned;
};

struct AdamArgs {
  Run runs[kMaxTargets];
  int count;
  AdamRule rule;
};
static_assert(sizeof(AdamArgs) <= 4096, "kernel arguments hold 4 KB on every driver");

__global__ void __launch_bounds__(kThreads) adam_step_kernel(const __grid_constant__ AdamArgs args) {
  int which = args.count - 1;
  while (args.runs[which].first > blockIdx.x) --which;
  const AdamTarget& t = args.runs[which].target;
  const AdamRule& rule = args.rule;
  const float scale = rule.scalars[kMuonGradScale], weight = rule.scalars[kMuonAverageWeight];
  const float lr = *rule.lr;
  const float keep = 1.0f - lr * rule.weight_decay, step = lr * rule.corrections[0];
  const float correction = rule.corrections[1];
  const bool skip = !isfinite(scale);
  const int64_t begin = (blockIdx.x - args.runs[which].first) * kRun;
  PGOLF_UNROLL
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t at = begin + (k * kThreads + threadIdx.x) * kVector;
    const int64_t valid = t.count - at;
    if (valid <= 0) return;
    const bool aligned = args.runs[which].aligned && valid >= kVector;
    float zero[kVector] = {};
    if (skip) {
      store8<true>(t.grad + at, zero, valid, aligned);
      continue;
    }
    float p[kVector], g[kVector], m[kVector], v[kVector], average[kVector];
    load8(g, t.grad + at, valid, aligned);
    load8(m, t.mean + at, valid, aligned);
    load8(v, t.square + at, valid, aligned);
    load8(p, t.param + at, valid, aligned);
    if (t.average != nullptr) load8(average, t.average + at, valid, aligned);
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) {
      g[i] *= scale;
      m[i] = fmaf(rule.beta1, m[i], rule.rest1 * g[i]);
      v[i] = fmaf(rule.beta2, v[i], rule.rest2 * g[i] * g[i]);
      p[i] = fmaf(p[i], keep, -step * m[i] / (sqrtf(correction * v[i]) + rule.eps));
    }
    store8<true>(t.grad + at, zero, valid, aligned);
    store8<true>(t.mean + at, m, valid, aligned);
    store8<true>(t.square + at, v, valid, aligned);
    store8<true>(t.param + at, p, valid, aligned);
    if (t.average == nullptr) continue;
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) {  // two forms, as torch.lerp: exact at both ends of the weight
      const float gap = p[i] - average[i];
      average[i] = weight < 0.5f ? fmaf(weight, gap, average[i]) : fmaf(weight - 1.0f, gap, p[i]);
    }
    store8<true>(t.average + at, average, valid, aligned);
  }
}

}  // namespace

int64_t square_sums_workspace(int count) {
  return static_cast<int64_t>(count) * (1 + kSumBlocks) * static_cast<int64_t>(sizeof(float));
}

template <typename T>
void square_sums_cuda(const SquareSum* tensors, int count, float* out, void* workspace, CUstream_st* stream) {
  auto* counters = static_cast<unsigned int*>(workspace);
  auto* partial = reinterpret_cast<float*>(counters + count);
  for (int begin = 0; begin < count; begin += kMaxSums) {
    const int here = std::min(count - begin, kMaxSums);
    SumArgs args{};
    std::copy_n(tensors + begin, here, args.tensors);
    args.out = out + begin;
    args.counters = counters + begin;
    args.partial = partial + static_cast<int64_t>(begin) * kSumBlocks;
    square_sums_kernel<typename DeviceType<T>::type>
        <<<dim3(kSumBlocks, static_cast<unsigned int>(here)), kSumThreads, 0, stream>>>(args);
    PGOLF_LAUNCH_CHECK();
  }
}

void clip_scale_cuda(const float* sums, int count, float* state, float* scalars, float* corrections,
                     ClipRule rule, CUstream_st* stream) {
  clip_scale_kernel<<<1, 1, 0, stream>>>(sums, count, state, scalars, corrections, rule);
  PGOLF_LAUNCH_CHECK();
}

void adam_step_cuda(const AdamTarget* targets, int count, AdamRule rule, CUstream_st* stream) {
  for (int begin = 0; begin < count; begin += kMaxTargets) {
    AdamArgs args{};
    args.rule = rule;
    int64_t blocks = 0;
    for (int i = begin; i < std::min(begin + kMaxTargets, count); ++i) {
      const AdamTarget& t = targets[i];
      if (t.count == 0) continue;
      const bool aligned = aligned16(t.param) && aligned16(t.grad) && aligned16(t.mean) &&
                           aligned16(t.square) && aligned16(t.average);
      args.runs[args.count++] = Run{t, static_cast<unsigned int>(blocks), aligned};
      blocks += (t.count + kRun - 1) / kRun;
      grid_blocks(blocks, 1, "adam_step");
    }
    if (args.count == 0) continue;
    adam_step_kernel<<<static_cast<unsigned int>(blocks), kThreads, 0, stream>>>(args);
    PGOLF_LAUNCH_CHECK();
  }
}

template void square_sums_cuda<float>(const SquareSum*, int, float*, void*, CUstream_st*);
template void square_sums_cuda<bf16>(const SquareSum*, int, float*, void*, CUstream_st*);

}  // namespace pgolf
