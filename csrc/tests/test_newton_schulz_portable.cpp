// newton_schulz's portable CUDA kernels and their launches, run on the host (host_cuda/cuda_runtime.h),
// against float64: tiles of both sizes, sides that are no multiple of 8, every type, and what float16 alone
// would lose.
#include <cstring>
#include <limits>

#include "kernels/common.h"
#include "tests/check.h"
#include "tests/matrix.h"

#undef PGOLF_UNROLL
#define PGOLF_UNROLL  // g++ has no such pragma

#include "kernels/newton_schulz_cuda.cu"

namespace pgolf::test {
namespace {

// The first three and the last polynomials of a Polar Express table. All four keep remainders of the float32
// input and of the first iteration's X.
constexpr float kTable[4][3] = {{8.1565545f, -22.483293f, 15.87877f},
                                {4.0429299f, -2.8089175f, 0.50001784f},
                                {3.8916678f, -2.7724842f, 0.50606482f},
                                {2.3465414f, -1.7097828f, 0.42323551f}};

struct Case {
  int64_t batch, rows, cols;
  int steps;
  int multiprocessors;  // 1: tiles of 128 x 128; many: of 64 x 64
};

NewtonSchulzShape shape_of(const Case& at, float eps) {
  NewtonSchulzShape shape{};
  shape.batch = at.batch, shape.rows = at.rows, shape.cols = at.cols;
  shape.steps = at.steps, shape.eps = eps;
  std::memcpy(shape.coefficients, kTable, sizeof(kTable));
  return shape;
}

// The iteration of one matrix in float64.
Matrix iterate(Matrix x, int64_t rows, int64_t cols, int steps, double eps) {
  double norm = 0.0;
  for (double v : x) norm += v * v;
  for (double& v : x) v /= std::sqrt(norm) + eps;
  const bool tall = rows > cols;
  if (tall) x = transposed(x, rows, cols), std::swap(rows, cols);
  for (int step = 0; step < steps; ++step) {
    const Matrix a = product(x, x, rows, rows, cols);
    Matrix b = product(a, a, rows, rows, rows);
    for (size_t i = 0; i < b.size(); ++i)
      b[i] = double{kTable[step][1]} * a[i] + double{kTable[step][2]} * b[i];
    const Matrix bx = product(b, transposed(x, rows, cols), rows, cols, rows);
    for (size_t i = 0; i < x.size(); ++i) x[i] = double{kTable[step][0]} * x[i] + bx[i];
  }
  return tall ? transposed(x, rows, cols) : x;
}

template <typename T>
std::vector<T> run_portable(const std::vector<T>& x, const Case& at, float eps) {
  multiprocessors = at.multiprocessors;
  const NewtonSchulzShape shape = shape_of(at, eps);
  // Filled with NaN, so that what is read before it is written is found; one byte too many would be an error.
  std::vector<unsigned char> workspace(static_cast<size_t>(newton_schulz_workspace_bytes(shape)), 0xff);
  std::vector<T> out(x.size());
  newton_schulz_cuda(x.data(), out.data(), workspace.data(), shape, nullptr);
  return out;
}

template <typename T>
void check_matches_float64(const Case& at, const std::vector<float>& values, double tolerance,
                           const std::string& what) {
  std::vector<T> x;
  for (float v : values) x.push_back(from_float<T>(v));
  const std::vector<T> out = run_portable(x, at, 1e-7f);
  const double unit = sizeof(T) == 4 ? 0.0 : std::is_same_v<T, bf16> ? 1.0 / 256 : 1.0 / 2048;
  const int64_t count = at.rows * at.cols;
  for (int64_t matrix = 0; matrix < at.batch; ++matrix) {
    const size_t begin = static_cast<size_t>(matrix * count);
    Matrix input;
    for (size_t i = 0; i < static_cast<size_t>(count); ++i) input.push_back(to_float(x[begin + i]));
    const Matrix want = iterate(input, at.rows, at.cols, at.steps, 1e-7);
    for (size_t i = 0; i < want.size(); ++i) {
      check_close(to_float(out[begin + i]), want[i], unit, tolerance,
                  what + " " + std::to_string(at.rows) + " x " + std::to_string(at.cols) + " at " +
                      std::to_string(begin + i));
    }
  }
}

template <typename... T>
void test_types(const Case& at) {
  const std::vector<float> values = normal_values(at.batch * at.rows * at.cols, 4);
  (check_matches_float64<T>(at, values, 1e-3, sizeof(T) == 4 ? "float32" : "16 bits"), ...);
}

// Input of rank one: the largest element of the output apart from its part along the input. Rounding X to
// float16 without keeping its remainder leaves several times the bound.
void test_rank_one(int64_t rows, int64_t cols) {
  const std::vector<float> u = normal_values(rows, 5), v = normal_values(cols, 6);
  std::vector<float> x;
  for (float left : u) {
    for (float right : v) x.push_back(left * right);
  }
  const std::vector<float> out = run_portable(x, {1, rows, cols, 4, 1}, 1e-7f);
  double along = 0.0, square = 0.0, worst = 0.0;
  for (size_t i = 0; i < x.size(); ++i) along += double{out[i]} * x[i], square += double{x[i]} * x[i];
  for (size_t i = 0; i < x.size(); ++i) worst = std::max(worst, std::fabs(out[i] - along / square * x[i]));
  check(worst < 1.5e-3, "rank one: off by " + std::to_string(worst));
}

void test_extremes() {
  const Case at{5, 5, 9, 2, 1};
  std::vector<float> x = normal_values(at.batch * 45, 7);
  const std::vector<float> plain = run_portable(x, at, 0.0f);
  for (size_t i = 0; i < 45; ++i) x[i] = 0.0f;
  x[45 + 7] = std::numeric_limits<float>::infinity();
  for (size_t i = 90; i < 135; ++i) x[i] = std::ldexp(x[i], 100);
  for (size_t i = 135; i < 180; ++i) x[i] = std::ldexp(x[i], -100);
  const std::vector<float> out = run_portable(x, at, 0.0f);
  for (size_t i = 0; i < 45; ++i) check(out[i] == 0.0f, "a zero matrix stays zero");
  for (size_t i = 45; i < 90; ++i) check(std::isnan(out[i]), "infinities become NaN in their matrix");
  for (size_t i = 90; i < out.size(); ++i) check(out[i] == plain[i], "powers of two do not matter");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf;
    using namespace pgolf::test;
    test_types<float, bf16, f16>({2, 37, 70, 2, 1 << 20});
    test_types<float, bf16, f16>({1, 70, 37, 2, 1});
    test_types<float, bf16, f16>({1, 16, 72, 1, 1});  // whole chunks
    // Tiles off the diagonal of the symmetric products.
    test_types<bf16>({1, 70, 81, 1, 1 << 20});
    test_types<bf16>({1, 144, 130, 1, 1});
    test_rank_one(36, 67);
    test_extremes();
  });
}
