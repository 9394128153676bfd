// CUDA kernels of int6.h. Codes outside [-32, 31] wrap to their low six bits: checking them would need a
// sync.
//
// Aligned kernels: a block turns 4096 codes into 3072 bytes. Both sides move 16 bytes per thread, coalesced;
// the 4:3 change of width happens in shared memory. General kernels: one thread per group of four codes, byte
// by byte.
#include "kernels/cuda_check.cuh"
#include "kernels/int6.h"

namespace pgolf {
namespace {

constexpr int kThreads = 256;
constexpr int kTileCodes = kThreads * 16;
constexpr int kTileBytes = kTileCodes / 4 * 3;
static_assert(kTileBytes % 16 == 0, "packed tiles keep 16-byte alignment");

// Four codes in the bytes of a word -> the 24-bit group.
__device__ __forceinline__ uint32_t pack_group(uint32_t bytes) {
  return (bytes & 0x3fu) | (bytes >> 2 & 0xfc0u) | (bytes >> 4 & 0x3f000u) | (bytes >> 6 & 0xfc0000u);
}

// The 24-bit group -> four sign-extended codes in the bytes of a word.
__device__ __forceinline__ uint32_t unpack_group(uint32_t v) {
  const uint32_t fields = (v & 0x3fu) | (v << 2 & 0x3f00u) | (v << 4 & 0x3f0000u) | (v << 6 & 0x3f000000u);
  // (field ^ 32) - 32 per byte; the borrow of a byte cannot reach the next because __vsub4 splits them.
  return __vsub4(fields ^ 0x20202020u, 0x20202020u);
}

__global__ void __launch_bounds__(kThreads)
    pack_aligned(const int8_t* codes, uint8_t* packed, int64_t count) {
  __shared__ uint4 staged[kTileBytes / 16];
  const int64_t tile = static_cast<int64_t>(blockIdx.x);
  const int64_t first = tile * kTileCodes + threadIdx.x * 16;
  uint4 in = make_uint4(0, 0, 0, 0);
  if (first + 16 <= count) {
    in = *reinterpret_cast<const uint4*>(codes + first);
  } else if (first < count) {  // count is a multiple of 4
    uint32_t words[4] = {};
    PGOLF_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (first + 4 * i < count) words[i] = *reinterpret_cast<const uint32_t*>(codes + first + 4 * i);
    }
    in = make_uint4(words[0], words[1], words[2], words[3]);
  }
  const uint32_t a = pack_group(in.x), b = pack_group(in.y), c = pack_group(in.z), d = pack_group(in.w);
  uint32_t* out = reinterpret_cast<uint32_t*>(staged) + threadIdx.x * 3;
  out[0] = a | b << 24;
  out[1] = b >> 8 | c << 16;
  out[2] = c >> 16 | d << 8;
  __syncthreads();
  const int64_t total = count / 4 * 3;
  const int64_t at = tile * kTileBytes + threadIdx.x * 16;
  if (threadIdx.x >= kTileBytes / 16 || at >= total) return;
  if (at + 16 <= total) {
    *reinterpret_cast<uint4*>(packed + at) = staged[threadIdx.x];
    return;
  }
  const uint8_t* bytes = reinterpret_cast<const uint8_t*>(staged) + threadIdx.x * 16;
  for (int64_t i = at; i < total; ++i) packed[i] = bytes[i - at];
}

__global__ void __launch_bounds__(kThreads)
    unpack_aligned(const uint8_t* packed, int8_t* codes, int64_t count) {
  __shared__ uint4 staged[kTileBytes / 16];
  const int64_t tile = static_cast<int64_t>(blockIdx.x);
  const int64_t total = count / 4 * 3;
  const int64_t at = tile * kTileBytes + threadIdx.x * 16;
  if (threadIdx.x < kTileBytes / 16 && at < total) {
    if (at + 16 <= total) {
      staged[threadIdx.x] = *reinterpret_cast<const uint4*>(packed + at);
    } else {
      uint8_t* bytes = reinterpret_cast<uint8_t*>(staged) + threadIdx.x * 16;
      for (int64_t i = at; i < total; ++i) bytes[i - at] = packed[i];
    }
  }
  __syncthreads();
  const int64_t first = tile * kTileCodes + threadIdx.x * 16;
  if (first >= count) return;
  const uint32_t* in = reinterpret_cast<const uint32_t*>(staged) + threadIdx.x * 3;
  const uint32_t x = in[0], y = in[1], z = in[2];
  const uint32_t words[4] = {unpack_group(x), unpack_group(x >> 24 | y << 8), unpack_group(y >> 16 | z << 16),
                             unpack_group(z >> 8)};
  if (first + 16 <= count) {
    *reinterpret_cast<uint4*>(codes + first) = make_uint4(words[0], words[1], words[2], words[3]);
    return;
  }
  PGOLF_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (first + 4 * i < count) *reinterpret_cast<uint32_t*>(codes + first + 4 * i) = words[i];
  }
}

