// CUDA kernels of muon_step.h: one launch for all banks (for every kMaxBanks or kMaxTargets of them). Both
// are bound by memory: each tensor is read and written once, 16 bytes at a time, and what nobody reads soon
// (gradients, momentum, parameters, averages) is marked to leave L2 first, so that the directions stay there
// for the polar iteration. Pointers travel as kernel arguments, so a CUDA graph holds them by value.
#include <algorithm>

#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"
#include "kernels/muon_momentum.cuh"
#include "kernels/muon_step.h"
#include "kernels/reduce.cuh"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeld = 8;                                // spans of a row that stay in registers
constexpr int kUnroll = 4;                              // vectors of a thread in muon_apply
constexpr int64_t kRun = kThreads * kVector * kUnroll;  // elements of a block in muon_apply
constexpr int kMaxBanks = 64;
constexpr int kMaxTargets = 80;

bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// ---- muon_direction: a warp a row
// --------------------------------------------------------------------------

struct Rows {
  MuonDirection bank;
  int64_t first;  // row of the launch at which the bank starts
  bool aligned;
};

struct DirectionArgs {
  Rows rows[kMaxBanks];
  int count;
  int64_t total;
  const float* scalars;
  MuonOptions options;
};
static_assert(sizeof(DirectionArgs) <= 4096, "kernel arguments hold 4 KB on every driver");

template <typename G, typename M, typename X>
__global__ void __launch_bounds__(kThreads)
    muon_direction_kernel(const __grid_constant__ DirectionArgs args) {
  const float grad_scale = args.scalars[kMuonGradScale];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= args.total) return;
  int which = args.count - 1;
  while (args.rows[which].first > row) --which;
  const MuonDirection& bank = args.rows[which].bank;
  const bool aligned = args.rows[which].aligned, nesterov = args.options.nesterov;
  const int64_t cols = bank.cols, start = (row - args.rows[which].first) * cols;
  const G* grad = static_cast<const G*>(bank.grad) + start;
  M* momentum = static_cast<M*>(bank.momentum) + start;
  X* direction = static_cast<X*>(bank.direction) + start;
  const float mu = args.scalars[kMuonMomentum];
  const float scale = grad_scale * (args.options.lerp ? 1.0f - mu : 1.0f);
  const int64_t lane = threadIdx.x % kWarp * kVector;

  if (!isfinite(grad_scale)) {
    float zero[kVector] = {};
    for (int64_t column = lane; column < cols; column += kSpan)
      store8<false>(direction + column, zero, cols - column, aligned);
    return;
  }
  float u[kHeld][kVector];
  float sum = 0.0f;
  for (int64_t base = 0; base < cols; base += kHeld * kSpan) {
    PGOLF_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      const int64_t column = base + h * kSpan + lane;
      if (column >= cols) continue;
      momentum8<true>(u[h], grad + column, momentum + column, cols - column, aligned, mu, scale, nesterov);
      PGOLF_UNROLL
      for (int i = 0; i < kVector; ++i) sum = fmaf(u[h][i], u[h][i], sum);
    }
  }
  float norm_scale = 1.0f;
  if (args.options.row_normalize) {
    PGOLF_UNROLL
    for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    norm_scale = 1.0f / fmaxf(sqrtf(sum), kMuonRowEps);
  }
  // Rows that do not fit in registers are computed again from the gradient and the new momentum.
  const bool held = cols <= kHeld * kSpan;
  for (int64_t base = 0; base < cols; base += kHeld * kSpan) {
    PGOLF_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      const int64_t column = base + h * kSpan + lane;
      if (column >= cols) continue;
      if (!held)
        momentum8<false>(u[h], grad + column, momentum + column, cols - column, aligned, mu, scale, nesterov);
      PGOLF_UNROLL
      for (int i = 0; i < kVector; ++i) u[h][i] *= norm_scale;
      store8<false>(direction + column, u[h], cols - column, aligned);
    }
  }
}

// ---- muon_apply: a block a run of elements
// -----------------------------------------------------------------

struct Run {
  MuonTarget target;
  unsigned int first;  // block of the launch at which the tensor starts
  bool aligned;
};

struct ApplyArgs {
  Run runs[kMaxTargets];
  int count;
  const float* scalars;
};
static_assert(sizeof(ApplyArgs) <= 4096, "kernel arguments hold 4 KB on every driver");

