// PTX instructions of Hopper alone (compute_90a): mbarrier, bulk tensor copies, wgmma, clusters. One wrapper
// each. Only translation units that are built for sm_90a may call them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/common.h"
#include "kernels/ptx.cuh"

namespace pgolf {

// Mbarrier: `bar` is an address in the shared window.
__device__ __forceinline__ void barrier_init(uint32_t bar, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals) : "memory");
}

// Makes this thread's barrier_init visible to the other blocks of the cluster and to the copy engine.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival that also announces `bytes` of copies that will complete on this barrier.
__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrives at the barrier with the same offset in block `rank` of the cluster. Nothing that this thread stored
// needs to be visible there: release at cluster scope would wait for all its global stores.
__device__ __forceinline__ void barrier_arrive_cluster(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(bar),
      "r"(rank)
      : "memory");
}

// Waits until the phase with this parity has completed. A lost arrival ends in a trap, not in a hang.
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
  constexpr uint32_t kSpins = 1u << 26;  // each lasts up to the hardware's suspension time
  for (uint32_t spin = 0;; ++spin) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(bar), "r"(parity)
        : "memory");
    if (done != 0) return;
    if (spin == kSpins) asm volatile("trap;");
  }
}

// Named barriers of a block: `threads` counts those that sync and those that arrive.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Clusters.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Bulk tensor copies, global to shared; bytes out of bounds arrive as zeros.
__device__ __forceinline__ void tensor_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tensor_load_2d(uint32_t shared, const CUtensorMap* map, uint32_t bar, int x,
                                               int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(bar), "r"(x), "r"(y)
      : "memory");
}

// The same to the same offset of every block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void tensor_load_2d_multicast(uint32_t shared, const CUtensorMap* map,
                                                         uint32_t bar, int x, int y, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(bar), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

// Coordinates (x, 0, 0, 0, y).
__device__ __forceinline__ void tensor_load_5d(uint32_t shared, const CUtensorMap* map, uint32_t bar, int x,
                                               int y) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %5, %5, "
      "%5, %4}], [%2];" ::"r"(shared),
      "l"(map), "r"(bar), "r"(x), "r"(y), "r"(0)
      : "memory");
}

__device__ __forceinline__ void tensor_load_5d_multicast(uint32_t shared, const CUtensorMap* map,
                                                         uint32_t bar, int x, int y, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %6, %6, %6, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(bar), "r"(x), "r"(y), "h"(blocks), "r"(0)
      : "memory");
}

// Wgmma.
// Operand in shared memory: rows of 64 16-bit elements along k, 128-byte swizzle, 1024-byte aligned.
__device__ __forceinline__ uint64_t wgmma_operand(uint32_t shared) {
  constexpr uint64_t kSwizzle128 = 1ull << 62;
  constexpr uint64_t kEightRows = static_cast<uint64_t>(1024 >> 4) << 32;  // from one 8-row group to the next
  return kSwizzle128 | kEightRows | (1ull << 16) | ((shared & 0x3ffffu) >> 4);
}

// The operand `bytes` further on in shared memory. Addresses stay in the low word.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) {
  return (operand & 0xffffffff00000000ull) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Waits until at most `Pending` of this warp's newest groups are still in flight.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Reads of `c` stay behind this: the compiler does not see that a product in flight writes it.
template <int Count>
__device__ __forceinline__ void wgmma_fence_result(float (&c)[Count]) {
  PGOLF_UNROLL
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

template <int Registers>
__device__ __forceinline__ void register_limit_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

template <int Registers>
__device__ __forceinline__ void register_limit_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

// c (64 x n, float32) = a (64 x 16) b^T (n x 16) + (accumulate ? c : 0), bf16. With g = lane / 4, t = lane %
// 4, warp w of the warpgroup holds, for each eight columns j, rows 16 w + g and 16 w + g + 8:
//   c[4 j] (g, 8 j + 2 t)   c[4 j + 1] (g, 8 j + 2 t + 1)   c[4 j + 2] (g + 8, ..)   c[4 j + 3]
__device__ __forceinline__ void wgmma_64x128x16(float (&c)[64], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, %64, %65, p, 1, 1, 0, 0;\n}\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]),
        "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]),
        "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]),
        "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]),
        "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]),
        "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]),
        "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]), "+f"(c[50]),
        "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]), "+f"(c[57]),
        "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])
      : "l"(a), "l"(b), "r"(accumulate));
}

}  // namespace pgolf
