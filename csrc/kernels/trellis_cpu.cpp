// CPU kernels of trellis.h. The two states 2p and 2p + 1 are reached from the same two, p and p + 128, at
// costs that differ by which is which; the loop over p has no branch, so that the compiler vectorises it.
#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "kernels/parallel.h"
#include "kernels/trellis.h"

namespace pgolf {
namespace {

constexpr int kStates = kTrellisStates, kHalf = kStates / 2;
constexpr float kUnreached = 1e30f;  // of the states that no path has come to yet

struct Machine {
  std::array<uint32_t, kHalf> side{};   // of both states p and p + 128
  std::array<uint32_t, kHalf> input{};  // parity(p & kTrellisInput); of p + 128 it is the other one
};

constexpr Machine make_machine() {
  Machine machine;
  for (uint32_t p = 0; p < kHalf; ++p) {
    machine.side[p] = trellis_parity(p & kTrellisSide);
    machine.input[p] = trellis_parity(p & kTrellisInput);
  }
  return machine;
}

constexpr Machine kMachine = make_machine();
static_assert((kTrellisSide & kHalf) == 0 && (kTrellisInput & kHalf) != 0, "the two predecessors' relation");

using Row = std::array<float, kStates>;

// Whether 2p and 2p + 1 were reached from p + 128, by p.
struct Decisions {
  std::array<uint8_t, kHalf> even, odd;
};

float squared_distance(float target, float residue) {
  const float off = target - residue;
  const float distance = off - 4.0f * std::nearbyint(0.25f * off);
  return distance * distance;
}

void step(float target, const Row& before, Row& after, Decisions& decided) {
  const float c0 = squared_distance(target, 0), c1 = squared_distance(target, 1);
  const float c2 = squared_distance(target, 2), c3 = squared_distance(target, 3);
  for (int p = 0; p < kHalf; ++p) {
    const float zero = kMachine.side[p] ? c1 : c0, two = kMachine.side[p] ? c3 : c2;
    const float same = kMachine.input[p] ? two : zero, other = kMachine.input[p] ? zero : two;
    const float even_low = before[p] + same, even_high = before[p + kHalf] + other;
    const float odd_low = before[p] + other, odd_high = before[p + kHalf] + same;
    after[2 * p] = std::min(even_low, even_high);
    after[2 * p + 1] = std::min(odd_low, odd_high);
    decided.even[p] = even_high < even_low;
    decided.odd[p] = odd_high < odd_low;
  }
}

void round_chain(const float* x, float* value, int length) {
  Row metrics[2];
  std::array<Decisions, kTrellisChain> decided;
  metrics[0].fill(kUnreached);
  metrics[0][0] = 0;
  for (int t = 0; t < length; ++t) step(2.0f * x[t] + 0.5f, metrics[t % 2], metrics[(t + 1) % 2], decided[t]);
  const Row& last = metrics[length % 2];
  int state = static_cast<int>(std::min_element(last.begin(), last.end()) - last.begin());
  for (int t = length - 1; t >= 0; --t) {
    const int p = state / 2, u = state % 2;
    const uint32_t high = u != 0 ? decided[t].odd[p] : decided[t].even[p];
    const uint32_t odd_code = static_cast<uint32_t>(u) ^ kMachine.input[p] ^ high;
    const float residue = static_cast<float>(2 * odd_code + kMachine.side[p]);
    const float target = 2.0f * x[t] + 0.5f;
    value[t] = 0.5f * (residue + 4.0f * std::nearbyint(0.25f * (target - residue))) - 0.25f;
    state = p + static_cast<int>(high) * kHalf;
  }
}

}  // namespace

void trellis_round_cpu(const float* x, float* value, int64_t rows, int64_t n, int threads) {
  const int64_t chains = (n + kTrellisChain - 1) / kTrellisChain;
  parallel_for(rows * chains, 16, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / chains * n + i % chains * kTrellisChain;
      const int64_t length = std::min<int64_t>(kTrellisChain, n - i % chains * kTrellisChain);
      round_chain(x + first, value + first, static_cast<int>(length));
    }
  });
}

void trellis_values_cpu(const int8_t* codes, float* value, int64_t count, int64_t rows, int64_t columns,
                        int threads) {
  const int64_t chains = (rows + kTrellisChain - 1) / kTrellisChain;
  parallel_for(count * chains, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<uint8_t> states(static_cast<size_t>(columns));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t from = i % chains * kTrellisChain, to = std::min(rows, from + kTrellisChain);
      std::fill(states.begin(), states.end(), uint8_t{0});
      for (int64_t row = from; row < to; ++row) {
        const int64_t at = (i / chains * rows + row) * columns;
        for (int64_t c = 0; c < columns; ++c) {
          const uint32_t state = states[static_cast<size_t>(c)];
          const int code = codes[at + c];
          value[at + c] = trellis_value(code, state);
          states[static_cast<size_t>(c)] = static_cast<uint8_t>(trellis_next(code, state));
        }
      }
    }
  });
}

}  // namespace pgolf
