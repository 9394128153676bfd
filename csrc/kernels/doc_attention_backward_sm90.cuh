// The main kernel of doc_attention.h's backward pass.
//
// A block takes a tile at a time, 128 keys of a document and of one group, and walks over the queries from
// there to the end of the document, 128 at a time, for each head of the group. dk and dv stay in registers.
// dq is added in memory by the copy engine, in float32: a document is short enough for its dq to stay in L2.
// For the same reason the zeros to which it is added are written here and not by a kernel before this one:
// each block writes those of its tile as soon as it has drawn it, one tile ahead, and sets a flag. A tile
// adds to its own rows and to later ones of its document, whose tiles were drawn before it, so no block waits
// for one that waits for it.
//
// Producer warps copy queries and upstream gradients through rings. Each of two warpgroups of consumers
// owns 64 keys in
//
//   S^T = K Q^T, dP^T = V dY^T   (keys x queries)     dV += P^T dY, dK += dS^T Q
//
// where P^T and dS^T are operands in the registers in which they were computed, and 64 queries in dQ = dS K,
// for which dS^T goes through shared memory, because both warpgroups need all of it. That is one barrier per
// block of queries; two buffers take turns, so a second one is not needed.
//
// The tensor cores get dP^T, dV, the next block's S^T, dQ and dK in this order: exponentials of the next
// block are computed while dQ and dK are multiplied.
//
// Exponentials 2^x have an instruction, of which a multiprocessor computes 16 in the time of 128
// multiplications with additions. So 3 of 8 are polynomials, computed by those, as in FlashAttention-4, and
// both units work at the same time. The two kinds take turns along the scores of a thread. On an H200, passes
// over 98,304 tokens with 0, 1, 2, 3 and 4 of 8 took 1.115, 1.111, 1.079, 1.078 and 1.095 ms. Forward they
// took 0.404, 0.420, 0.437, 0.458 and 0.472 ms: there the polynomials' instructions have no free time to be
// issued in, so that kernel has none.
#pragma once

#include "kernels/doc_attention_sm90.cuh"

