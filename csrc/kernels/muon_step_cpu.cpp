// CPU kernels of muon_step.h: rows and runs of elements over threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/muon_directions.h"
#include "kernels/muon_step.h"
#include "kernels/parallel.h"

namespace pgolf {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread

// u for one row, and the new momentum; both rounded to their types only when stored.
template <typename G, typename M>
void momentum_row(const G* grad, M* momentum, float* u, int64_t cols, const float* hyper,
                  MuonOptions options) {
  const float mu = hyper[kHyperMomentum];
  const float share = options.lerp ? 1.0f - mu : 1.0f;
  const float scale = hyper[kHyperGradScale] * share;
  for (int64_t j = 0; j < cols; ++j) {
    const float g = to_float(grad[j]) * scale;
    momentum[j] = from_float<M>(mu * to_float(momentum[j]) + g);
    u[j] = options.nesterov ? g + mu * to_float(momentum[j]) : to_float(momentum[j]);
  }
}

float row_scale(const float* u, int64_t cols) {
  double sum = 0.0;
  for (int64_t j = 0; j < cols; ++j) sum += static_cast<double>(u[j]) * u[j];
  return 1.0f / std::max(static_cast<float>(std::sqrt(sum)), kMuonRowEps);
}

template <typename X>
void apply_range(const MuonTarget& t, const float* hyper, bool cautious, int64_t begin, int64_t end) {
  const float lr = hyper[kHyperLr];
  const float keep = 1.0f - lr * hyper[kHyperWeightDecay];
  const float step = lr * t.lr_scale;
  const X* update = static_cast<const X*>(t.update);
  for (int64_t i = begin; i < end; ++i) {
    const float p = t.param[i], o = to_float(update[i]);
    t.param[i] = p * (cautious && !(p * o > 0.0f) ? 1.0f : keep) - step * o;
  }
  if (t.average == nullptr) return;
  // Two forms, as torch.lerp: exact at both ends of the weight.
  const float weight = hyper[kHyperAverageWeight];
  if (weight < 0.5f) {
    for (int64_t i = begin; i < end; ++i) t.average[i] += weight * (t.param[i] - t.average[i]);
  } else {
    for (int64_t i = begin; i < end; ++i)
      t.average[i] = t.param[i] - (t.param[i] - t.average[i]) * (1.0f - weight);
  }
}

}  // namespace

template <typename G, typename M, typename X>
void muon_direction_cpu(const MuonDirection* banks, int count, const float* hyper, MuonOptions options,
                        int threads) {
  const bool skip = !std::isfinite(hyper[kHyperGradScale]);
  for (int i = 0; i < count; ++i) {
    const MuonDirection& bank = banks[i];
    const int64_t cols = bank.cols;
    if (cols == 0) continue;
    if (skip) {
      std::fill_n(static_cast<X*>(bank.direction), bank.rows * cols, from_float<X>(0.0f));
      continue;
    }
    parallel_for(bank.rows, std::max<int64_t>(kGrain / cols, 1), threads, [&](int64_t begin, int64_t end) {
      std::vector<float> u(static_cast<size_t>(cols));
      for (int64_t row = begin; row < end; ++row) {
        momentum_row(static_cast<const G*>(bank.grad) + row * cols,
                     static_cast<M*>(bank.momentum) + row * cols, u.data(), cols, hyper, options);
        const float scale = options.row_normalize ? row_scale(u.data(), cols) : 1.0f;
        X* out = static_cast<X*>(bank.direction) + row * cols;
        for (int64_t j = 0; j < cols; ++j) out[j] = from_float<X>(u[static_cast<size_t>(j)] * scale);
      }
    });
  }
}

template <typename X>
int64_t muon_step_workspace_cpu(const MuonStep& step) {
  return direction_bytes<X>(step);
}

template <typename G, typename M, typename X>
void muon_step_cpu(const MuonStep& step, void* workspace, int threads) {
  const std::vector<MuonDirection> directions = directions_in<X>(step, workspace);
  muon_direction_cpu<G, M, X>(directions.data(), step.count, step.hyper, step.options, threads);
  for (int i = 0; i < step.count; ++i) {
    newton_schulz_cpu(static_cast<const X*>(directions[static_cast<size_t>(i)].direction),
                      static_cast<X*>(step.banks[i].update), iteration_of(step, i), threads);
  }
}

template <typename X, typename Target>
void muon_apply_cpu(const Target* targets, int count, const float* hyper, bool cautious, int threads) {
  const bool skipped = !std::isfinite(hyper[kHyperGradScale]);
  if (skipped && !kAhead<Target>) return;
  for (int i = 0; i < count; ++i) {
    parallel_for(targets[i].count, kGrain, threads, [&](int64_t begin, int64_t end) {
      if (!skipped) apply_range<X>(targets[i], hyper, cautious, begin, end);
      if constexpr (kAhead<Target>) move_ahead(targets[i], hyper, skipped, begin, end);
    });
  }
}

template void muon_direction_cpu<float, float, float>(const MuonDirection*, int, const float*, MuonOptions,
                                                      int);
template void muon_direction_cpu<float, float, bf16>(const MuonDirection*, int, const float*, MuonOptions,
                                                     int);
template void muon_direction_cpu<float, bf16, float>(const MuonDirection*, int, const float*, MuonOptions,
                                                     int);
template void muon_direction_cpu<float, bf16, bf16>(const MuonDirection*, int, const float*, MuonOptions,
                                                    int);
template void muon_direction_cpu<bf16, float, float>(const MuonDirection*, int, const float*, MuonOptions,
                                                     int);
template void muon_direction_cpu<bf16, float, bf16>(const MuonDirection*, int, const float*, MuonOptions,
                                                    int);
template void muon_direction_cpu<bf16, bf16, float>(const MuonDirection*, int, const float*, MuonOptions,
                                                    int);
template void muon_direction_cpu<bf16, bf16, bf16>(const MuonDirection*, int, const float*, MuonOptions, int);
template int64_t muon_step_workspace_cpu<float>(const MuonStep&);
template int64_t muon_step_workspace_cpu<bf16>(const MuonStep&);
template void muon_step_cpu<float, float, float>(const MuonStep&, void*, int);
template void muon_step_cpu<float, float, bf16>(const MuonStep&, void*, int);
template void muon_step_cpu<float, bf16, float>(const MuonStep&, void*, int);
template void muon_step_cpu<float, bf16, bf16>(const MuonStep&, void*, int);
template void muon_step_cpu<bf16, float, float>(const MuonStep&, void*, int);
template void muon_step_cpu<bf16, float, bf16>(const MuonStep&, void*, int);
template void muon_step_cpu<bf16, bf16, float>(const MuonStep&, void*, int);
template void muon_step_cpu<bf16, bf16, bf16>(const MuonStep&, void*, int);
template void muon_apply_cpu<float>(const MuonTarget*, int, const float*, bool, int);
template void muon_apply_cpu<bf16>(const MuonTarget*, int, const float*, bool, int);
template void muon_apply_cpu<float>(const Ahead<MuonTarget>*, int, const float*, bool, int);
template void muon_apply_cpu<bf16>(const Ahead<MuonTarget>*, int, const float*, bool, int);

}  // namespace pgolf
