// The instructions of kernels/ptx_sm90.cuh on the host, see ../cuda_runtime.h.
//
// What runs asynchronously on the device takes effect at a random moment, by the seed of the launch: some
// seeds put it off until nothing else can run or a wait asks for it. A load lands in each block on its own. A
// store or an addition reads its source at one moment and writes at a later one. A product reads its operands
// once all 128 threads have issued it, in the order of issue; from then until the wait that covers it, the
// threads' accumulators hold NaN. So a missing wait, or memory that is used again too early, gives wrong
// results, and a wait for what never comes ends with a list of what every thread waits for.
//
// Errors: too many arrivals, bytes that do not match those expected, one arrival too many of a thread at a
// named barrier, copies and arrivals to blocks that have ended, sources of copies that were not waited for,
// products that the threads of a warpgroup do not issue alike, a missing wgmma_fence after wgmma_wait, a
// missing fence of the proxy between stmatrix and its reader, and what the instructions require of
// alignments, sizes and ranges.
//
// Not modelled: time; the number of registers, but for the sum of setmaxnreg; the order of memory (all
// threads see a store at once); a missing fence of the proxy after plain stores to shared memory; wgmma_fence
// after writes to registers that no wgmma_wait comes before. Operands of products in registers are read when
// the product is issued. Sums are float32, in the order of k.
#pragma once

#include "../wgmma.h"

namespace pgolf {

[[noreturn]] inline void give_up() { test::fail("the kernel gave up"); }

inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  test::shared_at(test::this_block(), barrier, 8, "an mbarrier");
  if (barrier % 8 != 0) test::fail("an mbarrier is 8-byte aligned, not at byte " + std::to_string(barrier));
  if (arrivals == 0 || arrivals >= 1u << 20) test::fail("an mbarrier counts 1 to 2^20 - 1 arrivals");
  const bool fresh =
      test::hopper(test::this_block())
          .barriers
          .try_emplace(barrier, test::Mbarrier{.count = arrivals, .pending = arrivals, .waiting = {}})
          .second;
  if (!fresh) test::fail("an mbarrier is initialised twice");
}

inline void mbarrier_init_fence() {
  for (auto& [address, barrier] : test::hopper(test::this_block()).barriers) barrier.announced = true;
}

inline void mbarrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  test::barrier_at(test::this_block(), barrier).bytes += bytes;
  test::arrive(test::this_block(), barrier, 1);
  test::scheduler().perhaps_give_way();
}

inline void mbarrier_arrive(uint32_t barrier, uint32_t arrivals) {
  test::arrive(test::this_block(), barrier, arrivals);
  test::scheduler().perhaps_give_way();
}

inline void mbarrier_arrive(uint32_t barrier) { mbarrier_arrive(barrier, 1); }

inline void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  test::Cluster& cluster = test::this_block().cluster;
  if (rank >= cluster.blocks.size()) test::fail("an arrival at a block that the cluster lacks");
  if (!test::barrier_at(*cluster.blocks[rank], barrier).announced)
    test::fail("no mbarrier_init_fence before an arrival from the cluster");
  test::arrive(*cluster.blocks[rank], barrier, 1);
  test::scheduler().perhaps_give_way();
}

// Whether the phase of that parity has ended: the barrier is in a phase of the other one.
inline bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  test::scheduler().give_way();
  return test::barrier_at(test::this_block(), barrier).parity != parity;
}

inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  if (parity > 1) test::fail("the parity of a phase is 0 or 1");
  test::scheduler().perhaps_give_way();
  test::Mbarrier& state = test::barrier_at(test::this_block(), barrier);
  while (state.parity == parity) test::scheduler().sleep(state.waiting, {"mbarrier", barrier, parity});
}

inline void mbarrier_wait_or_trap(uint32_t barrier, uint32_t parity) { mbarrier_wait(barrier, parity); }

inline uint32_t cluster_rank() { return test::this_block().rank; }

inline void cluster_sync() {
  test::Cluster& cluster = test::this_block().cluster;
  uint32_t all = 0;
  for (const auto& block : cluster.blocks) all += block->live;
  test::meet(cluster.meeting, "cluster_sync", all, "cluster_sync");
}

inline void tma_prefetch(const CUtensorMap* map) {
  if (map->magic != test::kMapMagic) test::fail("a prefetch of what is no tensor map");
}