namespace pgolf::attention::backward {

constexpr int kTile = kDocKeys;  // keys, and queries of a step
constexpr int kConsumers = 2;    // warpgroups
constexpr int kThreads = (1 + kConsumers) * kGroup;
constexpr int kQueryStages = 3;
constexpr int kGradStages = 2;  // they are free earlier than queries
constexpr int kConsumerRegisters = 232;
constexpr int kProducerRegisters = 40;
static_assert(registers_fit(kConsumers, kConsumerRegisters, kProducerRegisters));
constexpr int kRows = kTile / kConsumers;       // of a warpgroup
constexpr int kTileBytes = kTile * kWidth * 2;  // 128 rows of 128 bytes
constexpr int kScoreBytes = kTile * kTile * 2;  // two such tiles: 64 queries each, a row per key
constexpr int kPartBytes = kRows * kWidth * 4;  // dq of a warpgroup
constexpr int kZeroBytes = kPartBytes / 2;      // 64 rows of 32 columns of dq
constexpr int kNumberBytes = kTile * 4;         // a float per query
constexpr uint32_t kQueriesAt = 2 * kTileBytes;
constexpr uint32_t kGradsAt = kQueriesAt + kQueryStages * kTileBytes;
constexpr uint32_t kScoresAt = kGradsAt + kGradStages * kTileBytes;
constexpr uint32_t kPartsAt = kScoresAt + kGradStages * kScoreBytes;
constexpr uint32_t kZerosAt = kPartsAt + kConsumers * kPartBytes;
constexpr uint32_t kLogSumsAt = kZerosAt + kZeroBytes;
constexpr uint32_t kDeltasAt = kLogSumsAt + kQueryStages * kNumberBytes;
constexpr uint32_t kBarriersAt = kDeltasAt + kGradStages * kNumberBytes;
constexpr int kBarriers = 2 + 2 * (kQueryStages + kGradStages);
constexpr uint32_t kDrawnAt = kBarriersAt + kBarriers * 8;
constexpr int kSharedBytes = 1024 + static_cast<int>(kDrawnAt) + kDrawnBytes;
static_assert(kSharedBytes <= 232448, "shared memory of a block on sm_90");

struct Args {
  DocTile* plan;
  const float* lse;
  const float* delta;
  uint32_t* filled;  // an item's rows of dq are zeros
  float* dq;
  bf16 *dk, *dv;
  int tokens, groups, ratio;  // heads per group
  float scale;
};

// Bit i: whether the exponentials of numbers i, i + 8, ... along the scores of a thread are polynomials. Of
// the choices of 3 that are spread out, this is one with which ptxas spills no register.
constexpr unsigned int kPolynomials = 0x49;
constexpr bool is_polynomial(int index) { return (kPolynomials & 1u << index % 8) != 0; }

// What a polynomial takes of x, for which (kBias + x) / kRange is between 0 and 1: the instruction of that
// product can limit its result to these for nothing. So 2^x is 0, exactly, for x of -127 or less, and -inf.
constexpr float kRange = 256.0f, kBias = 127.0f;

// 2^x for x = kRange y - kBias and y = s factor + offset, with a relative error of 9e-5. x must be less than
// 128; for NaN it is 0. kRange y is split into an integer, which goes to the exponent, and f in [0, 1). Of
// the polynomials of degree 3 with 1 at 0, this one has the least relative error to 2^f.
__device__ __forceinline__ float ex2_polynomial(float s, float factor, float offset) {
  // Its last place is 1 / kRange: rounded down, a sum with it has the integer less kBias in its lowest bits.
  constexpr float kSplit = 49152.0f - kBias / kRange;
  const float y = fma_saturate(s, factor, offset);
  const float split = __fadd_rd(y, kSplit);
  const float part = y + (kSplit - split);  // f / kRange, exactly
  constexpr float kFirst = 0.6951168179512024f * kRange, kSecond = 0.22764496505260468f * (kRange * kRange),
                  kThird = 0.0770670622587204f * (kRange * kRange * kRange);
  const float power = fmaf(fmaf(fmaf(kThird, part, kSecond), part, kFirst), part, 1.0f);
  return __uint_as_float(__float_as_uint(power) + (__float_as_uint(split) << 23));
}

// Addresses in shared memory.
struct Shared {
  uint32_t base;
  // From one lane, so that the compiler keeps what follows from it in uniform registers (product_sm90.cuh).
  __device__ explicit Shared(uint32_t start) : base(__shfl_sync(0xffffffffu, (start + 1023u) & ~1023u, 0)) {}
  __device__ uint32_t keys() const { return base; }
  __device__ uint32_t values() const { return base + kTileBytes; }
  __device__ uint32_t queries(int stage) const { return base + kQueriesAt + stage * kTileBytes; }
  __device__ uint32_t grads(int stage) const { return base + kGradsAt + stage * kTileBytes; }
  __device__ uint32_t scores(int buffer) const { return base + kScoresAt + buffer * kScoreBytes; }
  __device__ uint32_t part(int group) const { return base + kPartsAt + group * kPartBytes; }
  __device__ uint32_t zeros() const { return base + kZerosAt; }
  // A float per query, from offset `at` on.
  __device__ float* row(uint32_t at, int stage) const {
    return reinterpret_cast<float*>(shared_pointer(base + at + stage * kNumberBytes));
  }
  // Barriers of keys and values, of queries with their log sums, and of gradients with their deltas.
  __device__ uint32_t keys_full() const { return barrier(0); }
  __device__ uint32_t keys_empty() const { return barrier(1); }
  __device__ uint32_t queries_full(int stage) const { return barrier(2 + stage); }
  __device__ uint32_t queries_empty(int stage) const { return barrier(2 + kQueryStages + stage); }
  __device__ uint32_t grads_full(int stage) const { return barrier(2 + 2 * kQueryStages + stage); }
  __device__ uint32_t grads_empty(int stage) const {
    return barrier(2 + 2 * kQueryStages + kGradStages + stage);
  }
  __device__ uint32_t drawn() const { return base + kDrawnAt; }

