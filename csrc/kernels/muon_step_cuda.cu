// CUDA kernels of muon_step.h: one launch for all banks (for every kMaxBanks or kMaxTargets of them). Both
// are bound by memory: each tensor is read and written once, 16 bytes at a time, and all loads of a thread
// are under way before its first store. What is not read again soon (gradients, momentum, parameters,
// averages) is marked to leave L2 first, so that the directions stay there for the polar iteration.
#include "kernels/muon_apply.cuh"
#include "kernels/muon_momentum.cuh"
#include "kernels/muon_step.h"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHeld = 8;  // spans of a row that stay in registers
constexpr int kMaxBanks = 64;

// ---- muon_direction: one row per warp

struct DirectionArgs {
  Runs<MuonDirection, kMaxBanks> banks;
  const float* hyper;
  MuonOptions options;
};
static_assert(sizeof(DirectionArgs) <= 4096, "kernel arguments hold 4 KB on every driver");

template <typename G, typename M, typename X>
__global__ void __launch_bounds__(kThreads)
    muon_direction_kernel(const __grid_constant__ DirectionArgs args) {
  const int which = args.banks.of_block(blockIdx.x);
  const MuonDirection& bank = args.banks.targets[which];
  const bool aligned = args.banks.aligned[which], nesterov = args.options.nesterov;
  const int64_t row =
      static_cast<int64_t>(blockIdx.x - args.banks.first[which]) * kWarps + threadIdx.x / kWarp;
  if (row >= bank.rows) return;
  const int64_t cols = bank.cols, start = row * cols;
  const G* grad = static_cast<const G*>(bank.grad) + start;
  M* momentum = static_cast<M*>(bank.momentum) + start;
  X* direction = static_cast<X*>(bank.direction) + start;
  const float mu = args.hyper[kHyperMomentum], grad_scale = args.hyper[kHyperGradScale];
  const float scale = grad_scale * (args.options.lerp ? 1.0f - mu : 1.0f);
  const int64_t lane = threadIdx.x % kWarp * kVector;

  if (!isfinite(grad_scale)) {
    for (int64_t column = lane; column < cols; column += kSpan) {
      float zero[kVector] = {};
      store8<false>(direction + column, zero, cols - column, aligned);
    }
    return;
  }
  float u[kHeld][kVector];
  float sum = 0.0f;
  for (int64_t base = 0; base < cols; base += kHeld * kSpan) {
    PGOLF_UNROLL
    for (int h = 0; h < kHeld; ++h) {
      const int64_t column = base + h * kSpan + lane;
      if (column >= cols) continue;
      load_direction8<true>(u[h], grad + column, momentum + column, cols - column, aligned, mu, scale,
                            nesterov);
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
      if (!held) {
        load_direction8<false>(u[h], grad + column, momentum + column, cols - column, aligned, mu, scale,
                               nesterov);
      }
      PGOLF_UNROLL
      for (int i = 0; i < kVector; ++i) u[h][i] *= norm_scale;
      store8<false>(direction + column, u[h], cols - column, aligned);
    }
  }
}

}  // namespace

template <typename G, typename M, typename X>
void muon_direction_cuda(const MuonDirection* banks, int count, const float* hyper, MuonOptions options,
                         CUstream_st* stream) {
  launch_runs<kMaxBanks>(
      banks, count, "muon_step",
      [](const MuonDirection& bank) { return bank.cols == 0 ? 0 : (bank.rows + kWarps - 1) / kWarps; },
      [](const MuonDirection& bank) {
        return bank.cols % kVector == 0 && aligned16(bank.grad) && aligned16(bank.momentum) &&
               aligned16(bank.direction);
      },
      [&](const Runs<MuonDirection, kMaxBanks>& runs, unsigned int blocks) {
        muon_direction_kernel<typename DeviceType<G>::type, typename DeviceType<M>::type,
                              typename DeviceType<X>::type><<<blocks, kThreads, 0, stream>>>(
            DirectionArgs{.banks = runs, .hyper = hyper, .options = options});
        PGOLF_LAUNCH_CHECK();
      });
}

template <typename X, typename Target>
void muon_apply_cuda(const Target* targets, int count, const float* hyper, bool cautious,
                     CUstream_st* stream) {
  using D = typename DeviceType<X>::type;
  const auto kernel = cautious ? muon_apply_kernel<D, true, Target> : muon_apply_kernel<D, false, Target>;
  launch_apply(targets, count, hyper, [&](const ApplyArgs<Target>& args, unsigned int blocks) {
    kernel<<<blocks, kApplyThreads, 0, stream>>>(args);
    PGOLF_LAUNCH_CHECK();
  });
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
template void muon_apply_cuda<float>(const MuonTarget*, int, const float*, bool, CUstream_st*);
template void muon_apply_cuda<bf16>(const MuonTarget*, int, const float*, bool, CUstream_st*);
template void muon_apply_cuda<float>(const Ahead<MuonTarget>*, int, const float*, bool, CUstream_st*);
template void muon_apply_cuda<bf16>(const Ahead<MuonTarget>*, int, const float*, bool, CUstream_st*);

}  // namespace pgolf
