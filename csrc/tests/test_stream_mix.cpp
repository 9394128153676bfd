// stream_mix's CUDA kernels, run on the host (host_cuda/cuda_runtime.h), against a direct float64 evaluation.
#include <limits>

#include "kernels/common.h"
#include "tests/check.h"

#undef PGOLF_UNROLL
#define PGOLF_UNROLL  // g++ has no such pragma

#include "kernels/stream_mix.cuh"

namespace pgolf::test {
namespace {

constexpr double kEps = 1.1920929e-7;
using Matrix = std::vector<bf16>;

struct Case {
  int64_t tokens, width;
  unsigned int blocks;  // fewer than a GPU has, so that blocks take several rounds
};

Matrix random_matrix(int64_t count, unsigned seed) {
  Matrix values;
  for (const float value : normal_values(count, seed)) values.push_back(from_float<bf16>(value));
  return values;
}

// Filled with NaN, so that what is not written is found.
Matrix unwritten(int64_t count) {
  return Matrix(static_cast<size_t>(count), from_float<bf16>(std::numeric_limits<float>::quiet_NaN()));
}

void check_rows(const Matrix& got, const std::vector<double>& want, const std::string& what) {
  for (size_t i = 0; i < want.size(); ++i)
    check_close(to_float(got[i]), want[i], 1.0 / 128, 2e-3, what + " at " + std::to_string(i));
}

template <int Streams, int Sums, bool Norm>
void test_matches_float64(const Case& at, bool keep) {
  const int64_t tokens = at.tokens, width = at.width, count = tokens * width;
  const auto index = [&](int pair, int64_t column) { return static_cast<size_t>(pair * width + column); };
  const std::vector<float> c = normal_values(Sums * Streams * width, 7);
  std::vector<Matrix> streams, grads, sums, stream_grads;
  StreamMixForward forward{};
  StreamMixBackward backward{};
  forward.coefficients = backward.coefficients = c.data();
  forward.eps = backward.eps = static_cast<float>(kEps);
  for (int i = 0; i < Streams; ++i) {
    streams.push_back(random_matrix(count, static_cast<unsigned>(i)));
    stream_grads.push_back(unwritten(count));
    forward.streams[i] = backward.streams[i] = streams.back().data();
    backward.stream_grads[i] = stream_grads.back().data();
  }
  for (int o = 0; o < Sums; ++o) {
    grads.push_back(random_matrix(count, 10u + static_cast<unsigned>(o)));
    sums.push_back(unwritten(count));
    if (o == Sums - 1 && !keep) continue;
    forward.sums[o] = sums.back().data();
    backward.grads[o] = grads.back().data();
  }
  const Matrix grad_norm = random_matrix(count, 20);
  Matrix norm = unwritten(count);
  if (Norm) forward.norm = norm.data(), backward.grad_norm = grad_norm.data();
  std::vector<float> partials(at.blocks * static_cast<size_t>(Sums * Streams * width), NAN);
  backward.partials = partials.data();
  launch(at.blocks, kMixThreads, [&] { mix_kernel<Streams, Sums, Norm>(forward, tokens, width); });
  launch(at.blocks, kMixThreads, [&] { mix_backward_kernel<Streams, Sums, Norm>(backward, tokens, width); });

  std::vector<double> dc(c.size(), 0.0), n(static_cast<size_t>(count));
  std::vector<std::vector<double>> y(Sums, n), ds(Streams, n);
  for (int64_t row = 0; row < tokens; ++row) {
    const auto place = [&](int64_t column) { return static_cast<size_t>(row * width + column); };
    double square = 0.0, dot = 0.0;
    for (int64_t column = 0; column < width; ++column) {
      for (int o = 0; o < Sums; ++o) {
        for (int i = 0; i < Streams; ++i)
          y[o][place(column)] +=
              double{c[index(o * Streams + i, column)]} * to_float(streams[i][place(column)]);
      }
      square += std::pow(y[Sums - 1][place(column)], 2);
      dot += y[Sums - 1][place(column)] * to_float(grad_norm[place(column)]);
    }
    const double rho = 1.0 / std::sqrt(square / static_cast<double>(width) + kEps);
    for (int64_t column = 0; column < width; ++column) {
      n[place(column)] = rho * y[Sums - 1][place(column)];
      for (int o = 0; o < Sums; ++o) {
        const bool last = o == Sums - 1;
        double g = last && !keep ? 0.0 : to_float(grads[o][place(column)]);
        if (last && Norm)
          g += rho * (to_float(grad_norm[place(column)]) -
                      rho * rho * dot / static_cast<double>(width) * y[o][place(column)]);
        for (int i = 0; i < Streams; ++i) {
          ds[i][place(column)] += double{c[index(o * Streams + i, column)]} * g;
          dc[index(o * Streams + i, column)] += g * to_float(streams[i][place(column)]);
        }
      }
    }
  }
  for (int o = 0; o < Sums - !keep; ++o) check_rows(sums[o], y[o], "sum " + std::to_string(o));
  if (Norm) check_rows(norm, n, "norm");
  for (int i = 0; i < Streams; ++i) check_rows(stream_grads[i], ds[i], "gradient of " + std::to_string(i));
  for (size_t i = 0; i < dc.size(); ++i) {
    double got = 0.0;
    for (unsigned int block = 0; block < at.blocks; ++block) got += partials[block * dc.size() + i];
    check_close(got, dc[i], 1e-5, 1e-4, "coefficient " + std::to_string(i));
  }
}

void test_sizes() {
  check(mix_warps(8) == 1 && mix_warps(256) == 1 && mix_warps(264) == 2 && mix_warps(512) == 2,
        "one or two warps");
  check(mix_warps(520) == 4 && mix_warps(kMixMostWidth) == 4 && mix_tokens(kMixMostWidth) == 2, "four warps");
  StreamMixShape shape{.tokens = 1, .width = 512, .streams = 2, .sums = 1, .keep = true, .norm = false};
  check(stream_mix_supports(shape), "a shape of the model");
  for (const int64_t width : {0, 4, 12, 1032}) {
    shape.width = width;
    check(!stream_mix_supports(shape), "width " + std::to_string(width));
  }
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    test_sizes();
    // No token, one, fewer than a round holds, and rounds that end inside; widths of part of a warp, of one,
    // of two and of four, full and not.
    for (const Case& at : {Case{0, 8, 2}, Case{1, 8, 1}, Case{19, 72, 1}, Case{17, 256, 2}, Case{6, 264, 2},
                           Case{21, 512, 2}, Case{5, 520, 2}, Case{7, 1024, 2}})
      test_matches_float64<2, 1, true>(at, true);
    const Case odd{11, 328, 1};
    test_matches_float64<2, 1, true>(odd, false);
    test_matches_float64<3, 1, true>(odd, true);
    test_matches_float64<3, 2, true>(odd, false);
    test_matches_float64<4, 2, true>(odd, true);
    test_matches_float64<2, 1, false>(odd, true);
    test_matches_float64<4, 2, false>(odd, true);
  });
}
