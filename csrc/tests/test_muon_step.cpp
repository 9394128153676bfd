// The CPU kernels of muon_step.h against plain float64 loops: rows around the grain of a thread, both kinds
// of momentum, the step that is skipped, and a whole step of banks of different shapes.
#include <algorithm>
#include <limits>

#include "kernels/muon_step.h"
#include "tests/check.h"

namespace pgolf::test {
namespace {

void test_direction(int64_t rows, int64_t cols, MuonOptions options, int threads) {
  const float hyper[kHyperCount] = {0.1f, 0.9f, 0.2f, 0.5f, 0.25f};
  const std::vector<float> grad = normal_values(rows * cols, 1), before = normal_values(rows * cols, 2);
  std::vector<float> momentum = before;
  std::vector<float> direction(grad.size());
  const MuonDirection bank{grad.data(), momentum.data(), direction.data(), rows, cols};
  muon_direction_cpu<float, float, float>(&bank, 1, hyper, options, threads);
  const double share = options.lerp ? 0.1 : 1.0;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> u;
    double sum = 0.0;
    for (int64_t j = row * cols; j < (row + 1) * cols; ++j) {
      const auto k = static_cast<size_t>(j);
      const double g = share * 0.5 * grad[k];
      const double m = 0.9 * before[k] + g;
      check_close(momentum[k], m, 1e-5, 1e-6, "momentum");
      u.push_back(options.nesterov ? g + 0.9 * m : m);
      sum += u.back() * u.back();
    }
    const double norm = options.row_normalize ? std::max(std::sqrt(sum), 1e-7) : 1.0;
    for (int64_t j = 0; j < cols; ++j) {
      check_close(direction[static_cast<size_t>(row * cols + j)], u[static_cast<size_t>(j)] / norm, 1e-5,
                  1e-6, "direction");
    }
  }
}

void test_apply(int64_t count, float weight, bool cautious, int threads) {
  const float hyper[kHyperCount] = {0.1f, 0.9f, 0.2f, 0.5f, weight};
  const std::vector<float> start = normal_values(count, 3), update = normal_values(count, 4),
                           average = normal_values(count, 5);
  std::vector<float> param = start, moved = average;
  const MuonTarget target{param.data(), update.data(), moved.data(), count, 2.0f};
  muon_apply_cpu<float>(&target, 1, hyper, cautious, threads);
  for (size_t i = 0; i < param.size(); ++i) {
    const bool decays = !cautious || (start[i] > 0) == (update[i] > 0);
    const double want = start[i] * (decays ? 1 - 0.1 * 0.2 : 1.0) - 0.1 * 2.0 * update[i];
    check_close(param[i], want, 1e-5, 1e-6, "param");
    check_close(moved[i], average[i] + weight * (want - average[i]), 1e-5, 1e-6, "average");
  }
}

void test_skip() {
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    const float hyper[kHyperCount] = {0.1f, 0.9f, 0.2f, bad, 0.25f};
    const std::vector<float> grad = normal_values(6, 1), before = normal_values(6, 2);
    std::vector<float> momentum = before, direction = before, param = before, average = grad;
    const MuonDirection bank{grad.data(), momentum.data(), direction.data(), 2, 3};
    muon_direction_cpu<float, float, float>(&bank, 1, hyper, {true, false, true}, 1);
    const MuonTarget target{param.data(), grad.data(), average.data(), 6, 1.0f};
    muon_apply_cpu<float>(&target, 1, hyper, true, 1);
    check(direction == std::vector<float>(6), "a skipped step left a direction");
    check(momentum == before && param == before && average == grad, "a skipped step changed something");
  }
}

// A whole step is the directions of all banks, each iterated.
void test_step() {
  const float hyper[kHyperCount] = {0.1f, 0.9f, 0.2f, 0.5f, 0.25f};
  const MuonOptions options{.nesterov = true, .lerp = false, .row_normalize = true};
  const int64_t shapes[][3] = {{2, 3, 5}, {1, 7, 4}, {3, 1, 1}};
  std::vector<std::vector<float>> grads, momenta, updates;
  std::vector<MuonBank> banks;
  for (const auto& [matrices, rows, cols] : shapes) {
    const int64_t count = matrices * rows * cols;
    grads.push_back(normal_values(count, 6));
    momenta.push_back(normal_values(count, 7));
    updates.emplace_back(static_cast<size_t>(count));
    banks.push_back({.grad = grads.back().data(),
                     .momentum = momenta.back().data(),
                     .update = updates.back().data(),
                     .matrices = matrices,
                     .rows = rows,
                     .cols = cols});
  }
  const std::vector<std::vector<float>> before = momenta;
  MuonStep step{.banks = banks.data(),
                .count = static_cast<int>(banks.size()),
                .hyper = hyper,
                .options = options,
                .algorithm = NsAlgorithm::kAuto,
                .iteration = {}};
  step.iteration.steps = 2;
  step.iteration.eps = 1e-7f;
  for (int i = 0; i < 2; ++i) {
    const float abc[3] = {3.4445f, -4.7750f, 2.0315f};
    std::copy(abc, abc + 3, step.iteration.coefficients[i]);
  }
  std::vector<unsigned char> workspace(static_cast<size_t>(muon_step_workspace_cpu<float>(step)));
  muon_step_cpu<float, float, float>(step, workspace.data(), 2);
  for (size_t i = 0; i < banks.size(); ++i) {
    std::vector<float> momentum = before[i], direction(momentum.size()), want(momentum.size());
    const MuonDirection bank{.grad = banks[i].grad,
                             .momentum = momentum.data(),
                             .direction = direction.data(),
                             .rows = banks[i].matrices * banks[i].rows,
                             .cols = banks[i].cols};
    muon_direction_cpu<float, float, float>(&bank, 1, hyper, options, 1);
    NewtonSchulzShape shape = step.iteration;
    shape.batch = banks[i].matrices;
    shape.rows = banks[i].rows;
    shape.cols = banks[i].cols;
    newton_schulz_cpu(direction.data(), want.data(), shape, 1);
    check(momenta[i] == momentum && updates[i] == want, "bank " + std::to_string(i) + " of a step");
  }
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    for (int bits = 0; bits < 8; ++bits)
      test_direction(3, 5, {(bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0}, 1);
    test_direction(1, 1, {true, false, true}, 1);
    test_direction(7, 20000, {true, false, true}, 3);
    for (float weight : {0.0f, 0.25f, 0.75f, 1.0f}) {
      test_apply(100003, weight, false, 3);
      test_apply(100003, weight, true, 3);
    }
    test_apply(0, 0.5f, true, 2);
    test_skip();
    test_step();
  });
}
