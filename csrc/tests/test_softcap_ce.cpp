// softcap_ce's CPU kernel against a direct float64 evaluation, on rows that end inside every vector width.
#include "kernels/softcap_ce.h"
#include "tests/check.h"

namespace pgolf::test {
namespace {

struct Expected {
  double loss;
  double lse;
  std::vector<double> grad;
};

Expected expect_row(const float* x, int64_t vocab, int64_t target, double cap, double coefficient,
                    double z_loss) {
  const bool capped = std::isfinite(cap);
  std::vector<double> z(static_cast<size_t>(vocab));
  double sum = 0.0;
  for (int64_t j = 0; j < vocab; ++j)
    sum += std::exp(z[static_cast<size_t>(j)] = capped ? cap * std::tanh(x[j] / cap) : x[j]);
  const double lse = std::log(sum);
  Expected expected{lse - z[static_cast<size_t>(target)] + z_loss * lse * lse, lse, z};
  for (int64_t j = 0; j < vocab; ++j) {
    double& g = expected.grad[static_cast<size_t>(j)];
    const double slope = capped ? 1.0 / std::pow(std::cosh(x[j] / cap), 2) : 1.0;
    g = coefficient * ((1.0 + 2.0 * z_loss * lse) * std::exp(g) / sum - (j == target ? 1.0 : 0.0)) * slope;
  }
  return expected;
}

template <typename T>
void test_matches_float64(int64_t rows, int64_t vocab, float cap, float z_loss, double tolerance) {
  const SoftcapCeShape shape{rows, vocab, cap, -100, z_loss};
  std::vector<float> values = normal_values(rows * vocab, 1);
  std::vector<T> logits(values.size()), grad(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    logits[i] = from_float<T>(values[i] * 10.0f);
    values[i] = to_float(logits[i]);
  }
  std::vector<int64_t> target(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) target[static_cast<size_t>(row)] = (row * 7919) % vocab;
  std::vector<float> loss(target.size()), lse(loss), fused_loss(loss), fused_lse(loss);
  const std::vector<float> upstream(target.size(), 2.0f);
  softcap_ce_forward_cpu(logits.data(), target.data(), loss.data(), lse.data(), shape, 2);
  softcap_ce_backward_cpu(upstream.data(), logits.data(), target.data(), loss.data(), lse.data(), grad.data(),
                          shape, 2);
  std::vector<T> in_place = logits;
  softcap_ce_gradient_cpu(in_place.data(), target.data(), upstream.data(), rows % 2, fused_loss.data(),
                          fused_lse.data(), in_place.data(), shape, 2);
  for (int64_t row = 0; row < rows; ++row) {
    const auto r = static_cast<size_t>(row);
    const Expected want = expect_row(values.data() + row * vocab, vocab, target[r], cap, 2.0, z_loss);
    const std::string where = " of row " + std::to_string(row);
    check_close(loss[r], want.loss, 1e-5, 1e-5, "loss" + where);
    check_close(lse[r], want.lse, 1e-5, 1e-5, "lse" + where);
    check_close(fused_loss[r], want.loss, 1e-5, 1e-5, "loss in one pass" + where);
    check_close(fused_lse[r], want.lse, 1e-5, 1e-5, "lse in one pass" + where);
    for (int64_t j = 0; j < vocab; ++j) {
      const auto i = static_cast<size_t>(row * vocab + j);
      const std::string place = " at " + std::to_string(row) + ", " + std::to_string(j);
      const double expected = want.grad[static_cast<size_t>(j)];
      check_close(to_float(grad[i]), expected, tolerance, 1e-6, "gradient" + place);
      check_close(to_float(in_place[i]), expected, tolerance, 1e-6, "gradient in one pass" + place);
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
      for (float cap : {30.0f, HUGE_VALF}) {
        test::test_matches_float64<float>(3, vocab, cap, 0.0f, 2e-5);
        test::test_matches_float64<float>(3, vocab, cap, 1e-2f, 2e-5);
        test::test_matches_float64<bf16>(3, vocab, cap, 1e-2f, 1.0 / 256);
        test::test_matches_float64<f16>(3, vocab, cap, 1e-2f, 1.0 / 1024);
      }
    }
    test::test_matches_float64<float>(300, 512, 30.0f, 0.0f, 2e-5);  // several threads
    test::test_bad_row_is_found();
  });
}
