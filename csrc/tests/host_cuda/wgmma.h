// Products of warpgroups on the host, see kernels/ptx_sm90.cuh next to this file.
#pragma once

#include "hopper.h"

namespace pgolf::test {

struct Product {
  int columns;
  bool is_half, a_along_k, b_along_k, a_in_registers, accumulate;
  uint64_t a, b;
  bool operator==(const Product&) const = default;
};

// The accumulators of one array `d` of the threads, while products on it are in flight; the threads' own ones
// hold NaN then.
struct Tile {
  int columns;
  alignas(64) float values[64][192];
  std::array<float*, 128> lanes{};
  int users = 0;      // lanes that have not got their values back
  uint64_t last = 0;  // its newest product
};

// Of a warpgroup. Products are numbered in the order in which threads issue them.
struct Products {
  struct Entry {
    Product product;
    Tile* tile;
    int issued = 0;  // threads that have
    std::array<std::array<uint32_t, 4>, 128> registers;
  };
  struct Lane {
    uint64_t issued = 0;
    size_t groups = 0;  // committed
    bool fenced = false;
  };
  std::deque<Entry> entries;  // products done, done + 1, ...
  uint64_t done = 0;
  std::vector<uint64_t> ends;  // of the groups: the number of products before them and in them
  std::array<Lane, 128> lanes;
  std::vector<std::unique_ptr<Tile>> tiles;
  std::vector<Fiber*> waiting;
};

inline Products& products() {
  Hopper& state = hopper(this_block());
  std::shared_ptr<void>& mine = state.products[threadIdx.x / 128];
  if (mine == nullptr) {
    if (this_block().live < 128) fail("a product needs the 128 threads of a warpgroup");
    mine = std::make_shared<Products>();
  }
  return *static_cast<Products*>(mine.get());
}

inline bool products_in_flight(const void* products) {
  const auto* const all = static_cast<const Products*>(products);
  return !all->tiles.empty() || !all->entries.empty();
}

inline float element(uint16_t bits, bool is_half) {
  return is_half ? to_float(f16{bits}) : to_float(bf16{bits});
}

// Elements (line, k) of an operand, lines first .. first + lines - 1 along m or n and 16 along k, in
// to[k * pitch + line - first], or transposed to[(line - first) * pitch + k].
template <bool LineMajor>
void decode(Block& block, uint64_t descriptor, bool along_k, int lines, bool is_half, float* to, int pitch) {
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) fail("an operand without the 128-byte swizzle, which is not modelled");
  if ((descriptor >> 49 & 7) != 0 || (start >> 7 & 7) != 0)
    fail("an operand that starts inside a pattern of 1024 bytes, byte " + number(start));
  if (along_k ? start % 128 > 96 : start % 128 != 0)
    fail("an operand that leaves its rows of 128 bytes, byte " + number(start));
  const int outer = along_k ? lines : 16, chunks = along_k ? 2 : lines / 8;
  for (int row = 0; row < outer; ++row) {
    for (int chunk = 0; chunk < chunks; ++chunk) {
      uint32_t address =
          start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8) * 128;
      address += static_cast<uint32_t>(chunk / 8) * leading + static_cast<uint32_t>(chunk % 8) * 16;
      address = swizzled(address);
      uint16_t bits[8];
      std::memcpy(bits, shared_at(block, address, 16, "a product"), 16);
      check_fenced(block, address, "a product");
      for (int e = 0; e < 8; ++e) {
        const int line = along_k ? row : chunk * 8 + e, k = along_k ? chunk * 8 + e : row;
        to[LineMajor ? line * pitch + k : k * pitch + line] = element(bits[e], is_half);
      }
    }
  }
}

__attribute__((no_sanitize("address", "undefined"), optimize("O3"), noinline)) inline void multiply_add(
    float* __restrict__ c, const float* __restrict__ a, const float* __restrict__ b, int columns) {
  for (int row = 0; row < 64; ++row) {
    for (int k = 0; k < 16; ++k) {
      const float left = a[row * 16 + k];
      for (int n = 0; n < columns; ++n) c[row * 192 + n] += left * b[k * 192 + n];
    }
  }
}