__global__ void __launch_bounds__(kThreads)
    pack_general(const int8_t* codes, uint8_t* packed, int64_t groups_total, int64_t groups_per_row,
                 int64_t n) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups_total) return;
  const int64_t row = group / groups_per_row;
  const int64_t column = (group - row * groups_per_row) * 4;
  uint32_t bytes = 0;
  for (int i = 0; i < 4 && column + i < n; ++i) {
    bytes |= static_cast<uint32_t>(static_cast<uint8_t>(codes[row * n + column + i])) << (8 * i);
  }
  const uint32_t v = pack_group(bytes);
  uint8_t* out = packed + group * 3;
  out[0] = static_cast<uint8_t>(v);
  out[1] = static_cast<uint8_t>(v >> 8);
  out[2] = static_cast<uint8_t>(v >> 16);
}

__global__ void __launch_bounds__(kThreads)
    unpack_general(const uint8_t* packed, int8_t* codes, int64_t groups_total, int64_t groups_per_row,
                   int64_t n) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (group >= groups_total) return;
  const int64_t row = group / groups_per_row;
  const int64_t column = (group - row * groups_per_row) * 4;
  const uint8_t* in = packed + group * 3;
  const uint32_t word = unpack_group(static_cast<uint32_t>(in[0]) | static_cast<uint32_t>(in[1]) << 8 |
                                     static_cast<uint32_t>(in[2]) << 16);
  for (int i = 0; i < 4 && column + i < n; ++i)
    codes[row * n + column + i] = static_cast<int8_t>(word >> (8 * i));
}

bool aligned16(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

}  // namespace

void pack_int6_cuda(const int8_t* codes, uint8_t* packed, int64_t rows, int64_t n, CUstream_st* stream) {
  if (rows == 0 || n == 0) return;
  const int64_t groups = (n + 3) / 4;
  if (n % 4 == 0 && aligned16(codes, packed)) {
    pack_aligned<<<grid_blocks(rows * n, kTileCodes, "pack_int6"), kThreads, 0, stream>>>(codes, packed,
                                                                                          rows * n);
  } else {
    pack_general<<<grid_blocks(rows * groups, kThreads, "pack_int6"), kThreads, 0, stream>>>(
        codes, packed, rows * groups, groups, n);
  }
  PGOLF_LAUNCH_CHECK();
}

void unpack_int6_cuda(const uint8_t* packed, int8_t* codes, int64_t rows, int64_t n, CUstream_st* stream) {
  if (rows == 0 || n == 0) return;
  const int64_t groups = (n + 3) / 4;
  if (n % 4 == 0 && aligned16(packed, codes)) {
    unpack_aligned<<<grid_blocks(rows * n, kTileCodes, "unpack_int6"), kThreads, 0, stream>>>(packed, codes,
                                                                                              rows * n);
  } else {
    unpack_general<<<grid_blocks(rows * groups, kThreads, "unpack_int6"), kThreads, 0, stream>>>(
        packed, codes, rows * groups, groups, n);
  }
  PGOLF_LAUNCH_CHECK();
}

}  // namespace pgolf
