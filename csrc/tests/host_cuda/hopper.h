// The state of Hopper's instructions on the host, see kernels/ptx_sm90.cuh next to this file: mbarriers,
// named barriers, and copies between global and shared memory.
#pragma once

#include <cuda.h>

#include <deque>
#include <map>

#include "kernels/ptx.cuh"

namespace pgolf::test {

struct Mbarrier {
  uint32_t count, pending;
  int64_t bytes = 0;  // expected and not there yet
  uint32_t parity = 0;
  bool announced = false;  // to the copy engine and to other blocks, by a fence
  std::vector<Fiber*> waiting;
};

struct NamedBarrier {
  int threads = 0;
  uint32_t generation = 0;
  std::vector<bool> arrived;
  int count = 0;
  std::vector<Fiber*> waiting;
};

// Of a block.
struct Hopper {
  std::map<uint32_t, Mbarrier> barriers;
  std::array<NamedBarrier, 16> named;
  // 16-byte pieces of shared memory that stmatrix wrote: the warp, plus one, and how many of its writes came
  // before. The copy engine and products may read them once each lane of the warp has fenced.
  struct Written {
    uint32_t warp = 0;
    uint64_t number = 0;
  };
  std::vector<Written> written;
  std::vector<uint64_t> writes;                  // of each warp
  std::vector<std::array<uint64_t, 32>> fenced;  // how many of them a lane has fenced
  std::vector<int> registers;                    // of a thread of each warpgroup; 0: never set
  std::vector<std::shared_ptr<void>> products;   // of each warpgroup, see wgmma.h
};

inline std::string number(int64_t value) { return std::to_string(value); }

inline Hopper& hopper(Block& block);

// Bytes [address, address + count) of a block's shared memory.
inline unsigned char* shared_at(Block& block, uint32_t address, size_t count, const char* what) {
  if (address + count > block.shared.size())
    fail(std::string(what) + " of bytes " + number(address) + " to " +
         number(static_cast<int64_t>(address + count)) + " of a block's shared memory, which has " +
         number(static_cast<int64_t>(block.shared.size())));
  return block.shared.data() + address;
}

inline Mbarrier& barrier_at(Block& block, uint32_t address) {
  const auto found = hopper(block).barriers.find(address);
  if (found == hopper(block).barriers.end())
    fail("there is no mbarrier at byte " + number(address) + " of shared memory");
  if (block.live == 0) fail("an arrival at an mbarrier of a block that has ended");
  return found->second;
}

inline std::string state_of(uint32_t address, const Mbarrier& barrier) {
  return "the mbarrier at byte " + number(address) + " (phase of parity " + number(barrier.parity) + ", " +
         number(barrier.pending) + " of " + number(barrier.count) + " arrivals and " + number(barrier.bytes) +
         " bytes missing)";
}

inline void settle(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.parity ^= 1;
  barrier.pending = barrier.count;
  scheduler().wake(barrier.waiting);
}

inline void arrive(Block& block, uint32_t address, uint32_t arrivals) {
  Mbarrier& barrier = barrier_at(block, address);
  if (barrier.pending < arrivals) fail("too many arrivals at " + state_of(address, barrier));
  barrier.pending -= arrivals;
  settle(barrier);
}

inline void complete(Block& block, uint32_t address, int64_t bytes) {
  Mbarrier& barrier = barrier_at(block, address);
  if (!barrier.announced) fail("no mbarrier_init_fence before a copy to " + state_of(address, barrier));
  barrier.bytes -= bytes;
  settle(barrier);
}

// Of one warpgroup, see wgmma.h.
inline bool products_in_flight(const void* products);

// The end of a block: what its barriers and copies lack.
inline void end_block(Block& block) {
  for (const auto& [address, barrier] : hopper(block).barriers) {
    if (barrier.bytes != 0)
      throw std::runtime_error("block " + number(block.index.x) +
                               " ended with bytes expected that did not come, or the reverse, at " +
                               state_of(address, barrier));
  }
  for (const auto& products : hopper(block).products) {
    if (products != nullptr && products_in_flight(products.get()))
      throw std::runtime_error("block " + number(block.index.x) + " ended with products in flight");
  }
}

inline Hopper& hopper(Block& block) {
  if (block.hopper == nullptr) {
    auto made = std::make_shared<Hopper>();
    made->written.resize((block.shared.size() + 15) / 16);
    made->writes.resize(block.warps.size());
    made->fenced.resize(block.warps.size());
    made->registers.resize((block.warps.size() + 3) / 4);
    made->products.resize((block.warps.size() + 3) / 4);
    block.hopper = made;
    block.at_end = [&block] { end_block(block); };
    block.explain = [&block](const Wait& wait) -> std::string {
      const std::string what = wait.what;
      if (what == "mbarrier")
        return "parity " + number(wait.detail) + " at " +
               state_of(wait.where, hopper(block).barriers.at(wait.where));
      if (what == "named barrier") {
        const NamedBarrier& barrier = hopper(block).named[wait.where];
        return "named barrier " + number(wait.where) + " (" + number(barrier.count) + " of " +
               number(barrier.threads) + " threads are there)";
      }
      return "";
    };
  }
  return *static_cast<Hopper*>(block.hopper.get());
}

// Fibers that wait for a counter in global memory.
inline std::map<const uint32_t*, std::vector<Fiber*>> counter_waiting;

// What the copy engine or a product reads must have been fenced since stmatrix wrote it.
inline void check_fenced(Block& block, uint32_t address, const char* reader) {
  const Hopper& state = hopper(block);
  const Hopper::Written& written = state.written[address / 16];
  if (written.warp == 0) return;
  for (const uint64_t fenced : state.fenced[written.warp - 1]) {
    if (fenced < written.number)
      fail(std::string(reader) + " reads byte " + number(address) +
           " of shared memory, which stmatrix wrote, without fence_proxy or fence_proxy_shared of each "
           "thread of warp " +
           number(written.warp - 1) + " between them");
  }
}

// The 128-byte swizzle.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 3 & 0x70); }

using Coordinates = std::array<int64_t, 5>;

// Calls piece(shared address, bytes inside, first byte in global memory) for every 16 bytes of a box;
// `inside` has bit i set where byte i lies within the tensor.
template <typename Piece>
void for_box(const CUtensorMap& map, const Coordinates& first, uint32_t shared, const Piece& piece) {
  std::array<uint32_t, 5> at{};
  for (uint32_t row = 0;; ++row) {
    bool inside = true;
    int64_t offset = 0;
    for (size_t i = 1; i < 5; ++i) {
      const int64_t place = first[i] + at[i];
      inside = inside && place >= 0 && place < static_cast<int64_t>(map.sizes[i]);
      offset += place * static_cast<int64_t>(map.strides[i]);
    }
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      uint32_t mask = 0;
      const int64_t byte = first[0] * map.element + chunk * 16;
      for (int e = 0; inside && e < 16; ++e)
        mask |= uint32_t{byte + e >= 0 && byte + e < static_cast<int64_t>(map.sizes[0] * map.element)} << e;
      piece(swizzled(shared + row * 128 + chunk * 16), mask, mask == 0 ? nullptr : map.first + offset + byte);
    }
    size_t i = 1;
    for (; i < 5 && ++at[i] == map.box[i]; ++i) at[i] = 0;
    if (i == 5) return;
  }
}

