// range_coder's CPU kernel: round trips of every mode and extreme, streams that were cut, grown or damaged.
#include <algorithm>

#include "kernels/range_coder.h"
#include "tests/check.h"

namespace pgolf::test {
namespace {

using Bytes = std::vector<uint8_t>;
using Codes = std::vector<int8_t>;

// Copies of exactly the streams' and the pool's sizes, so that ASan sees a byte too many.
const char* decode(const Bytes& stream, Codes& codes, int64_t rows, int64_t cols, const Codes& pool = {}) {
  const Bytes exact(stream.begin(), stream.end());
  const Shape shape{rows, cols, cols > 0 ? static_cast<int64_t>(pool.size()) / cols : 0};
  return decode_codes_cpu(exact.data(), static_cast<int64_t>(exact.size()), pool.data(), codes.data(), shape);
}

Bytes round_trip(const Codes& codes, int64_t rows, int64_t cols, const std::string& what,
                 const Codes& pool = {}) {
  const Shape shape{rows, cols, cols > 0 ? static_cast<int64_t>(pool.size()) / cols : 0};
  const Bytes stream = encode_codes_cpu(codes.data(), pool.data(), shape);
  check(stream.size() <= codes.size() + 1, what + ": at most one byte more than raw");
  Codes back(codes.size(), 99);
  const char* error = decode(stream, back, rows, cols, pool);
  check(error == nullptr, what + ": " + (error == nullptr ? "" : error));
  check(codes == back, what + ": codes survive");
  return stream;
}

Codes gaussian(int64_t rows, int64_t cols, float deviation, unsigned seed) {
  Codes codes;
  for (const float value : normal_values(rows * cols, seed)) {
    codes.push_back(static_cast<int8_t>(std::clamp(std::lround(value * deviation), -128L, 127L)));
  }
  return codes;
}

// Rows share a mean, so that prediction pays.
Codes predictable(int64_t rows, int64_t cols) {
  Codes codes = gaussian(rows, cols, 3.0f, 5);
  for (size_t i = 0; i < codes.size(); ++i)
    codes[i] = static_cast<int8_t>(codes[i] + 30 - static_cast<int>(i) % static_cast<int>(cols) * 4);
  return codes;
}

void test_extremes() {
  for (const int value : {0, 1, -1, 31, 127, -127, -128}) {
    const Codes codes(7 * 130, static_cast<int8_t>(value));
    const Bytes stream = round_trip(codes, 7, 130, "all " + std::to_string(value));
    check(value != 0 || stream == Bytes({1, 0}), "zeros take two bytes");
    round_trip({static_cast<int8_t>(value)}, 1, 1, "1x1 of " + std::to_string(value));
    Codes hot(33 * 17);
    hot[40] = static_cast<int8_t>(value);
    round_trip(hot, 33, 17, "one hot " + std::to_string(value));
  }
  round_trip({}, 0, 5, "no rows");
  round_trip({}, 5, 0, "no columns");
  check(round_trip(Codes((1 << 20) + 1), 1, (1 << 20) + 1, "very wide")[0] == 0, "very wide rows are stored");
  Codes ends;
  for (int i = 0; i < 999; ++i) ends.push_back(static_cast<int8_t>(i % 2 ? 127 : -128));
  round_trip(ends, 999, 1, "both ends, predicted");
  round_trip(ends, 3, 333, "both ends");
}

void test_sizes_follow_the_entropy() {
  const Codes codes = gaussian(512, 64, 2.7f, 1);
  const Bytes stream = round_trip(codes, 512, 64, "gaussian");
  // log2(2.7) + 2.047 = 3.480 bits.
  check(static_cast<double>(stream.size()) * 8 < 3.52 * 512 * 64,
        "gaussian: " + std::to_string(stream.size()));
  const Codes noise = gaussian(50, 50, 1000.0f, 2);
  check(round_trip(noise, 50, 50, "two values and noise")[0] == 1, "clipped noise is still coded");
  std::mt19937 generator(3);
  Codes random(4000);
  for (int8_t& code : random) code = static_cast<int8_t>(generator());
  check(round_trip(random, 40, 100, "random bytes").size() <= 4001, "random bytes are stored");
  check(round_trip(predictable(512, 16), 512, 16, "predictable")[0] == 3, "prediction is chosen");
  const Codes same = gaussian(20, 300, 3.0f, 9);
  const size_t alone = round_trip(same, 20, 300, "rows alone").size();
  const size_t leaned = round_trip(same, 20, 300, "rows of the pool", same).size();
  check(2 * leaned < alone,
        "the pool is leaned on: " + std::to_string(leaned) + " of " + std::to_string(alone));
}

void test_damage_never_escapes(const Codes& codes, int64_t rows, int64_t cols, const Codes& pool = {}) {
  const Bytes good = round_trip(codes, rows, cols, "good", pool);
  Codes back(codes.size());
  for (size_t size = 0; size < good.size(); size += 1 + size / 16) {
    const Bytes cut(good.begin(), good.begin() + static_cast<int64_t>(size));
    const bool refused = decode(cut, back, rows, cols, pool) != nullptr;
    check(refused || back != codes, "cut at " + std::to_string(size));
  }
  for (const uint8_t extra : {0, 255}) {
    Bytes longer = good;
    longer.push_back(extra);
    check(decode(longer, back, rows, cols, pool) != nullptr || back != codes, "one byte more");
  }
  std::mt19937 generator(4);
  for (int i = 0; i < 100; ++i) {
    Bytes damaged = good;
    damaged[generator() % (i % 4 ? damaged.size() : 4)] ^= static_cast<uint8_t>(1u << generator() % 8);
    decode(damaged, back, rows, cols, pool);  // any answer, but no sanitizer report
    for (uint8_t& byte : damaged) byte = static_cast<uint8_t>(generator());
    damaged[0] = static_cast<uint8_t>(1 + i % 3);
    damaged[1] = static_cast<uint8_t>(i % 2 ? 128 : generator());
    decode(damaged, back, rows, cols, pool);
  }
}

void test_impossible_headers_are_refused() {
  Codes back(3000);
  check(decode({}, back, 1, 1) != nullptr, "empty");
  check(decode({4, 1, 0}, back, 1, 1) != nullptr, "unknown mode");
  check(decode({1}, back, 1, 1) != nullptr, "no largest code");
  check(decode({1, 129, 0}, back, 1, 1) != nullptr, "largest code above 128");
  check(decode({1, 0, 0}, back, 1, 1) != nullptr, "zeros with a byte too many");
  check(decode({2, 0}, back, 1, 1) != nullptr, "compared zeros");
  check(decode({2, 1, 0}, back, 1, 2049) != nullptr, "too wide to compare");
  check(decode({1, 1, 0}, back, 0, (1 << 20) + 1) != nullptr, "too wide to model");
  check(decode({0, 1, 2}, back, 1, 1) != nullptr, "raw of another length");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    test_extremes();
    test_sizes_follow_the_entropy();
    test_damage_never_escapes(gaussian(31, 20, 2.7f, 7), 31, 20);
    test_damage_never_escapes(gaussian(31, 20, 200.0f, 7), 31, 20);
    test_damage_never_escapes(predictable(160, 7), 160, 7);
    test_damage_never_escapes(gaussian(24, 30, 2.7f, 7), 24, 30, gaussian(24, 30, 2.7f, 7));
    test_impossible_headers_are_refused();
  });
}
