// CPU kernels of adam_step.h: runs of elements over threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/adam_step.h"
#include "kernels/parallel.h"

namespace pgolf {
namespace {

constexpr int64_t kGrain = 1 << 15;  // elements that are worth a thread
constexpr int64_t kRun = 1 << 12;    // elements of a partial sum, whatever the number of threads

template <typename T>
double square_sum(const T* data, int64_t count) {
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(to_float(data[i])) * to_float(data[i]);
  return sum;
}

void adam_range(const AdamTarget& t, const AdamRule& rule, int64_t begin, int64_t end) {
  const float lr = *rule.lr, scale = rule.hyper[kHyperGradScale];
  const float keep = 1.0f - lr * rule.weight_decay, step = lr * rule.corrections[0];
  const float correction = rule.corrections[1];
  for (int64_t i = begin; i < end; ++i) {
    const float g = t.grad[i] * scale;
    const float mean = rule.beta1 * t.mean[i] + rule.rest1 * g;
    const float square = rule.beta2 * t.square[i] + rule.rest2 * g * g;
    t.mean[i] = mean;
    t.square[i] = square;
    t.param[i] = t.param[i] * keep - step * mean / (std::sqrt(correction * square) + rule.eps);
  }
  if (t.average == nullptr) return;
  // Two forms, as torch.lerp: exact at both ends of the weight.
  const float weight = rule.hyper[kHyperAverageWeight];
  for (int64_t i = begin; i < end; ++i) {
    const float gap = t.param[i] - t.average[i];
    t.average[i] = weight < 0.5f ? t.average[i] + weight * gap : t.param[i] - gap * (1.0f - weight);
  }
}

}  // namespace

template <typename T>
void square_sums_cpu(const SquareSum* tensors, int count, float* out, int threads) {
  for (int i = 0; i < count; ++i) {
    const T* data = static_cast<const T*>(tensors[i].data);
    const int64_t length = tensors[i].count, runs = (length + kRun - 1) / kRun;
    std::vector<double> partial(static_cast<size_t>(runs));
    parallel_for(runs, kGrain / kRun, threads, [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run)
        partial[static_cast<size_t>(run)] =
            square_sum(data + run * kRun, std::min(kRun, length - run * kRun));
    });
    double sum = 0.0;
    for (double value : partial) sum += value;
    out[i] = static_cast<float>(sum);
  }
}

void clip_scale_cpu(const float* sums, int count, float* state, float* hyper, float* corrections,
                    ClipRule rule) {
  float sum = 0.0f;
  for (int i = 0; i < count; ++i) sum += sums[i];
  const float norm = std::sqrt(sum);
  const bool finite = std::isfinite(norm);
  const float scale =
      rule.clip > 0 ? std::min(static_cast<float>(rule.clip) / (norm + kClipEps), 1.0f) : 1.0f;
  hyper[kHyperGradScale] = finite ? scale : std::numeric_limits<float>::quiet_NaN();
  state[kClipNorm] = norm;
  state[finite ? kClipSteps : kClipSkipped] += 1.0f;
  const double steps = std::max(state[kClipSteps], 1.0f);
  corrections[0] = static_cast<float>(1.0 / (1.0 - std::pow(rule.beta1, steps)));
  corrections[1] = static_cast<float>(1.0 / (1.0 - std::pow(rule.beta2, steps)));
}

template <typename Target>
void adam_step_cpu(const Target* targets, int count, AdamRule rule, int threads) {
  const bool skip = !std::isfinite(rule.hyper[kHyperGradScale]);
  for (int i = 0; i < count; ++i) {
    const Target& t = targets[i];
    parallel_for(t.count, kGrain, threads, [&](int64_t begin, int64_t end) {
      if (!skip) adam_range(t, rule, begin, end);
      if constexpr (kAhead<Target>) move_ahead(t, rule.hyper, skip, begin, end);
      std::fill(t.grad + begin, t.grad + end, 0.0f);
    });
  }
}

template void square_sums_cpu<float>(const SquareSum*, int, float*, int);
template void square_sums_cpu<bf16>(const SquareSum*, int, float*, int);
template void adam_step_cpu(const AdamTarget*, int, AdamRule, int);
template void adam_step_cpu(const Ahead<AdamTarget>*, int, AdamRule, int);

}  // namespace pgolf
