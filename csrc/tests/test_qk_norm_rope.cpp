// qk_norm_rope's CUDA kernels, run on the host (host_cuda/cuda_runtime.h), against a direct float64
// evaluation.
#include <limits>

#include "kernels/common.h"
#include "tests/check.h"

#undef PGOLF_UNROLL
#define PGOLF_UNROLL  // g++ has no such pragma

#include "kernels/qk_norm_rope.cuh"

namespace pgolf::test {
namespace {

constexpr double kEps = 1.1920929e-7;
using Matrix = std::vector<bf16>;

struct Case {
  int64_t tokens;
  int heads, groups, dims;
  unsigned int blocks = 1;   // fewer than a GPU has, so that blocks take several rounds
  int values = 2;            // gradients of v
  bool gain_is_bf16 = true;  // and the rows of the product have others between them
  bool dq_is_bf16 = true;    // otherwise float32, of which no bit may be lost
};

Matrix rounded(const std::vector<float>& source) {
  Matrix values;
  for (const float value : source) values.push_back(from_float<bf16>(value));
  return values;
}

Matrix random_matrix(int64_t count, unsigned seed) { return rounded(normal_values(count, seed)); }

// Filled with NaN, so that what is not written is found.
Matrix unwritten(int64_t count) {
  return Matrix(static_cast<size_t>(count), from_float<bf16>(std::numeric_limits<float>::quiet_NaN()));
}

void check_at(const Matrix& got, int64_t at, double want, const std::string& what) {
  check_close(to_float(got[static_cast<size_t>(at)]), want, 1.0 / 128, 2e-3,
              what + " at " + std::to_string(at));
}

// The rotation of a head of `width` columns, sign -1: back.
std::vector<double> rotated(const std::vector<double>& x, const float* cos, const float* sin, int half,
                            double sign) {
  std::vector<double> y = x;
  for (int j = 0; j < half; ++j) {
    const double c = cos[j], s = sign * sin[j], first = x[static_cast<size_t>(j)];
    const double second = x[static_cast<size_t>(j + half)];
    y[static_cast<size_t>(j)] = first * c + second * s;
    y[static_cast<size_t>(j + half)] = second * c - first * s;
  }
  return y;
}

template <int Width, bool Whole>
void test_matches_float64(const Case& at) {
  const int64_t tokens = at.tokens, heads = at.heads, groups = at.groups, all = heads + 2 * groups;
  const int64_t stride = all * Width + (at.gain_is_bf16 ? 24 : 0);
  const int half = at.dims / 2;
  const QkNormRopeShape shape{tokens, at.heads, at.groups, Width, at.dims};
  check(qk_norm_rope_supports(shape), "a shape of the kernels");
  const Matrix qkv = random_matrix(tokens * stride, 1);
  const std::vector<float> gain = normal_values(heads, 2), angles = normal_values(tokens * half, 3);
  const Matrix gain_bf16 = rounded(gain);
  std::vector<float> cos, sin;
  for (const float angle : angles) cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
  const std::vector<float> dq_float = normal_values(tokens * heads * Width, 4);
  const Matrix dq = rounded(dq_float), dk = random_matrix(tokens * groups * Width, 5);
  const Matrix dv[2] = {random_matrix(tokens * groups * Width, 6), random_matrix(tokens * groups * Width, 7)};
  const void* gain_source = at.gain_is_bf16 ? static_cast<const void*>(gain_bf16.data()) : gain.data();
  const QkNormRopeInput in{
      qkv.data(), stride, gain_source, at.gain_is_bf16, cos.data(), sin.data(), static_cast<float>(kEps)};
  Matrix q = unwritten(tokens * heads * Width), k = unwritten(tokens * groups * Width);
  Matrix dqkv = unwritten(tokens * all * Width);
  std::vector<float> partials(static_cast<size_t>(kRopePartials * heads),
                              0.0f);  // of blocks that are not run
  for (size_t i = 0; i < at.blocks * static_cast<size_t>(heads); ++i) partials[i] = NAN;
  std::vector<float> dgain(static_cast<size_t>(heads), NAN);
  const QkNormRopeForward forward{in, q.data(), k.data()};
  QkNormRopeBackward backward{.in = in,
                              .dq = at.dq_is_bf16 ? static_cast<const void*>(dq.data()) : dq_float.data(),
                              .dq_is_bf16 = at.dq_is_bf16,
                              .dk = dk.data(),
                              .dv = {},
                              .dqkv = dqkv.data(),
                              .partials = partials.data(),
                              .dgain = dgain.data()};
  for (int i = 0; i < at.values; ++i) backward.dv[i] = dv[i].data();
  launch(dim3{at.blocks, rope_parts(shape, false)}, kHeadThreads,
         [&] { qk_norm_rope_kernel<Width, Whole>(forward, shape); });
  launch(dim3{at.blocks, rope_parts(shape, true)}, kHeadThreads, [&] {
    if (at.dq_is_bf16) {
      qk_norm_rope_backward_kernel<Width, Whole, false>(backward, shape);
    } else {
      qk_norm_rope_backward_kernel<Width, Whole, true>(backward, shape);
    }
  });
  launch(static_cast<unsigned int>(heads), kRopeSumThreads,
         [&] { sum_gain_kernel(partials.data(), dgain.data(), at.heads); });

  std::vector<double> want_dgain(static_cast<size_t>(heads), 0.0);
  for (int64_t token = 0; token < tokens; ++token) {
    const float *c = cos.data() + token * half, *s = sin.data() + token * half;
    for (int64_t head = 0; head < all; ++head) {
      const int64_t grad_at = (token * all + head) * Width;
      if (head >= heads + groups) {
        const int64_t first = (token * groups + head - heads - groups) * Width;
        for (int l = 0; l < Width; ++l) {
          double sum = 0.0;
          for (int i = 0; i < at.values; ++i) sum += to_float(dv[i][static_cast<size_t>(first + l)]);
          check_at(dqkv, grad_at + l, sum, "gradient of v");
        }
        continue;
      }
      const bool of_q = head < heads;
      const int64_t first = of_q ? (token * heads + head) * Width : (token * groups + head - heads) * Width;
      std::vector<double> x(Width), g(Width);
      double square = 0.0, dot = 0.0;
      for (size_t l = 0; l < Width; ++l) {
        x[l] = to_float(qkv[static_cast<size_t>(token * stride + head * Width) + l]);
        const size_t i = static_cast<size_t>(first) + l;
        g[l] = of_q && !at.dq_is_bf16 ? dq_float[i] : to_float((of_q ? dq : dk)[i]);
        square += x[l] * x[l];
      }
      const auto row = static_cast<size_t>(head);
      const double factor = !of_q ? 1.0 : at.gain_is_bf16 ? to_float(gain_bf16[row]) : gain[row];
      const double r = 1.0 / std::sqrt(square / Width + kEps);
      const std::vector<double> turned = rotated(x, c, s, half, 1.0), h = rotated(g, c, s, half, -1.0);
      for (size_t l = 0; l < Width; ++l) dot += h[l] * x[l];
      if (of_q) want_dgain[row] += r * dot;
      for (int l = 0; l < Width; ++l) {
        const auto i = static_cast<size_t>(l);
        check_at(of_q ? q : k, first + l, factor * r * turned[i], of_q ? "q" : "k");
        check_at(dqkv, grad_at + l, factor * r * (h[i] - r * r * dot / Width * x[i]), "gradient of q and k");
      }
    }
  }
  for (size_t i = 0; i < want_dgain.size(); ++i)
    check_close(dgain[i], want_dgain[i], 1e-5, 1e-4, "gradient of gain " + std::to_string(i));
}

void test_sizes() {
  check(qk_norm_rope_supports({1, 8, 4, 64, 16}) && qk_norm_rope_supports({0, 4, 1, 128, 0}),
        "sizes of a model");
  for (const QkNormRopeShape& shape :
       {QkNormRopeShape{1, 8, 4, 32, 16}, QkNormRopeShape{1, 6, 2, 64, 16}, QkNormRopeShape{1, 2, 4, 64, 16},
        QkNormRopeShape{1, 8, 0, 64, 16}, QkNormRopeShape{1, 8, 4, 64, 66}, QkNormRopeShape{1, 8, 4, 64, 15}})
    check(!qk_norm_rope_supports(shape), "a shape that the kernels do not take");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    test_sizes();
    // No token, one, fewer than a round holds, rounds that end inside; part of a warp's stripes, all, more;
    // all kinds of heads in one stripe, and rotations of none, a part and all of a head.
    for (const Case& at :
         {Case{0, 8, 4, 16, 2}, Case{1, 8, 4, 16}, Case{7, 8, 4, 16}, Case{19, 8, 4, 16, 2, 1, false},
          Case{5, 1, 1, 64}, Case{9, 2, 1, 0, 1, 0, false}, Case{6, 24, 12, 48}})
      test_matches_float64<64, true>(at);
    test_matches_float64<64, false>(Case{5, 8, 4, 6});
    test_matches_float64<64, false>(Case{5, 4, 4, 56, 1, 1, false});
    test_matches_float64<128, true>(Case{9, 8, 4, 96});
    test_matches_float64<128, true>(Case{5, 12, 3, 128, 1, 0});
    test_matches_float64<128, false>(Case{5, 3, 3, 126});
    // A float32 gradient of q: stripes of q alone, of k alone, and of both.
    for (const Case& at : {Case{19, 8, 4, 16, 2, 2, true, false}, Case{9, 2, 1, 0, 1, 0, true, false},
                           Case{5, 1, 1, 64, 1, 1, false, false}})
      test_matches_float64<64, true>(at);
    test_matches_float64<64, false>(Case{5, 4, 2, 6, 1, 2, true, false});
    test_matches_float64<128, true>(Case{9, 8, 4, 96, 1, 2, true, false});
    test_matches_float64<128, false>(Case{5, 3, 3, 126, 1, 2, false, false});
  });
}
