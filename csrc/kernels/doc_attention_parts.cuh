// The small kernels of doc_attention.h: the list of tiles, and delta = dy . y.
#pragma once

#include "kernels/doc_attention.h"
#include "kernels/head_rows.cuh"

namespace pgolf::attention {

inline constexpr int kPlanThreads = 1024;
inline constexpr int kPlanSizes = 256;  // documents of as many tiles or more are alike

// Writes the number of tiles, zero for how many are drawn, and then the tiles of all documents, of at most
// `size` tokens each, and zeros for `flags` flags. Tiles of a document are next to each other, the last one
// first, so that blocks which draw them one after another read the same rows, from L2. The longest documents
// come first, so that all blocks end at about the same time. One block.
__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int32_t* __restrict__ documents, int segments, int size, DocTile* __restrict__ plan,
                uint32_t* __restrict__ flag, int64_t flags) {
  __shared__ int place[kPlanSizes];  // of each number of tiles: their sum, then the place of the next one
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t i = thread; i < flags; i += kPlanThreads) flag[i] = 0;
  if (thread < kPlanSizes) place[thread] = 0;
  __syncthreads();
  const auto each_document = [&](const auto& body) {
    for (int segment = thread; segment < segments; segment += kPlanThreads) {
      const int begin = documents[segment], end = documents[segment + 1];
      const int tiles = (end - begin + size - 1) / size;
      if (tiles > 0) body(begin, end, tiles, place + min(tiles, kPlanSizes) - 1);
    }
  };
  each_document([](int, int, int tiles, int* sum) { atomicAdd(sum, tiles); });
  __syncthreads();
  // The sum of each number and of all larger ones, less its own: where its tiles begin.
  const bool mine = thread < kPlanSizes;
  const int count = mine ? place[thread] : 0;
  for (int step = 1; step < kPlanSizes; step *= 2) {
    const int more = thread + step < kPlanSizes ? place[thread + step] : 0;
    __syncthreads();
    if (mine) place[thread] += more;
    __syncthreads();
  }
  if (thread == 0) plan[0] = DocTile{place[0], 0, 0, 0};
  __syncthreads();
  if (mine) place[thread] -= count;
  __syncthreads();
  each_document([&](int begin, int end, int tiles, int* next) {
    DocTile* const own = plan + 1 + atomicAdd(next, tiles);
    for (int i = 0; i < tiles; ++i) {
      own[i] = DocTile{begin + (tiles - 1 - i) * size, begin, end, 0};
    }
  });
}

inline constexpr int kPieces = kDocWidth / kVector;  // of a head: a thread has one at a time

// delta (heads, tokens) = sum over the columns of grad y.
__global__ void __launch_bounds__(kHeadThreads)
    delta_kernel(const bf16* __restrict__ grad, int64_t grad_stride, const bf16* __restrict__ y,
                 float* __restrict__ delta, int64_t tokens, int heads) {
  const int64_t each = int64_t{heads} * kPieces, step = int64_t{gridDim.x} * kHeadThreads;
  const int64_t first = int64_t{blockIdx.x} * kHeadThreads + threadIdx.x, lane = threadIdx.x % 32;
  // All lanes of a warp take part in its sums.
  for (int64_t at = first; at - lane < tokens * each; at += step) {
    const bool inside = at < tokens * each;
    const int64_t token = at / each, piece = at % each;
    HeadRaw raw[2];
    load_if(raw[0], grad + token * grad_stride + piece * kVector, inside);
    load_if(raw[1], y + at * kVector, inside);
    float a[kVector], b[kVector];
    raw[0].widen(a);
    raw[1].widen(b);
    const float sum = head_sum<kDocWidth>(dot8(a, b));
    if (inside && piece % kPieces == 0) delta[piece / kPieces * tokens + token] = sum;
  }
}

}  // namespace pgolf::attention
