from typing_extensions import Buffer

LEVEL: int

def resize(
    source: Buffer,
    target: Buffer,
    height: int,
    width: int,
    top: int,
    left: int,
    bicubic: bool,
    level: int,
    /,
) -> None: ...
