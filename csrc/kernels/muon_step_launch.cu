// muon_step_cuda of muon_step.h: which kernels take a step, and in what order they are launched.
#include <algorithm>
#include <vector>

#include "kernels/cuda_check.cuh"
#include "kernels/muon_direction_sm90.h"
#include "kernels/muon_directions.h"
#include "kernels/newton_schulz_sm90.h"

namespace pgolf {
namespace {

template <typename X>
constexpr NsType kNsType = NsType::kFloat32;
template <>
constexpr NsType kNsType<bf16> = NsType::kBfloat16;

// The banks as the Hopper kernel takes them, without their input: where that lies depends on the kernels.
template <typename X>
std::vector<NsBank> hopper_banks(const MuonStep& step) {
  std::vector<NsBank> banks;
  for (int i = 0; i < step.count; ++i) {
    const MuonBank& bank = step.banks[i];
    banks.push_back({.in = nullptr,
                     .out = bank.update,
                     .type = kNsType<X>,
                     .batch = bank.matrices,
                     .rows = bank.rows,
                     .cols = bank.cols});
  }
  return banks;
}

bool aligned(const MuonBank& bank) {
  return reinterpret_cast<uintptr_t>(bank.grad) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(bank.momentum) % 16 == 0;
}

int64_t round_up(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// muon_direction_sm90 and the products, for as many banks at a time as one launch takes.
template <typename G, typename M>
void run_fused(const MuonStep& step, const std::vector<NsBank>& banks, void* workspace, CUstream_st* stream) {
  for (int first = 0, here = 0; first < step.count; first += here) {
    NsPrepared prepared{};
    here = newton_schulz_sm90_prepare(banks.data() + first, step.count - first, step.iteration.steps,
                                      workspace, &prepared);
    std::vector<MuonPolarInput> inputs;
    for (int i = 0; i < here; ++i) {
      const MuonBank& bank = step.banks[first + i];
      inputs.push_back({.grad = bank.grad,
                        .momentum = bank.momentum,
                        .x = prepared.x[i],
                        .matrices = bank.matrices,
                        .rows = bank.rows,
                        .cols = bank.cols});
    }
    muon_direction_sm90<G, M>(inputs.data(), here, prepared, step.iteration.eps, step.hyper, step.options,
                              stream);
    newton_schulz_sm90_prepared(banks.data() + first, here, step.iteration.coefficients, step.iteration.steps,
                                workspace, stream);
  }
}

template <typename X>
void iterate_hopper(const MuonStep& step, const std::vector<MuonDirection>& directions, void* workspace,
                    CUstream_st* stream) {
  std::vector<NsBank> banks = hopper_banks<X>(step);
  for (size_t i = 0; i < banks.size(); ++i) banks[i].in = directions[i].direction;
  newton_schulz_sm90(banks.data(), step.count, step.iteration.coefficients, step.iteration.steps,
                     step.iteration.eps, workspace, stream);
}

template <typename X>
void iterate_portable(const MuonStep& step, const std::vector<MuonDirection>& directions, void* workspace,
                      CUstream_st* stream) {
  for (int i = 0; i < step.count; ++i) {
    newton_schulz_cuda(static_cast<const X*>(directions[static_cast<size_t>(i)].direction),
                       static_cast<X*>(step.banks[i].update), workspace, iteration_of(step, i), stream);
  }
}

}  // namespace

template <typename X>
MuonPlan muon_step_plan_cuda(const MuonStep& step) {
  if (step.count == 0) return {MuonKernels::kNone, 0};
  const std::vector<NsBank> banks = hopper_banks<X>(step);
  const int64_t directions = round_up(direction_bytes<X>(step));
  if (step.algorithm == NsAlgorithm::kStandard || !newton_schulz_sm90_can_run(banks.data(), step.count)) {
    int64_t most = 0;
    for (int i = 0; i < step.count; ++i)
      most = std::max(most, newton_schulz_workspace_bytes(iteration_of(step, i)));
    return {MuonKernels::kPortable, directions + most};
  }
  const auto products =
      static_cast<int64_t>(newton_schulz_sm90_workspace(banks.data(), step.count, step.iteration.steps));
  if (std::all_of(step.banks, step.banks + step.count, aligned)) return {MuonKernels::kHopperFused, products};
  return {MuonKernels::kHopper, directions + products};
}

template <typename G, typename M, typename X>
void muon_step_cuda(const MuonStep& step, const MuonPlan& plan, void* workspace, CUstream_st* stream) {
  if (plan.kernels == MuonKernels::kNone) return;
  if (plan.kernels == MuonKernels::kHopperFused) {
    run_fused<G, M>(step, hopper_banks<X>(step), workspace, stream);
    return;
  }
  const std::vector<MuonDirection> directions = directions_in<X>(step, workspace);
  muon_direction_cuda<G, M, X>(directions.data(), step.count, step.hyper, step.options, stream);
  void* const rest = static_cast<unsigned char*>(workspace) + round_up(direction_bytes<X>(step));
  if (plan.kernels == MuonKernels::kHopper) {
    iterate_hopper<X>(step, directions, rest, stream);
  } else {
    iterate_portable<X>(step, directions, rest, stream);
  }
}

template MuonPlan muon_step_plan_cuda<float>(const MuonStep&);
template MuonPlan muon_step_plan_cuda<bf16>(const MuonStep&);
template void muon_step_cuda<float, float, float>(const MuonStep&, const MuonPlan&, void*, CUstream_st*);
template void muon_step_cuda<float, float, bf16>(const MuonStep&, const MuonPlan&, void*, CUstream_st*);
template void muon_step_cuda<float, bf16, float>(const MuonStep&, const MuonPlan&, void*, CUstream_st*);
template void muon_step_cuda<float, bf16, bf16>(const MuonStep&, const MuonPlan&, void*, CUstream_st*);
template void muon_step_cuda<bf16, float, float>(const MuonStep&, const MuonPlan&, void*, CUstream_st*);
template void muon_step_cuda<bf16, float, bf16>(const MuonStep&, const MuonPlan&, void*, CUstream_st*);
template void muon_step_cuda<bf16, bf16, float>(const MuonStep&, const MuonPlan&, void*, CUstream_st*);
template void muon_step_cuda<bf16, bf16, bf16>(const MuonStep&, const MuonPlan&, void*, CUstream_st*);

}  // namespace pgolf
