// Tensor maps on the host, see cuda_runtime.h: the rules of cuTensorMapEncodeTiled, as far as tensor_map.cuh
// uses it.
#pragma once

#include <cuda_runtime.h>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;

enum CUresult { CUDA_SUCCESS };
enum CUtensorMapDataType {
  CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
  CU_TENSOR_MAP_DATA_TYPE_FLOAT32
};
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_L2_256B };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  uint32_t magic;  // of a map that was encoded
  uint32_t rank;
  uint32_t element;  // bytes
  unsigned char* first;
  uint64_t sizes[5];
  uint64_t strides[5];  // bytes
  uint32_t box[5];
};

namespace pgolf::test {

inline constexpr uint32_t kMapMagic = 0x7e4503a9u;

inline CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* first,
                             const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                             const cuuint32_t* element_strides, CUtensorMapInterleave, CUtensorMapSwizzle,
                             CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  const auto require = [](bool ok, const std::string& rule) {
    if (!ok) throw std::runtime_error("tensor map: " + rule);
  };
  require(rank >= 1 && rank <= 5, "the rank is 1 to 5");
  require(first != nullptr && reinterpret_cast<uintptr_t>(first) % 16 == 0, "the tensor is 16-byte aligned");
  const uint32_t element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : 2;
  require(box[0] * element == 128, "with a swizzle of 128 bytes a box has as many in dimension 0");
  *map = {.magic = kMapMagic,
          .rank = rank,
          .element = element,
          .first = static_cast<unsigned char*>(first),
          .sizes = {1, 1, 1, 1, 1},
          .strides = {element},
          .box = {1, 1, 1, 1, 1}};
  for (uint32_t i = 0; i < rank; ++i) {
    require(sizes[i] >= 1 && sizes[i] <= uint64_t{1} << 32, "sizes are 1 to 2^32");
    require(box[i] >= 1 && box[i] <= 256, "boxes have 1 to 256 elements in each dimension");
    require(element_strides[i] == 1, "element strides are 1 here");
    map->sizes[i] = sizes[i], map->box[i] = box[i];
    if (i == 0) continue;
    require(strides[i - 1] % 16 == 0 && strides[i - 1] < uint64_t{1} << 40,
            "strides are multiples of 16 bytes below 2^40");
    map->strides[i] = strides[i - 1];
  }
  return CUDA_SUCCESS;
}

}  // namespace pgolf::test

enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned int, int,
                                                    cudaDriverEntryPointQueryResult* status) {
  *function = reinterpret_cast<void*>(&pgolf::test::encode_tiled);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
