// What the forward and the backward kernel of doc_attention.h share.
#pragma once

#include "kernels/doc_attention.h"
#include "kernels/ptx_sm90.cuh"
#include "kernels/registers.h"
#include "kernels/tensor_map.cuh"

namespace pgolf::attention {

constexpr int kWidth = kDocWidth;
constexpr int kRowBytes = kWidth * 2;  // of an operand in shared memory: the width of the swizzle
constexpr int kGroup = 128;            // threads of a warpgroup
constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;

// The map of (tokens, heads, 64), of which a box is 128 bytes of the columns of `box` tokens of a head.
template <typename T>
CUtensorMap head_map(const T* first, int64_t tokens, int heads, int64_t stride, int box) {
  const auto type = sizeof(T) == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  return tensor_map(type, first,
                    {.rank = 3,
                     .sizes = {kWidth, static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens)},
                     .strides = {kWidth * sizeof(T), static_cast<cuuint64_t>(stride) * sizeof(T)},
                     .box = {kRowBytes / sizeof(T), 1, static_cast<cuuint32_t>(box)}});
}

template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == Stages) stage = 0, phase ^= 1;
  }
};

// Items are tiles, one for each group. A block draws the next one of plan_kernel's list whenever it is free:
// one thread does (Draw), and the other warps read what it drew from shared memory (Walk).
struct Items {
  const DocTile* tiles;
  int groups, item = 0;
  __device__ Items(const DocTile* plan, int groups) : tiles(plan + 1), groups(groups) {}
  __device__ int group() const { return item % groups; }
  __device__ DocTile tile() const { return tiles[item / groups]; }
};

constexpr int kDraws = 2;  // how far ahead
constexpr int kDrawnBytes = kDraws * (4 + 8 + 8);
static_assert(kDraws % 2 == 0, "mbarriers of 8 bytes follow items of 4");

// What was drawn, in shared memory; -1: nothing is left.
struct Drawn {
  uint32_t base;
  uint32_t draws = 0;
  __device__ int& item() const { return *reinterpret_cast<int*>(shared_pointer(base + stage() * 4)); }
  __device__ uint32_t full() const { return base + kDraws * 4 + stage() * 8; }
  __device__ uint32_t empty() const { return base + kDraws * 12 + stage() * 8; }
  __device__ uint32_t phase() const { return draws / kDraws % 2; }
  // For as many warps that walk.
  __device__ void init(int warps) {
    for (draws = 0; draws < kDraws; ++draws) {
      mbarrier_init(full(), 1);
      mbarrier_init(empty(), warps);
    }
  }

 private:
  __device__ uint32_t stage() const { return draws % kDraws; }
};

struct Walk : Items {
  Drawn drawn;
  __device__ Walk(const DocTile* plan, int groups, uint32_t drawn) : Items(plan, groups), drawn{drawn} {}
  // Goes to the next item; false if there is none. All lanes of a warp.
  __device__ bool next() {
    mbarrier_wait(drawn.full(), drawn.phase());
    item = __shfl_sync(0xffffffffu, drawn.item(), 0);
    if (threadIdx.x % 32 == 0) mbarrier_arrive(drawn.empty());
    ++drawn.draws;
    return item >= 0;
  }
};

struct Draw : Items {
  Drawn drawn;
  int *counter, count;
  int begin, ready;
  // own_first: a block begins with the item of its own number, and saves the time to ask. Without it, only
  // blocks that run have items, in their order: a block may wait for what others do with items before its
  // own.
  __device__ Draw(DocTile* plan, int groups, uint32_t drawn, bool own_first)
      : Items(plan, groups), drawn{drawn}, counter(&plan->begin), count(plan->first * groups) {
    begin = own_first ? static_cast<int>(gridDim.x) : 0;
    ready = static_cast<int>(blockIdx.x);
    if (!own_first) ask();
  }
  // Asks for the item after this one, which takes a while. Once before each next() but the first.
  __device__ void ask() { ready = begin + atomicAdd(counter, 1); }
  // Draws the next item; false if there is none. One thread.
  __device__ bool next() {
    item = ready < count ? ready : -1;
    mbarrier_wait(drawn.empty(), drawn.phase() ^ 1);
    drawn.item() = item;
    mbarrier_arrive(drawn.full());
    ++drawn.draws;
    return item >= 0;
  }
};

// Place of a thread in its warpgroup. A tile of products has its rows `row` and `row + 8`, and columns
// 8 n + column, 8 n + column + 1 of them.
struct Place {
  int group, warp, lane, row, column;
  __device__ Place() {
    const int thread = static_cast<int>(threadIdx.x);
    // From one lane, so that the compiler knows it to be the same in the warp.
    group = __shfl_sync(0xffffffffu, thread / kGroup - 1, 0);
    warp = thread / 32 % 4;
    lane = thread % 32;
    row = warp * 16 + lane / 4;
    column = lane % 4 * 2;
  }
};

// The pairs of columns of a tile of products, rounded: also the A operand of a product over these columns.
template <int Count>
__device__ __forceinline__ void round_pairs(uint32_t (&bits)[Count / 2], const float (&value)[Count]) {
  PGOLF_UNROLL
  for (int i = 0; i < Count / 2; ++i) bits[i] = pack_bfloat16(value[2 * i], value[2 * i + 1]);
}

// Where a row of 64 columns has 16 bytes, with the 128-byte swizzle.
__device__ __forceinline__ uint32_t piece_at(uint32_t tile, int row, int piece) {
  return tile + row * kRowBytes + (piece ^ (row % 8)) * 16;
}

// Where this lane's row of four 8 x 8 matrices begins: lane l has row l % 8 of matrix l / 8. They are rows 0
// and 8 from `row` on, then the same rows of the next 8 columns, from 16 `chunk` on. Loaded or stored in this
// order they are the A operand of a product over these columns.
__device__ __forceinline__ uint32_t matrix_row(uint32_t tile, int row, int chunk, const Place& at) {
  return piece_at(tile, row + at.lane % 16, 2 * chunk + at.lane / 16);
}

// Writes 16 rows of this warp from `row` on, of which `bits` has the columns from 16 `chunk` on.
__device__ __forceinline__ void write_rows(uint32_t tile, int row, int chunk, const uint32_t* bits,
                                           const Place& at) {
  stmatrix_x4<false>(matrix_row(tile, row, chunk, at), bits[0], bits[1], bits[2], bits[3]);
}

// Writes a warpgroup's 64 rows of sums to memory in bf16, whole lines at a time, through shared memory, which
// the warpgroup may write. target(row) is where the row's 64 columns begin, null for none.
template <typename Target>
__device__ __forceinline__ void write_sums(const float (&sum)[32], uint32_t tile, const Place& at,
                                           const Target& target) {
  uint32_t bits[16];
  round_pairs(bits, sum);
  PGOLF_UNROLL
  for (int chunk = 0; chunk < 4; ++chunk) write_rows(tile, at.warp * 16, chunk, bits + 4 * chunk, at);
  named_sync(2 + at.group, kGroup);
  const int thread = static_cast<int>(threadIdx.x) % kGroup, piece = thread % 8;
  PGOLF_UNROLL
  for (int i = 0; i < 4; ++i) {
    const int row = thread / 8 + 16 * i;
    bf16* const to = target(row);
    if (to == nullptr) continue;
    reinterpret_cast<uint4*>(to)[piece] =
        *reinterpret_cast<const uint4*>(shared_pointer(piece_at(tile, row, piece)));
  }
}

}  // namespace pgolf::attention
