// PTX instructions of Hopper alone (sm_90a), one wrapper each: mbarriers, clusters, the tensor copy engine,
// warpgroup products. Only translation units that are built for sm_90a may call them. Addresses of barriers
// and operands are in the shared window. Every wait is bounded: a lost arrival ends in an error, not in a
// hang.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/common.h"
#include "kernels/ptx.cuh"

namespace pgolf {

// Seconds of polling; no wait of a correct kernel comes near it.
inline constexpr uint32_t kMaxPolls = 1u << 22;

// Ends the launch with an error (illegal address). Not a trap: with one in the code, ptxas 13.0 ignores
// setmaxnreg without a word and spills everything above the entry's registers.
__device__ __forceinline__ void give_up() {
  asm volatile("st.global.u32 [%0], %1;" ::"l"(16ull), "r"(0) : "memory");
}

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine and to the other blocks of the cluster.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// One arrival that also announces `bytes` of copies that will complete on this barrier.
__device__ __forceinline__ void mbarrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier with the same offset in block `rank` of the cluster. Nothing that this thread stored
// needs to be visible there: release at cluster scope would wait for all its global stores.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}\n" ::"r"(barrier),
      "r"(rank)
      : "memory");
}

__device__ __forceinline__ bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
}

// Waits for the phase of the given parity to end.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  for (uint32_t polls = 0; !mbarrier_try_wait(barrier, parity); ++polls) {
    if (polls == kMaxPolls) give_up();
  }
}

// The same, ending in a trap, which says more than an illegal address; only where ptxas keeps setmaxnreg next
// to it (see give_up): check the SASS for USETMAXREG.
__device__ __forceinline__ void mbarrier_wait_or_trap(uint32_t barrier, uint32_t parity) {
  constexpr uint32_t kPolls = 1u << 26;  // each lasts up to the hardware's suspension time
  for (uint32_t polls = 0;; ++polls) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (done != 0) return;
    if (polls == kPolls) asm volatile("trap;");
  }
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Bulk tensor copies, global to shared; bytes out of bounds arrive as zeros.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load_2d(uint32_t shared, const CUtensorMap* map, uint32_t bar, int x,
                                            int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(bar), "r"(x), "r"(y)
      : "memory");
}

// The same to the same offset of every block of the cluster whose bit is set in `blocks`.
__device__ __forceinline__ void tma_load_2d_multicast(uint32_t shared, const CUtensorMap* map, uint32_t bar,
                                                      int x, int y, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(bar), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}

// The same at coordinates (x, 0, 0, 0, y) of a rank-5 tensor map.
__device__ __forceinline__ void tma_load_5d_multicast(uint32_t shared, const CUtensorMap* map, uint32_t bar,
                                                      int x, int y, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
      "[%1, {%3, %6, %6, %6, %4}], [%2], %5;" ::"r"(shared),
      "l"(map), "r"(bar), "r"(x), "r"(y), "h"(blocks), "r"(0)
      : "memory");
}

// The same of a rank-3 tensor map.
__device__ __forceinline__ void tma_load_3d(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int x,
                                            int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(shared),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// A box from shared memory; parts outside the tensor are dropped. Joins the thread's open group.
__device__ __forceinline__ void tma_store(const CUtensorMap* map, uint32_t shared, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
               "r"(shared), "r"(x), "r"(y), "r"(z)
               : "memory");
}

// Copies `bytes`, a multiple of 16, from shared memory to 16-byte aligned memory. Joins the thread's open
// group.
__device__ __forceinline__ void bulk_store(void* to, uint32_t shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared),
               "r"(bytes)
               : "memory");
}

// Adds a box of floats to those of the tensor, in no stated order with other additions.
__device__ __forceinline__ void tma_add(const CUtensorMap* map, uint32_t shared, int x, int y, int z) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(
          map),
      "r"(shared), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ __forceinline__ void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the sources of all but the newest `Pending` groups have been read.
template <int Pending>
__device__ __forceinline__ void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory");
}

// Waits until all groups are written.
__device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Orders ordinary accesses before and copy-engine accesses after, and the reverse.
__device__ __forceinline__ void fence_proxy() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ void fence_proxy_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Named barriers of a block: `threads` counts those that sync and those that arrive.
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int Registers>
__device__ __forceinline__ void registers_raise() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void registers_lower() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}

__device__ __forceinline__ void release_add(uint32_t* counter, uint32_t value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* counter) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// Waits until a counter that other blocks add to has reached `need`. The fence orders copies that follow,
// which go through another proxy, after the acquiring load.
__device__ __forceinline__ void wait_for(const uint32_t* counter, uint32_t need) {
  for (uint32_t polls = 0; load_acquire(counter) < need; ++polls) {
    if (polls == kMaxPolls) give_up();
  }
  fence_proxy();
}

// Two floats rounded to nearest even, x in the lower half.
__device__ __forceinline__ uint32_t pack_half(float x, float y) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
  return packed;
}
__device__ __forceinline__ uint32_t pack_bfloat16(float x, float y) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(y), "f"(x));
  return packed;
}

