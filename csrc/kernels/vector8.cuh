// What the memory-bound kernels of an optimizer step share: eight elements of a tensor at a time, and lists
// of tensors as one launch. Pointers travel as kernel arguments, so a CUDA graph holds them by value.
#pragma once

#include <algorithm>

#include "kernels/convert.cuh"
#include "kernels/cuda_check.cuh"

namespace pgolf {

inline constexpr int kVector = 8;  // elements that a thread handles at once

// Eight elements as they are in memory, to have many loads under way before the first is needed.
template <typename T>
struct Raw8 {
  static constexpr int kWords = kVector / Pack<T>::kCount;
  uint4 words[kWords];

  __device__ __forceinline__ void load(const T* source) {
    PGOLF_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = __ldcs(reinterpret_cast<const uint4*>(source) + i);
  }

  __device__ __forceinline__ void widen(float (&value)[kVector]) const {
    PGOLF_UNROLL
    for (int i = 0; i < kWords; ++i) {
      Pack<T> pack;
      memcpy(&pack, &words[i], sizeof(pack));
      PGOLF_UNROLL
      for (int l = 0; l < Pack<T>::kCount; ++l) value[i * Pack<T>::kCount + l] = load_float(pack.value[l]);
    }
  }
};

// Eight elements, zeros past `valid`. Aligned: all eight are valid and 16-byte aligned.
template <typename T>
__device__ __forceinline__ void load8(float (&value)[kVector], const T* source, int64_t valid, bool aligned) {
  if (aligned) {
    Raw8<T> raw;
    raw.load(source);
    raw.widen(value);
    return;
  }
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) value[i] = i < valid ? load_float(source[i]) : 0.0f;
}

// Rounds `value` to T and stores it; `value` becomes what was stored. Streamed: evicted from L2 first.
template <bool Streamed, typename T>
__device__ __forceinline__ void store8(T* target, float (&value)[kVector], int64_t valid, bool aligned) {
  constexpr int kCount = Pack<T>::kCount;
  PGOLF_UNROLL
  for (int i = 0; i < kVector; i += kCount) {
    Pack<T> pack;
    PGOLF_UNROLL
    for (int l = 0; l < kCount; ++l) {
      pack.value[l] = store_float<T>(value[i + l]);
      value[i + l] = load_float(pack.value[l]);
    }
    if (aligned) {
      uint4 bits;
      memcpy(&bits, &pack, sizeof(bits));
      if constexpr (Streamed) {
        __stcs(reinterpret_cast<uint4*>(target + i), bits);
      } else {
        *reinterpret_cast<uint4*>(target + i) = bits;
      }
    } else {
      PGOLF_UNROLL
      for (int l = 0; l < kCount; ++l) {
        if (i + l < valid) target[i + l] = pack.value[l];
      }
    }
  }
}

// What was read for the last time becomes zero.
template <typename T>
__device__ __forceinline__ void zero8(T* target, int64_t valid, bool aligned) {
  float zero[kVector] = {};
  store8<true>(target, zero, valid, aligned);
}

__device__ __forceinline__ float dot8(const float (&a)[kVector], const float (&b)[kVector]) {
  float sum = 0.0f;
  PGOLF_UNROLL
  for (int l = 0; l < kVector; ++l) sum = fmaf(a[l], b[l], sum);
  return sum;
}

// average = lerp(average, p, weight), in two forms, as torch.lerp: exact at both ends of the weight.
__device__ __forceinline__ void lerp8(float (&average)[kVector], const float (&p)[kVector], float weight) {
  PGOLF_UNROLL
  for (int i = 0; i < kVector; ++i) {
    const float gap = p[i] - average[i];
    average[i] = weight < 0.5f ? fmaf(weight, gap, average[i]) : fmaf(weight - 1.0f, gap, p[i]);
  }
}

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Tensors of one launch; consecutive blocks share a tensor.
template <typename Target, int Max>
struct Runs {
  Target targets[Max];
  unsigned int first[Max];  // block of the launch at which the tensor starts
  bool aligned[Max];
  int count;

  __device__ __forceinline__ int of_block(unsigned int block) const {
    int which = count - 1;
    while (first[which] > block) --which;
    return which;
  }
};

// Calls launch(runs, blocks) for every Max of the tensors that have blocks.
template <int Max, typename Target, typename BlocksOf, typename Aligned, typename Launch>
void launch_runs(const Target* targets, int count, const char* op, const BlocksOf& blocks_of,
                 const Aligned& aligned, const Launch& launch) {
  for (int begin = 0; begin < count; begin += Max) {
    Runs<Target, Max> runs{};
    int64_t blocks = 0;
    for (int i = begin; i < std::min(begin + Max, count); ++i) {
      const int64_t mine = blocks_of(targets[i]);
      if (mine == 0) continue;
      runs.targets[runs.count] = targets[i];
      runs.first[runs.count] = static_cast<unsigned int>(blocks);
      runs.aligned[runs.count++] = aligned(targets[i]);
      blocks += mine;
      grid_blocks(blocks, 1, op);
    }
    if (runs.count > 0) launch(runs, static_cast<unsigned int>(blocks));
  }
}

}  // namespace pgolf
