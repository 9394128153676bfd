// The Hopper kernel of linear_softcap_ce's backward pass and its launch, run on the host
// (host_cuda/kernels/ptx_sm90.cuh), against float64.
#include <limits>

#include "kernels/linear_softcap_ce_hidden_sm90.cu"
#include "tests/check.h"

namespace pgolf::test {
namespace {

using Matrix = std::vector<bf16>;

Matrix random_matrix(int64_t count, unsigned seed) {
  Matrix values;
  for (const float value : normal_values(count, seed)) values.push_back(from_float<bf16>(value));
  return values;
}

struct Case {
  int64_t rows, vocab, width;
  int multiprocessors;  // half as many clusters share the tiles
  int64_t gap = 0;      // columns between the rows of the factor
  bool one_grad = false, with_scaled = true;
};

void test_matches_float64(const Case& at, uint32_t seed) {
  multiprocessors = at.multiprocessors;
  launch_seed = seed;
  const int64_t rows = at.rows, vocab = at.vocab, width = at.width, ld = vocab + at.gap;
  const LinearSoftcapCeShape shape{rows, vocab, width, 7.5f, -100, 0.0f};
  const Matrix hidden = random_matrix(rows * width, 1), weight = random_matrix(vocab * width, 2);
  const Matrix factor = random_matrix(rows * ld, 3);
  const std::vector<float> grad = normal_values(rows, 4);
  std::vector<float> scale = normal_values(rows, 5);
  std::vector<float> upstream = grad;
  // A row that is ignored has no gradient, whatever comes from above.
  for (int64_t row = 2; row < rows; row += 7) {
    scale[static_cast<size_t>(row)] = 0.0f;
    if (!at.one_grad) upstream[static_cast<size_t>(row)] = std::numeric_limits<float>::infinity();
  }
  const bf16 unwritten = from_float<bf16>(std::numeric_limits<float>::quiet_NaN());
  Matrix product(static_cast<size_t>(rows * width), unwritten), scaled = product;
  linear_softcap_ce_hidden_sm90(
      {upstream.data(), at.one_grad ? 0 : 1, scale.data(), factor.data(), ld, weight.data(), hidden.data(),
       product.data(), at.with_scaled ? scaled.data() : nullptr},
      shape, nullptr);

  for (int64_t row = 0; row < rows; ++row) {
    const double own = scale[static_cast<size_t>(row)];
    const double v = own == 0.0 ? 0.0 : own * upstream[static_cast<size_t>(at.one_grad ? 0 : row)];
    for (int64_t column = 0; column < width; ++column) {
      const auto place = static_cast<size_t>(row * width + column);
      const std::string where = " at row " + std::to_string(row) + ", column " + std::to_string(column);
      double sum = 0.0;
      for (int64_t i = 0; i < vocab; ++i)
        sum += double{to_float(factor[static_cast<size_t>(row * ld + i)])} *
               to_float(weight[static_cast<size_t>(i * width + column)]);
      check_close(to_float(product[place]), v * sum, 1.0 / 250, 1e-4 * std::sqrt(static_cast<double>(vocab)),
                  "the product" + where);
      if (at.with_scaled)
        check_close(to_float(scaled[place]), v * to_float(hidden[place]), 1.0 / 250, 1e-12,
                    "the scaled hidden state" + where);
    }
  }
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    // Parts of tiles in rows, columns and along the sum; more stages than the ring has; more tiles than
    // clusters; one gradient for all rows.
    test_matches_float64({300, 328, 264, 2}, 0);
    test_matches_float64({520, 72, 136, 4, 8}, 5);
    test_matches_float64({1, 8, 8, 2, 0, true}, 9);
    test_matches_float64({129, 64, 256, 2, 0, false, false}, 10);
  });
}