inline uint32_t box_bytes(const CUtensorMap& map) {
  return 128 * map.box[1] * map.box[2] * map.box[3] * map.box[4];
}

inline void check_map(const CUtensorMap* map, uint32_t rank, uint32_t shared) {
  if (map->magic != kMapMagic || map->rank != rank)
    fail("the copy needs a tensor map of rank " + number(rank));
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) fail("a tensor map is 64-byte aligned");
  if (shared % 128 != 0)
    fail("the copy engine's shared memory is 128-byte aligned, not byte " + number(shared));
}

// One block's part of a load, at the moment when it lands.
inline void land(Block& block, uint32_t shared, const CUtensorMap& map, const Coordinates& first,
                 uint32_t barrier) {
  const uint32_t bytes = box_bytes(map);
  if (block.live == 0) fail("a copy lands in a block that has ended");
  const auto live = hopper(block).barriers.upper_bound(shared + bytes - 1);
  if (live != hopper(block).barriers.begin() && std::prev(live)->first + 8 > shared)
    fail("a copy overwrites " + state_of(std::prev(live)->first, std::prev(live)->second));
  unsigned char* const base = shared_at(block, shared, bytes, "a copy") - shared;
  for_box(map, first, shared, [&](uint32_t to, uint32_t inside, const unsigned char* from) {
    hopper(block).written[to / 16] = {};
    if (inside == 0xffff) {
      std::memcpy(base + to, from, 16);
      return;
    }
    std::memset(base + to, 0, 16);
    for (int e = 0; e < 16; ++e) {
      if ((inside >> e & 1) != 0) base[to + e] = from[e];
    }
  });
  complete(block, barrier, bytes);
}

