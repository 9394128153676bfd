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
  });
}