 private:
  __device__ uint32_t barrier(int index) const { return base + kBarriersAt + index * 8; }
};

// Where the number of a query is, so that one load has those of columns 8 n + column and 8 (n + 1) + column,
// and of the next ones, for an even n.
__device__ __forceinline__ constexpr int number_at(int query) {
  return query / 16 * 16 + query % 8 / 2 * 4 + query / 8 % 2 * 2 + query % 2;
}

// Calls body(i, number) for the 64 products of a thread, each with the number of its query.
template <typename Body>
__device__ __forceinline__ void with_numbers(const float* numbers, const Place& at, const Body& body) {
  PGOLF_UNROLL
  for (int n = 0; n < 16; n += 2) {
    const float4 four = *reinterpret_cast<const float4*>(numbers + 8 * n + 2 * at.column);
    PGOLF_UNROLL
    for (int i = 0; i < 4; ++i) {
      body(4 * n + i, i % 2 == 0 ? four.x : four.y);
      body(4 * n + 4 + i, i % 2 == 0 ? four.z : four.w);
    }
  }
}

// Producers: one warp copies queries, one upstream gradients, one keys and values.

// Copies a block of queries, or of upstream gradients, for each step of the consumers, and a number per
// query: the log2 sum, or what ex2_polynomial takes. Queries come when there are zeros to which the step can
// add their dq.
template <bool Grads>
__device__ void produce(const Args& args, const Shared& shared, const CUtensorMap* map) {
  constexpr uint32_t kTiles = Grads ? kGradsAt : kQueriesAt, kNumbers = Grads ? kDeltasAt : kLogSumsAt;
  constexpr float kFactor = Grads ? 1.0f : kLog2E;
  const float* const numbers = Grads ? args.delta : args.lse;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  // The same for all queries of a lane, which are 8 numbers apart.
  const bool polynomial = !Grads && is_polynomial(lane / 8 * 2 + lane % 2);
  // Queries of the next document: with an infinite sum p is 0.
  const float outside = Grads ? 0.0f : polynomial ? -INFINITY : INFINITY;
  const auto number_of = [&](float value) {
    return polynomial ? fmaf(value, -kFactor / kRange, kBias / kRange) : kFactor * value;
  };
  Ring<Grads ? kGradStages : kQueryStages> at;
  Walk walk(args.plan, args.groups, shared.drawn());
  while (walk.next()) {
    const DocTile tile = walk.tile();
    int head = walk.group() * args.ratio;
    const uint32_t* filled = args.filled + walk.item;  // of the tile of keys in the place of the queries
    // As many steps as the consumers have: all heads of a block of queries, then the next block.
    for (int first = tile.first, left = args.ratio; first < tile.end; ++head) {
      // Before the wait, so that they are there after it.
      const float* const source = numbers + (static_cast<int64_t>(head) * args.tokens + first);
      float number[kTile / 32];
      PGOLF_UNROLL
      for (int i = 0; i < kTile / 32; ++i) {
        number[i] = first + lane + 32 * i < tile.end ? number_of(source[lane + 32 * i]) : outside;
      }
      if constexpr (!Grads) {
        if (left == args.ratio) {
          wait_for(filled, 1);
          filled -= args.groups;
        }
      }
      const uint32_t full = Grads ? shared.grads_full(at.stage) : shared.queries_full(at.stage);
      mbarrier_wait(Grads ? shared.grads_empty(at.stage) : shared.queries_empty(at.stage), at.phase ^ 1);
      if (lane == 0) {
        mbarrier_expect_bytes(full, kTileBytes);
        tma_load_3d(shared.base + kTiles + at.stage * kTileBytes, map, full, 0, head, first);
      }
      PGOLF_UNROLL
      for (int i = 0; i < kTile / 32; ++i)
        shared.row(kNumbers, at.stage)[number_at(lane) + 32 * i] = number[i];
      mbarrier_arrive(full);
      at.advance();
      if (--left == 0) {
        left = args.ratio;
        head -= args.ratio;
        first += kTile;
      }
    }
  }
}

// Writes zeros to the item's rows of dq.
__device__ __forceinline__ void fill_dq(const Args& args, const Shared& shared, const CUtensorMap* map,
                                        const DocTile& tile, int head) {
  int first = tile.first;
  const int end = min(first + kTile, tile.end);
  for (; first + kRows <= end; first += kRows) {
    for (int i = 0; i < args.ratio; ++i) {
      tma_store(map, shared.zeros(), 0, head + i, first);
      tma_store(map, shared.zeros(), 32, head + i, first);
    }
  }
  // The next document's rows may be sums already.
  float* to = args.dq + (static_cast<int64_t>(first) * args.groups * args.ratio + head) * kWidth;
  for (; first < end; ++first, to += args.groups * args.ratio * kWidth)
    bulk_store(to, shared.zeros(), args.ratio * kWidth * 4);
  tma_store_commit();
  tma_store_wait();
  fence_proxy();
}

// One thread. It draws each item when the one before it begins, not earlier: others may wait for its zeros.
inline __device__ void produce_keys(const Args& args, const Shared& shared, const CUtensorMap* keys,
                                    const CUtensorMap* values, const CUtensorMap* dq) {
  uint32_t phase = 0;
  Draw draw(args.plan, args.groups, shared.drawn(), false);
  for (; draw.next(); draw.ask()) {
    const DocTile tile = draw.tile();
    const int group = draw.group();
    fill_dq(args, shared, dq, tile, group * args.ratio);
    release_add(args.filled + draw.item, 1);
    mbarrier_wait(shared.keys_empty(), phase ^ 1);
    mbarrier_expect_bytes(shared.keys_full(), 2 * kTileBytes);
    tma_load_3d(shared.keys(), keys, shared.keys_full(), 0, group, tile.first);
    tma_load_3d(shared.values(), values, shared.keys_full(), 0, group, tile.first);
    phase ^= 1;
  }
}

// Consumers.

// p^T in place of s^T, from log2 sums in shared memory, or what ex2_polynomial takes.
__device__ __forceinline__ void exponentials(float (&s)[64], const float* log_sums, float factor,
                                             bool diagonal, const Place& at) {
  with_numbers(log_sums, at, [&](int i, float sum) {
    s[i] = is_polynomial(i / 4 * 2 + i % 2) ? ex2_polynomial(s[i], factor / kRange, sum)
                                            : ex2_approx(fmaf(s[i], factor, -sum));
  });
  if (!diagonal) return;
  PGOLF_UNROLL
  for (int n = 0; n < 16; ++n) {
    PGOLF_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int key = at.group * kRows + at.row + i / 2 * 8, query = 8 * n + at.column + i % 2;
      if (key > query) s[4 * n + i] = 0.0f;
    }
  }
}