// The oldest product that is not done: operands are read now.
inline void execute_front(Block& block, Products& all) {
  Products::Entry& entry = all.entries.front();
  const Product& product = entry.product;
  alignas(64) static float a[64 * 16], b[16 * 192];
  if (product.a_in_registers) {
    for (int thread = 0; thread < 128; ++thread) {
      for (int word = 0; word < 4; ++word) {
        const int row = thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8, k = thread % 4 * 2 + word / 2 * 8;
        const uint32_t pair = entry.registers[static_cast<size_t>(thread)][static_cast<size_t>(word)];
        a[row * 16 + k] = element(static_cast<uint16_t>(pair), product.is_half);
        a[row * 16 + k + 1] = element(static_cast<uint16_t>(pair >> 16), product.is_half);
      }
    }
  } else {
    decode<true>(block, product.a, product.a_along_k, 64, product.is_half, a, 16);
  }
  decode<false>(block, product.b, product.b_along_k, product.columns, product.is_half, b, 192);
  if (!product.accumulate) std::memset(entry.tile->values, 0, sizeof(entry.tile->values));
  multiply_add(&entry.tile->values[0][0], a, b, product.columns);
  all.entries.pop_front();
  ++all.done;
}

// Element i of the accumulators of a thread of the warpgroup.
inline float& accumulator(Tile& tile, uint32_t thread, uint32_t i) {
  return tile.values[thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8][i / 4 * 8 + thread % 4 * 2 + i % 2];
}

inline void issue(float* d, const Product& product, const uint32_t* registers) {
  Products& all = products();
  const uint32_t thread = threadIdx.x % 128;
  Products::Lane& lane = all.lanes[thread];
  const size_t at = static_cast<size_t>(lane.issued - all.done);
  const auto count = static_cast<uint32_t>(product.columns) / 2;
  if (at == all.entries.size()) all.entries.push_back({.product = product, .tile = nullptr, .registers = {}});
  Products::Entry& entry = all.entries[at];
  if (!(entry.product == product))
    fail("the threads of a warpgroup issue different products or descriptors, or not in the same order");
  Tile* tile = nullptr;
  for (const auto& candidate : all.tiles) {
    if (candidate->lanes[thread] == d) tile = candidate.get();
  }
  if (tile == nullptr) {
    if (!lane.fenced)
      fail(
          "no wgmma_fence between the last wgmma_wait and a product on accumulators that may have been "
          "touched since");
    if (entry.tile == nullptr) {
      all.tiles.push_back(std::make_unique<Tile>());
      entry.tile = all.tiles.back().get();
      entry.tile->columns = product.columns;
    }
    tile = entry.tile;
    if (tile->lanes[thread] != nullptr) fail("the threads of a warpgroup do not use the same accumulators");
    tile->lanes[thread] = d;
    ++tile->users;
    for (uint32_t i = 0; i < count; ++i) {
      accumulator(*tile, thread, i) = d[i];
      d[i] = __builtin_nanf("");
    }
  }
  if (entry.tile == nullptr) entry.tile = tile;
  if (entry.tile != tile || tile->columns != product.columns)
    fail("the threads of a warpgroup do not use the same accumulators");
  tile->last = std::max(tile->last, lane.issued);
  if (registers != nullptr) std::copy(registers, registers + 4, entry.registers[thread].begin());
  ++lane.issued;
  if (++entry.issued == 128) {
    scheduler().wake(all.waiting);
    scheduler().later([&block = this_block(), &all] {
      if (!all.entries.empty() && all.entries.front().issued == 128) execute_front(block, all);
    });
  }
}

inline void commit() {
  Products& all = products();
  Products::Lane& lane = all.lanes[threadIdx.x % 128];
  if (lane.groups == all.ends.size()) all.ends.push_back(lane.issued);
  if (all.ends[lane.groups] != lane.issued) fail("the threads of a warpgroup commit different products");
  ++lane.groups;
  scheduler().perhaps_give_way();
}

// Completes all but the newest `pending` groups, and gives this thread its accumulators back.
inline void wait_products(size_t pending) {
  exchange<1>("wgmma_wait", {static_cast<uint32_t>(pending)}, [](const auto&) {});
  Products& all = products();
  const uint32_t thread = threadIdx.x % 128;
  Products::Lane& lane = all.lanes[thread];
  lane.fenced = false;
  const uint64_t target = lane.groups > pending ? all.ends[lane.groups - 1 - pending] : 0;
  while (all.done < target) {
    if (all.entries.front().issued == 128) {
      execute_front(this_block(), all);
    } else {
      scheduler().sleep(all.waiting, {"the other threads of the warpgroup to issue a product"});
    }
  }
  for (size_t i = 0; i < all.tiles.size();) {
    Tile& tile = *all.tiles[i];
    float*& d = tile.lanes[thread];
    if (d != nullptr && tile.last < target) {
      for (uint32_t e = 0; e < static_cast<uint32_t>(tile.columns) / 2; ++e)
        d[e] = accumulator(tile, thread, e);
      d = nullptr;
      if (--tile.users == 0) {
        all.tiles.erase(all.tiles.begin() + static_cast<std::ptrdiff_t>(i));
        continue;
      }
    }
    ++i;
  }
}

}  // namespace pgolf::test
