// Types shared by every kernel, host and device side. Standard headers only.
#pragma once

#include <cstdint>
#include <cstring>

// `#pragma unroll` in the form that clang-format leaves in its place. Device code only.
#define PGOLF_UNROLL _Pragma("unroll")

// Marks functions that host and device code share; nothing where CUDA is not compiled.
#ifdef __CUDACC__
#define PGOLF_HOST_DEVICE __host__ __device__
#else
#define PGOLF_HOST_DEVICE
#endif

// The bridge headers name CUDA streams without including CUDA.
struct CUstream_st;

namespace pgolf {

// bfloat16 as it crosses the bridge: the upper half of a float32.
struct bf16 {
  uint16_t bits;
};

// IEEE binary16 as it crosses the bridge.
struct f16 {
  uint16_t bits;
};

static_assert(sizeof(bf16) == 2 && sizeof(f16) == 2, "two-byte storage types");

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

// Without branches, so that loops over it vectorise: the multiplication rescales both normals and denormals.
inline float to_float(f16 value) {
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const float scaled = bits_to_float(magnitude) * bits_to_float(0x77800000u);  // 2^112
  // Exponent 31 (infinity, NaN) must become exponent 255.
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bits_to_float(sign | float_to_bits(scaled) | special);
}

template <typename T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

// Round to nearest even; NaN stays NaN.
template <>
inline bf16 from_float<bf16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>(value != value ? quiet : rounded)};
}

// Round to nearest even, overflow to infinity; NaN stays NaN.
template <>
inline f16 from_float<f16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias the exponent by -112 and round the 13 dropped bits.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Denormal halves: adding 0.5 moves the value's half-precision bits to the bottom of the mantissa.
  const uint32_t denormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x47800000u ? 0x7c00u : half;  // 65536 and above
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return f16{static_cast<uint16_t>(sign | half)};
}

}  // namespace pgolf
