// The test harness: a failed check prints what it saw and ends the program with status 1, so ctest needs no
// framework.
#pragma once

#include <cmath>
#include <cstdint>
#include <iostream>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/common.h"

namespace pgolf::test {

inline void check(bool ok, const std::string& what,
                  std::source_location at = std::source_location::current()) {
  if (ok) return;
  throw std::runtime_error(std::string(at.file_name()) + ":" + std::to_string(at.line()) + ": " + what);
}

inline void check_close(double got, double want, double relative, double absolute, const std::string& what,
                        std::source_location at = std::source_location::current()) {
  const bool same = got == want || std::fabs(got - want) <= absolute + relative * std::fabs(want);
  check(same, what + ": got " + std::to_string(got) + ", want " + std::to_string(want), at);
}

// Standard normal values, the same on every run.
inline std::vector<float> normal_values(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

// Runs the test program; returns main's status.
template <typename Body>
int run(const Body& body) {
  try {
    body();
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 1;
  }
  return 0;
}

}  // namespace pgolf::test
