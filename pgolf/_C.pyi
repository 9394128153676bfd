from typing import TypedDict

class BuildInfo(TypedDict):
    torch_headers: str
    cxx_compiler: str
    cuda_compiler: str
    cuda_archs: str
    cuda_reason: str

def build_info() -> BuildInfo: ...
def encode_codes(
    codes: bytes | memoryview, rows: int, cols: int, pool: bytes | memoryview, fast: bool, /
) -> bytes: ...
def decode_codes(
    data: bytes | memoryview, rows: int, cols: int, pool: bytes | memoryview, /
) -> bytearray: ...