inline void load(uint32_t rank, uint32_t shared, const CUtensorMap* map, uint32_t barrier,
                 const Coordinates& first, uint32_t blocks) {
  check_map(map, rank, shared);
  Cluster& cluster = this_block().cluster;
  if (blocks == 0 || blocks >> cluster.blocks.size() != 0) fail("a copy to a block that the cluster lacks");
  for (uint32_t i = 0; i < cluster.blocks.size(); ++i) {
    if ((blocks >> i & 1) == 0) continue;
    Block& block = *cluster.blocks[i];
    shared_at(block, shared, box_bytes(*map), "a copy");
    barrier_at(block, barrier);
    scheduler().later(
        [&block, shared, map = *map, first, barrier] { land(block, shared, map, first, barrier); });
  }
  scheduler().perhaps_give_way();
}

inline void add_float(unsigned char* to, const unsigned char* from) {
  float sum, value;
  std::memcpy(&sum, to, 4);
  std::memcpy(&value, from, 4);
  sum += value;
  std::memcpy(to, &sum, 4);
}

// A copy or an addition to global memory.
struct Store {
  Block* block;
  uint32_t shared;
  CUtensorMap map{};
  Coordinates first{};
  uint32_t bytes = 0;
  bool adds = false;
  unsigned char* target = nullptr;         // of a copy without a map
  std::vector<unsigned char> source = {};  // once it has been read
  bool written = false;

  void read() {
    if (!source.empty()) return;
    source.resize(bytes);
    const unsigned char* const from = shared_at(*block, shared, bytes, "a copy");
    for (uint32_t at = 0; at < bytes; at += 16) check_fenced(*block, shared + at, "the copy engine");
    std::memcpy(source.data(), from, bytes);
  }

  void write() {
    read();
    if (written) return;
    written = true;
    if (target != nullptr) {
      std::memcpy(target, source.data(), bytes);
      return;
    }
    for_box(map, first, shared, [&](uint32_t from, uint32_t inside, unsigned char* to) {
      const unsigned char* const piece = source.data() + (from - shared);
      for (uint32_t e = 0; e < 16; e += adds ? 4 : 1) {
        if ((inside >> e & 1) == 0) continue;
        if (adds) {
          add_float(to + e, piece + e);
        } else {
          to[e] = piece[e];
        }
      }
    });
  }
};

// Of a thread.
struct Stores {
  std::vector<std::shared_ptr<Store>> open;
  std::deque<std::vector<std::shared_ptr<Store>>> groups;  // not known to be written
  size_t read = 0;                                         // of them, the first ones known to be read
};

inline Stores& stores() {
  Fiber& thread = this_thread();
  if (thread.hopper == nullptr) {
    auto made = std::make_shared<Stores>();
    thread.hopper = made;
    thread.at_exit = [made] {
      if (!made->open.empty() || made->read < made->groups.size())
        fail(
            "a thread ended before the sources of its copies to global memory were known to be read: "
            "tma_store_wait_read or tma_store_wait is missing");
    };
  }
  return *static_cast<Stores*>(thread.hopper.get());
}

inline void store(Store made) {
  const auto shared = std::make_shared<Store>(std::move(made));
  shared_at(*shared->block, shared->shared, shared->bytes, "a copy");
  stores().open.push_back(shared);
  // Read at one moment, written at a later one.
  scheduler().later([shared] {
    shared->read();
    scheduler().later([shared] { shared->write(); });
  });
  scheduler().perhaps_give_way();
}

inline void wait_read(size_t pending) {
  Stores& mine = stores();
  for (; mine.groups.size() - mine.read > pending && mine.read < mine.groups.size(); ++mine.read) {
    for (const auto& one : mine.groups[mine.read]) one->read();
  }
}

inline void wait_written() {
  Stores& mine = stores();
  for (const auto& group : mine.groups) {
    for (const auto& one : group) one->write();
  }
  mine.groups.clear();
  mine.read = 0;
}

}  // namespace pgolf::test
