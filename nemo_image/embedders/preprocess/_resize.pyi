from typing_extensions import Buffer

AVX2: int

def resize(
    source: Buffer,
    target: Buffer,
    height: int,
    width: int,
    top: int,
    left: int,
    bicubic: bool,
    vectorized: bool,
    /,
) -> None: ...
