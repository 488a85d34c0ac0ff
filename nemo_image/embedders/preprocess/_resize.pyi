from typing_extensions import Buffer

LEVEL: int

def axis(length: int, resized: int, start: int, count: int, bicubic: bool, aligned: bool, /) -> object: ...
def resize(
    source: Buffer,
    target: Buffer,
    across: object,
    down: object,
    level: int,
    /,
) -> None: ...
