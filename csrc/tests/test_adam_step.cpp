// The CPU kernels of adam_step.h against plain float64 loops: sizes around the grain of a thread, sums that
// do not depend on the number of threads, and the step that is skipped.
#include <cmath>
#include <limits>

#include "kernels/adam_step.h"
#include "tests/check.h"

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
  });
}
