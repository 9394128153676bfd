// CPU kernel of int6.h.
#include "kernels/int6.h"
#include "kernels/parallel.h"

namespace pgolf {
namespace {

// Codes below which another thread costs more than it saves.
constexpr int64_t kGrainCodes = 1 << 18;

uint32_t field(int8_t code) { return static_cast<uint32_t>(code) & 63u; }

int8_t sign_extend(uint32_t six_bits) {
  return static_cast<int8_t>(static_cast<int>((six_bits & 63u) ^ 32u) - 32);
}

void store_group(uint32_t v, uint8_t* out) {
  out[0] = static_cast<uint8_t>(v);
  out[1] = static_cast<uint8_t>(v >> 8);
  out[2] = static_cast<uint8_t>(v >> 16);
}

uint32_t load_group(const uint8_t* in) {
  return static_cast<uint32_t>(in[0]) | static_cast<uint32_t>(in[1]) << 8 |
         static_cast<uint32_t>(in[2]) << 16;
}

void pack_row(const int8_t* codes, uint8_t* packed, int64_t n) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4, packed += 3) {
    const int8_t* c = codes + j;
    store_group(field(c[0]) | field(c[1]) << 6 | field(c[2]) << 12 | field(c[3]) << 18, packed);
  }
  if (j < n) {
    uint32_t v = 0;
    for (int shift = 0; j < n; ++j, shift += 6) v |= field(codes[j]) << shift;
    store_group(v, packed);
  }
}

void unpack_row(const uint8_t* packed, int8_t* codes, int64_t n) {
  int64_t j = 0;
  for (; j + 4 <= n; j += 4, packed += 3) {
    const uint32_t v = load_group(packed);
    codes[j] = sign_extend(v);
    codes[j + 1] = sign_extend(v >> 6);
    codes[j + 2] = sign_extend(v >> 12);
    codes[j + 3] = sign_extend(v >> 18);
  }
  if (j < n) {
    for (uint32_t v = load_group(packed); j < n; ++j, v >>= 6) codes[j] = sign_extend(v);
  }
}

// Splits (rows, n) over threads in units of four codes, so that one long row is split too.
template <typename Body>
void for_each_piece(int64_t rows, int64_t n, int threads, const Body& body) {
  const int64_t groups = (n + 3) / 4;
  parallel_for(rows * groups, kGrainCodes / 4, threads, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t row = begin / groups;
      const int64_t first = begin - row * groups;
      const int64_t count = std::min(groups - first, end - begin);
      body(row, first, std::min(n - first * 4, count * 4));
      begin += count;
    }
  });
}

}  // namespace

int64_t int6_first_bad_code(const int8_t* codes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (codes[i] < kInt6Min || codes[i] > kInt6Max) return i;
  }
  return -1;
}

void pack_int6_cpu(const int8_t* codes, uint8_t* packed, int64_t rows, int64_t n, int threads) {
  for_each_piece(rows, n, threads, [&](int64_t row, int64_t group, int64_t count) {
    pack_row(codes + row * n + group * 4, packed + row * int6_row_bytes(n) + group * 3, count);
  });
}

void unpack_int6_cpu(const uint8_t* packed, int8_t* codes, int64_t rows, int64_t n, int threads) {
  for_each_piece(rows, n, threads, [&](int64_t row, int64_t group, int64_t count) {
    unpack_row(packed + row * int6_row_bytes(n) + group * 3, codes + row * n + group * 4, count);
  });
}

}  // namespace pgolf
