// linear_softcap_ce's Hopper kernel and its launch, run on the host (host_cuda/kernels/ptx_sm90.cuh), against
// float64: all four forms of its tiles, in several interleavings of the threads.
#include <limits>

#include "kernels/linear_softcap_ce_sm90.cu"
#include "tests/check.h"

namespace pgolf::test {
namespace {

using Matrix = std::vector<bf16>;

Matrix random_matrix(int64_t count, unsigned seed, float scale) {
  Matrix values;
  for (const float value : normal_values(count, seed)) values.push_back(from_float<bf16>(value * scale));
  return values;
}

struct Case {
  int64_t rows, vocab, width;
  int multiprocessors;  // half as many clusters share the tiles
  Form form;
  bool with_factor = true;
};

void test_matches_float64(const Case& at, uint32_t seed) {
  multiprocessors = at.multiprocessors;
  launch_seed = seed;
  constexpr float kCap = 7.5f;
  constexpr int64_t kIgnored = -100;
  const int64_t rows = at.rows, vocab = at.vocab, width = at.width, ld = (vocab + 7) / 8 * 8;
  const LinearSoftcapCeShape shape{rows, vocab, width, kCap, kIgnored, 0.0f};
  check(linear_softcap_ce_sm90_supports(shape) && choose(shape) == at.form, "the form that is meant");
  const Matrix hidden = random_matrix(rows * width, 1, 1.0f);
  const Matrix weight = random_matrix(vocab * width, 2, 3.0f / std::sqrt(static_cast<float>(width)));
  std::vector<int64_t> target;
  for (int64_t row = 0; row < rows; ++row) target.push_back(row % 9 == 4 ? kIgnored : row * 37 % vocab);
  const int64_t tiles = linear_softcap_ce_sm90_tiles(shape);
  const int64_t columns = at.form == Form::kWide ? kWideColumns : kTileColumns;
  Matrix factor(static_cast<size_t>(rows * ld), from_float<bf16>(std::numeric_limits<float>::quiet_NaN()));
  std::vector<float> sums(static_cast<size_t>(rows * tiles), NAN), logit(static_cast<size_t>(rows), NAN);
  linear_softcap_ce_forward_sm90({hidden.data(), weight.data(), target.data(),
                                  at.with_factor ? factor.data() : nullptr, ld, sums.data(), logit.data()},
                                 shape, nullptr);

  for (int64_t row = 0; row < rows; ++row) {
    const int64_t label = target[static_cast<size_t>(row)];
    std::vector<double> want(static_cast<size_t>(tiles));
    for (int64_t column = 0; column < ld; ++column) {
      const std::string where = " at row " + std::to_string(row) + ", column " + std::to_string(column);
      const double got = to_float(factor[static_cast<size_t>(row * ld + column)]);
      if (column >= vocab || label == kIgnored) {
        check(!at.with_factor || got == 0.0, "zero" + where);
        continue;
      }
      double x = 0.0;
      for (int64_t i = 0; i < width; ++i)
        x += double{to_float(hidden[static_cast<size_t>(row * width + i)])} *
             to_float(weight[static_cast<size_t>(column * width + i)]);
      const double t = std::tanh(x / double{kCap}), e = std::exp(double{kCap} * (t - 1.0));
      if (column == label) {
        check_close(logit[static_cast<size_t>(row)], x, 1e-5, 1e-4, "the target's logit" + where);
        continue;
      }
      if (at.with_factor) check_close(got, e * (1.0 - t * t), 1.0 / 200, 1e-12, "F" + where);
      want[static_cast<size_t>(column / columns)] += e;
    }
    if (label == kIgnored) check(logit[static_cast<size_t>(row)] == 0.0f, "an ignored row's logit");
    for (int64_t tile = 0; tile < tiles; ++tile)
      check_close(sums[static_cast<size_t>(row * tiles + tile)], want[static_cast<size_t>(tile)], 1e-4, 1e-12,
                  "the sum of row " + std::to_string(row) + ", tile " + std::to_string(tile));
  }
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    using pgolf::Form;
    test_matches_float64({300, 544, 72, 4, Form::kResident}, 0);
    test_matches_float64({130, 416, 136, 2, Form::kNarrow}, 4);
    test_matches_float64({5, 416, 2048, 4, Form::kWide}, 8);
    test_matches_float64({130, 205, 72, 2, Form::kPlain}, 1);
    test_matches_float64({1, 96, 8, 2, Form::kNarrow, false}, 9);
  });
}
