// The kernel of doc_attention.h's forward pass.
//
// Each of three warpgroups of consumers has 64 rows of scores, which are the queries of a few tokens for all
// heads of a group: they have the same keys. A block walks over the keys of a tile of queries, 96 at a time,
// from the last ones, where some scores are masked, to the first ones of the document:
//
//   S = Q K^T      m' = max(m, rows of S)      P = exp(S - m')      O = exp(m - m') O + P V
//
// where m' stays m if that is not much smaller, as in FlashAttention-4: then O need not be multiplied.
// While a warpgroup computes exponentials, its product with the values before is under way, and the products
// of the other two. Q and P are operands in registers. A producer thread copies queries, keys and values.
#pragma once

#include "kernels/doc_attention_sm90.cuh"

namespace pgolf::attention::forward {

constexpr int kConsumers = 3;  // warpgroups
constexpr int kThreads = (1 + kConsumers) * kGroup;
constexpr int kConsumerRegisters = 160;
constexpr int kProducerRegisters = 32;
static_assert(registers_fit(kConsumers, kConsumerRegisters, kProducerRegisters));
constexpr int kRows = 64;  // of a warpgroup
constexpr int kKeys = 96;  // of a step
constexpr int kStages = 4;
constexpr float kSpare = 8.0f;  // doublings by which P may exceed 1
constexpr uint32_t kPartBytes = kRows * kRowBytes;
constexpr uint32_t kQueryBytes = kConsumers * kPartBytes;
constexpr uint32_t kKeyBytes = kKeys * kRowBytes;
constexpr uint32_t kValuesAt = kStages * kKeyBytes;
constexpr uint32_t kQueriesAt = kValuesAt + kStages * kKeyBytes;
constexpr uint32_t kOutAt = kQueriesAt + kQueryBytes;
constexpr uint32_t kBarriersAt = kOutAt + kQueryBytes;
constexpr int kBarriers = 2 + 4 * kStages;
constexpr uint32_t kDrawnAt = kBarriersAt + kBarriers * 8;
constexpr int kSharedBytes = 1024 + static_cast<int>(kDrawnAt) + kDrawnBytes;
static_assert(kSharedBytes <= 232448, "shared memory of a block on sm_90");
static_assert(kKeyBytes % 1024 == 0 && kPartBytes % 1024 == 0, "the swizzle repeats every 1,024 bytes");

static_assert(doc_attention_queries(1) == kConsumers * kRows, "a row of scores for each query and head");

struct Args {
  DocTile* plan;
  bf16* y;
  float* lse;
  int tokens, groups, ratio;  // heads per group
  float scale;
};

// Addresses in shared memory.
struct Shared {
  uint32_t base;
  // From one lane, so that the compiler keeps what follows from it in uniform registers (product_sm90.cuh).
  __device__ explicit Shared(uint32_t start) : base(__shfl_sync(0xffffffffu, (start + 1023u) & ~1023u, 0)) {}
  __device__ uint32_t keys(int stage) const { return base + stage * kKeyBytes; }
  __device__ uint32_t values(int stage) const { return base + kValuesAt + stage * kKeyBytes; }
  __device__ uint32_t queries(int group) const { return base + kQueriesAt + group * kPartBytes; }
  __device__ uint32_t out(int group) const { return base + kOutAt + group * kPartBytes; }
  __device__ uint32_t drawn() const { return base + kDrawnAt; }
  __device__ uint32_t queries_full() const { return barrier(0); }
  __device__ uint32_t queries_empty() const { return barrier(1); }
  __device__ uint32_t keys_full(int stage) const { return barrier(2 + stage); }
  __device__ uint32_t keys_empty(int stage) const { return barrier(2 + kStages + stage); }
  __device__ uint32_t values_full(int stage) const { return barrier(2 + 2 * kStages + stage); }
  __device__ uint32_t values_empty(int stage) const { return barrier(2 + 3 * kStages + stage); }

