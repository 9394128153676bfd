// softcap_ce's CPU kernel against a direct float64 evaluation, on rows that end inside every vector width.
#include "kernels/softcap_ce.h"
#include "tests/check.h"

namespace pgolf::test {
namespace {

struct Expected {
  double loss;
  std::vector<double> grad;
};

Expected expect_row(const float* x, int64_t vocab, int64_t target, double cap) {
  std::vector<double> z(static_cast<size_t>(vocab));
  double sum = 0.0;
  for (int64_t j = 0; j < vocab; ++j)
    sum += std::exp(z[static_cast<size_t>(j)] = cap * std::tanh(x[j] / cap));
  Expected expected{std::log(sum) - z[static_cast<size_t>(target)], z};
  for (int64_t j = 0; j < vocab; ++j) {
    double& g = expected.grad[static_cast<size_t>(j)];
    const double slope = 1.0 / std::pow(std::cosh(x[j] / cap), 2);
    g = (std::exp(g) / sum - (j == target ? 1.0 : 0.0)) * slope;
  }
  return expected;
}

template <typename T>
void test_matches_float64(int64_t rows, int64_t vocab, double tolerance) {
  const SoftcapCeShape shape{rows, vocab, 30.0f, -100};
  std::vector<float> values = normal_values(rows * vocab, 1);
  std::vector<T> logits(values.size()), grad(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    logits[i] = from_float<T>(values[i] * 10.0f);
    values[i] = to_float(logits[i]);
  }
  std::vector<int64_t> target(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) target[static_cast<size_t>(row)] = (row * 7919) % vocab;
  std::vector<float> loss(target.size()), lse(target.size()), upstream(target.size(), 2.0f);
  softcap_ce_forward_cpu(logits.data(), target.data(), loss.data(), lse.data(), shape, 2);
  softcap_ce_backward_cpu(upstream.data(), logits.data(), target.data(), loss.data(), lse.data(), grad.data(),
                          shape, 2);
  for (int64_t row = 0; row < rows; ++row) {
    const auto r = static_cast<size_t>(row);
    const Expected want = expect_row(values.data() + row * vocab, vocab, target[r], 30.0);
    check_close(loss[r], want.loss, 1e-5, 1e-5, "loss of row " + std::to_string(row));
    for (int64_t j = 0; j < vocab; ++j) {
      const double got = to_float(grad[static_cast<size_t>(row * vocab + j)]);
      check_close(got, 2.0 * want.grad[static_cast<size_t>(j)], tolerance, 1e-6,
                  "gradient at " + std::to_string(row) + ", " + std::to_string(j));
    }
  }
}

void test_bad_row_is_found() {
  const std::vector<int64_t> target{0, -100, 4, 5, -1};
  check(softcap_ce_first_bad_row(target.data(), {5, 5, 30.0f, -100}) == 3, "row 3 holds vocab itself");
  check(softcap_ce_first_bad_row(target.data(), {3, 5, 30.0f, -100}) == -1, "the first three rows are fine");
  check(softcap_ce_first_bad_row(target.data(), {5, 6, 30.0f, 4}) == 1,
        "-100 is bad when it is not ignore_index");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf;
    for (int64_t vocab : {1, 7, 15, 16, 17, 33, 129}) {
      test::test_matches_float64<float>(3, vocab, 2e-5);
      test::test_matches_float64<bf16>(3, vocab, 1.0 / 256);
      test::test_matches_float64<f16>(3, vocab, 1.0 / 1024);
    }
    test::test_matches_float64<float>(300, 512, 2e-5);  // several threads
    test::test_bad_row_is_found();
  });
}
