// Splits a range over threads. Threads are started per call: about 20 us each, so `grain` keeps small work
// serial.
#pragma once

#include <algorithm>
#include <cstdint>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace pgolf {

// Calls body(begin, end) on disjoint chunks that cover [0, count), on at most `threads` threads and with at
// least `grain` items per chunk. The caller's thread takes the first chunk, and those for which no thread can
// be started. The first exception of a chunk is rethrown.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int threads, const Body& body) {
  if (count <= 0) return;
  const int64_t most = (count + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t chunks = std::clamp<int64_t>(threads, 1, most);
  if (chunks == 1) {
    body(int64_t{0}, count);
    return;
  }
  std::vector<std::exception_ptr> errors(static_cast<size_t>(chunks));
  auto guarded = [&](int64_t chunk) {
    try {
      body(count * chunk / chunks, count * (chunk + 1) / chunks);
    } catch (...) {
      errors[static_cast<size_t>(chunk)] = std::current_exception();
    }
  };
  std::vector<std::thread> workers;
  workers.reserve(static_cast<size_t>(chunks - 1));
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    try {
      workers.emplace_back(guarded, chunk);
    } catch (const std::system_error&) {  // no thread is left, as in small containers
      guarded(chunk);
    }
  }
  guarded(0);
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace pgolf
