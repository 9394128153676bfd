// The threads of a cluster of blocks as fibers on one thread of the system. A seed decides which fiber runs
// next and when what runs asynchronously takes effect, so every seed is another interleaving, and a run can
// be repeated. A fiber gives way where it waits, and at random where it touches what others see.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned int x = 1, y = 1, z = 1;
};

namespace pgolf::test {

struct Block;

// What a fiber waits for, for the message of a deadlock.
struct Wait {
  const char* what = "";
  uint32_t where = 0, detail = 0;
};

struct Context {
  ucontext_t context;
  void* fake_stack = nullptr;  // AddressSanitizer's
  const void* stack = nullptr;
  size_t stack_bytes = 0;
};

struct Fiber : Context {
  Block* block = nullptr;
  dim3 thread;
  uint32_t priority = 0;
  bool finished = false;
  Wait wait;
  std::shared_ptr<void> copies, hopper;  // of kernels/ptx.cuh and kernels/ptx_sm90.cuh
  std::function<void()> at_exit;
};

class Stacks {
 public:
  static constexpr size_t kBytes = size_t{256} << 10, kGuard = 4096;

  unsigned char* take(size_t number) {
    while (stacks_.size() <= number) {
      void* const memory =
          mmap(nullptr, kBytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stack of a fiber");
      mprotect(memory, kGuard, PROT_NONE);
      stacks_.push_back(static_cast<unsigned char*>(memory) + kGuard);
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(stacks_[number], kBytes);  // a launch that failed leaves frames behind
#endif
    return stacks_[number];
  }

 private:
  std::vector<unsigned char*> stacks_;
};

class Scheduler {
 public:
  // How fibers are chosen: each at the same odds, the one that became ready last, or by a priority of its
  // warp.
  enum class Choice { kUniform, kNewest, kPriority };

  Scheduler(uint32_t seed, std::function<void()> body, void (*enter)(Fiber&),
            std::string (*name)(const Fiber&))
      : random_(seed * 0x9e3779b97f4a7c15ull + 0x1234567ull),
        body_(std::move(body)),
        enter_(enter),
        name_(name) {
    constexpr uint32_t kEagerness[] = {0, 1, 16, 128};  // of 256
    choice_ = static_cast<Choice>(seed % 3);
    eagerness_ = kEagerness[seed / 3 % 4];
    for (int i = 0; i < 4; ++i) random();
  }

  Fiber& current() { return *current_; }

  uint32_t random() {  // xorshift64*
    random_ ^= random_ >> 12, random_ ^= random_ << 25, random_ ^= random_ >> 27;
    return static_cast<uint32_t>((random_ * 0x2545f4914f6cdd1dull) >> 32);
  }
  uint32_t random(size_t limit) { return static_cast<uint32_t>(random() % limit); }

  void add(Block* block, dim3 thread, uint32_t priority) {
    static Stacks stacks;
    fibers_.push_back(std::make_unique<Fiber>());
    Fiber& fiber = *fibers_.back();
    fiber.block = block, fiber.thread = thread, fiber.priority = priority;
    fiber.stack = stacks.take(fibers_.size() - 1), fiber.stack_bytes = Stacks::kBytes;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = const_cast<void*>(fiber.stack);
    fiber.context.uc_stack.ss_size = fiber.stack_bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Scheduler::start, 0);
    // AddressSanitizer would mark all of the stack as valid at every switch.
    fiber.context.uc_stack.ss_size = 0;
    ready_.push_back(&fiber);
  }

  // Runs all fibers to their end, then everything that is still to take effect.
  void run() {
    active = this;
    leave(main_);
    while (error_ == nullptr && !pending_.empty()) step();
    // After an error every fiber that has not ended unwinds its stack.
    for (size_t i = 0; error_ != nullptr && i < fibers_.size(); ++i) {
      if (!fibers_[i]->finished) change(main_, *fibers_[i]);
    }
    pending_.clear();
    active = nullptr;
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

  // Puts the running fiber to sleep until wake(list); the caller checks its condition anew.
  void sleep(std::vector<Fiber*>& list, const Wait& why) {
    current_->wait = why;
    list.push_back(current_);
    leave(*current_);
  }
  void wake(std::vector<Fiber*>& list) {
    ready_.insert(ready_.end(), list.begin(), list.end());
    list.clear();
  }

  void give_way() {
    uniform_ = true;  // else a fiber that polls could be chosen for ever
    ready_.push_back(current_);
    leave(*current_);
  }
  void perhaps_give_way() {
    if (!pending_.empty() && random() % 256 < eagerness_) step();
    if (random() % 16 == 0) give_way();
  }

  // Something that takes effect at a random moment from now on.
  void later(std::function<void()> effect) { pending_.push_back(std::move(effect)); }

  static inline Scheduler* active = nullptr;

 private:
  struct Abandoned {};  // thrown in fibers after an error elsewhere

  static void start() {
    Scheduler& self = *active;
    self.arrived(nullptr);
    Fiber& mine = *self.current_;
    try {
      if (self.error_ == nullptr) self.body_();
      if (self.error_ == nullptr && mine.at_exit) mine.at_exit();
    } catch (...) {
      if (self.error_ == nullptr) self.error_ = std::current_exception();
    }
    mine.finished = true;
    ++self.finished_;
    try {
      if (self.error_ == nullptr) self.enter_(mine);
    } catch (...) {
      if (self.error_ == nullptr) self.error_ = std::current_exception();
    }
    self.leave(mine);
  }

  void step() {
    const uint32_t which = random(pending_.size());
    const std::function<void()> effect = std::move(pending_[which]);
    pending_[which] = std::move(pending_.back());
    pending_.pop_back();
    try {
      effect();
    } catch (...) {
      if (error_ == nullptr) error_ = std::current_exception();
    }
  }

  Context& next() {
    for (;;) {
      if (error_ != nullptr || finished_ == fibers_.size()) return main_;
      if (!pending_.empty() && (ready_.empty() || random() % 256 < eagerness_)) {
        step();
        continue;
      }
      if (ready_.empty()) {
        error_ = std::make_exception_ptr(std::runtime_error(deadlock()));
        return main_;
      }
      size_t which = random(ready_.size());
      if (!uniform_ && choice_ == Choice::kNewest && random() % 8 != 0) which = ready_.size() - 1;
      if (!uniform_ && choice_ == Choice::kPriority) {
        for (int i = 0; i < 3; ++i) {
          const size_t other = random(ready_.size());
          if (ready_[other]->priority > ready_[which]->priority) which = other;
        }
      }
      uniform_ = false;
      Fiber* const fiber = ready_[which];
      ready_[which] = ready_.back();
      ready_.pop_back();
      return *fiber;
    }
  }

  void leave(Context& mine) {
    Context& to = next();
    if (&to != &mine) change(mine, to);
    if (error_ != nullptr && &mine != &main_ && !static_cast<Fiber&>(mine).finished) throw Abandoned{};
  }

  void change(Context& mine, Context& to) {
    previous_ = &mine;
    current_ = &to == &main_ ? nullptr : static_cast<Fiber*>(&to);
    if (current_ != nullptr) enter_(*current_);
#ifdef __SANITIZE_ADDRESS__
    const bool dies = &mine != &main_ && static_cast<Fiber&>(mine).finished;
    __sanitizer_start_switch_fiber(dies ? nullptr : &mine.fake_stack, to.stack, to.stack_bytes);
#endif
    swapcontext(&mine.context, &to.context);
    arrived(mine.fake_stack);
  }

  void arrived([[maybe_unused]] void* fake_stack) {
#ifdef __SANITIZE_ADDRESS__
    const void* stack = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(fake_stack, &stack, &bytes);
    if (previous_ == &main_) main_.stack = stack, main_.stack_bytes = bytes;
#endif
  }

  std::string deadlock() const {
    std::map<std::string, size_t> waits;
    for (const std::unique_ptr<Fiber>& fiber : fibers_) {
      if (!fiber->finished) ++waits[name_(*fiber)];
    }
    std::string message = "deadlock: no thread can go on";
    for (const auto& [name, count] : waits) message += "\n  " + std::to_string(count) + " threads of " + name;
    return message;
  }

  uint64_t random_;
  std::function<void()> body_;
  void (*enter_)(Fiber&);              // before a fiber runs, and when it has ended
  std::string (*name_)(const Fiber&);  // where a fiber is and what it waits for
  Choice choice_;
  uint32_t eagerness_;
  bool uniform_ = false;
  Context main_;
  Context* previous_ = nullptr;
  Fiber* current_ = nullptr;
  size_t finished_ = 0;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;
  std::vector<std::function<void()>> pending_;
  std::exception_ptr error_;
};

}  // namespace pgolf::test
