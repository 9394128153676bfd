// Feeds arbitrary bytes to range_coder's decoder and arbitrary codes through both ways. Built by `make fuzz`
// with libFuzzer where clang has it, else with a mutating main() of its own; ASan and UBSan in both.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "kernels/range_coder.h"

namespace pgolf {
namespace {

using Bytes = std::vector<uint8_t>;

// What the first four bytes of an input ask for; at most 192 codes, so that a run is quick.
struct Case {
  Shape shape;
  bool decode;

  explicit Case(const uint8_t* data)
      : shape{1 + data[0] % 16, 1 + data[1] % 12, data[2] % 6}, decode((data[3] & 3) != 0) {}

  int64_t count() const { return shape.rows * shape.cols; }
};

// A pool that both sides know.
std::vector<int8_t> pool_of(const Shape& shape) {
  std::mt19937 generator(static_cast<unsigned>(shape.cols));
  std::vector<int8_t> pool(static_cast<size_t>(shape.pool_rows * shape.cols));
  for (int8_t& code : pool) code = static_cast<int8_t>(generator() % 13 - 6);
  return pool;
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "fuzz: %s\n", what);
  std::abort();
}

void round_trip(const Bytes& input, const Case& c) {
  std::vector<int8_t> codes(static_cast<size_t>(c.count()));
  for (size_t i = 0; i < codes.size() && !input.empty(); ++i) {
    codes[i] = static_cast<int8_t>(input[i % input.size()] + i / input.size());
  }
  const std::vector<int8_t> pool = pool_of(c.shape);
  const Bytes stream = encode_codes_cpu(codes.data(), pool.data(), c.shape);
  if (stream.size() > codes.size() + 1) fail("a stream is longer than the raw codes");
  std::vector<int8_t> back(codes.size());
  const auto size = static_cast<int64_t>(stream.size());
  if (decode_codes_cpu(stream.data(), size, pool.data(), back.data(), c.shape) != nullptr) fail("refused");
  if (back != codes) fail("codes do not survive");
}

}  // namespace
}  // namespace pgolf

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace pgolf;
  if (size < 4) return 0;
  const Case c(data);
  const Bytes input(data + 4, data + size);  // a copy of exactly this size: ASan sees a byte too many
  if (c.decode) {
    const std::vector<int8_t> pool = pool_of(c.shape);
    std::vector<int8_t> codes(static_cast<size_t>(c.count()));
    decode_codes_cpu(input.data(), static_cast<int64_t>(input.size()), pool.data(), codes.data(), c.shape);
  } else {
    round_trip(input, c);
  }
  return 0;
}

#ifdef PGOLF_FUZZ_MAIN
// Arguments: number of inputs, seed. Inputs are real streams with flipped bits, cuts and random bytes.
int main(int argc, char** argv) {
  using namespace pgolf;
  const long runs = argc > 1 ? std::atol(argv[1]) : 10000;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 1u);
  std::normal_distribution<float> normal(0.0f, 2.7f);
  Bytes good;
  for (long run = 0; run < runs; ++run) {
    if (run % 50 == 0) {  // a new real stream to damage
      good = {static_cast<uint8_t>(random()), static_cast<uint8_t>(random()), static_cast<uint8_t>(random()),
              1};
      const Case c(good.data());
      std::vector<int8_t> codes(static_cast<size_t>(c.count()));
      for (int8_t& code : codes) code = static_cast<int8_t>(normal(random));
      const std::vector<int8_t> pool = pool_of(c.shape);
      const Bytes stream = encode_codes_cpu(codes.data(), pool.data(), c.shape);
      good.insert(good.end(), stream.begin(), stream.end());
    }
    Bytes input = good;
    for (unsigned i = 0; i <= random() % 4; ++i) {
      const size_t place = random() % 8 == 0 ? random() % 6 : random() % input.size();
      if (place < input.size()) input[place] ^= static_cast<uint8_t>(1u << random() % 8);
    }
    if (random() % 8 == 0) input.resize(random() % (input.size() + 8), static_cast<uint8_t>(random()));
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("Done %ld runs\n", runs);
  return 0;
}
#endif
