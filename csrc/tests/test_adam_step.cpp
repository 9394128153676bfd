// The CPU kernels of adam_step.h against plain float64 loops: sizes around the grain of a thread, sums that
// do not depend on the number of threads, and the step that is skipped. The CUDA kernel of a step, run on the
// host (host_cuda/cuda_runtime.h), against them: several launches, ends of tensors, addresses that are not
// 16-byte aligned.
#include <math.h>  // isfinite outside namespace std

#include <cmath>
#include <limits>

#include "kernels/common.h"
#include "tests/check.h"

#undef PGOLF_UNROLL
#define PGOLF_UNROLL  // g++ has no such pragma

#include "kernels/adam_apply.cuh"

namespace pgolf::test {
namespace {

void test_sums(int64_t count) {
  const std::vector<float> values = normal_values(count, 1);
  double want = 0.0;
  for (float value : values) want += static_cast<double>(value) * value;
  const SquareSum tensors[] = {{values.data(), count}, {values.data(), count / 2}};
  float one[2], many[2];
  square_sums_cpu<float>(tensors, 2, one, 1);
  square_sums_cpu<float>(tensors, 2, many, 5);
  check_close(one[0], want, 1e-6, 0.0, "sum of squares");
  check(one[0] == many[0] && one[1] == many[1], "the sum depends on the number of threads");
}

void test_clip(float sum, float clip, float want) {
  float state[kClipState] = {0.0f, 2.0f, 0.0f}, hyper[kHyperCount] = {}, corrections[2];
  clip_scale_cpu(&sum, 1, state, hyper, corrections, {clip, 0.9, 0.99});
  check_close(hyper[kHyperGradScale], want, 1e-6, 0.0, "factor");
  check_close(state[kClipNorm], std::sqrt(sum), 1e-6, 0.0, "norm");
  check(state[kClipSteps] == 3.0f && state[kClipSkipped] == 0.0f, "the step was not counted");
  check_close(corrections[0], 1 / (1 - std::pow(0.9, 3)), 1e-6, 0.0, "first correction");
  check_close(corrections[1], 1 / (1 - std::pow(0.99, 3)), 1e-6, 0.0, "second correction");
}

void test_step(int64_t count, float weight, int threads) {
  const float lr = 0.1f, corrections[2] = {2.0f, 3.0f};
  const float hyper[kHyperCount] = {0.0f, 0.0f, 0.0f, 0.5f, weight};
  const AdamRule rule{&lr, hyper, corrections, 0.2f, 0.9f, 0.99f, 1e-8f, 0.1f, 0.01f};
  const std::vector<float> p = normal_values(count, 1), g = normal_values(count, 2),
                           m = normal_values(count, 3), a = normal_values(count, 4);
  std::vector<float> param = p, grad = g, mean = m, square(p.size(), 0.5f), average = a;
  const AdamTarget target{param.data(), grad.data(), mean.data(), square.data(), average.data(), count};
  adam_step_cpu(&target, 1, rule, threads);
  for (size_t i = 0; i < p.size(); ++i) {
    const double scaled = 0.5 * g[i], first = 0.9 * m[i] + 0.1 * scaled;
    const double second = 0.99 * 0.5 + 0.01 * scaled * scaled;
    const double want = p[i] * (1 - 0.1 * 0.2) - 0.1 * 2.0 * first / (std::sqrt(3.0 * second) + 1e-8);
    check_close(mean[i], first, 1e-5, 1e-6, "mean");
    check_close(square[i], second, 1e-5, 1e-6, "square");
    check_close(param[i], want, 1e-5, 1e-6, "param");
    check_close(average[i], a[i] + weight * (want - a[i]), 1e-5, 1e-6, "average");
    check(grad[i] == 0.0f, "a gradient was left");
  }
}

void test_skip() {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    float state[kClipState] = {}, hyper[kHyperCount] = {}, corrections[2];
    clip_scale_cpu(&bad, 1, state, hyper, corrections, {0.3, 0.9, 0.99});
    check(std::isnan(hyper[kHyperGradScale]), "a norm that is not finite gave a factor");
    check(state[kClipSteps] == 0.0f && state[kClipSkipped] == 1.0f, "a skipped step was counted as taken");
    check(std::isfinite(corrections[0]) && std::isfinite(corrections[1]), "corrections are not finite");
    const float lr = 0.1f;
    const std::vector<float> before = normal_values(5, 1);
    std::vector<float> param = before, grad = before, mean = before, square = before;
    const AdamTarget target{param.data(), grad.data(), mean.data(), square.data(), nullptr, 5};
    adam_step_cpu(&target, 1, {&lr, hyper, corrections, 0.2f, 0.9f, 0.99f, 1e-8f, 0.1f, 0.01f}, 1);
    check(param == before && mean == before && square == before, "a skipped step changed something");
    check(grad == std::vector<float>(5), "a skipped step left a gradient");
  }
}

// A step with EMA-Nesterov, of tensors that a test copies to compare what several kernels make of them.
struct Tensors {
  std::vector<std::vector<float>> params, grads, means, squares, averages, bases, velocities;

  explicit Tensors(const std::vector<int64_t>& sizes) {
    unsigned seed = 0;
    for (auto* list : {&params, &grads, &means, &squares, &averages, &bases, &velocities})
      for (const int64_t size : sizes) list->push_back(normal_values(size, ++seed));
    for (auto& square : squares)
      for (float& value : square) value *= value;
  }