inline void tma_load_2d(uint32_t shared, const CUtensorMap* map, uint32_t bar, int x, int y) {
  test::load(2, shared, map, bar, {x, y}, 1u << cluster_rank());
}

inline void tma_load_2d_multicast(uint32_t shared, const CUtensorMap* map, uint32_t bar, int x, int y,
                                  uint16_t blocks) {
  test::load(2, shared, map, bar, {x, y}, blocks);
}

inline void tma_load_5d_multicast(uint32_t shared, const CUtensorMap* map, uint32_t bar, int x, int y,
                                  uint16_t blocks) {
  test::load(5, shared, map, bar, {x, 0, 0, 0, y}, blocks);
}

inline void tma_load_3d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x, int y, int z) {
  test::load(3, shared, map, barrier, {x, y, z}, 1u << cluster_rank());
}

inline void tma_store(const CUtensorMap* map, uint32_t shared, int x, int y, int z) {
  test::check_map(map, 3, shared);
  test::store({.block = &test::this_block(),
               .shared = shared,
               .map = *map,
               .first = {x, y, z},
               .bytes = test::box_bytes(*map)});
}

inline void tma_add(const CUtensorMap* map, uint32_t shared, int x, int y, int z) {
  test::check_map(map, 3, shared);
  if (map->element != 4) test::fail("tma_add adds floats");
  test::store({.block = &test::this_block(),
               .shared = shared,
               .map = *map,
               .first = {x, y, z},
               .bytes = test::box_bytes(*map),
               .adds = true});
}

inline void bulk_store(void* to, uint32_t shared, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || shared % 16 != 0 || bytes % 16 != 0)
    test::fail("bulk_store copies whole pieces of 16 bytes");
  test::store({.block = &test::this_block(),
               .shared = shared,
               .bytes = bytes,
               .target = static_cast<unsigned char*>(to)});
}

inline void tma_store_commit() {
  test::Stores& mine = test::stores();
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
  test::scheduler().perhaps_give_way();
}

template <int Pending>
void tma_store_wait_read() {
  test::wait_read(Pending);
}

inline void tma_store_wait() { test::wait_written(); }

inline void fence_proxy_shared() {
  test::Hopper& state = test::hopper(test::this_block());
  state.fenced[threadIdx.x / 32][threadIdx.x % 32] = state.writes[threadIdx.x / 32];
}
inline void fence_proxy() { fence_proxy_shared(); }

namespace test {

// One thread at a named barrier.
inline void arrive_named(int id, int threads, bool waits) {
  if (id < 0 || id > 15) fail("there is no named barrier " + std::to_string(id));
  if (threads <= 0 || threads % 32 != 0) fail("a named barrier counts whole warps");
  NamedBarrier& barrier = hopper(this_block()).named[static_cast<size_t>(id)];
  barrier.arrived.resize(this_block().warps.size() * 32);
  if (barrier.count > 0 && barrier.threads != threads)
    fail("named barrier " + std::to_string(id) + " with " + std::to_string(threads) +
         " threads, others count " + std::to_string(barrier.threads));
  if (barrier.arrived[threadIdx.x])
    fail("arrives at named barrier " + std::to_string(id) + " again, before all others are there");
  barrier.threads = threads;
  barrier.arrived[threadIdx.x] = true;
  if (++barrier.count == threads) {
    barrier.count = 0;
    ++barrier.generation;
    std::fill(barrier.arrived.begin(), barrier.arrived.end(), false);
    scheduler().wake(barrier.waiting);
  } else if (waits) {
    const uint32_t generation = barrier.generation;
    while (barrier.generation == generation)
      scheduler().sleep(barrier.waiting, {"named barrier", static_cast<uint32_t>(id)});
  }
  scheduler().perhaps_give_way();
}

inline void set_registers(int registers) {
  if (registers % 8 != 0 || registers < 24 || registers > 256)
    fail("setmaxnreg takes 24 to 256 registers, a multiple of 8");
  std::vector<int>& all = hopper(this_block()).registers;
  all[threadIdx.x / 128] = registers;
  int sum = 0;
  for (const int one : all) sum += one;
  if (sum > 512) fail("the warpgroups of a block have more than 65536 registers");
}

}  // namespace test

