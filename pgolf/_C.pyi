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
def encode_codes(
    codes: bytes | memoryview, rows: int, cols: int, pool: bytes | memoryview, fast: bool
) -> bytes: ...
def decode_codes(data: bytes | memoryview, rows: int, cols: int, pool: bytes | memoryview) -> bytearray: ...