  // `skip` elements of each tensor are left out at its start, which moves the addresses.
  std::vector<Ahead<AdamTarget>> targets(int64_t skip, bool with_averages) {
    std::vector<Ahead<AdamTarget>> all;
    for (size_t i = 0; i < params.size(); ++i) {
      const auto at = [&](std::vector<std::vector<float>>& list) { return list[i].data() + skip; };
      const int64_t count = static_cast<int64_t>(params[i].size()) - skip;
      all.push_back(
          {{at(params), at(grads), at(means), at(squares), with_averages ? at(averages) : nullptr, count},
           at(bases),
           at(velocities)});
    }
    return all;
  }

  std::vector<AdamTarget> plain_targets(int64_t skip, bool with_averages) {
    std::vector<AdamTarget> all;
    for (const AdamTarget& target : targets(skip, with_averages)) all.push_back(target);
    return all;
  }
};

template <typename Target>
void run_on_host(const std::vector<Target>& targets, const AdamRule& rule) {
  launch_adam(targets.data(), static_cast<int>(targets.size()), rule,
              [&](const AdamArgs<Target>& args, unsigned int blocks) {
                launch(blocks, kAdamThreads, [&] { adam_step_kernel<Target>(args); });
              });
}

// Compares the lists of two steps that should be equal but for rounding.
void check_lists(const Tensors& got, const Tensors& want, const char* what) {
  const auto close = [&](const auto& a, const auto& b, const char* name) {
    for (size_t i = 0; i < a.size(); ++i)
      for (size_t k = 0; k < a[i].size(); ++k)
        check_close(a[i][k], b[i][k], 4e-6, 4e-6,
                    std::string(what) + " " + name + " " + std::to_string(k) + " of " + std::to_string(i));
  };
  close(got.params, want.params, "param");
  close(got.means, want.means, "mean");
  close(got.squares, want.squares, "square");
  close(got.averages, want.averages, "average");
  close(got.bases, want.bases, "base");
  close(got.velocities, want.velocities, "velocity");
  check(got.grads == want.grads, std::string(what) + ": gradients");
}

// `scale` that is not finite: the step is skipped.
void test_kernel(const std::vector<int64_t>& sizes, int64_t skip, bool averages, float weight, float scale) {
  const float lr = 0.1f, corrections[2] = {2.0f, 3.0f}, shift = 0.6f;
  const float hyper[kHyperCount] = {0.0f, 0.0f, 0.0f, scale, 0.25f, weight, shift};
  const AdamRule rule{&lr, hyper, corrections, 0.2f, 0.9f, 0.99f, 1e-8f, 0.1f, 0.01f};
  const Tensors before(sizes);
  const int count = static_cast<int>(sizes.size());
  Tensors plain = before, plain_cpu = before, ahead = before, ahead_cpu = before;
  run_on_host(plain.plain_targets(skip, averages), rule);
  adam_step_cpu(plain_cpu.plain_targets(skip, averages).data(), count, rule, 1);
  check_lists(plain, plain_cpu, "without EMA-Nesterov");
  run_on_host(ahead.targets(skip, averages), rule);
  adam_step_cpu(ahead_cpu.targets(skip, averages).data(), count, rule, 1);
  check_lists(ahead, ahead_cpu, "with EMA-Nesterov");
  // All but parameter, base and velocity is as without it, bit for bit.
  check(ahead.means == plain.means && ahead.squares == plain.squares && ahead.averages == plain.averages &&
            ahead.grads == plain.grads,
        "EMA-Nesterov changed the step");
  for (size_t i = 0; i < sizes.size(); ++i) {
    for (size_t k = static_cast<size_t>(skip); k < before.params[i].size(); ++k) {
      const bool taken = std::isfinite(scale);
      const double base = before.bases[i][k], old = before.velocities[i][k];
      const double x = taken ? plain.params[i][k] : base, v = taken ? old + weight * (x - base - old) : old;
      const std::string where = " " + std::to_string(k) + " of tensor " + std::to_string(i);
      check(ahead.bases[i][k] == static_cast<float>(x), "base" + where);
      check_close(ahead.velocities[i][k], v, 1e-5, 1e-6, "velocity" + where);
      check_close(ahead.params[i][k], x + shift * v, 1e-5, 1e-6, "parameter" + where);
    }
  }
}

void test_kernels() {
  // More tensors than one launch takes, empty ones among them.
  std::vector<int64_t> many;
  for (int i = 0; i < 2 * kMaxAdamTargets + 3; ++i) many.push_back(i % 3 == 0 ? 0 : i);
  for (float scale : {0.5f, std::numeric_limits<float>::quiet_NaN()}) {
    for (float weight : {0.0f, 0.25f, 0.75f, 1.0f})
      test_kernel({1, 8, 9, 4096, 2 * kAdamRun + 5}, 0, true, weight, scale);
    test_kernel({kAdamRun + 12, 17}, 0, false, 0.25f, scale);
    test_kernel({kAdamRun + 12, 17}, 1, true, 0.25f, scale);
    test_kernel(many, 0, true, 0.25f, scale);
  }
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    for (int64_t count : {0, 1, 4096, 4097, 300001}) test_sums(count);
    test_clip(0.25f, 0.0f, 1.0f);
    test_clip(0.25f, 1.0f, 1.0f);
    test_clip(9.0f, 0.3f, 0.3f / 3.000001f);
    test_clip(0.0f, 0.3f, 1.0f);
    for (float weight : {0.25f, 0.75f}) {
      test_step(1, weight, 1);
      test_step(100003, weight, 3);
    }
    test_skip();
    test_kernels();
  });
}