// ds^T in place of dp^T.
__device__ __forceinline__ void score_gradients(float (&dp)[64], const float (&p)[64], const float* deltas,
                                                const Place& at) {
  with_numbers(deltas, at, [&](int i, float delta) { dp[i] = p[i] * (dp[i] - delta); });
}

// Adds this warpgroup's dq, of 64 queries from `first` on, to that in memory. Queries after the document,
// which have none, get zeros.
__device__ __forceinline__ void add_dq(const float (&dq)[32], const Shared& shared, const CUtensorMap* map,
                                       float scale, int head, int first, const Place& at) {
  const bool leader = threadIdx.x % kGroup == 0;
  if (leader) tma_store_wait_read<0>();
  named_sync(2 + at.group, kGroup);
  // Two tiles of 32 columns, with the swizzle. Odd rows write other columns first: of the four rows which are
  // written at once, no two then use the same banks.
  const uint32_t part = shared.part(at.group);
  const int lane = lane_index(), row = at.warp * 16 + lane / 4;
  const bool odd = row % 2 != 0;
  const uint32_t own = piece_at(part, row, lane % 4 / 2 ^ (odd ? 4 : 0)) + lane % 2 * 8;
  PGOLF_UNROLL
  for (int n = 0; n < 8; ++n) {
    PGOLF_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int even_at = 4 * n + 2 * half, odd_at = 4 * (n ^ 2) + 2 * half;
      const float2 sums = make_float2(scale * (odd ? dq[odd_at] : dq[even_at]),
                                      scale * (odd ? dq[odd_at + 1] : dq[even_at + 1]));
      const uint32_t to = (own ^ n % 4 * 32) + n / 4 * (kPartBytes / 2) + half * 8 * kRowBytes;
      *reinterpret_cast<float2*>(shared_pointer(to)) = sums;
    }
  }
  fence_proxy_shared();
  named_sync(2 + at.group, kGroup);
  if (leader) {
    tma_add(map, part, 0, head, first);
    tma_add(map, part + kPartBytes / 2, 32, head, first);
    tma_store_commit();
  }
}

