// CPU kernels of trellis.h. Four chains go side by side, one in each lane of a vector, so that a step has no
// branch and lanes exchange nothing. The two states 2p and 2p + 1 are reached from the same two, p and
// p + 128, at costs that differ by which is which.
#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "kernels/parallel.h"
#include "kernels/trellis.h"

namespace pgolf {
namespace {

constexpr int kStates = kTrellisStates, kHalf = kStates / 2;
constexpr int kLanes = 4;            // of the vectors that every x86-64 has
constexpr float kUnreached = 1e30f;  // of the states that no path has come to yet

using Floats __attribute__((vector_size(4 * kLanes))) = float;
using Bits __attribute__((vector_size(4 * kLanes))) = uint32_t;
using Row = std::array<Floats, kStates>;

// Whether states were reached from the higher of their two: bit 31 - i of word w is that of state 32 w + i.
using Decisions = std::array<Bits, kStates / 32>;

// The residue mod 4 of the values between p and 2p, and between p + 128 and 2p + 1. That of the other two
// pairs differs in bit 1, because residue(128) is 2. Parities add up: residue(p) = residue(p - p % 16) ^
// residue(p % 16).
constexpr uint32_t residue(uint32_t p) {
  return 2 * trellis_parity(p & kTrellisInput) + trellis_parity(p & kTrellisSide);
}

// The nearest multiple of 4, halfway the even one, of numbers below 2^23: floats near kFour are 4 apart.
template <typename T>
T nearest(const T& x) {
  constexpr float kFour = 3 << 24;
  return x + kFour - kFour;
}

void step(const Floats* distances, const Row& before, Row& after, Decisions& decided) {
  for (int word = 0; word < kStates / 32; ++word) {
    const uint32_t first = residue(16 * word);
    const Floats d[4] = {distances[first], distances[first ^ 1], distances[first ^ 2], distances[first ^ 3]};
    Bits bits{};
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
      const int p = 16 * word + i;
      const Floats same = d[residue(i)], other = d[residue(i) ^ 2];
      const auto even_low = before[p] + same, even_high = before[p + kHalf] + other;
      const auto odd_low = before[p] + other, odd_high = before[p + kHalf] + same;
      after[2 * p] = even_high < even_low ? even_high : even_low;
      after[2 * p + 1] = odd_high < odd_low ? odd_high : odd_low;
      // Compared with the minimum, not with each other: then the compiler takes an instruction for minima.
      bits += bits - std::bit_cast<Bits>(after[2 * p] != even_low);  // true is -1
      bits += bits - std::bit_cast<Bits>(after[2 * p + 1] != odd_low);
    }
    decided[word] = bits;
  }
}

// Rounds one chain of each of `lanes` rows that begin `stride` numbers apart.
void round_chains(const float* x, float* value, int64_t stride, int64_t lanes, int64_t length) {
  Row costs[2];
  std::array<Decisions, kTrellisChain> decided;
  costs[0].fill(Floats{} + kUnreached);
  costs[0][0] = Floats{};
  Floats target{}, distances[4];
  for (int64_t t = 0; t < length; ++t) {
    for (int64_t lane = 0; lane < lanes; ++lane) target[lane] = 2.0f * x[lane * stride + t] + 0.5f;
    for (int r = 0; r < 4; ++r) {
      const Floats off = target - static_cast<float>(r), distance = off - nearest(off);
      distances[r] = distance * distance;
    }
    step(distances, costs[t % 2], costs[(t + 1) % 2], decided[t]);
  }
  const Row& last = costs[length % 2];
  for (int64_t lane = 0; lane < lanes; ++lane) {
    uint32_t state = 0;
    for (uint32_t s = 1; s < kStates; ++s) {
      if (last[s][lane] < last[state][lane]) state = s;
    }
    for (int64_t t = length - 1; t >= 0; --t) {
      const uint32_t high = decided[t][state / 32][lane] >> (31 - state % 32) & 1;
      const auto r = static_cast<float>(residue(state / 2) ^ 2 * (state % 2 ^ high));
      const float goal = 2.0f * x[lane * stride + t] + 0.5f;
      value[lane * stride + t] = 0.5f * (r + nearest(goal - r)) - 0.25f;
      state = state / 2 + kHalf * high;
    }
  }
}

}  // namespace

void trellis_round_cpu(const float* x, float* value, int64_t rows, int64_t n, int threads) {
  if (n % kTrellisChain == 0) {  // then the lanes take chains of one row, too
    rows *= n / kTrellisChain;
    n = kTrellisChain;
  }
  const int64_t chains = (n + kTrellisChain - 1) / kTrellisChain;
  // Two vectors of chains take longer than the start of a thread.
  parallel_for((rows + kLanes - 1) / kLanes * chains, 2, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / chains * kLanes, first = i % chains * kTrellisChain, at = row * n + first;
      round_chains(x + at, value + at, n, std::min<int64_t>(kLanes, rows - row),
                   std::min<int64_t>(kTrellisChain, n - first));
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
