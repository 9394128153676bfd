// parallel_for: every item once, the first exception, and what happens where no thread can be started.
#include <pthread.h>

#include "kernels/parallel.h"
#include "tests/check.h"

namespace pgolf::test {
namespace {

void test_every_item_once(int64_t count, int64_t grain, int threads) {
  std::vector<int> seen(static_cast<size_t>(count));
  parallel_for(count, grain, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
  });
  check(seen == std::vector<int>(seen.size(), 1), std::to_string(count) + " items, each once");
}

void test_exception_is_rethrown() {
  bool caught = false;
  try {
    parallel_for(6, 1, 3, [](int64_t begin, int64_t) {
      if (begin > 0) throw std::runtime_error("chunk");
    });
  } catch (const std::runtime_error& error) {
    caught = error.what() == std::string("chunk");
  }
  check(caught, "a chunk's exception reaches the caller");
}

// Stacks larger than the address space.
void test_without_threads() {
  pthread_attr_t usual, huge;
  check(pthread_getattr_default_np(&usual) == 0 && pthread_getattr_default_np(&huge) == 0, "attributes");
  check(pthread_attr_setstacksize(&huge, size_t{1} << 50) == 0, "stack size");
  check(pthread_setattr_default_np(&huge) == 0, "new default");
  test_every_item_once(1000, 1, 8);
  test_exception_is_rethrown();
  check(pthread_setattr_default_np(&usual) == 0, "old default");
}

}  // namespace
}  // namespace pgolf::test

int main() {
  return pgolf::test::run([] {
    using namespace pgolf::test;
    for (int threads : {1, 2, 8}) {
      for (int64_t count : {0, 1, 2, 7, 1000}) test_every_item_once(count, 1, threads);
    }
    test_every_item_once(100, 64, 8);
    test_exception_is_rethrown();
    test_without_threads();
  });
}
