// norm_mlp's Hopper kernels and their launches, run on the host (host_cuda/kernels/ptx_sm90.cuh), against
// float64: barriers, phases, swizzles and masks, in several interleavings of the threads.
#include <limits>

#include "kernels/norm_mlp_sm90.cu"
#include "kernels/norm_mlp_sum_sm90.cu"
#include "tests/check.h"

namespace pgolf::test {
namespace {

using Matrix = std::vector<bf16>;

Matrix random_matrix(int64_t count, unsigned seed, float scale) {
  Matrix values;
  for (const float value : normal_values(count, seed)) values.push_back(from_float<bf16>(value * scale));
  return values;
}

Matrix unwritten(int64_t count) {
  return Matrix(static_cast<size_t>(count), from_float<bf16>(std::numeric_limits<float>::quiet_NaN()));
}

struct Case {
  int64_t rows, width, hidden;
  int multiprocessors;  // half as many clusters share the tiles
};

// Row `row` of a times row `column` of b.
double dot(const Matrix& a, int64_t row, const Matrix& b, int64_t column, int64_t width) {
  double sum = 0.0;
  for (int64_t i = 0; i < width; ++i)
    sum += double{to_float(a[static_cast<size_t>(row * width + i)])} *
           to_float(b[static_cast<size_t>(column * width + i)]);
  return sum;
}

void test_matches_float64(const Case& at, uint32_t seed) {
  multiprocessors = at.multiprocessors;
  launch_seed = seed;
  const int64_t rows = at.rows, width = at.width, hidden = at.hidden;
  const NormMlpShape shape{rows, width, hidden, 0.5f};
  check(norm_mlp_sm90_supports(shape), "a shape of the kernels");
  constexpr float kEps = 1e-3f;
  const Matrix x = random_matrix(rows * width, 1, 1.0f), up = random_matrix(hidden * width, 2, 0.1f);
  const Matrix grad = random_matrix(rows * width, 3, 1.0f), down = random_matrix(hidden * width, 4, 0.1f);
  std::vector<float> rho(static_cast<size_t>(rows), NAN);
  Matrix act = unwritten(rows * hidden), e = unwritten(rows * hidden);
  std::vector<uint32_t> signs(static_cast<size_t>(norm_mlp_sign_words(shape)), 0xa5a5a5a5u);
  std::vector<float> partials(static_cast<size_t>(hidden / 128 * rows), NAN);
  norm_mlp_up_sm90({x.data(), up.data(), kEps, rho.data(), act.data(), signs.data()}, shape, nullptr);
  norm_mlp_dact_sm90(
      {grad.data(), down.data(), act.data(), signs.data(), rho.data(), e.data(), partials.data()}, shape,
      nullptr);

  for (int64_t row = 0; row < rows; ++row) {
    const double r = 1.0 / std::sqrt(dot(x, row, x, row, width) / static_cast<double>(width) + double{kEps});
    check_close(rho[static_cast<size_t>(row)], r, 1e-6, 0.0, "rho of row " + std::to_string(row));
    for (int64_t tile = 0; tile < hidden / 128; ++tile) {
      double sum = 0.0, size = 0.0;
      for (int64_t column = tile * 128; column < tile * 128 + 128; ++column) {
        const std::string where = " at row " + std::to_string(row) + ", column " + std::to_string(column);
        const auto i = static_cast<size_t>(row * hidden + column);
        const double h = r * dot(x, row, up, column, width), q = dot(grad, row, down, column, width);
        const double slope = h > 0.0 ? 1.0 : double{shape.slope}, leaky = slope * h;
        check_close(to_float(act[i]), leaky * leaky, 1.0 / 200, 1e-9, "act" + where);
        // Near zero the sign of h may differ.
        const double used = to_float(act[i]), rate = 2.0 * slope * std::sqrt(used) * (h > 0.0 ? 1.0 : -1.0);
        check_close(to_float(e[i]), r * q * rate, 1.0 / 200, std::fabs(h) < 1e-5 ? 1e-3 : 1e-6, "e" + where);
        sum += 2.0 * q * used, size += std::fabs(q * used);
      }
      check_close(partials[static_cast<size_t>(tile * rows + row)], sum, 0.0, 1e-5 * size,
                  "the sum of row " + std::to_string(row) + ", tile " + std::to_string(tile));
    }
  }
}

// out = residual + a b - (rho^2 S / width) x, without the residual or without x.
void test_sum(const Case& at, bool with_residual, bool with_x, uint32_t seed) {
  multiprocessors = at.multiprocessors;
  launch_seed = seed;
  const int64_t rows = at.rows, width = at.width, hidden = at.hidden, tiles = hidden / 128;
  const Matrix a = random_matrix(rows * hidden, 1, 1.0f), b = random_matrix(hidden * width, 2, 0.1f);
  const Matrix residual = random_matrix(rows * width, 3, 1.0f), x = random_matrix(rows * width, 4, 1.0f);
  const std::vector<float> rho = normal_values(rows, 5), partials = normal_values(tiles * rows, 6);
  std::vector<float> rate(static_cast<size_t>(rows), NAN);
  Matrix out = unwritten(rows * width);
  norm_mlp_sum_sm90({a.data(), b.data(), with_residual ? residual.data() : nullptr,
                     with_x ? x.data() : nullptr, rho.data(), partials.data(), rate.data(), out.data()},
                    {rows, width, hidden, 0.5f}, nullptr);
  for (int64_t row = 0; row < rows; ++row) {
    double factor = 0.0;
    for (int64_t tile = 0; tile < tiles; ++tile) factor += partials[static_cast<size_t>(tile * rows + row)];
    factor *= std::pow(rho[static_cast<size_t>(row)], 2) / static_cast<double>(width);
    std::vector<double> want(static_cast<size_t>(width));
    for (int64_t k = 0; k < hidden; ++k) {
      const double left = to_float(a[static_cast<size_t>(row * hidden + k)]);
      for (size_t i = 0; i < want.size(); ++i)
        want[i] += left * to_float(b[static_cast<size_t>(k * width) + i]);
    }
    for (size_t i = 0; i < want.size(); ++i) {
      const size_t place = static_cast<size_t>(row * width) + i;
      if (with_residual) want[i] += to_float(residual[place]);
      if (with_x) want[i] -= factor * to_float(x[place]);
      check_close(to_float(out[place]), want[i], 1.0 / 256, 1e-4,
                  "the sum at row " + std::to_string(row) + ", column " + std::to_string(i));
    }
  }
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    // One row, rows that end inside a fragment and inside the second cluster's rows; depths of one slice, of
    // a part of one and of all eight; clusters with one tile, with several, with rows that change, and with
    // one tile before they change.
    test_matches_float64({1, 64, 512, 2}, 0);
    test_matches_float64({127, 8, 512, 4}, 4);
    test_matches_float64({129, 136, 640, 2}, 8);
    test_matches_float64({300, 512, 512, 4}, 9);
    test_matches_float64({700, 72, 512, 2}, 1);
    test_matches_float64({513, 8, 512, 8}, 7);
    // Columns of one block of the cluster alone, of both, of more; rows as above.
    test_sum({1, 64, 512, 2}, true, false, 0);
    test_sum({130, 136, 512, 2}, false, true, 4);
    test_sum({300, 392, 640, 4}, true, true, 8);
  });
}
