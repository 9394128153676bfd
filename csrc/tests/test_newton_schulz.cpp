// gemm_cpu and newton_schulz's CPU kernel against plain float64 loops, on sides around the register tiles.
#include "kernels/gemm.h"
#include "kernels/newton_schulz.h"
#include "tests/check.h"
#include "tests/matrix.h"

namespace pgolf::test {
namespace {

void test_gemm(int64_t m, int64_t n, int64_t k, int threads) {
  const std::vector<float> a = normal_values(m * k, 1), b = normal_values(n * k, 2),
                           d = normal_values(m * n, 3);
  std::vector<float> c(static_cast<size_t>(m * n));
  gemm_cpu({.m = m,
            .n = n,
            .k = k,
            .a = a.data(),
            .a_stride = k,
            .b = b.data(),
            .b_row_stride = 1,
            .b_col_stride = k,
            .alpha = 0.5f,
            .beta = -2.0f,
            .d = d.data(),
            .c = c.data()},
           threads);
  const Matrix want = product({a.begin(), a.end()}, {b.begin(), b.end()}, m, n, k);
  for (size_t i = 0; i < c.size(); ++i) {
    check_close(c[i], 0.5 * want[i] - 2.0 * d[i], 1e-5, 1e-6 * static_cast<double>(k), "gemm");
  }
}

void test_iteration(int64_t rows, int64_t cols, int threads) {
  const float abc[3] = {3.4445f, -4.7750f, 2.0315f};
  const NewtonSchulzShape shape{.batch = 2,
                                .rows = rows,
                                .cols = cols,
                                .steps = 2,
                                .coefficients = {{abc[0], abc[1], abc[2]}, {abc[0], abc[1], abc[2]}},
                                .eps = 1e-7f};
  const std::vector<float> values = normal_values(2 * rows * cols, 4);
  std::vector<float> out(values.size());
  newton_schulz_cpu(values.data(), out.data(), shape, threads);
  for (int64_t matrix = 0; matrix < 2; ++matrix) {
    const auto begin = values.begin() + matrix * rows * cols;
    Matrix x(begin, begin + rows * cols);
    double norm = 0.0;
    for (double v : x) norm += v * v;
    for (double& v : x) v /= std::sqrt(norm) + 1e-7;
    for (int step = 0; step < 2; ++step) {
      const Matrix a = product(x, x, rows, rows, cols);
      Matrix b = product(a, a, rows, rows, rows);
      for (size_t i = 0; i < b.size(); ++i) b[i] = abc[1] * a[i] + abc[2] * b[i];
      const Matrix bx = product(b, transposed(x, rows, cols), rows, cols, rows);
      for (size_t i = 0; i < x.size(); ++i) x[i] = abc[0] * x[i] + bx[i];
    }
    for (int64_t i = 0; i < rows * cols; ++i) {
      check_close(out[static_cast<size_t>(matrix * rows * cols + i)], x[static_cast<size_t>(i)], 1e-4, 1e-5,
                  std::to_string(rows) + " x " + std::to_string(cols));
    }
  }
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    for (int64_t m : {1, 4, 13}) {
      for (int64_t n : {1, 16, 33}) test_gemm(m, n, 7, 1);
    }
    test_gemm(30, 70, 600, 3);  // three slices of k, several threads
    for (int threads : {1, 3}) {
      test_iteration(5, 9, threads);
      test_iteration(9, 5, threads);
      test_iteration(40, 40, threads);
    }
  });
}
