// trellis's CPU kernels: golden values, what is rounded can be read back, exact output sizes (ASan sees an
// element too many), the same values for every number of threads and as the plain algorithm gives.
#include <algorithm>

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

// One chain by the plain Viterbi algorithm: from all states before, the lower one where both are as good.
std::vector<float> best_path(const float* x, int64_t n) {
  const auto count = static_cast<size_t>(kTrellisStates);
  const auto nearest = [](float target, uint32_t residue) {
    const auto r = static_cast<float>(residue);
    return r + 4.0f * std::nearbyint(0.25f * (target - r));
  };
  const auto residue = [](uint32_t from, uint32_t to) {
    return 2 * ((to & 1) ^ trellis_parity(from & kTrellisInput)) + trellis_parity(from & kTrellisSide);
  };
  std::vector<float> cost(count, 1e30f);
  cost[0] = 0;
  std::vector<std::vector<uint32_t>> sources;
  for (int64_t t = 0; t < n; ++t) {
    const float target = 2.0f * x[t] + 0.5f;
    std::vector<float> next(count);
    auto& source = sources.emplace_back(count);
    for (uint32_t to = 0; to < count; ++to) {
      const auto through = [&](uint32_t from) {
        const uint32_t r = residue(from, to);
        const float off = target - static_cast<float>(r);
        const float distance = off - 4.0f * std::nearbyint(0.25f * off);
        return cost[from] + distance * distance;
      };
      const uint32_t low = to / 2, high = low + kTrellisStates / 2;
      source[to] = through(high) < through(low) ? high : low;
      next[to] = through(source[to]);
    }
    cost = next;
  }
  auto state = static_cast<uint32_t>(std::min_element(cost.begin(), cost.end()) - cost.begin());
  std::vector<float> values(static_cast<size_t>(n));
  for (int64_t t = n - 1; t >= 0; --t) {
    const uint32_t from = sources[static_cast<size_t>(t)][state];
    values[static_cast<size_t>(t)] = 0.5f * nearest(2.0f * x[t] + 0.5f, residue(from, state)) - 0.25f;
    state = from;
  }
  return values;
}

// Every chain has the values of the plain algorithm, to the bit, whatever lies beside it and also where many
// paths are as good: on quarters (unit 0.25) distances are equal, and all are 0 on zeros (unit 0).
void test_against_plain_viterbi(int64_t rows, int64_t n, float unit) {
  std::vector<float> x = normal_values(rows * n, 3), values(x.size());
  if (unit != 1) {
    for (float& value : x) value = unit * std::nearbyint(8 * value);
  }
  trellis_round_cpu(x.data(), values.data(), rows, n, 2);
  std::vector<float> plain;
  while (plain.size() < x.size()) {
    const auto i = static_cast<int64_t>(plain.size());
    const auto chain = best_path(x.data() + i, std::min<int64_t>(kTrellisChain, n - i % n));
    plain.insert(plain.end(), chain.begin(), chain.end());
  }
  check(values == plain, "the plain algorithm on " + std::to_string(rows) + " rows of " + std::to_string(n));
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
    for (float unit : {1.0f, 0.25f, 0.0f}) {
      for (int64_t n : {1, 7, 256, 300, 512}) test_against_plain_viterbi(3, n, unit);
      test_against_plain_viterbi(5, 270, unit);
    }
  });
}