// Begins s^T of this warpgroup's keys and the next block of queries; the caller waits for it. Without a next
// block it multiplies whatever is there, because a product in a branch would make the compiler wait for each.
__device__ __forceinline__ void begin_scores(float (&s)[64], uint64_t keys, const Shared& shared,
                                             const Ring<kQueryStages>& ring, bool more) {
  if (more) mbarrier_wait(shared.queries_full(ring.stage), ring.phase);
  const uint64_t queries = wgmma_descriptor(shared.queries(ring.stage));
  wgmma_fence();
  PGOLF_UNROLL
  for (int k = 0; k < kWidth / 16; ++k) {
    wgmma_64x128x16<true, true>(s, wgmma_advance(keys, k * 32), wgmma_advance(queries, k * 32), k > 0,
                                __nv_bfloat16{});
  }
  wgmma_commit();
}

inline __device__ void consume(const Args& args, const Shared& shared, const CUtensorMap* dq_map) {
  const Place at;
  const float factor = args.scale * kLog2E;
  const uint64_t keys = wgmma_descriptor(shared.keys() + at.group * kRows * 128);
  const uint64_t values = wgmma_descriptor(shared.values() + at.group * kRows * 128);
  const uint64_t all_keys = wgmma_descriptor(shared.keys());
  Ring<kQueryStages> ring;
  Ring<kGradStages> of_grads;  // and of the buffers of ds^T
  uint32_t keys_phase = 0;
  Walk walk(args.plan, args.groups, shared.drawn());
  while (walk.next()) {
    const DocTile tile = walk.tile();
    const int group = walk.group();
    float dk[32], dv[32], s[64];
    PGOLF_UNROLL
    for (int i = 0; i < 32; ++i) dk[i] = dv[i] = 0.0f;
    mbarrier_wait(shared.keys_full(), keys_phase);
    keys_phase ^= 1;
    begin_scores(s, keys, shared, ring, true);
    wgmma_wait<0>();
    wgmma_keep_order(s);
    exponentials(s, shared.row(kLogSumsAt, ring.stage), factor, true, at);
    int head = group * args.ratio;
    int first = tile.first, left = args.ratio;
    do {
      float dp[64];
      const uint64_t queries = wgmma_descriptor(shared.queries(ring.stage));
      const uint64_t grads = wgmma_descriptor(shared.grads(of_grads.stage));
      mbarrier_wait(shared.grads_full(of_grads.stage), of_grads.phase);
      wgmma_fence();
      PGOLF_UNROLL
      for (int k = 0; k < kWidth / 16; ++k) {
        wgmma_64x128x16<true, true>(dp, wgmma_advance(values, k * 32), wgmma_advance(grads, k * 32), k > 0,
                                    __nv_bfloat16{});
      }
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_keep_order(dp);
      score_gradients(dp, s, shared.row(kDeltasAt, of_grads.stage), at);
      uint32_t p_bits[32], ds_bits[32];
      round_pairs(p_bits, s);
      round_pairs(ds_bits, dp);

      const int this_first = first, this_head = head, this_stage = ring.stage;
      ++head;
      if (--left == 0) {
        left = args.ratio;
        head -= args.ratio;
        first += kTile;
      }
      ring.advance();
      wgmma_fence();
      PGOLF_UNROLL
      for (int j = 0; j < kTile / 16; ++j) {
        wgmma_64x64x16<false>(dv, p_bits + 4 * j, wgmma_advance(grads, j * 2048), 1);
      }
      wgmma_commit();
      begin_scores(s, keys, shared, ring, first < tile.end);
      PGOLF_UNROLL
      for (int j = 0; j < kTile / 16; ++j) {
        write_rows(shared.scores(of_grads.stage) + j / 4 * kTileBytes, at.group * kRows + at.warp * 16, j % 4,
                   ds_bits + 4 * j, at);
      }
      fence_proxy_shared();
      named_sync(1, kConsumers * kGroup);
      wgmma_wait<1>();
      wgmma_keep_order(dv);
      if (at.lane == 0) mbarrier_arrive(shared.grads_empty(of_grads.stage));
      float dq[32];
      wgmma_fence();
      const uint64_t scores = wgmma_descriptor(shared.scores(of_grads.stage) + at.group * kTileBytes);
      PGOLF_UNROLL
      for (int j = 0; j < kTile / 16; ++j) {
        wgmma_64x64x16<false, false>(dq, wgmma_advance(scores, j * 2048), wgmma_advance(all_keys, j * 2048),
                                     j > 0);
      }
      wgmma_commit();
      PGOLF_UNROLL
      for (int j = 0; j < kTile / 16; ++j) {
        wgmma_64x64x16<false>(dk, ds_bits + 4 * j, wgmma_advance(queries, j * 2048), 1);
      }
      wgmma_commit();
      of_grads.advance();
      wgmma_wait<2>();
      wgmma_keep_order(s);
      // While these products run.
      exponentials(s, shared.row(kLogSumsAt, ring.stage), factor, first == tile.first, at);
      wgmma_wait<1>();
      wgmma_keep_order(dq);
      add_dq(dq, shared, dq_map, args.scale, this_head, this_first + at.group * kRows, at);
      wgmma_wait<0>();
      wgmma_keep_order(dk);
      if (at.lane == 0) mbarrier_arrive(shared.queries_empty(this_stage));
    } while (first < tile.end);
    if (at.lane == 0) mbarrier_arrive(shared.keys_empty());
    PGOLF_UNROLL
    for (int i = 0; i < 32; ++i) dk[i] *= args.scale;
    // The copy engine has read dq from this memory.
    if (threadIdx.x % kGroup == 0) tma_store_wait_read<0>();
    named_sync(2 + at.group, kGroup);
    const int first_key = tile.first + at.group * kRows;
    const auto row_of = [&](bf16* target) {
      return [=, groups = args.groups](int row) {
        const int64_t key = first_key + row;
        return key < tile.end ? target + (key * groups + group) * kWidth : nullptr;
      };
    };
    write_sums(dk, shared.part(at.group), at, row_of(args.dk));
    write_sums(dv, shared.part(at.group) + kPartBytes / 2, at, row_of(args.dv));
  }
  // Shared memory must outlive what the copy engine reads of it.
  if (threadIdx.x % kGroup == 0) tma_store_wait();
}

