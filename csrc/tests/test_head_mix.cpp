// head_mix's CUDA kernels, run on the host (host_cuda/cuda_runtime.h), against a direct float64 evaluation.
#include <limits>

#include "kernels/common.h"
#include "tests/check.h"

#undef PGOLF_UNROLL
#define PGOLF_UNROLL  // g++ has no such pragma

#include "kernels/head_mix.cuh"

namespace pgolf::test {
namespace {

using Matrix = std::vector<bf16>;

struct Case {
  int64_t tokens;
  int groups;
  unsigned int blocks;  // fewer than a GPU has, so that blocks take several rounds
  int64_t gap = 0;      // elements between the tokens of v, and of z
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

void check_all(const Matrix& got, const std::vector<double>& want, const std::string& what) {
  check(got.size() == want.size(), what + " has its size");
  for (size_t i = 0; i < want.size(); ++i)
    check_close(to_float(got[i]), want[i], 1.0 / 128, 2e-3, what + " at " + std::to_string(i));
}

// kind: as in the operator; 3: as 1, with float32 logits.
template <int Width, int Ratio>
void test_matches_float64(const Case& at, int kind) {
  const int64_t tokens = at.tokens, heads = at.groups * Ratio, v_stride = at.groups * Width + 8 * at.gap;
  const int64_t z_stride = heads + at.gap;
  const HeadMixShape shape{tokens, static_cast<int>(heads), at.groups, Width};
  check(head_mix_supports(shape), "a shape of the kernels");
  const Matrix y = random_matrix(tokens * heads * Width, 1), grad = random_matrix(tokens * heads * Width, 2);
  Matrix v = random_matrix(tokens * v_stride, 3);
  const std::vector<float> z_float = normal_values(tokens * z_stride, 4);
  Matrix z;
  for (const float value : z_float) z.push_back(from_float<bf16>(value));
  const bool z_is_bf16 = kind != 3;
  const auto logit = [&](int64_t i) {
    return z_is_bf16 ? to_float(z[static_cast<size_t>(i)]) : z_float[static_cast<size_t>(i)];
  };
  const float inner = kind == 2 ? 1.0f : 0.5f, outer = kind == 2 ? 2.0f : 1.0f;
  // A value of zeros, and one so small that its square is replaced.
  for (int64_t i = 0; i < std::min<int64_t>(tokens, 2); ++i) {
    for (int l = 0; l < Width; ++l) {
      bf16& element = v[static_cast<size_t>(i * v_stride + l)];
      element = from_float<bf16>(i == 0 ? 0.0f : 1e-14f * to_float(element));
    }
  }

  HeadMixGate gate{};
  if (kind != 0) {
    const void* source = z_is_bf16 ? static_cast<const void*>(z.data()) : z_float.data();
    gate = {source, z_stride, z_is_bf16, inner, outer};
  }
  Matrix out = unwritten(tokens * heads * Width), dy = out, dv = unwritten(tokens * at.groups * Width);
  Matrix dz = unwritten(tokens * heads);
  std::vector<float> dz_float(static_cast<size_t>(tokens * heads), NAN);
  std::vector<float> delta(static_cast<size_t>(heads * tokens), NAN);
  void* dz_target = z_is_bf16 ? static_cast<void*>(dz.data()) : dz_float.data();
  const HeadMixForward forward{y.data(), v.data(), v_stride, gate, out.data()};
  const HeadMixBackward backward{.grad = grad.data(),
                                 .y = y.data(),
                                 .v = v.data(),
                                 .v_stride = v_stride,
                                 .gate = gate,
                                 .dy = dy.data(),
                                 .dv = dv.data(),
                                 .dz = kind == 0 ? nullptr : dz_target,
                                 .delta = delta.data()};
  const dim3 grid{at.blocks, stripe_count(int64_t{at.groups} * Width, 1)};
  launch(grid, kHeadThreads, [&] { head_mix_kernel<Width, Ratio>(forward, shape); });
  launch(grid, kHeadThreads, [&] { head_mix_backward_kernel<Width, Ratio>(backward, shape); });

  std::vector<double> want_out(out.size()), want_dy(out.size()), want_dv(dv.size(), 0.0), want_dz(dz.size());
  for (int64_t head = 0; head < tokens * heads; ++head) {
    const int64_t token = head / heads, group = head % heads / Ratio;
    const auto y_at = [&](int l) { return double{to_float(y[static_cast<size_t>(head * Width + l)])}; };
    const auto p_at = [&](int l) { return double{to_float(grad[static_cast<size_t>(head * Width + l)])}; };
    const auto v_at = [&](int l) {
      return double{to_float(v[static_cast<size_t>(token * v_stride + group * Width + l)])};
    };
    double square = 0.0, yv = 0.0, pv = 0.0, py = 0.0;
    for (int l = 0; l < Width; ++l) {
      square += v_at(l) * v_at(l), yv += y_at(l) * v_at(l), pv += p_at(l) * v_at(l), py += p_at(l) * y_at(l);
    }
    const double m = std::max(square, 1e-24), a = yv / m, inside = square >= 1e-24;
    const double s = 1.0 / (1.0 + std::exp(-inner * logit(token * z_stride + head % heads)));
    const double g = kind == 0 ? 1.0 : outer * s, w = g * pv / m;
    want_dz[static_cast<size_t>(head)] = outer * inner * s * (1.0 - s) * (py - a * pv);
    for (int l = 0; l < Width; ++l) {
      want_out[static_cast<size_t>(head * Width + l)] = g * (y_at(l) - a * v_at(l));
      want_dy[static_cast<size_t>(head * Width + l)] = g * p_at(l) - w * v_at(l);
      want_dv[static_cast<size_t>((token * at.groups + group) * Width + l)] +=
          -a * g * p_at(l) - w * y_at(l) + inside * 2.0 * a * w * v_at(l);
    }
    double of_stored = 0.0;
    for (int l = 0; l < Width; ++l)
      of_stored += to_float(dy[static_cast<size_t>(head * Width + l)]) * y_at(l);
    check_close(delta[static_cast<size_t>(head % heads * tokens + token)], of_stored, 1e-5, 1e-4,
                "delta of head " + std::to_string(head));
  }
  check_all(out, want_out, "result");
  check_all(dy, want_dy, "gradient of y");
  // Those of the tiny value are about 1e12.
  check_all(dv, want_dv, "gradient of v");
  if (kind == 0) return;
  if (z_is_bf16) check_all(dz, want_dz, "gradient of z");
  for (size_t i = 0; !z_is_bf16 && i < want_dz.size(); ++i)
    check_close(dz_float[i], want_dz[i], 1e-4, 1e-5, "gradient of float32 z at " + std::to_string(i));
}

void test_sizes() {
  check(stripe_count(256, 1) == 1 && stripe_count(257, 1) == 2 && stripe_count(1536, 3) == 2, "stripes");
  check(head_mix_supports({1, 8, 4, 64}) && head_mix_supports({0, 4, 1, 128}), "shapes of the kernels");
  for (const HeadMixShape& shape : {HeadMixShape{1, 8, 4, 32}, HeadMixShape{1, 6, 2, 64},
                                    HeadMixShape{1, 8, 1, 64}, HeadMixShape{1, 8, 0, 64}})
    check(!head_mix_supports(shape), "a shape that the kernels do not take");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    test_sizes();
    // No token, one, fewer than a round holds, rounds that end inside; part of a stripe, one, one and a part.
    for (const Case& at :
         {Case{0, 4, 2}, Case{1, 4, 1}, Case{7, 4, 1}, Case{19, 4, 2, 3}, Case{9, 1, 1, 1}, Case{11, 6, 1}})
      test_matches_float64<64, 2>(at, 1);
    const Case odd{11, 3, 1, 2};
    test_matches_float64<64, 1>(odd, 0);
    test_matches_float64<64, 4>(odd, 2);
    test_matches_float64<128, 1>(odd, 3);
    test_matches_float64<128, 2>(odd, 0);
    test_matches_float64<128, 4>(odd, 1);
  });
}
