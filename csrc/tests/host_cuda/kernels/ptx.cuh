// What kernels/ptx.cuh has for batched_product.cuh, on the host: products, matrix loads and copies of a warp,
// see ../cuda_runtime.h. A copy arrives when its group is waited for, so that a missing wait is seen.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstring>
#include <deque>

namespace pgolf {

inline float ex2_approx(float x) { return std::exp2(x); }
inline float fma_saturate(float a, float b, float c) {
  return std::fmin(std::fmax(std::fma(a, b, c), 0.0f), 1.0f);  // fmax has 0 for NaN
}
inline float rcp_approx(float x) { return 1.0f / x; }
inline float min_nan(float a, float b) { return a != a || b != b ? NAN : std::min(a, b); }

inline float sqrt_approx(float x) { return std::sqrt(x); }

inline int lane_index() { return static_cast<int>(threadIdx.x % 32); }

inline uint4 fetch16(const void* from) { return *static_cast<const uint4*>(from); }
inline uint4 fetch16_alone(const void* from) { return *static_cast<const uint4*>(from); }
inline uint32_t fetch4(const void* from) { return *static_cast<const uint32_t*>(from); }

// Reads the address, so that the sanitizers see one that is out of bounds.
inline void prefetch_line(const void* from) { static_cast<void>(*static_cast<const volatile char*>(from)); }

inline unsigned char* dynamic_shared() { return test::this_block().shared.data(); }

// Offset in the block's dynamic shared memory.
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - dynamic_shared());
}

inline unsigned char* shared_pointer(uint32_t address) { return dynamic_shared() + address; }

namespace test {

struct AsyncCopy {
  uint32_t shared;
  const void* global;  // null: zeros
};

// Of a thread.
struct AsyncCopies {
  std::vector<AsyncCopy> open;
  std::deque<std::vector<AsyncCopy>> groups;
};

inline AsyncCopies& async_copies() {
  std::shared_ptr<void>& copies = this_thread().copies;
  if (copies == nullptr) copies = std::make_shared<AsyncCopies>();
  return *static_cast<AsyncCopies*>(copies.get());
}

}  // namespace test

inline void cp_async16(uint32_t shared, const void* global, bool valid) {
  test::async_copies().open.push_back({shared, valid ? global : nullptr});
}

inline void cp_async_commit() {
  test::AsyncCopies& copies = test::async_copies();
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}

template <int Pending>
void cp_async_wait() {
  auto& groups = test::async_copies().groups;
  for (; groups.size() > Pending; groups.pop_front()) {
    for (const test::AsyncCopy& copy : groups.front()) {
      unsigned char* const to = dynamic_shared() + copy.shared;
      if (copy.global == nullptr) {
        std::memset(to, 0, 16);
      } else {
        std::memcpy(to, copy.global, 16);
      }
    }
  }
}

template <bool Transposed>
void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
  const uint32_t group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
  test::exchange<1>("ldmatrix", {shared}, [&](const auto& rows) {
    const auto element = [&](uint32_t matrix, uint32_t row, uint32_t column) {
      uint16_t bits;
      std::memcpy(&bits, dynamic_shared() + rows[matrix * 8 + row][0] + 2 * column, sizeof(bits));
      return uint32_t{bits};
    };
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t low = Transposed ? element(i, 2 * place, group) : element(i, group, 2 * place);
      const uint32_t high = Transposed ? element(i, 2 * place + 1, group) : element(i, group, 2 * place + 1);
      r[i] = low | high << 16;
    }
  });
}

inline void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  const uint32_t group = threadIdx.x % 32 / 4, place = threadIdx.x % 4;
  test::exchange<6>("mma", {a[0], a[1], a[2], a[3], b0, b1}, [&](const auto& words) {
    // Element k of a row of A or a column of B: pairs lie in four lanes, k >= 8 in another word.
    const auto element = [&](uint32_t line, uint32_t k, uint32_t first, uint32_t second) {
      const uint32_t word = words[line * 4 + k % 8 / 2][k < 8 ? first : second];
      return to_float(f16{static_cast<uint16_t>(k % 2 == 0 ? word : word >> 16)});
    };
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t half = i / 2, column = 2 * place + i % 2;
      for (uint32_t k = 0; k < 16; ++k) c[i] += element(group, k, half, half + 2) * element(column, k, 4, 5);
    }
  });
}

}  // namespace pgolf
