// qkv_rope's Hopper kernel and its launch, run on the host (host_cuda/kernels/ptx_sm90.cuh): the product
// against float64, q and k against float64 and against the bits that qk_norm_rope's kernel makes of the
// product.
#include <limits>

#include "kernels/qk_norm_rope.cuh"
#include "kernels/qkv_rope_sm90.cu"
#include "tests/check.h"

namespace pgolf::test {
namespace {

constexpr float kEps = 1.1920929e-7f;
using Matrix = std::vector<bf16>;

struct Case {
  int64_t tokens, depth;
  int heads, groups, dims;
  int multiprocessors;  // half as many clusters share the tiles
  bool gain_is_bf16;
};

Matrix rounded(const std::vector<float>& source, float scale) {
  Matrix values;
  for (const float value : source) values.push_back(from_float<bf16>(value * scale));
  return values;
}

Matrix unwritten(int64_t count) {
  return Matrix(static_cast<size_t>(count), from_float<bf16>(std::numeric_limits<float>::quiet_NaN()));
}

std::string place_of(int64_t token, int64_t head, int64_t column) {
  return " at token " + std::to_string(token) + ", head " + std::to_string(head) + ", column " +
         std::to_string(column);
}

void check_product(const Matrix& qkv, const Matrix& n, const Matrix& weight, const Case& at) {
  const int64_t columns = int64_t{at.heads + 2 * at.groups} * kWidth;
  for (int64_t token = 0; token < at.tokens; ++token) {
    for (int64_t column = 0; column < columns; ++column) {
      double sum = 0.0;
      for (int64_t i = 0; i < at.depth; ++i)
        sum += double{to_float(n[static_cast<size_t>(token * at.depth + i)])} *
               to_float(weight[static_cast<size_t>(column * at.depth + i)]);
      check_close(to_float(qkv[static_cast<size_t>(token * columns + column)]), sum, 1.0 / 256, 1e-5,
                  "qkv" + place_of(token, column / kWidth, column % kWidth));
    }
  }
}

// One head of q or k, of which x are the columns of the product.
void check_head(const bf16* got, const bf16* x, double gain, const float* cos, const float* sin, int half,
                const std::string& where) {
  double squares = 0.0;
  for (int i = 0; i < kWidth; ++i) squares += std::pow(double{to_float(x[i])}, 2);
  const double factor = gain / std::sqrt(squares / kWidth + double{kEps});
  for (int i = 0; i < kWidth; ++i) {
    double turned = to_float(x[i]);
    if (i < half) turned = turned * cos[i] + double{to_float(x[i + half])} * sin[i];
    if (i >= half && i < 2 * half)
      turned = turned * cos[i - half] - double{to_float(x[i - half])} * sin[i - half];
    check_close(to_float(got[i]), factor * turned, 1.0 / 256, 1e-5, where + ", column " + std::to_string(i));
  }
}

void test_matches(const Case& at, uint32_t seed) {
  multiprocessors = at.multiprocessors;
  launch_seed = seed;
  const int64_t tokens = at.tokens, heads = at.heads, groups = at.groups, all = heads + 2 * groups;
  const int half = at.dims / 2;
  const QkvRopeShape shape{tokens, at.depth, at.heads, at.groups, kWidth, at.dims};
  check(qkv_rope_sm90_supports(shape), "a shape of the kernel");
  const Matrix n = rounded(normal_values(tokens * at.depth, 1), 1.0f);
  const Matrix weight = rounded(normal_values(all * kWidth * at.depth, 2), 0.1f);
  const std::vector<float> gain = normal_values(heads, 3), angles = normal_values(tokens * half, 4);
  const Matrix gain_bf16 = rounded(gain, 1.0f);
  std::vector<float> cos, sin;
  for (const float angle : angles) cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
  const void* gains = at.gain_is_bf16 ? static_cast<const void*>(gain_bf16.data()) : gain.data();
  Matrix qkv = unwritten(tokens * all * kWidth);
  Matrix q = unwritten(tokens * heads * kWidth), k = unwritten(tokens * groups * kWidth);
  qkv_rope_sm90({n.data(), weight.data(), gains, at.gain_is_bf16, cos.data(), sin.data(), kEps, qkv.data(),
                 q.data(), k.data()},
                shape, nullptr);
  check_product(qkv, n, weight, at);

  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t head = 0; head < heads + groups; ++head) {
      const bool of_q = head < heads;
      const bf16* got = of_q ? q.data() + (token * heads + head) * kWidth
                             : k.data() + (token * groups + head - heads) * kWidth;
      const auto at_gain = static_cast<size_t>(head);
      const double factor = !of_q ? 1.0 : at.gain_is_bf16 ? to_float(gain_bf16[at_gain]) : gain[at_gain];
      check_head(got, qkv.data() + (token * all + head) * kWidth, factor, cos.data() + token * half,
                 sin.data() + token * half, half, place_of(token, head, 0));
    }
  }

  Matrix other_q = unwritten(tokens * heads * kWidth), other_k = unwritten(tokens * groups * kWidth);
  const QkNormRopeForward other{
      {qkv.data(), all * kWidth, gains, at.gain_is_bf16, cos.data(), sin.data(), kEps},
      other_q.data(),
      other_k.data()};
  const QkNormRopeShape other_shape{tokens, at.heads, at.groups, kWidth, at.dims};
  launch(dim3{1, rope_parts(other_shape, false)}, kHeadThreads,
         [&] { qk_norm_rope_kernel<kWidth, true>(other, other_shape); });
  check(std::memcmp(q.data(), other_q.data(), q.size() * sizeof(bf16)) == 0, "q has other bits");
  check(std::memcmp(k.data(), other_k.data(), k.size() * sizeof(bf16)) == 0, "k has other bits");
}

void test_shapes() {
  const QkvRopeShape good{1, 512, 8, 4, 64, 16};
  check(qkv_rope_sm90_supports(good), "the model's shape");
  const auto refused = [&](auto change) {
    QkvRopeShape shape = good;
    change(shape);
    check(!qkv_rope_sm90_supports(shape), "a shape that the kernel would misread");
  };
  refused([](QkvRopeShape& s) { s.depth = 520; });
  refused([](QkvRopeShape& s) { s.depth = 12; });
  refused([](QkvRopeShape& s) { s.depth = 0; });
  refused([](QkvRopeShape& s) { s.heads = 7; });
  refused([](QkvRopeShape& s) { s.heads = 0; });
  refused([](QkvRopeShape& s) { s.groups = 3; });
  refused([](QkvRopeShape& s) { s.groups = 0; });
  refused([](QkvRopeShape& s) { s.heads = 2, s.groups = 2; });
  refused([](QkvRopeShape& s) { s.width = 128; });
  refused([](QkvRopeShape& s) { s.dims = 8; });
  refused([](QkvRopeShape& s) { s.tokens = (int64_t{1} << 24) + 1; });
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    test_shapes();
    // One row, rows that end inside a fragment and inside the second cluster's rows; depths of one slice, of
    // a part of one and of all eight; as many heads of k as of q, and the most a group has; no rotation.
    test_matches({1, 64, 8, 4, 16, 2, false}, 0);
    test_matches({127, 8, 8, 2, 16, 4, true}, 4);
    test_matches({129, 136, 4, 4, 16, 2, true}, 8);
    test_matches({300, 512, 8, 4, 16, 4, false}, 9);
    test_matches({300, 72, 4, 2, 0, 2, true}, 1);
    test_matches({513, 8, 4, 2, 16, 8, false}, 7);
  });
}
