// int6's CPU kernels: golden bytes, exact output sizes (ASan sees a byte too many), every length of a last
// group.
#include "kernels/int6.h"
#include "tests/check.h"

namespace pgolf::test {
namespace {

void test_golden_bytes() {
  const std::vector<int8_t> codes{1, 2, 3, 4, -32};
  std::vector<uint8_t> packed(6);
  pack_int6_cpu(codes.data(), packed.data(), 1, 5, 1);
  check(packed == std::vector<uint8_t>({0x81, 0x30, 0x10, 0x20, 0x00, 0x00}), "golden bytes of 1 2 3 4 -32");
}

void test_round_trip(int64_t rows, int64_t n, int threads) {
  std::vector<int8_t> codes(static_cast<size_t>(rows * n)), back(codes.size(), 99);
  for (size_t i = 0; i < codes.size(); ++i)
    codes[i] = static_cast<int8_t>(static_cast<int>(i * 37 % 64) - 32);
  std::vector<uint8_t> packed(static_cast<size_t>(rows * int6_row_bytes(n)));
  pack_int6_cpu(codes.data(), packed.data(), rows, n, threads);
  unpack_int6_cpu(packed.data(), back.data(), rows, n, threads);
  check(codes == back, "round trip of " + std::to_string(rows) + " x " + std::to_string(n));
}

void test_fused(int64_t rows, int64_t n, int bits, int threads) {
  std::vector<float> weight(static_cast<size_t>(rows * n));
  for (size_t i = 0; i < weight.size(); ++i)
    weight[i] = 0.25f * static_cast<float>(static_cast<int>(i * 37 % 15) - 7);
  std::vector<f16> steps(static_cast<size_t>(rows), from_float<f16>(0.25f));
  std::vector<uint8_t> packed(static_cast<size_t>(rows * packed_row_bytes(n, bits)));
  std::vector<bf16> back(weight.size());
  quantize_pack_cpu(weight.data(), steps.data(), packed.data(), rows, n, bits, 0.0f, threads);
  unpack_dequantize_cpu(packed.data(), steps.data(), back.data(), rows, n, bits, threads);
  bool same = true;
  for (size_t i = 0; i < weight.size(); ++i) same = same && to_float(back[i]) == weight[i];
  check(same, std::to_string(bits) + " bits, " + std::to_string(rows) + " x " + std::to_string(n));
  if (n < 2) return;
  std::vector<f16> serial(steps.size());
  std::vector<uint8_t> other(packed.size());
  quantize_pack_cpu(weight.data(), steps.data(), packed.data(), rows, n, bits, 3.0f, threads);
  quantize_pack_cpu(weight.data(), serial.data(), other.data(), rows, n, bits, 3.0f, 1);
  check(packed == other, "any number of threads gives the same bytes");
}

void test_fused_golden_bytes() {
  const std::vector<float> weight{1, -1, 3, 0, -4, 2, 5, -7, 6};
  std::vector<f16> step{from_float<f16>(1.0f)};
  std::vector<uint8_t> packed(10);
  quantize_pack_cpu(weight.data(), step.data(), packed.data(), 1, 9, 5, 0.0f, 1);
  check(packed == std::vector<uint8_t>({0xe1, 0x0f, 0xc0, 0x45, 0xc9, 0x06, 0, 0, 0, 0}),
        "five bits, by hand");
}

void test_bad_code_is_found() {
  const std::vector<int8_t> codes{-32, 31, 0, 32, -33};
  check(int6_first_bad_code(codes.data(), 5) == 3, "32 is the first code out of range");
  check(int6_first_bad_code(codes.data(), 3) == -1, "the ends of the range are in range");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    test_golden_bytes();
    for (int64_t n : {0, 1, 2, 3, 4, 5, 127}) test_round_trip(3, n, 1);
    test_round_trip(1, 1 << 20, 3);  // one row split over threads
    test_round_trip(1031, 1030, 4);  // pieces that start and end inside rows
    test_bad_code_is_found();
    test_fused_golden_bytes();
    for (int bits = 4; bits <= 8; ++bits) {
      // Parts of a group, parts of eight codes, the buffer's end and one past it.
      for (int64_t n : {1, 2, 3, 7, 8, 9, 511, 512, 513, 1030}) test_fused(3, n, bits, 1);
      test_fused(2051, 513, bits, 4);
    }
  });
}
