// The host's Hopper (host_cuda/kernels/ptx_sm90.cuh) itself: a kernel that uses every kind of operand against
// float64, and faults that it has to report.
#include <functional>
#include <limits>

#include "kernels/ptx_sm90.cuh"
#include "kernels/tensor_map.cuh"
#include "tests/check.h"

namespace pgolf::test {
namespace {

constexpr int kTokens = 200, kHeads = 2, kTile = 128, kWidth = 64;
constexpr uint32_t kBox = 64 * 128;  // bytes of 64 rows

// Shared memory: a tile of q, two stages of k and v, p of each group, float32 sums of each group, barriers.
constexpr uint32_t kQ = 0, kK = kQ + 2 * kBox, kV = kK + 4 * kBox, kP = kV + 4 * kBox, kSums = kP + 4 * kBox;
constexpr uint32_t kBarriers = kSums + 4 * kBox, kBytes = kBarriers + 5 * 8;

struct Maps {
  CUtensorMap q, k, v, out, transposed;
};

void produce(const Maps& maps, uint32_t base, int head, int first) {
  const uint32_t bar = base + kBarriers;
  mbarrier_expect_bytes(bar + 32, 2 * kBox);
  tma_load_3d(base + kQ, &maps.q, bar + 32, 0, head, first);
  for (int tile = 0; tile < 2; ++tile) {
    for (int stage = 0; stage < 2; ++stage) {
      const uint32_t at = static_cast<uint32_t>(stage);
      mbarrier_wait(bar + 16 + 8 * at, (static_cast<uint32_t>(tile) & 1) ^ 1);
      mbarrier_expect_bytes(bar + 8 * at, 4 * kBox);
      tma_load_3d(base + kK + at * 2 * kBox, &maps.k, bar + 8 * at, 0, head, stage * kTile);
      tma_load_3d(base + kV + at * 2 * kBox, &maps.v, bar + 8 * at, 0, head, stage * kTile);
    }
  }
}

// p = q k^T, rounded; o += p v, twice; transposed += p^T q, once, by the copy engine; out = p of the last
// keys.
void consume(const Maps& maps, uint32_t base, int head, int first, int group, float* o) {
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4, thread = warp * 32 + lane;
  const uint32_t bar = base + kBarriers, p_at = base + kP + static_cast<uint32_t>(group) * 2 * kBox;
  const uint32_t sums_at = base + kSums + static_cast<uint32_t>(group) * 2 * kBox;
  float sum[32];
  mbarrier_wait(bar + 32, 0);
  const uint64_t q = wgmma_descriptor<16>(base + kQ + static_cast<uint32_t>(group) * kBox);
  for (int step = 0; step < 4; ++step) {
    const uint32_t stage = static_cast<uint32_t>(step) % 2, phase = static_cast<uint32_t>(step) / 2;
    mbarrier_wait(bar + 8 * stage, phase);
    float s[64];
    const uint64_t k = wgmma_descriptor<16>(base + kK + stage * 2 * kBox);
    wgmma_fence();
    for (uint32_t i = 0; i < 4; ++i)
      wgmma_64x128x16<true, true>(s, wgmma_advance(q, 32 * i), wgmma_advance(k, 32 * i), i > 0,
                                  __nv_bfloat16{});
    wgmma_commit();
    check(std::isnan(s[0]) && std::isnan(s[63]), "accumulators in flight are NaN");
    wgmma_wait<0>();
    wgmma_keep_order(s);
    uint32_t p[32];
    for (int i = 0; i < 32; ++i) p[i] = pack_bfloat16(s[2 * i], s[2 * i + 1]);
    // The copy engine has read the p and the sums before.
    if (thread == 0) tma_store_wait_read<0>();
    named_sync(1 + group, 128);
    for (uint32_t j = 0; j < 8; ++j) {
      // Matrices: rows 0-7 and 8-15 of the warp's, columns 16 j .. and 16 j + 8 ..
      const uint32_t row = static_cast<uint32_t>(warp * 16 + lane % 16),
                     column = j * 16 + static_cast<uint32_t>(lane) / 16 * 8;
      const uint32_t chunk = column % 64 / 8 ^ row % 8;
      stmatrix_x4<false>(p_at + column / 64 * kBox + row * 128 + chunk * 16, p[4 * j], p[4 * j + 1],
                         p[4 * j + 2], p[4 * j + 3]);
    }
    fence_proxy_shared();
    named_sync(1 + group, 128);
    // o += p v, p from registers.
    const uint64_t v = wgmma_descriptor(base + kV + stage * 2 * kBox);
    wgmma_fence();
    for (uint32_t i = 0; i < 8; ++i)
      wgmma_64x64x16<false>(sum, p + 4 * i, wgmma_advance(v, 2048 * i), step > 0 || i > 0);
    wgmma_commit();
    // 64 keys at a time: p^T q, both transposed in shared memory.
    for (uint32_t half = 0; half < 2 && step < 2; ++half) {
      float t[32];
      const uint64_t a = wgmma_descriptor(p_at + half * kBox);
      const uint64_t b = wgmma_descriptor(base + kQ + static_cast<uint32_t>(group) * kBox);
      wgmma_fence();
      for (uint32_t i = 0; i < 4; ++i)
        wgmma_64x64x16<false, false>(t, wgmma_advance(a, 2048 * i), wgmma_advance(b, 2048 * i), i > 0);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_keep_order(t);
      if (thread == 0) tma_store_wait_read<0>();
      named_sync(1 + group, 128);
      for (int i = 0; i < 32; ++i) {
        // Two tiles of 32 columns with the swizzle.
        const uint32_t row = static_cast<uint32_t>(warp * 16 + lane / 4 + i / 2 % 2 * 8);
        const uint32_t column = static_cast<uint32_t>(i / 4 * 8 + lane % 4 * 2 + i % 2);
        const uint32_t piece = (column % 32 / 4) ^ (row % 8);
        const uint32_t at = sums_at + column / 32 * kBox + row * 128 + piece * 16 + column % 4 * 4;
        *reinterpret_cast<float*>(shared_pointer(at)) = t[i];
      }
      fence_proxy();
      named_sync(1 + group, 128);
      if (thread == 0) {
        for (uint32_t i = 0; i < 2; ++i)
          tma_add(&maps.transposed, sums_at + i * kBox, static_cast<int>(32 * i), 0,
                  step * 128 + static_cast<int>(half) * 64);
        tma_store_commit();
      }
    }
    wgmma_wait<0>();
    mbarrier_arrive(bar + 16 + 8 * stage);
    if (step == 3 && thread == 0) {
      for (int half = 0; half < 2; ++half)
        tma_store(&maps.out, p_at + static_cast<uint32_t>(half) * kBox, 64 * half, 0, first + 64 * group);
      tma_store_commit();
    }
  }
  if (thread == 0) tma_store_wait();
  for (int i = 0; i < 32; ++i) {
    const int row = first + group * 64 + warp * 16 + lane / 4 + i / 2 % 2 * 8;
    if (row < kTokens) o[row * kWidth + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
  static_cast<void>(head);
}

void kernel(const Maps& maps, int head, float* o) {
  const uint32_t base = shared_address(dynamic_shared()), bar = base + kBarriers;
  if (threadIdx.x == 0) {
    for (uint32_t i = 0; i < 5; ++i) mbarrier_init(bar + 8 * i, i == 2 || i == 3 ? 256 : 1);
    mbarrier_init_fence();
    tma_prefetch(&maps.q);
  }
  __syncthreads();
  const int first = static_cast<int>(blockIdx.x) * kTile;
  if (threadIdx.x < 128) {
    registers_lower<24>();
    if (threadIdx.x == 0) produce(maps, base, head, first);
  } else {
    registers_raise<240>();
    consume(maps, base, head, first, static_cast<int>(threadIdx.x) / 128 - 1, o);
  }
}

using Matrix = std::vector<bf16>;

Matrix random_matrix(unsigned seed) {
  Matrix values;
  for (const float value : normal_values(kTokens * kHeads * kWidth, seed))
    values.push_back(from_float<bf16>(value));
  return values;
}

CUtensorMap map_of(const Matrix& m) {
  return tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, m.data(),
                    {.rank = 3,
                     .sizes = {kWidth, kHeads, kTokens},
                     .strides = {kWidth * 2, kHeads * kWidth * 2},
                     .box = {64, 1, kTile}});
}

void test_products(uint32_t seed) {
  const Matrix q = random_matrix(1), k = random_matrix(2), v = random_matrix(3);
  const int head = 1;
  Matrix out(kTokens * 128, from_float<bf16>(NAN));
  std::vector<float> o(kTokens * kWidth, NAN), transposed(2 * kTile * kWidth, 1.0f);
  Maps maps{
      map_of(q), map_of(k), map_of(v),
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, out.data(),
                 {.rank = 3, .sizes = {128, 1, kTokens}, .strides = {256, 256}, .box = {64, 1, 64}}),
      tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, transposed.data(),
                 {.rank = 3, .sizes = {kWidth, 1, 2 * kTile}, .strides = {256, 256}, .box = {32, 1, 64}})};
  launch({.grid = {2}, .threads = 384, .shared = kBytes, .seed = seed},
         [&] { kernel(maps, head, o.data()); });

