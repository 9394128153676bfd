// CPU kernel of newton_schulz.h: three float32 products per iteration, one matrix of the batch at a time.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/gemm.h"
#include "kernels/newton_schulz.h"
#include "kernels/parallel.h"

namespace pgolf {
namespace {

// Buffers of one matrix; `small` <= `large` are its sides.
struct Scratch {
  explicit Scratch(int64_t small, int64_t large)
      : x(static_cast<size_t>(small * large)),
        next(x.size()),
        gram(static_cast<size_t>(small * small)),
        poly(gram.size()) {}
  std::vector<float> x, next, gram, poly;
};

// x[i][j] = source / (||source||_F + eps), transposed when the matrix is tall.
template <typename T>
void load_normalised(const T* source, const NewtonSchulzShape& shape, float* x) {
  const int64_t count = shape.rows * shape.cols;
  double sum = 0.0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(to_float(source[i])) * to_float(source[i]);
  // Finite without eps too, so that a zero matrix stays zero.
  constexpr double kLargest = std::numeric_limits<float>::max();
  const float scale = static_cast<float>(std::min(1.0 / (std::sqrt(sum) + shape.eps), kLargest));
  if (shape.rows <= shape.cols) {
    for (int64_t i = 0; i < count; ++i) x[i] = to_float(source[i]) * scale;
    return;
  }
  for (int64_t i = 0; i < shape.rows; ++i) {
    for (int64_t j = 0; j < shape.cols; ++j)
      x[j * shape.rows + i] = to_float(source[i * shape.cols + j]) * scale;
  }
}

template <typename T>
void store(const float* x, const NewtonSchulzShape& shape, T* out) {
  if (shape.rows <= shape.cols) {
    for (int64_t i = 0; i < shape.rows * shape.cols; ++i) out[i] = from_float<T>(x[i]);
    return;
  }
  for (int64_t i = 0; i < shape.rows; ++i) {
    for (int64_t j = 0; j < shape.cols; ++j) out[i * shape.cols + j] = from_float<T>(x[j * shape.rows + i]);
  }
}

void iterate(const NewtonSchulzShape& shape, Scratch& s, int threads) {
  const int64_t m = std::min(shape.rows, shape.cols);
  const int64_t n = std::max(shape.rows, shape.cols);
  for (int step = 0; step < shape.steps; ++step) {
    const auto& [a, b, c] = shape.coefficients[step];
    // A = X X^T: the right factor reads X's rows as columns.
    gemm_cpu({.m = m,
              .n = m,
              .k = n,
              .a = s.x.data(),
              .a_stride = n,
              .b = s.x.data(),
              .b_row_stride = 1,
              .b_col_stride = n,
              .c = s.gram.data(),
              .symmetric = true},
             threads);
    // B = b A + c A^2
    gemm_cpu({.m = m,
              .n = m,
              .k = m,
              .a = s.gram.data(),
              .a_stride = m,
              .b = s.gram.data(),
              .b_row_stride = m,
              .b_col_stride = 1,
              .alpha = c,
              .beta = b,
              .d = s.gram.data(),
              .c = s.poly.data(),
              .symmetric = true},
             threads);
    // X = a X + B X
    gemm_cpu({.m = m,
              .n = n,
              .k = m,
              .a = s.poly.data(),
              .a_stride = m,
              .b = s.x.data(),
              .b_row_stride = n,
              .b_col_stride = 1,
              .beta = a,
              .d = s.x.data(),
              .c = s.next.data()},
             threads);
    std::swap(s.x, s.next);
  }
}

}  // namespace

template <typename T>
void newton_schulz_cpu(const T* x, T* out, const NewtonSchulzShape& shape, int threads) {
  const int64_t count = shape.rows * shape.cols;
  if (count == 0) return;
  // Whole matrices per thread where there are enough of them, else all threads on each product.
  const bool split_batch = shape.batch >= threads;
  parallel_for(shape.batch, 1, split_batch ? threads : 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(std::min(shape.rows, shape.cols), std::max(shape.rows, shape.cols));
    for (int64_t i = begin; i < end; ++i) {
      load_normalised(x + i * count, shape, scratch.x.data());
      iterate(shape, scratch, split_batch ? 1 : threads);
      store(scratch.x.data(), shape, out + i * count);
    }
  });
}

template void newton_schulz_cpu(const float*, float*, const NewtonSchulzShape&, int);
template void newton_schulz_cpu(const bf16*, bf16*, const NewtonSchulzShape&, int);
template void newton_schulz_cpu(const f16*, f16*, const NewtonSchulzShape&, int);

}  // namespace pgolf