inline void named_sync(int id, int threads) { test::arrive_named(id, threads, true); }
inline void named_arrive(int id, int threads) { test::arrive_named(id, threads, false); }

template <int Registers>
void registers_raise() {
  test::set_registers(Registers);
}
template <int Registers>
void registers_lower() {
  test::set_registers(Registers);
}

inline void release_add(uint32_t* counter, uint32_t value) {
  *counter += value;
  test::scheduler().wake(test::counter_waiting[counter]);
  test::scheduler().perhaps_give_way();
}

inline uint32_t load_acquire(const uint32_t* counter) {
  test::scheduler().give_way();
  return *counter;
}

inline void wait_for(const uint32_t* counter, uint32_t need) {
  test::scheduler().perhaps_give_way();
  while (*counter < need) test::scheduler().sleep(test::counter_waiting[counter], {"a counter"});
  fence_proxy();
}

inline uint32_t pack_half(float x, float y) {
  return from_float<f16>(x).bits | static_cast<uint32_t>(from_float<f16>(y).bits) << 16;
}
inline uint32_t pack_bfloat16(float x, float y) {
  return from_float<bf16>(x).bits | static_cast<uint32_t>(from_float<bf16>(y).bits) << 16;
}

template <bool Transposed>
void stmatrix_x4(uint32_t shared, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  test::Block& block = test::this_block();
  test::Hopper& state = test::hopper(block);
  unsigned char* const row = test::shared_at(block, shared, 16, "stmatrix");
  if (shared % 16 != 0)
    test::fail("the rows of stmatrix are 16-byte aligned, not byte " + std::to_string(shared));
  // The lane that gives a row's address writes it.
  test::exchange<4>("stmatrix", {r0, r1, r2, r3}, [&](const auto& words) {
    const uint32_t matrix = lane / 8, line = lane % 8;
    for (uint32_t column = 0; column < 8; ++column) {
      const uint32_t g = Transposed ? column : line, place = Transposed ? line : column;
      const uint32_t word = words[g * 4 + place / 2][matrix];
      const auto bits = static_cast<uint16_t>(place % 2 == 0 ? word : word >> 16);
      std::memcpy(row + 2 * column, &bits, 2);
    }
  });
  state.written[shared / 16] = {warp + 1, ++state.writes[warp]};
  // No lane goes on before all have written.
  test::exchange<0>("stmatrix", {}, [](const auto&) {});
}

inline void wgmma_fence() { test::products().lanes[threadIdx.x % 128].fenced = true; }
inline void wgmma_commit() { test::commit(); }
template <int Pending>
void wgmma_wait() {
  test::wait_products(Pending);
}
template <int N>
void wgmma_keep_order(float (&)[N]) {}

template <uint32_t Leading = 8192>
uint64_t wgmma_descriptor(uint32_t shared) {
  return uint64_t{1} << 62 | uint64_t{1024 >> 4} << 32 | uint64_t{Leading >> 4} << 16 |
         (shared & 0x3ffff) >> 4;
}

inline uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) {
  return (operand & 0xffffffff00000000ull) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

template <bool AAlongK, bool BAlongK, typename T>
void wgmma_64x128x16(float (&d)[64], uint64_t a, uint64_t b, int accumulate, T) {
  test::issue(d, {128, std::is_same_v<T, __half>, AAlongK, BAlongK, false, accumulate != 0, a, b}, nullptr);
}
inline void wgmma_64x192x16(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
  test::issue(d, {192, false, true, true, false, accumulate != 0, a, b}, nullptr);
}
template <bool AAlongK, bool BAlongK>
void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  test::issue(d, {64, false, AAlongK, BAlongK, false, accumulate != 0, a, b}, nullptr);
}
template <bool BAlongK>
void wgmma_64x96x16(float (&d)[48], const uint32_t* a, uint64_t b, int accumulate) {
  test::issue(d, {96, false, true, BAlongK, true, accumulate != 0, 0, b}, a);
}
template <bool BAlongK>
void wgmma_64x64x16(float (&d)[32], const uint32_t* a, uint64_t b, int accumulate) {
  test::issue(d, {64, false, true, BAlongK, true, accumulate != 0, 0, b}, a);
}

}  // namespace pgolf
