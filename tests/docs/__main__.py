"""Count the pages' code blocks: ``python -m tests.docs``."""

from __future__ import annotations

from collections import Counter

from tests.docs.blocks import PAGES, blocks


def main() -> None:
    """Print a line a page, the sums, and what is opted out with its reason."""
    total: Counter[str] = Counter()
    for page in PAGES:
        found = Counter(block.how for block in blocks(page))
        total += found
        if found:
            print(f"{page}: {', '.join(f'{count} {how}' for how, count in sorted(found.items()))}")
    run = total["python"] + total["commands"] + total["file"]
    print(f"\n{run} executed, {total['opted out']} opted out, {total['output']} show output\n")
    for page in PAGES:
        for block in blocks(page):
            if block.opted_out:
                print(f"{page}:{block.line} {block.opted_out[0]}: {block.opted_out[1]}")


if __name__ == "__main__":
    main()
