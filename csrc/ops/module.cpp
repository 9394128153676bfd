// The Python module `pgolf._C`: what was built, and the host codec. Loading it registers the operators of the
// other files here.
#include <pybind11/pybind11.h>

#include <sstream>
#include <string>

namespace pgolf {
void bind_range_coder(pybind11::module_& m);  // range_coder.cpp
}

namespace {

pybind11::list split(const std::string& text) {
  pybind11::list parts;
  std::istringstream stream(text);
  for (std::string part; std::getline(stream, part, ',');) parts.append(part);
  return parts;
}

pybind11::dict build_info() {
#ifdef PGOLF_WITH_CUDA
  const bool linked = true;
#else
  const bool linked = false;
#endif
  pybind11::dict info;
  info["torch_version"] = PGOLF_TORCH_VERSION;
  info["torch_cuda"] = PGOLF_TORCH_CUDA;
  info["cuda_compiled"] = static_cast<bool>(PGOLF_CUDA_COMPILED);
  info["cuda_linked"] = linked;
  info["cuda_archs"] = split(PGOLF_CUDA_ARCHS);
  info["cxx_compiler"] = PGOLF_CXX_COMPILER;
  info["cuda_compiler"] = PGOLF_CUDA_COMPILER;
  info["cuda_reason"] = PGOLF_CUDA_REASON;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of pgolf: build information, the host codec, and the operators of torch.ops.pgolf";
  m.def("build_info", &build_info,
        "What was built: torch_version, torch_cuda, cuda_compiled, cuda_linked, cuda_archs, cxx_compiler, "
        "cuda_compiler, cuda_reason (why CUDA kernels are missing, or empty).");
  pgolf::bind_range_coder(m);
}