template <typename X>
__global__ void __launch_bounds__(kThreads) muon_apply_kernel(const __grid_constant__ ApplyArgs args) {
  if (!isfinite(args.scalars[kMuonGradScale])) return;
  int which = args.count - 1;
  while (args.runs[which].first > blockIdx.x) --which;
  const MuonTarget& t = args.runs[which].target;
  const X* update = static_cast<const X*>(t.update);
  const int64_t begin = (blockIdx.x - args.runs[which].first) * kRun;
  const float lr = args.scalars[kMuonLr];
  const float keep = 1.0f - lr * args.scalars[kMuonWeightDecay];
  const float step = lr * t.lr_scale;
  const float weight = args.scalars[kMuonAverageWeight];
  PGOLF_UNROLL
  for (int k = 0; k < kUnroll; ++k) {
    const int64_t at = begin + (k * kThreads + threadIdx.x) * kVector;
    const int64_t valid = t.count - at;
    if (valid <= 0) return;
    const bool aligned = args.runs[which].aligned && valid >= kVector;
    float p[kVector], o[kVector], average[kVector];
    load8(p, t.param + at, valid, aligned);
    if (update != nullptr) {
      load8(o, update + at, valid, aligned);
      PGOLF_UNROLL
      for (int i = 0; i < kVector; ++i) p[i] = fmaf(p[i], keep, -step * o[i]);
      store8<true>(t.param + at, p, valid, aligned);
    }
    if (t.average == nullptr) continue;
    load8(average, t.average + at, valid, aligned);
    PGOLF_UNROLL
    for (int i = 0; i < kVector; ++i) {  // two forms, as torch.lerp: exact at both ends of the weight
      const float gap = p[i] - average[i];
      average[i] = weight < 0.5f ? fmaf(weight, gap, average[i]) : fmaf(weight - 1.0f, gap, p[i]);
    }
    store8<true>(t.average + at, average, valid, aligned);
  }
}

}  // namespace

template <typename G, typename M, typename X>
void muon_direction_cuda(const MuonDirection* banks, int count, const float* scalars, MuonOptions options,
                         CUstream_st* stream) {
  for (int begin = 0; begin < count; begin += kMaxBanks) {
    DirectionArgs args{};
    args.scalars = scalars;
    args.options = options;
    for (int i = begin; i < std::min(begin + kMaxBanks, count); ++i) {
      const MuonDirection& bank = banks[i];
      if (bank.rows == 0 || bank.cols == 0) continue;
      const bool aligned = bank.cols % kVector == 0 && aligned16(bank.grad) && aligned16(bank.momentum) &&
                           aligned16(bank.direction);
      args.rows[args.count++] = Rows{bank, args.total, aligned};
      args.total += bank.rows;
    }
    if (args.count == 0) continue;
    muon_direction_kernel<typename DeviceType<G>::type, typename DeviceType<M>::type,
                          typename DeviceType<X>::type>
        <<<grid_blocks(args.total, kWarps, "muon_step"), kThreads, 0, stream>>>(args);
    PGOLF_LAUNCH_CHECK();
  }
}

template <typename X>
void muon_apply_cuda(const MuonTarget* targets, int count, const float* scalars, CUstream_st* stream) {
  for (int begin = 0; begin < count; begin += kMaxTargets) {
    ApplyArgs args{};
    args.scalars = scalars;
    int64_t blocks = 0;
    for (int i = begin; i < std::min(begin + kMaxTargets, count); ++i) {
      const MuonTarget& t = targets[i];
      if (t.count == 0) continue;
      const bool aligned = aligned16(t.param) && aligned16(t.update) && aligned16(t.average);
      args.runs[args.count++] = Run{t, static_cast<unsigned int>(blocks), aligned};
      blocks += (t.count + kRun - 1) / kRun;
      grid_blocks(blocks, 1, "muon_step");
    }
    if (args.count == 0) continue;
    muon_apply_kernel<typename DeviceType<X>::type>
        <<<static_cast<unsigned int>(blocks), kThreads, 0, stream>>>(args);
    PGOLF_LAUNCH_CHECK();
  }
}

template void muon_direction_cuda<float, float, float>(const MuonDirection*, int, const float*, MuonOptions,
                                                       CUstream_st*);
template void muon_direction_cuda<float, float, bf16>(const MuonDirection*, int, const float*, MuonOptions,
                                                      CUstream_st*);
template void muon_direction_cuda<float, bf16, float>(const MuonDirection*, int, const float*, MuonOptions,
                                                      CUstream_st*);
template void muon_direction_cuda<float, bf16, bf16>(const MuonDirection*, int, const float*, MuonOptions,
                                                     CUstream_st*);
template void muon_direction_cuda<bf16, float, float>(const MuonDirection*, int, const float*, MuonOptions,
                                                      CUstream_st*);
template void muon_direction_cuda<bf16, float, bf16>(const MuonDirection*, int, const float*, MuonOptions,
                                                     CUstream_st*);
template void muon_direction_cuda<bf16, bf16, float>(const MuonDirection*, int, const float*, MuonOptions,
                                                     CUstream_st*);
template void muon_direction_cuda<bf16, bf16, bf16>(const MuonDirection*, int, const float*, MuonOptions,
                                                    CUstream_st*);
template void muon_apply_cuda<float>(const MuonTarget*, int, const float*, CUstream_st*);
template void muon_apply_cuda<bf16>(const MuonTarget*, int, const float*, CUstream_st*);

}  // namespace pgolf
