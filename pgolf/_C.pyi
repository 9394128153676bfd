from typing import TypedDict

class BuildInfo(TypedDict):
    torch_version: str
    torch_cuda: str
    cuda_compiled: bool
    cuda_linked: bool
    cuda_archs: list[str]
    cxx_compiler: str
    cuda_compiler: str
    cuda_reason: str

def build_info() -> BuildInfo: ...
