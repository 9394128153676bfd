// Binding of range_coder: bytes in, bytes out, without the interpreter's lock. Format: kernels/range_coder.h.
#include "kernels/range_coder.h"

#include <pybind11/pybind11.h>

#include <string>

namespace pgolf {
namespace {

namespace py = pybind11;

// A contiguous buffer of one-byte items, held for as long as this lives.
class View {
 public:
  explicit View(const py::buffer& buffer) {
    if (PyObject_GetBuffer(buffer.ptr(), &view_, PyBUF_SIMPLE) != 0) throw py::error_already_set();
  }
  ~View() { PyBuffer_Release(&view_); }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  template <typename T>
  const T* data() const {
    static_assert(sizeof(T) == 1);
    return static_cast<const T*>(view_.buf);
  }
  int64_t size() const { return view_.len; }

 private:
  Py_buffer view_{};
};

void check_shape(const char* op, int64_t rows, int64_t cols) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (rows < 0 || cols < 0 || rows > kMost || cols > kMost || rows * cols > kMost) {
    throw py::value_error(std::string(op) + ": shape must be (rows, cols) of at most 2^31 codes, got (" +
                          std::to_string(rows) + ", " + std::to_string(cols) + ")");
  }
}

// The matrix's shape with its pool's; the pool is a buffer of whole rows.
Shape shape_of(const char* op, int64_t rows, int64_t cols, const View& pool) {
  check_shape(op, rows, cols);
  const int64_t pool_rows = cols > 0 ? pool.size() / cols : 0;
  if (pool_rows * cols != pool.size()) {
    throw py::value_error(std::string(op) + ": the pool's " + std::to_string(pool.size()) +
                          " codes are no whole rows of " + std::to_string(cols) + " columns");
  }
  check_shape(op, rows + pool_rows, cols);
  return {rows, cols, pool_rows};
}

py::bytes encode(const py::buffer& codes, int64_t rows, int64_t cols, const py::buffer& pool, bool fast) {
  const View view(codes), earlier(pool);
  const Shape shape = shape_of("encode_codes", rows, cols, earlier);
  if (view.size() != rows * cols) {
    throw py::value_error("encode_codes: expected " + std::to_string(rows * cols) + " codes, got " +
                          std::to_string(view.size()));
  }
  std::vector<uint8_t> stream;
  {
    const py::gil_scoped_release unlocked;
    stream = encode_codes_cpu(view.data<int8_t>(), earlier.data<int8_t>(), shape, fast);
  }
  return {reinterpret_cast<const char*>(stream.data()), stream.size()};
}

py::bytearray decode(const py::buffer& data, int64_t rows, int64_t cols, const py::buffer& pool) {
  const View view(data), earlier(pool);
  const Shape shape = shape_of("decode_codes", rows, cols, earlier);
  const auto count = static_cast<Py_ssize_t>(rows * cols);
  auto codes = py::reinterpret_steal<py::bytearray>(PyByteArray_FromStringAndSize(nullptr, count));
  if (!codes) throw py::error_already_set();
  auto* out = reinterpret_cast<int8_t*>(PyByteArray_AS_STRING(codes.ptr()));
  const char* error = nullptr;
  {
    const py::gil_scoped_release unlocked;
    error = decode_codes_cpu(view.data<uint8_t>(), view.size(), earlier.data<int8_t>(), out, shape);
  }
  if (error != nullptr) {
    throw py::value_error("decode_codes: expected the codes of a " + std::to_string(rows) + " x " +
                          std::to_string(cols) + " matrix, but in " + std::to_string(view.size()) +
                          " bytes " + error);
  }
  return codes;
}

}  // namespace

void bind_range_coder(py::module_& m) {
  m.def("encode_codes", &encode, py::arg("codes"), py::arg("rows"), py::arg("cols"), py::arg("pool"),
        py::arg("fast"), "The entropy-coded stream of (rows, cols) int8 codes, row-major.");
  m.def("decode_codes", &decode, py::arg("data"), py::arg("rows"), py::arg("cols"), py::arg("pool"),
        "The (rows, cols) int8 codes of a stream, row-major.");
}

}  // namespace pgolf