 private:
  __device__ uint32_t barrier(int index) const { return base + kBarriersAt + index * 8; }
};

// Blocks of keys that the queries of a tile attend to, all of which begin in the document.
__device__ __forceinline__ int key_blocks(const DocTile& tile, int queries) {
  return (min(tile.first + queries, tile.end) - tile.begin + kKeys - 1) / kKeys;
}

// One thread.
inline __device__ void produce(const Args& args, const Shared& shared, const CUtensorMap* queries,
                               const CUtensorMap* keys, const CUtensorMap* values) {
  const int each = kRows / args.ratio;  // queries of a warpgroup
  Ring<kStages> at;
  uint32_t phase = 0;
  Draw draw(args.plan, args.groups, shared.drawn(), true);
  while (draw.next()) {
    draw.ask();
    const DocTile tile = draw.tile();
    const int group = draw.group();
    mbarrier_wait(shared.queries_empty(), phase ^ 1);
    mbarrier_expect_bytes(shared.queries_full(), kQueryBytes);
    for (int part = 0; part < kConsumers; ++part) {
      for (int i = 0; i < args.ratio; ++i) {
        tma_load_3d(shared.queries(part) + i * each * kRowBytes, queries, shared.queries_full(), 0,
                    group * args.ratio + i, tile.first + part * each);
      }
    }
    phase ^= 1;
    for (int block = key_blocks(tile, kConsumers * each) - 1; block >= 0; --block) {
      const int first = tile.begin + block * kKeys;
      mbarrier_wait(shared.keys_empty(at.stage), at.phase ^ 1);
      mbarrier_expect_bytes(shared.keys_full(at.stage), kKeyBytes);
      tma_load_3d(shared.keys(at.stage), keys, shared.keys_full(at.stage), 0, group, first);
      mbarrier_wait(shared.values_empty(at.stage), at.phase ^ 1);
      mbarrier_expect_bytes(shared.values_full(at.stage), kKeyBytes);
      tma_load_3d(shared.values(at.stage), values, shared.values_full(at.stage), 0, group, first);
      at.advance();
    }
  }
}

// The largest score of each of a thread's two rows, and this thread's part of the sum of exponentials.
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
};

// Of a thread's two rows.
__device__ __forceinline__ float largest_of_row(const float (&s)[48], int half) {
  float largest = s[2 * half];
  PGOLF_UNROLL
  for (int n = 0; n < 12; ++n) largest = fmaxf(largest, fmaxf(s[4 * n + 2 * half], s[4 * n + 2 * half + 1]));
  largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
  return fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
}

// P in place of S. Returns whether sums so far shrink, by `shrink`, for a row of this warp. They need not as
// long as the scores exceed the largest one before by less than kSpare: then P is at most 2^kSpare. factor is
// that of scores, times log2 e.
__device__ __forceinline__ bool exponentials(float (&s)[48], Softmax& state, float (&shrink)[2],
                                             float factor) {
  bool grown[2];
  PGOLF_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float largest = largest_of_row(s, half), before = state.largest[half];
    grown[half] = largest * factor > fmaf(before, factor, kSpare);
    state.largest[half] = grown[half] ? largest : before;
    // A row of which all scores so far are masked has no finite one.
    const float offset = state.largest[half] == -INFINITY ? 0.0f : state.largest[half] * factor;
    shrink[half] = grown[half] ? ex2_approx(fmaf(before, factor, -offset)) : 1.0f;
    float sum = 0.0f;
    PGOLF_UNROLL
    for (int n = 0; n < 12; ++n) {
      PGOLF_UNROLL
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        s[4 * n + i] = ex2_approx(fmaf(s[4 * n + i], factor, -offset));
        sum += s[4 * n + i];
      }
    }
    state.sum[half] = fmaf(state.sum[half], shrink[half], sum);
  }
  return __any_sync(0xffffffffu, grown[0] || grown[1]);
}

// Scores of keys after the query become -inf. `first` is the key of the first column less the warpgroup's
// first query, `mask` is one less than its number of queries.
__device__ __forceinline__ void mask_scores(float (&s)[48], int first, int mask, const Place& at) {
  PGOLF_UNROLL
  for (int n = 0; n < 12; ++n) {
    PGOLF_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int query = (at.row + i / 2 * 8) & mask, key = first + 8 * n + at.column + i % 2;
      if (key > query) s[4 * n + i] = -INFINITY;
    }
  }
}

// S = Q K^T of a block of keys.
__device__ __forceinline__ void begin_scores(float (&s)[48], const uint32_t (&q)[16], uint32_t keys) {
  const uint64_t operand = wgmma_descriptor(keys);
  wgmma_fence();
  PGOLF_UNROLL
  for (int k = 0; k < kWidth / 16; ++k) {
    wgmma_64x96x16<true>(s, q + 4 * k, wgmma_advance(operand, k * 32), k > 0);
  }
  wgmma_commit();
}

// O += P V.
__device__ __forceinline__ void begin_outputs(float (&o)[32], const uint32_t (&p)[24], uint32_t values) {
  const uint64_t operand = wgmma_descriptor(values);
  wgmma_fence();
  PGOLF_UNROLL
  for (int j = 0; j < kKeys / 16; ++j) {
    wgmma_64x64x16<false>(o, p + 4 * j, wgmma_advance(operand, j * 16 * kRowBytes), 1);
  }
  wgmma_commit();
}