  const auto at = [&](const Matrix& m, int row, int column) {
    return double{to_float(m[static_cast<size_t>((row * kHeads + head) * kWidth + column)])};
  };
  std::vector<double> want_o(kTokens * kWidth), want_t(2 * kTile * kWidth, 1.0);
  for (int row = 0; row < kTokens; ++row) {
    for (int key = 0; key < kTokens; ++key) {
      double s = 0.0;
      for (int l = 0; l < kWidth; ++l) s += at(q, row, l) * at(k, key, l);
      const double p = to_float(from_float<bf16>(static_cast<float>(s)));
      for (int l = 0; l < kWidth; ++l) {
        want_o[static_cast<size_t>(row * kWidth + l)] += 2.0 * p * at(v, key, l);
        want_t[static_cast<size_t>(key * kWidth + l)] += p * at(q, row, l);
      }
      if (key >= kTile)
        check_close(to_float(out[static_cast<size_t>(row * 128 + key - kTile)]), s, 1.0 / 250, 1e-4, "p");
    }
  }
  // A sum of s in another order may round to another p.
  for (size_t i = 0; i < want_o.size(); ++i) check_close(o[i], want_o[i], 1e-4, 0.5, "p v");
  for (size_t i = 0; i < want_t.size(); ++i) check_close(transposed[i], want_t[i], 1e-4, 0.5, "p^T q");
}

// A kernel that ends with an error which says `what`, in all interleavings that are tried.
void check_fails(const std::string& what, unsigned int threads, const std::function<void()>& faulty) {
  for (uint32_t seed = 0; seed < 12; ++seed) {
    std::string message = "no error";
    try {
      launch({.grid = {1}, .threads = threads, .shared = 65536, .seed = seed}, faulty);
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    check(message.find(what) != std::string::npos, "want an error of '" + what + "', got: " + message);
  }
}

void one_barrier(uint32_t arrivals) {
  if (threadIdx.x == 0) mbarrier_init(0, arrivals), mbarrier_init_fence();
  __syncthreads();
}

void test_faults() {
  const Matrix source = random_matrix(1);
  const CUtensorMap map = map_of(source);
  check_fails("2 of 34 arrivals and 0 bytes missing", 32, [] {
    one_barrier(34);
    mbarrier_arrive(0);
    mbarrier_wait(0, 0);
  });
  check_fails("too many arrivals", 32, [] {
    one_barrier(31);
    if (threadIdx.x < 30) mbarrier_arrive(0);
    __syncwarp();
    if (threadIdx.x == 0) mbarrier_arrive(0, 2);
  });
  check_fails("bytes expected that did not come", 32, [&] {
    one_barrier(1);
    if (threadIdx.x == 0) {
      mbarrier_expect_bytes(0, 4 * kBox);
      tma_load_3d(1024, &map, 0, 0, 0, 0);
    }
  });
  check_fails("0 of 1 arrivals and 16384 bytes missing", 32, [&] {
    one_barrier(1);
    if (threadIdx.x == 0) {
      mbarrier_expect_bytes(0, 4 * kBox);
      tma_load_3d(1024, &map, 0, 0, 0, 0);
      mbarrier_wait(0, 0);
    }
  });
  check_fails("a copy overwrites the mbarrier", 32, [&] {
    one_barrier(1);
    if (threadIdx.x == 0) {
      mbarrier_expect_bytes(0, 2 * kBox);
      tma_load_3d(0, &map, 0, 0, 0, 0);
      mbarrier_wait(0, 0);
    }
  });
  check_fails("of a block's shared memory, which has 65536", 32, [&] {
    one_barrier(1);
    if (threadIdx.x == 0) tma_load_3d(65536 - 8192, &map, 0, 0, 0, 0);
  });
  check_fails("(32 of 64 threads are there)", 64, [] {
    if (threadIdx.x < 32) named_sync(1, 64);
  });
  check_fails("again, before all others are there", 64, [] {
    if (threadIdx.x < 32) named_arrive(1, 64), named_arrive(1, 64);
  });
  check_fails("others of its warp or block are at", 32, [] {
    if (threadIdx.x < 16) __syncwarp();
    __shfl_sync(0xffffffffu, 1, 0);
  });
  check_fails("without fence_proxy", 32, [&] {
    stmatrix_x4<false>(1024 + threadIdx.x * 16, 0, 0, 0, 0);
    if (threadIdx.x != 5) fence_proxy_shared();
    __syncwarp();
    if (threadIdx.x == 0) tma_store(&map, 1024, 0, 0, kTokens), tma_store_commit(), tma_store_wait();
  });
  check_fails("tma_store_wait_read or tma_store_wait is missing", 32, [&] {
    if (threadIdx.x == 0) tma_store(&map, 1024, 0, 0, kTokens), tma_store_commit();
  });
  check_fails("tma_add adds floats", 32, [&] { tma_add(&map, 1024, 0, 0, 0); });
  const auto multiply = [](bool fence, uint32_t bytes) {
    float d[32] = {};
    const uint64_t operand = wgmma_descriptor(bytes);
    if (fence) wgmma_fence();
    wgmma_64x64x16<true, true>(d, operand, operand, 0);
    wgmma_commit();
    wgmma_wait<0>();
  };
  check_fails("no wgmma_fence", 128, [&] { multiply(false, 1024); });
  check_fails("different products or descriptors", 128, [&] { multiply(true, threadIdx.x / 32 * 1024); });
  check_fails("starts inside a pattern", 128, [&] { multiply(true, 128); });
  check_fails("to issue a product", 128, [&] {
    if (threadIdx.x < 96) multiply(true, 1024);
    __syncthreads();
  });
  check_fails("ended with products in flight", 128, [&] {
    float d[32];
    wgmma_fence();
    wgmma_64x64x16<true, true>(d, wgmma_descriptor(0), wgmma_descriptor(0), 0);
    wgmma_commit();
  });
}

// What is overwritten before it was read, or read before it is there, is wrong in some interleaving.
void test_races_show() {
  const Matrix source = random_matrix(1);
  const CUtensorMap map = map_of(source);
  int early = 0, late = 0, added = 0;
  for (uint32_t seed = 0; seed < 24; ++seed) {
    alignas(16) float sums[32] = {};
    const CUtensorMap sums_map =
        tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, sums,
                   {.rank = 3, .sizes = {32, 1, 1}, .strides = {128, 128}, .box = {32, 1, 1}});
    bool missed = false;
    launch({.grid = {1}, .threads = 32, .shared = 65536, .seed = seed}, [&] {
      one_barrier(1);
      if (threadIdx.x != 0) return;
      mbarrier_expect_bytes(0, 2 * kBox);
      tma_load_3d(1024, &map, 0, 0, 0, 0);
      uint16_t bits;
      std::memcpy(&bits, dynamic_shared() + 1024, 2);
      missed = bits != source[0].bits;
      mbarrier_wait(0, 0);
      std::memcpy(&bits, dynamic_shared() + 1024, 2);
      check(bits == source[0].bits, "a load has landed after the wait");
      float* const values = reinterpret_cast<float*>(dynamic_shared() + 1024);
      values[0] = 1.0f;
      fence_proxy();
      tma_add(&sums_map, 1024, 0, 0, 0);
      tma_store_commit();
      values[0] = 2.0f;
      tma_store_wait();
    });
    early += missed;
    late += sums[0] == 2.0f;
    added += sums[0] == 1.0f;
  }
  check(early > 0, "a load is late in some interleaving");
  check(late > 0 && added > 0 && late + added == 24, "a source is read early and late");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    pgolf::test::test_faults();
    pgolf::test::test_races_show();
    for (uint32_t seed = 0; seed < 12; ++seed) pgolf::test::test_products(seed);
  });
}
