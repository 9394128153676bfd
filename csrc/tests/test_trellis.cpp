// trellis's CPU kernels: golden values, what is rounded can be read back, exact output sizes (ASan sees an
// element too many), the same values for every number of threads.
#include "kernels/trellis.h"
#include "tests/check.h"

namespace pgolf::test {
namespace {

void test_golden_values() {
  const std::vector<int8_t> codes{1, 0, 0, 0, 0, 0};
  std::vector<float> values(codes.size());
  trellis_values_cpu(codes.data(), values.data(), 1, 6, 1, 1);
  check(values == std::vector<float>({0.75f, 0.25f, -0.25f, 0.25f, -0.25f, -0.25f}), "golden values");
}

void test_round_trip(int64_t rows, int64_t n, int threads) {
  const std::vector<float> x = normal_values(rows * n, 7);
  std::vector<float> values(x.size()), serial(x.size()), back(x.size());
  trellis_round_cpu(x.data(), values.data(), rows, n, threads);
  trellis_round_cpu(x.data(), serial.data(), rows, n, 1);
  check(values == serial, "any number of threads gives the same values");
  std::vector<int8_t> codes(x.size());  // (n, rows): one chain per column
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const float value = values[static_cast<size_t>(r * n + i)];
      codes[static_cast<size_t>(i * rows + r)] = static_cast<int8_t>(std::lround(value));
      check(std::fabs(value - x[static_cast<size_t>(r * n + i)]) < 1, "a value lies within 1 of its number");
    }
  }
  trellis_values_cpu(codes.data(), back.data(), 1, n, rows, threads);
  bool same = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i)
      same = same && back[static_cast<size_t>(i * rows + r)] == values[static_cast<size_t>(r * n + i)];
  }
  check(same, "values of " + std::to_string(rows) + " chains of " + std::to_string(n));
}

void test_every_state_follows() {
  for (uint32_t state = 0; state < kTrellisStates; ++state) {
    const uint32_t a = trellis_next(0, state), b = trellis_next(1, state);
    check(a < kTrellisStates && (a ^ b) == 1 && a / 2 == state % (kTrellisStates / 2), "the states after");
    check(trellis_next(-1, state) == b && trellis_next(-2, state) == a, "negative codes");
  }
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    test_golden_values();
    test_every_state_follows();
    for (int64_t n : {0, 1, 2, 33, 255, 256, 257, 700}) test_round_trip(3, n, 1);
    test_round_trip(40, 300, 4);
  });
}