inline __device__ void consume(const Args& args, const Shared& shared) {
  const Place at;
  const int each = kRows / args.ratio, heads = args.groups * args.ratio;
  const float factor = args.scale * kLog2E;
  Ring<kStages> ring;
  uint32_t phase = 0;
  Walk walk(args.plan, args.groups, shared.drawn());
  while (walk.next()) {
    const DocTile tile = walk.tile();
    const int first_query = tile.first + at.group * each;
    uint32_t q[16];
    mbarrier_wait(shared.queries_full(), phase);
    phase ^= 1;
    PGOLF_UNROLL
    for (int k = 0; k < kWidth / 16; ++k) {
      uint32_t matrices[4];
      ldmatrix_x4<false>(matrices, matrix_row(shared.queries(at.group), at.warp * 16, k, at));
      PGOLF_UNROLL
      for (int i = 0; i < 4; ++i) q[4 * k + i] = matrices[i];
    }
    __syncwarp();
    if (at.lane == 0) mbarrier_arrive(shared.queries_empty());

    float s[48], o[32], shrink[2];
    uint32_t p[24];
    Softmax state;
    PGOLF_UNROLL
    for (int i = 0; i < 32; ++i) o[i] = 0.0f;
    int left = key_blocks(tile, kConsumers * each) - 1;
    int offset = tile.begin + left * kKeys - first_query;  // of the block's first key
    mbarrier_wait(shared.keys_full(ring.stage), ring.phase);
    begin_scores(s, q, shared.keys(ring.stage));
    wgmma_wait<0>();
    wgmma_keep_order(s);
    if (at.lane == 0) mbarrier_arrive(shared.keys_empty(ring.stage));
    mask_scores(s, offset, each - 1, at);
    exponentials(s, state, shrink, factor);
    round_pairs(p, s);
    for (; left > 0; --left) {
      Ring<kStages> next = ring;
      next.advance();
      offset -= kKeys;
      mbarrier_wait(shared.keys_full(next.stage), next.phase);
      begin_scores(s, q, shared.keys(next.stage));
      mbarrier_wait(shared.values_full(ring.stage), ring.phase);
      begin_outputs(o, p, shared.values(ring.stage));
      wgmma_wait<1>();
      wgmma_keep_order(s);
      if (at.lane == 0) mbarrier_arrive(shared.keys_empty(next.stage));
      if (offset + kKeys > 1) mask_scores(s, offset, each - 1, at);
      const bool shrinks = exponentials(s, state, shrink, factor);
      wgmma_wait<0>();
      wgmma_keep_order(o);
      if (at.lane == 0) mbarrier_arrive(shared.values_empty(ring.stage));
      if (shrinks) {
        PGOLF_UNROLL
        for (int i = 0; i < 32; ++i) o[i] *= shrink[i / 2 % 2];
      }
      round_pairs(p, s);
      ring = next;
    }
    mbarrier_wait(shared.values_full(ring.stage), ring.phase);
    begin_outputs(o, p, shared.values(ring.stage));
    wgmma_wait<0>();
    wgmma_keep_order(o);
    if (at.lane == 0) mbarrier_arrive(shared.values_empty(ring.stage));
    ring.advance();

    const int first_head = walk.group() * args.ratio;
    PGOLF_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = state.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const float inverse = 1.0f / sum;
      PGOLF_UNROLL
      for (int i = 2 * half; i < 32; i += 4) o[i] *= inverse, o[i + 1] *= inverse;
      const int row = at.row + half * 8, query = first_query + row % each;
      if (at.column == 0 && query < tile.end) {
        args.lse[static_cast<int64_t>(first_head + row / each) * args.tokens + query] =
            fmaf(state.largest[half], args.scale, log2f(sum) * kLn2);
      }
    }
    // All have read what was there of the tile before.
    named_sync(2 + at.group, kGroup);
    write_sums(o, shared.out(at.group), at, [=, &args](int row) {
      const int64_t query = first_query + row % each;
      return query < tile.end ? args.y + (query * heads + first_head + row / each) * kWidth : nullptr;
    });
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    kernel(const __grid_constant__ CUtensorMap queries, const __grid_constant__ CUtensorMap keys,
           const __grid_constant__ CUtensorMap values, const __grid_constant__ Args args) {
  const Shared shared(shared_address(dynamic_shared()));
  if (threadIdx.x == 0) {
    constexpr int kWarps = kConsumers * 4;
    mbarrier_init(shared.queries_full(), 1);
    mbarrier_init(shared.queries_empty(), kWarps);
    Drawn{shared.drawn()}.init(kWarps);
    for (int stage = 0; stage < kStages; ++stage) {
      mbarrier_init(shared.keys_full(stage), 1);
      mbarrier_init(shared.keys_empty(stage), kWarps);
      mbarrier_init(shared.values_full(stage), 1);
      mbarrier_init(shared.values_empty(stage), kWarps);
    }
    mbarrier_init_fence();
    tma_prefetch(&queries);
    tma_prefetch(&keys);
    tma_prefetch(&values);
  }
  __syncthreads();
  if (threadIdx.x < kGroup) {
    registers_lower<kProducerRegisters>();
    if (threadIdx.x == 0) produce(args, shared, &queries, &keys, &values);
  } else {
    registers_raise<kConsumerRegisters>();
    consume(args, shared);
  }
}

}  // namespace pgolf::attention::forward
