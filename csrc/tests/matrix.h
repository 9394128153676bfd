// Plain float64 matrix products for the tests.
#pragma once

#include <cstdint>
#include <vector>

namespace pgolf::test {

using Matrix = std::vector<double>;  // row-major

// A B^T with A (m, k) and B (n, k).
inline Matrix product(const Matrix& a, const Matrix& b, int64_t m, int64_t n, int64_t k) {
  Matrix c(static_cast<size_t>(m * n));
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      const double *left = a.data() + i * k, *right = b.data() + j * k;
      double sum = 0.0;
      for (int64_t p = 0; p < k; ++p) sum += left[p] * right[p];
      c[static_cast<size_t>(i * n + j)] = sum;
    }
  }
  return c;
}

inline Matrix transposed(const Matrix& x, int64_t rows, int64_t cols) {
  Matrix out(x.size());
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < cols; ++j)
      out[static_cast<size_t>(j * rows + i)] = x[static_cast<size_t>(i * cols + j)];
  }
  return out;
}

}  // namespace pgolf::test
