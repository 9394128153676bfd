// Which vector instructions this CPU has. A kernel's body is a forced-inline template over its vector width;
// one wrapper per instruction set carries the target attribute, and the dispatcher picks with best_isa().
#pragma once

#if defined(__x86_64__)
#define PGOLF_TARGET(isa) __attribute__((target(isa)))
#else
#define PGOLF_TARGET(isa)
#endif

namespace pgolf {

enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("fma")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

}  // namespace pgolf
