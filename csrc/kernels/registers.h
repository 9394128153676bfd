// How many registers the threads of a block can have.
#pragma once

namespace pgolf {

// Whether a block of one warpgroup of producers and `consumers` others can lower the registers of a
// producer's thread to `lowered` and raise those of the others to `raised`: all come from what the block has
// at its launch. If not, setmaxnreg waits for ever, and the block with it.
constexpr bool registers_fit(int consumers, int raised, int lowered) {
  constexpr int kAll = 65536, kStep = 8;  // of a multiprocessor; what a thread has is a multiple
  const int warpgroups = consumers + 1, at_launch = kAll / (warpgroups * 128) / kStep * kStep;
  return consumers * raised + lowered <= warpgroups * at_launch;
}
static_assert(registers_fit(2, 240, 24) && !registers_fit(2, 240, 32) && registers_fit(3, 160, 32));

}  // namespace pgolf
