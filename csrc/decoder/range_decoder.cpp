// The decoder of kernels/range_coder.h on its own, behind a C interface: for programs that have no compiled
// pgolf and compile it themselves. csrc/decoder/make.py writes it, with what it includes, as one small file.
#define PGOLF_DECODER_ONLY
#include "kernels/range_coder_cpu.cpp"

// Returns nullptr, or what is wrong with the stream. Arguments as of decode_codes_cpu.
extern "C" const char* decode(const uint8_t* data, int64_t size, const int8_t* pool, int8_t* codes,
                              int64_t rows, int64_t cols, int64_t pool_rows) {
  try {
    return pgolf::decode_codes_cpu(data, size, pool, codes, {rows, cols, pool_rows});
  } catch (...) {  // a C interface throws nothing; only memory can run out
    return "there is not enough memory";
  }
}