__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ CUtensorMap queries, const __grid_constant__ CUtensorMap keys,
           const __grid_constant__ CUtensorMap values, const __grid_constant__ CUtensorMap grads,
           const __grid_constant__ CUtensorMap dq, const __grid_constant__ Args args) {
  const Shared shared(shared_address(dynamic_shared()));
  for (int at = static_cast<int>(threadIdx.x) * 16; at < kZeroBytes; at += kThreads * 16)
    *reinterpret_cast<uint4*>(shared_pointer(shared.zeros() + at)) = make_uint4(0, 0, 0, 0);
  fence_proxy_shared();
  if (threadIdx.x == 0) {
    constexpr int kWarps = kConsumers * 4;
    mbarrier_init(shared.keys_full(), 1);
    mbarrier_init(shared.keys_empty(), kWarps);
    Drawn{shared.drawn()}.init(kWarps + 2);  // the consumers and the producers of queries and gradients
    // Full: the copy's arrival and one of each lane, which wrote log sums or deltas.
    for (int stage = 0; stage < kQueryStages; ++stage) {
      mbarrier_init(shared.queries_full(stage), 1 + 32);
      mbarrier_init(shared.queries_empty(stage), kWarps);
    }
    for (int stage = 0; stage < kGradStages; ++stage) {
      mbarrier_init(shared.grads_full(stage), 1 + 32);
      mbarrier_init(shared.grads_empty(stage), kWarps);
    }
    mbarrier_init_fence();
    tma_prefetch(&queries);
    tma_prefetch(&keys);
    tma_prefetch(&values);
    tma_prefetch(&grads);
    tma_prefetch(&dq);
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x < 32) {
      produce<false>(args, shared, &queries);
    } else if (threadIdx.x < 64) {
      produce<true>(args, shared, &grads);
    } else if (threadIdx.x == 64) {
      produce_keys(args, shared, &keys, &values, &dq);
    }
  } else {
    registers_raise<kConsumerRegisters>();
    consume(args, shared, &dq);
  }
}

}  // namespace pgolf::attention::backward
