// The Python module `pgolf._C`: what was built, and the host codec. Loading it registers the operators of the
// other files here with torch. In Python's limited API, so that one binary serves every Python from 3.10 on;
// pybind11 has no limited API.
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

namespace pgolf {
PyObject* encode_codes(PyObject*, PyObject* arguments);  // range_coder.cpp
PyObject* decode_codes(PyObject*, PyObject* arguments);
}  // namespace pgolf

namespace {

PyObject* build_info(PyObject*, PyObject*) {
#ifdef PGOLF_WITH_CUDA
  const char* cuda_compiler = PGOLF_CUDA_COMPILER;
  const char* cuda_archs = PGOLF_CUDA_ARCHS;
#else
  const char *cuda_compiler = "", *cuda_archs = "";
#endif
  return Py_BuildValue("{s:s,s:s,s:s,s:s,s:s}", "torch_headers", PGOLF_TORCH_VERSION, "cxx_compiler",
                       PGOLF_CXX_COMPILER, "cuda_compiler", cuda_compiler, "cuda_archs", cuda_archs,
                       "cuda_reason", PGOLF_CUDA_REASON);
}

PyMethodDef kMethods[] = {
    {"build_info", build_info, METH_NOARGS,
     "What was built: torch_headers (version), cxx_compiler, cuda_compiler, cuda_archs (separated by "
     "commas), "
     "cuda_reason (why CUDA kernels are missing, or empty)."},
    {"encode_codes", pgolf::encode_codes, METH_VARARGS,
     "encode_codes(codes, rows, cols, pool, fast): the entropy-coded stream of (rows, cols) int8 codes, "
     "row-major."},
    {"decode_codes", pgolf::decode_codes, METH_VARARGS,
     "decode_codes(data, rows, cols, pool): the (rows, cols) int8 codes of a stream, row-major."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef kModule = {
    PyModuleDef_HEAD_INIT,
    "_C",
    "Compiled half of pgolf: build information, the host codec, and the operators of torch.ops.pgolf.",
    -1,
    kMethods,
    nullptr,
    nullptr,
    nullptr,
    nullptr,
};

}  // namespace

PyMODINIT_FUNC PyInit__C() { return PyModule_Create(&kModule); }