// Four 8x8 matrices of 16-bit elements to shared memory, the mirror of ldmatrix_x4.
template <bool Transposed>
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, uint32_t r0, uint32_t r1, uint32_t r2,
                                            uint32_t r3) {
  if constexpr (Transposed) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared),
                 "r"(r0), "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
  } else {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r0),
                 "r"(r1), "r"(r2), "r"(r3)
                 : "memory");
  }
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Uses of `d` after this stay after it: the compiler does not see that products in flight write it.
template <int N>
__device__ __forceinline__ void wgmma_keep_order(float (&d)[N]) {
  PGOLF_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Operand in shared memory made of 64x64 blocks of 16-bit elements (128-byte rows, 128-byte swizzle, 8192
// bytes each, 1024-byte aligned). Within a block groups of 8 rows are 1024 bytes apart. `AlongK`: rows run
// along k, the next 64 rows are the next block. Otherwise columns run along m or n, and the next block holds
// the next 64 columns.
template <uint32_t Leading = 8192>  // bytes; used where columns run along m or n
__device__ __forceinline__ uint64_t wgmma_descriptor(uint32_t shared) {
  constexpr uint64_t kLeading = uint64_t{Leading >> 4} << 16;
  constexpr uint64_t kStride = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  return kSwizzle128 | kStride | kLeading | ((shared & 0x3ffff) >> 4);
}

// The operand `bytes` further on in shared memory. Addresses stay in the low word.
__device__ __forceinline__ uint64_t wgmma_advance(uint64_t operand, uint32_t bytes) {
  return (operand & 0xffffffff00000000ull) | (static_cast<uint32_t>(operand) + (bytes >> 4));
}

// d (64x128, float32) = a (64x16) b (16x128) + (accumulate ? d : 0). Lane 4 g + t of warp w holds, for each n
// of 16, d[4 n ..]: (16 w + g, 8 n + 2 t), the next column, then the same two of row 16 w + g + 8.
#define PGOLF_R4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PGOLF_R16(d, i) PGOLF_R4(d, i), PGOLF_R4(d, i + 4), PGOLF_R4(d, i + 8), PGOLF_R4(d, i + 12)
#define PGOLF_WGMMA(types)                                                                \
  asm volatile(                                                                           \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                        \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." types                                \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "          \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
      "%64, %65, p, 1, 1, %67, %68;\n}"                                                   \
      : PGOLF_R16(d, 0), PGOLF_R16(d, 16), PGOLF_R16(d, 32), PGOLF_R16(d, 48)             \
      : "l"(a), "l"(b), "r"(accumulate), "n"(AAlongK ? 0 : 1), "n"(BAlongK ? 0 : 1))
template <bool AAlongK, bool BAlongK>
__device__ __forceinline__ void wgmma_64x128x16(float (&d)[64], uint64_t a, uint64_t b, int accumulate,
                                                __half) {
  PGOLF_WGMMA("f16.f16");
}
template <bool AAlongK, bool BAlongK>
__device__ __forceinline__ void wgmma_64x128x16(float (&d)[64], uint64_t a, uint64_t b, int accumulate,
                                                __nv_bfloat16) {
  PGOLF_WGMMA("bf16.bf16");
}
__device__ __forceinline__ void wgmma_64x192x16(float (&d)[96], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %98, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, "
      "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, "
      "%47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
      "%62, %63, %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, "
      "%77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "
      "%92, %93, %94, %95 "
      "}, %96, %97, p, 1, 1, 0, 0;\n}"
      : PGOLF_R16(d, 0), PGOLF_R16(d, 16), PGOLF_R16(d, 32), PGOLF_R16(d, 48), PGOLF_R16(d, 64),
        PGOLF_R16(d, 80)
      : "l"(a), "l"(b), "r"(accumulate));
}

// d (64x64, float32) = a (64x16) b (16x64) + (accumulate ? d : 0), d as above. `a` in shared memory, or in
// registers: those of lane 4 g + t of warp w are (16 w + g, 2 t), (16 w + g + 8, 2 t), (16 w + g, 2 t + 8)
// and (16 w + g + 8, 2 t + 8), each with the next column in its upper half. So columns 16 j .. 16 j + 15 of a
// `d`, rounded, are elements 8 j .. 8 j + 7 of it in pairs.
#define PGOLF_D32                                                           \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
template <bool AAlongK, bool BAlongK>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PGOLF_D32 "%32, %33, p, 1, 1, %35, %36;\n}"
      : PGOLF_R16(d, 0), PGOLF_R16(d, 16)
      : "l"(a), "l"(b), "r"(accumulate), "n"(AAlongK ? 0 : 1), "n"(BAlongK ? 0 : 1));
}
template <bool BAlongK>
__device__ __forceinline__ void wgmma_64x64x16(float (&d)[32], const uint32_t* a, uint64_t b,
                                               int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " PGOLF_D32
      "{%32, %33, %34, %35}, %36, p, 1, 1, %38;\n}"
      : PGOLF_R16(d, 0), PGOLF_R16(d, 16)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(BAlongK ? 0 : 1));
}
// The same 64x96, with `a` in registers.
template <bool BAlongK>
__device__ __forceinline__ void wgmma_64x96x16(float (&d)[48], const uint32_t* a, uint64_t b,
                                               int accumulate) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %53, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n96k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47}, "
      "{%48, %49, %50, %51}, %52, p, 1, 1, %54;\n}"
      : PGOLF_R16(d, 0), PGOLF_R16(d, 16), PGOLF_R16(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(BAlongK ? 0 : 1));
}
#undef PGOLF_D32
#undef PGOLF_WGMMA
#undef PGOLF_R4
#undef PGOLF_R16

}  // namespace pgolf
