// Binding of range_coder: bytes in, bytes out, without the interpreter's lock. Format: kernels/range_coder.h.
// In Python's limited API: see module.cpp.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include "kernels/range_coder.h"

#include <Python.h>

#include <new>
#include <string>
#include <vector>

namespace pgolf {
namespace {

// A reference that is given up at the end of the scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {}
  ~Owned() { Py_XDECREF(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  PyObject* get() const { return object_; }
  PyObject* release() {
    PyObject* object = object_;
    object_ = nullptr;
    return object;
  }

 private:
  PyObject* object_;
};

// Lets other Python threads run while it lives.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// The bytes of an object with a buffer: a copy, unless it is a `bytes`. Null where it has none.
struct Bytes {
  explicit Bytes(PyObject* object) : owner(PyBytes_FromObject(object)) {
    if (owner.get() != nullptr && PyBytes_AsStringAndSize(owner.get(), &data, &size) != 0) data = nullptr;
  }
  Owned owner;
  char* data = nullptr;
  Py_ssize_t size = 0;
};

PyObject* value_error(const std::string& message) {
  PyErr_SetString(PyExc_ValueError, message.c_str());
  return nullptr;
}

bool check_shape(const char* op, long long rows, long long cols) {
  constexpr long long kMost = 1LL << 31;
  if (rows >= 0 && cols >= 0 && rows <= kMost && cols <= kMost && rows * cols <= kMost) return true;
  value_error(std::string(op) + ": shape must be (rows, cols) of at most 2^31 codes, got (" +
              std::to_string(rows) + ", " + std::to_string(cols) + ")");
  return false;
}

// Fills in the matrix's shape with its pool's, which must be whole rows.
bool shape_of(const char* op, long long rows, long long cols, const Bytes& pool, Shape* shape) {
  if (!check_shape(op, rows, cols)) return false;
  const long long pool_rows = cols > 0 ? pool.size / cols : 0;
  if (pool_rows * cols != pool.size) {
    value_error(std::string(op) + ": the pool's " + std::to_string(pool.size) +
                " codes are no whole rows of " + std::to_string(cols) + " columns");
    return false;
  }
  if (!check_shape(op, rows + pool_rows, cols)) return false;
  *shape = {rows, cols, pool_rows};
  return true;
}

PyObject* encode(PyObject*, PyObject* arguments) {
  PyObject *codes = nullptr, *earlier = nullptr;
  long long rows = 0, cols = 0;
  int fast = 0;
  if (PyArg_ParseTuple(arguments, "OLLOp:encode_codes", &codes, &rows, &cols, &earlier, &fast) == 0) {
    return nullptr;
  }
  const Bytes view(codes), pool(earlier);
  Shape shape{};
  if (view.data == nullptr || pool.data == nullptr) return nullptr;
  if (!shape_of("encode_codes", rows, cols, pool, &shape)) return nullptr;
  if (view.size != rows * cols) {
    return value_error("encode_codes: expected " + std::to_string(rows * cols) + " codes, got " +
                       std::to_string(view.size));
  }
  std::vector<uint8_t> stream;
  {
    const Unlocked unlocked;
    stream = encode_codes_cpu(reinterpret_cast<const int8_t*>(view.data),
                              reinterpret_cast<const int8_t*>(pool.data), shape, fast != 0);
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(stream.data()),
                                   static_cast<Py_ssize_t>(stream.size()));
}

PyObject* decode(PyObject*, PyObject* arguments) {
  PyObject *data = nullptr, *earlier = nullptr;
  long long rows = 0, cols = 0;
  if (PyArg_ParseTuple(arguments, "OLLO:decode_codes", &data, &rows, &cols, &earlier) == 0) return nullptr;
  const Bytes view(data), pool(earlier);
  Shape shape{};
  if (view.data == nullptr || pool.data == nullptr) return nullptr;
  if (!shape_of("decode_codes", rows, cols, pool, &shape)) return nullptr;
  Owned codes(PyByteArray_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(rows * cols)));
  if (codes.get() == nullptr) return nullptr;
  auto* out = reinterpret_cast<int8_t*>(PyByteArray_AsString(codes.get()));
  const char* error = nullptr;
  {
    const Unlocked unlocked;
    error = decode_codes_cpu(reinterpret_cast<const uint8_t*>(view.data), view.size,
                             reinterpret_cast<const int8_t*>(pool.data), out, shape);
  }
  if (error != nullptr) {
    return value_error("decode_codes: expected the codes of a " + std::to_string(rows) + " x " +
                       std::to_string(cols) + " matrix, but in " + std::to_string(view.size) + " bytes " +
                       error);
  }
  return codes.release();
}

// Calls a function of Python; what C++ throws in it becomes a Python exception.
template <PyObject* (*function)(PyObject*, PyObject*)>
PyObject* guarded(PyObject* self, PyObject* arguments) {
  try {
    return function(self, arguments);
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& e) {
    PyErr_SetString(PyExc_RuntimeError, e.what());
    return nullptr;
  }
}

}  // namespace

PyObject* encode_codes(PyObject* self, PyObject* arguments) { return guarded<encode>(self, arguments); }
PyObject* decode_codes(PyObject* self, PyObject* arguments) { return guarded<decode>(self, arguments); }

}  // namespace pgolf
